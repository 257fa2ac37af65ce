"""The lesson: its blocks are run, and what they print and draw is what the pages show, in both languages.

After a change, `python tests/test_lesson.py RUN` writes what the blocks print into both pages and draws the pictures;
RUN is a run of `python train.py frases`. The numbers in the prose are then to be read again: the tests name those that
no block of their section has. What the prose concludes from a trained run, a block prints as a claim,
which must be True.
"""

import contextlib
import dataclasses
import io
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import numpy as np
import pytest

import nanogpt_jax
from nanogpt_jax import api, config
from nanogpt_jax.data import frases, tokenizer
from nanogpt_jax.model import gpt2

LESSON = Path(nanogpt_jax.__file__).parent / "lesson"
ENGLISH, SPANISH = PAGES = [LESSON / "LESSON.md", LESSON / "LECCION.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)  # a program, and what it prints
TRAINED = 'nanogpt_jax.load("runs/frases")'  # from the block with this on, numbers are those of a trained run
PICTURES = {"by_hand.svg": False, "colour.svg": True}  # whether it is of a trained run
NUMBER = re.compile(r"(?<![\w.-])-?\d+(?:\.\d+)?")
CLAIM = re.compile(r"^(claim: .*: )(True|False)$", re.M)  # what a run has to have learned, whatever its digits
CLOSE = 0.2  # how far a run that another processor trained may be from the page; two compilers were up to 0.15 apart


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


EXACT = next(i for i, (code, _) in enumerate(blocks(ENGLISH)) if TRAINED in code)  # how many blocks need no run


def printed(code: str, names: dict) -> str:
    """What a block prints. `names`: what the blocks before it have left."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "a block of the lesson", "exec"), names)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def numbers(text: str) -> np.ndarray:
    return np.array(NUMBER.findall(text), float)


def same(found: str, page: str, within: float) -> bool:
    """The same words, and numbers that differ by at most `within`."""
    a, b = numbers(found), numbers(page)
    words = [NUMBER.sub("", text).split() for text in (found, page)]
    return words[0] == words[1] and len(a) == len(b) and bool((np.abs(a - b) <= within + 1e-9).all())


def claims(said: str) -> list[bool]:
    return [verdict == "True" for _, verdict in CLAIM.findall(said)]


def told(picture: Path) -> str:
    """What a picture tells those who cannot see it: each row's weights. It parses, and shows the same words."""
    root = ET.parse(picture).getroot()
    shown = {text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")}
    label = root.attrib["aria-label"]
    for row in label.split("; "):
        assert row.rpartition(": ")[0] in shown, row
    return label


def sections(page: Path) -> list[tuple[str, str]]:
    """(what the blocks of a section say, its prose), from heading to heading."""
    fence = re.compile(r"^```.*?^```\n", re.M | re.S)
    # headings begin a section, but comments in a block do not: blocks hold none that begin a line
    parts = re.split(r"^#+ .*\n", page.read_text(encoding="utf-8"), flags=re.M)
    return [("".join(fence.findall(part)), fence.sub("", part)) for part in parts]


def quoted(prose: str) -> list[float]:
    """The numbers of a prose, without signs: no years, no places of a list, not 0 and 1, not what links lead to."""
    prose = re.sub(r"\]\([^)]+\)|\b(19|20)\d\d\b|^\d\. ", " ", prose, flags=re.M)
    return sorted(n for n in np.abs(numbers(prose)).tolist() if n not in (0, 1))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_number_of_the_prose_is_printed_or_typed_by_a_block_of_its_section(page):
    """A section without blocks may quote those of the whole page."""
    parts = sections(page)
    everything = "".join(said for said, _ in parts)
    for said, prose in parts:
        known = {*np.abs(numbers(said or everything)).tolist(), CLOSE}
        assert [n for n in quoted(prose) if n not in known] == [], prose


def test_both_languages_have_the_same_blocks_and_the_same_numbers():
    assert blocks(ENGLISH) == blocks(SPANISH)
    english, spanish = (map(quoted, (prose for _, prose in sections(page))) for page in PAGES)
    for one, other in zip(english, spanish, strict=True):
        assert one == other


def test_what_the_prose_concludes_from_a_trained_run_is_claimed_and_true():
    """Each claim is a line that a new run must print word for word, though its numbers may differ by CLOSE."""
    for number, (code, said) in enumerate(blocks(ENGLISH)):
        assert len(claims(said)) == said.count("claim") == code.count('print("claim')
        assert all(claims(said)), said
        assert number >= EXACT or not claims(said)
    assert sum(len(claims(said)) for _, said in blocks(ENGLISH)) == 12


def test_three_seeds_are_those_of_the_recipe():
    """What the page says of other seeds was measured once; the recipe's story has all digits."""
    story = (LESSON.parents[1] / "configs" / "frases.toml").read_text(encoding="utf-8")
    losses, seeds, best = re.search(
        r"loss ([\d., ]+) nats a word \(seeds ([\d, ]+)\), the best possible ([\d.]+): ", story
    ).groups()
    least = re.search(r"Of the 200 items in each group at least (\d+) are right", story)[1]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for seed, loss in zip(seeds.split(", "), losses.split(", "), strict=True):
            row = rf"^ *{seed} +{float(loss):.2f} +{float(best):.2f}  at least {least}$"
            assert re.search(row, text, re.M), row
        assert f"validation loss {losses.split(', ')[0]}, the best possible {best}, at the last step" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_it_is_half_an_hour_and_shows_its_pictures(page):
    text = page.read_text(encoding="utf-8")
    assert sum(len(prose.split()) for _, prose in sections(page)) <= 3200  # at 150 a minute, 21 minutes and the blocks
    assert re.findall("^(python .*)$", text, re.M)[0] == "python train.py frases"  # first of all
    assert sorted(re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)) == sorted(PICTURES)
    for name in PICTURES:
        assert (LESSON / name).stat().st_size < 60_000
        assert told(LESSON / name)


def test_what_needs_no_training_is_exact(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, said in blocks(ENGLISH)[:EXACT]:
        assert printed(code, names) == said, code
    assert Path("by_hand.svg").read_text(encoding="utf-8") == (LESSON / "by_hand.svg").read_text(encoding="utf-8")


def check_trained(names: dict, within: float, learned: bool = True) -> None:
    for number, (code, said) in enumerate(blocks(ENGLISH)):
        found = printed(code, names)
        if not learned:
            found, said = (CLAIM.sub(r"\1", text) for text in (found, said))
        if number >= EXACT:
            assert same(found, said, within), found


@pytest.mark.long
def test_what_holds_for_any_model_holds_for_an_untrained_one(tmp_path, monkeypatch):
    """The blocks of part two, word for word; their numbers are the next test's."""
    cfg, words = config.load(["frases"]).cfg, tokenizer.make("word", frases.text())
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=words.n_vocab))
    run = api.Run(cfg, gpt2.init_params(cfg.model, jax.random.key(0)), words)
    monkeypatch.setattr(api, "load", lambda path: run)
    monkeypatch.chdir(tmp_path)
    check_trained({}, np.inf, learned=False)


@pytest.mark.slow  # trains a minute or two
def test_a_new_run_gives_the_numbers_of_the_page(tmp_path, monkeypatch, users_env):
    train = [sys.executable, "-m", "nanogpt_jax", "train", "frases"]
    subprocess.run(train, cwd=tmp_path, env=users_env, capture_output=True, check=True)
    monkeypatch.chdir(tmp_path)
    check_trained({}, CLOSE)
    new, page = (told(folder / "colour.svg").split("; ") for folder in (tmp_path, LESSON))
    assert [row.partition(":")[0] for row in new] == [row.partition(":")[0] for row in page]
    assert same(new[-1], page[-1], CLOSE)


@pytest.mark.long
def test_the_notebook_runs_from_top_to_bottom(tmp_path, clean_env, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("XLA_FLAGS", clean_env["XLA_FLAGS"])  # one device
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(LESSON / "first_steps.ipynb", as_version=4)
    assert len(notebook.cells) == 10
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs/first_steps/checkpoints/150").is_dir()
    for cell in notebook.cells[1:]:
        said = "".join(out.get("text", "") for out in cell.outputs if out.get("name") == "stderr")
        assert "Error" not in said, said
        assert cell.outputs, cell.source


def renew(run: Path) -> None:
    """Writes into both pages what the blocks print with that run, and draws the pictures."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        shutil.copytree(run, "runs/frases")
        names, said = {}, {}
        for code, _ in blocks(ENGLISH):
            said[code] = printed(code, names)
        for name in PICTURES:
            shutil.copy(name, LESSON)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(BLOCK.sub(lambda block: _with(block[1], said[block[1]]), text), encoding="utf-8")


def _with(code: str, said: str) -> str:
    return f"```python\n{code}```\n" + (f"\n```text\n{said}```\n" if said else "")


if __name__ == "__main__":
    renew(Path(sys.argv[1]).resolve())
