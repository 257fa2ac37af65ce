"""The pages: the front page is short, files exist as they say, and every command in them is valid."""

import dataclasses
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from test_architecture import PACKAGE, ROOT, was_removed

from nanogpt_jax import cli, config
from nanogpt_jax.inference import options


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A directory with the settings of the runs that configs and the pages' commands start from."""
    for name in ("gpt2", "default"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        model = config.load(["gpt2"]).cfg.model
        settings = config.Config(model=dataclasses.replace(model, vocab_size=50257))
        (tmp_path / "runs" / name / "config.json").write_text(config.to_json(settings))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
@pytest.mark.usefixtures("runs")
def test_every_config_loads_by_name_and_tells_its_story(path):
    command = config.load([path.stem])
    assert command.run_dir == Path("runs") / path.stem
    story = path.read_text(encoding="utf-8")
    assert story.startswith("# ")
    assert f"python train.py {path.stem}" in story
    if "setting for setting" not in story:  # else it lists only what differs from the default
        defaults = config.load([]).cfg
        for section, keys in tomllib.loads(story).items():
            same = [key for key, value in keys.items() if getattr(getattr(defaults, section), key) == value]
            assert not same, section


COMMAND = re.compile(r"^(?:.*&& )?((?:python |nanogpt-jax ).*)$")


PAGES = [
    ROOT / "README.md",
    *sorted(p for room in ("configs", "nanogpt_jax", "tests") for p in (ROOT / room).rglob("README.md")),
    *sorted((PACKAGE / "lesson").glob("LE*.md")),
]


def commands_of(pages: list[Path]) -> list[list[str]]:
    """Every command that these pages name, in a block or in backticks, without placeholders and grammar."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    lines = [re.sub(r"^(XLA_FLAGS=\S+ |next: |or train longer: )", "", line.strip()) for line in lines]
    found = [m[1] for line in lines if (m := COMMAND.match(line)) and not re.search(r"[\[…]|COMMAND|\| ", line)]
    values = {"S": "--data.source=text.txt", "FILE": "text.txt", "N": "2", "RUN": "runs/done", "TEXT": "x"}
    commands = [[values.get(w, w).replace("=FILE", "=text.txt") for w in shlex.split(line)] for line in found]
    return sorted(map(list, {tuple(command) for command in commands}))


def test_a_readers_way_to_the_step_is_as_short_as_the_page_says():
    page = (PACKAGE / "README.md").read_text(encoding="utf-8")
    way, total = page[: page.index(" lines to the whole step")].rsplit(": ", 1)
    whole = [(name, int(lines)) for name, lines in re.findall(r"`([a-z0-9_/.]+)` \((\d+)(?: lines)?\)", way)]
    parts = [int(lines) for lines in re.findall(r"first (\d+) of", " ".join(way.split()))]
    assert (len(whole), len(parts)) == (3, 2)
    for name, lines in whole:
        assert len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) == lines, name
    assert sum(lines for _, lines in whole) + sum(parts) == int(total) <= 450


def test_the_front_page_is_one_that_people_read():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    assert len(text.encode()) <= 10_000
    assert ["python", "train.py"] in commands_of([ROOT / "README.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_says_things_once_and_its_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    headings = re.findall("^## .*", text, re.M)
    assert len(headings) == len(set(headings))
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        place = page.parent / target
        assert target.startswith("https://") or place.exists() or was_removed(place), target
    for name in re.findall(r"^ *(\w+\.\w+)  +\S", text, re.M):  # a line of a map
        assert list(page.parent.rglob(name)) or was_removed(PACKAGE / "commands" / name), name


@pytest.mark.parametrize("room", sorted({path.parent for path in PACKAGE.glob("*/*.py")}), ids=lambda room: room.name)
def test_a_rooms_page_or_the_packages_names_each_of_its_files(room):
    page = room / "README.md" if (room / "README.md").exists() else PACKAGE / "README.md"
    text = page.read_text(encoding="utf-8")
    assert [path.name for path in room.glob("*.py") if path.name not in text] in ([], ["__init__.py"])


@pytest.mark.parametrize("words", commands_of(PAGES), ids=" ".join)
@pytest.mark.usefixtures("runs")
def test_every_command_of_every_page_is_understood(words, tmp_path, monkeypatch):
    """Read to the end by the parser that would run it: each flag is known, each value allowed, each config there."""
    name, *rest = words[1:] if words[0] == "python" else words
    if name == "nanogpt-jax":
        name, *rest = rest
    if "--help" in rest:
        assert cli.asks_for_help(rest)
    elif name.startswith("tests/"):
        assert (ROOT / name).is_file()
    elif name.removesuffix(".py") == "train":
        config.load(rest)
    elif name.removesuffix(".py") == "sample":
        options.read(rest)
    elif name not in cli.offered():
        assert was_removed(PACKAGE / f"{cli.COMMANDS[name][1].replace('.', '/')}.py")
    else:
        command = importlib.import_module(f"nanogpt_jax.{cli.COMMANDS[name][1]}")
        if name == "bench":
            monkeypatch.setattr(command, "find_spec", lambda name: name)  # as if torch was there
        if name == "classify":
            monkeypatch.chdir(tmp_path)
            (tmp_path / "runs/done").mkdir(parents=True)
            (tmp_path / "runs/done/config.json").write_text(config.to_json(config.Config()))
        command.read(*([name, rest] if name.endswith("-hf") else [rest]))
