"""Many runs beside each other: groups, what differs, curves, what is left out, and the page."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import filelock
import pytest
from helpers import looked_at, refused
from test_architecture import PACKAGE, ROOT

from nanogpt_jax import config
from nanogpt_jax.commands import compare as command
from nanogpt_jax.commands import evaluate
from nanogpt_jax.comparing import groups, runs, shown
from nanogpt_jax.comparing.runs import BITS, NATS
from nanogpt_jax.config import Config
from nanogpt_jax.run import opened

FIXTURE = Path(__file__).parent / "fixtures/run.tar.gz"
with_pages = pytest.mark.skipif(not (PACKAGE / "pages").exists(), reason="pages/ was removed")
STEPS, EVERY = 100, 20


def data_of(text: str = "a", tokenizer: str = "t", n_bytes: int = 500) -> dict[str, Any]:
    """A data.json: of a text with this hash, in tokens of this tokenizer."""
    return {
        "fingerprint": f"{text}/{tokenizer}",
        "source": {"name": "text", "path": "/somewhere/text.txt", "sha256": text},
        "val_fraction": 0.1,
        "tokenizer": {"kind": "char", "fingerprint": tokenizer},
        "val": {"tokens": 100, "bytes": n_bytes, "fingerprint": "x"},
    }


def lines(final: float, speed: float = 1000.0, until: int = STEPS, bits: float = 2.0) -> list[dict[str, Any]]:
    """What training logs: a falling loss, ten steps apart, and an evaluation each EVERY."""
    rows: list[dict[str, Any]] = []
    for step in range(10, until + 1, 10):
        loss = final + (STEPS - step) / 50
        rows.append({"step": step, "train/loss": loss, "grad_norm": 1.0, "tokens_per_second": speed})
        if step % EVERY == 0:
            rows.append({"step": step, "val/loss": loss, "val/bits_per_byte": loss * bits})
    return rows


def made(path: str, flags: str = "", final: float | None = 2.0, data: Any = None, **how: Any) -> Path:
    """A run directory as training leaves it, without checkpoints. `final`: its last loss; None: no metrics."""
    flags = f"--model.block-size 8 --train.batch-size 5 --train.steps {STEPS} {flags}"
    cfg = config.load(merged(flags)).cfg
    run = Path(path)
    run.mkdir(parents=True)
    (run / "config.json").write_text(config.to_json(config.merge(cfg, {"model.vocab_size": 65}, "test")))
    (run / "data.json").write_text(json.dumps(data or data_of()))
    if final is not None:
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines(final, **how)))
    return run


def merged(flags: str) -> list[str]:
    """Words of a command line, in which the last of a flag counts."""
    words = flags.split()
    return [word for pair in dict(zip(words[::2], words[1::2], strict=True)).items() for word in pair]


def compared(*words: str) -> groups.Comparison:
    return groups.compare(runs.find(list(words))[0])


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert command.main(list(words)) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def six(place):
    """Two learning rates, three seeds each."""
    for rate, losses in (("0.01", (2.0, 2.1, 2.2)), ("0.02", (1.9, 2.02, 2.14))):
        for seed, loss in enumerate(losses, 1):
            made(f"runs/{rate}-{seed}", f"--optim.learning-rate {rate} --train.seed {seed}", loss)


# ---- groups and their figures ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("six")
def test_a_groups_mean_is_over_its_seeds_and_the_same_whatever_else_is_shown():
    found = compared("runs/*")
    assert [group.runs[0].settings["optim.learning_rate"] for group in found.groups] == [0.02, 0.01]
    best = found.groups[0].final(NATS)
    assert best is not None
    assert best.value == pytest.approx(2.02)
    assert best.error == pytest.approx(0.12 / math.sqrt(3))
    made("runs/other", "--optim.name adamw --train.seed 1", 9.0, data_of("b", "u"), bits=1.0)
    more = compared("runs/other", "runs/*")
    same = [group for group in more.groups if group.runs[0].recipe == found.groups[0].runs[0].recipe]
    assert [group.final(NATS) for group in same] == [best]
    assert len(more.groups) == 3


@pytest.mark.usefixtures("six")
def test_the_best_is_compared_with_the_second_by_pairs_of_seeds(capsys):
    out = said(capsys, "runs/*")
    (verdict,) = compared("runs/*").verdicts
    assert verdict.pairs == 3
    assert verdict.gap.value == pytest.approx(0.08)  # of 0.1, 0.08 and 0.06
    assert verdict.gap.error == pytest.approx(0.02 / math.sqrt(3))
    assert "Group 1 is better than group 2 by 0.0800 ± 0.0115 nats a token, 6.9 standard errors (paired by 3" in out
    # each mean alone is uncertain: without common seeds nobody can tell
    for seed in (1, 2, 3):
        path = Path(f"runs/0.01-{seed}/config.json")
        path.write_text(path.read_text().replace(f'"seed": {seed}', f'"seed": {seed + 10}'))
    assert "No clear winner: group 1 is ahead of group 2" in said(capsys, "runs/*")
    (verdict,) = compared("runs/*").verdicts
    assert verdict.pairs == 0
    assert verdict.gap.error == pytest.approx(math.hypot(0.12, 0.1) / math.sqrt(3))


@pytest.mark.usefixtures("six")
def test_one_run_of_each_says_nothing_about_seeds_and_a_seed_counts_once(capsys):
    assert "is unknown, as it takes two seeds of each" in " ".join(said(capsys, "runs/0.01-1", "runs/0.02-1").split())
    shutil.copytree("runs/0.01-1", "elsewhere/again")
    found = compared("runs/0.01-*", "elsewhere/again")
    assert [len(group.by_seed(NATS)) for group in found.groups] == [3]
    assert found.groups[0].final(NATS) == compared("runs/0.01-*").groups[0].final(NATS)
    Path("elsewhere/again/metrics.jsonl").write_text(Path("runs/0.01-3/metrics.jsonl").read_text())
    assert groups.compare(runs.find(["runs/0.01-*", "elsewhere/again"])[0]).groups[0].by_seed(NATS) == pytest.approx(
        {1: (2.0 + 2.2) / 2, 2: 2.1, 3: 2.2}
    )
    assert "elsewhere/again, runs/0.01-1 of group 1 have the same seed 1 and count once" in shown.page(found, {}, [])


@pytest.mark.usefixtures("six")
def test_settings_that_differ_are_shown_and_no_others(capsys):
    assert [one.key for one in compared("runs/*").differences] == ["optim.learning_rate", "train.seed"]
    assert [one.key for one in compared("runs/0.01-*").differences] == ["train.seed"]
    out = said(capsys, "runs/*")
    assert re.search(r"optim.learning_rate +0.02 +group 1\n +optim.learning_rate +0.01 +group 2\n", out)
    assert "optim.beta1" not in out
    assert re.search(r"^  1 +learning_rate=0.02 +3 +2.0200 ± 0.0693 ", out, re.M)


def test_how_a_run_was_computed_and_where_its_text_lay_make_no_group_but_are_said():
    made("a/x", "--train.log-every 5 --data.source one.txt --train.seed 1")
    made("b/x", "--train.log-every 50 --data.source two.txt --train.seed 2 --mesh.data 5")
    found = compared("a/x", "b/x")
    assert len(found.groups) == 1
    assert {one.key: one.is_of_groups for one in found.differences} == dict.fromkeys(
        ("data.source", "train.log_every", "train.seed", "mesh.data"), False
    )
    assert re.search(r"train.log_every +50 +b/x\n", shown.page(found, {}, []))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--train.steps 50", {}),  # a schedule of another length
        ("--model.dtype bfloat16", {}),
        ("", {"data": data_of("b")}),  # another text at the same place
        ("", {"origin": {"extended": [{"at_step": 50, "from_steps": 50}]}}),
    ],
)
def test_what_makes_another_recipe(flags, told):
    made("a")
    made("b", flags, data=told.get("data"))
    Path("b/origin.json").write_text(json.dumps(told.get("origin", {})))
    found = compared("a", "b")
    assert len(found.groups) == 2
    assert len(found.differences) == 1
    assert groups.labels(found)[1] != ""


def test_seconds_and_tokens_a_second_follow_from_what_is_logged():
    run = runs.read(made("a", speed=200.0))
    assert run.speed == pytest.approx(200)
    assert run.seconds(STEPS) == pytest.approx(STEPS * 8 * 5 / 200)
    assert run.seconds(15) == pytest.approx(15 * 8 * 5 / 200)
    rows = [{"step": 10, "tokens_per_second": 100}, {"step": 20}, {"step": 40, "tokens_per_second": 50.0}]
    Path("a/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = runs.read(Path("a"))
    assert run.clock == [(10, 4.0), (40, 4.0 + 30 * 40 / 50)]
    assert run.seconds(25) == pytest.approx(4 + 15 * 40 / 50)
    assert run.seconds(50) == pytest.approx(4 + 40 * 40 / 50)
    Path("a/metrics.jsonl").write_text('{"step": 10, "train/loss": 2.0}\n')
    assert runs.read(Path("a")).seconds(10) is None


def test_runs_of_other_tokenizers_are_compared_in_bits_a_byte(capsys):
    made("a", final=3.0, data=data_of(tokenizer="gpt2"), bits=0.2)
    made("b", "--data.tokenizer word", final=1.0, data=data_of(tokenizer="char"), bits=0.8)
    found = compared("a", "b")
    assert found.unit == BITS
    assert [group.runs[0].name for group in found.groups] == ["a", "b"]  # 0.6 bits, 0.8 bits
    out = said(capsys, "a", "b")
    assert "Group 1 is ahead of group 2 by 0.2000 bits a byte" in out
    assert "final, nats a token  final, bits a byte" in out


def test_losses_of_other_texts_are_shown_but_not_compared(capsys):
    made("a", final=1.0)
    made("b", "--data.source other.txt", final=2.0, data=data_of("b"))
    out = said(capsys, "a", "b")
    assert "2 different validation texts" in out
    assert [one.key for one in compared("a", "b").differences] == ["data.source"]  # which says it all
    assert "ahead" not in out
    assert "better" not in out


def test_runs_of_other_lengths_are_shown_with_a_warning(capsys):
    made("a", "--train.seed 1")
    made("b", "--train.steps 200", until=200)
    made("c", "--model.block-size 4 --train.batch-size 10")
    out = " ".join(said(capsys, "a", "b").split())
    assert "Groups were trained on different numbers of tokens" in out
    out = " ".join(said(capsys, "a", "c").split())
    assert "different numbers of tokens" not in out
    assert "Contexts differ in length (model.block_size)" in out


# ---- what a run can be -----------------------------------------------------------------------------------------------


def test_whatever_a_pattern_matches_is_shown_or_named(capsys):
    made("runs/done", "--train.seed 1")
    made("runs/stopped", "--train.seed 2", until=60)
    made("runs/going", "--train.seed 3", until=40)
    made("runs/broken", "--train.seed 4", until=60)
    with Path("runs/broken/metrics.jsonl").open("a") as file:
        file.write('{"step": 70, "diverged": 1.0}\n')
    made("runs/new", "--train.seed 5", final=None)
    made("runs/imported", "--train.seed 6", final=None)
    Path("runs/imported/import.json").write_text("{}")
    made("runs/classifier")
    told = json.loads(Path("runs/classifier/config.json").read_text()) | {"classify": {}}
    Path("runs/classifier/config.json").write_text(json.dumps(told))
    made("runs/sweep/one")
    Path("runs/folder").mkdir()
    Path("runs/notes.txt").write_text("")
    Path("runs/compare.html").write_text("")
    for name in (ours := {"report.html", "sweep.json", "lock"}):
        Path("runs", name).write_text("")
    made("runs/damaged")
    Path("runs/damaged/config.json").write_text("{")
    os.symlink("done", "runs/link")
    os.symlink("nowhere", "runs/dangling")
    with filelock.FileLock("runs/going/lock"):
        out = said(capsys, "runs/*")
        unquoted = said(capsys, *map(str, sorted(Path("runs").iterdir())))
    assert unquoted == out
    for name, state in {
        "done": "finished", "stopped": "stopped", "going": "running", "broken": "diverged at step 70 of 100",
        "new": "without metrics", "imported": "imported",
    }.items():  # fmt: skip
        assert re.search(rf"^  runs/{name} .* {state}$", out, re.M), out
    assert "1 finished, 1 stopped, 1 running, 1 diverged, 1 without metrics, 1 imported" in out
    assert re.search(r"runs/stopped .*60 of 100 +2\.8000 at step 60", out)
    _, left_out = out.split("\nleft out\n")
    for name, why in {
        "classifier": "a classifier; measure it: nanogpt-jax classify eval",
        "sweep": "a folder of runs; compare them: ",
        "folder": "no run, as it has no config.json",
        "notes.txt": "not a folder",
        "damaged": "runs/damaged/config.json is damaged: ",
        "link": "the same run as runs/done",
        "dangling": "not a folder",
    }.items():
        assert re.search(rf"^  .*runs/{name}\b.*  {why}", left_out, re.M), left_out
    assert {path for path in os.listdir("runs") if f"runs/{path}" not in out} - {"compare.html"} == ours
    assert "compare.html" not in left_out.partition("\n\n")[0]


def test_what_other_commands_write_beside_runs_is_known():
    record = pytest.importorskip("nanogpt_jax.sweeping.record")  # it may have been removed
    assert {record.NAME, record.LOCK, record.CSV, record.PAGE, record.BEST} <= set(runs.OURS)


def test_a_run_that_is_not_finished_is_in_no_mean():
    made("a/1", "--train.seed 1", 2.0)
    made("a/2", "--train.seed 2", 5.0, until=80)
    (group,) = compared("a/*").groups
    assert group.final(NATS) == pytest.approx(groups.Estimate(2.0, None))
    none = "No run is finished, so no final losses are compared."
    assert none not in shown.page(compared("a/*"), {}, [])
    made("b", "--optim.name sgd", until=80)
    assert none in shown.page(compared("a/2", "b"), {}, [])


def test_groups_with_many_settings_are_known_by_their_first_runs(capsys):
    made("a", "--train.seed 1")
    made("b", "--train.seed 2")
    made("c", "--optim.name adamw --optim.learning-rate 0.0123 --optim.weight-decay 0.0123 --optim.warmup-steps 7", 3.0)
    out = said(capsys, "a", "b", "c")
    assert re.search(r"^  group  first run  n .*\n  1 +a +2 .*\n  2 +c +1 ", out, re.M)
    assert "  validation loss, nats a token  " in out


@pytest.mark.parametrize(
    "line",
    [
        *(
            '{"step": 5, "train/loss"',
            "[]",
            '"x"',
            "\x00",
            '{"step": true}',
            '{"step": -1}',
            '{"step": "5"}',
            "[" * 9999,
        ),
        '{"step": 100000000000000000000000}',
    ],
)
def test_damaged_lines_of_metrics_are_left_out_and_counted(line, capsys):
    made("a")
    made("b", "--train.seed 2")
    with Path("b/metrics.jsonl").open("a") as file:
        file.write(f"{line}\n{line}\n")
    assert "finished; 2 damaged lines of metrics.jsonl left out" in said(capsys, "a", "b")


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"2.0"', "true", "[1]", "{}", f"1{'0' * 400}"])
def test_values_that_are_no_numbers_are_no_points(value):
    run = made("a")
    with Path("a/metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 110, "train/loss": {value}, "val/loss": {value}, "tokens_per_second": {value}}}\n')
    found = runs.read(run)
    assert found.training[-1][0] == found.validation[NATS][-1][0] == found.clock[-1][0] == STEPS


def test_metrics_that_cannot_be_read_and_a_missing_or_damaged_data_json():
    made("a")
    made("b")
    Path("a/metrics.jsonl").unlink()
    os.mkfifo("a/metrics.jsonl")
    assert runs.read(Path("a")).notes[0].startswith("cannot read metrics.jsonl: it is a pipe")
    for content in (
        "[]",
        "{",
        '{"fingerprint": 5}',
        '{"fingerprint": "x", "mixture": {"a": 1}, "val": 3, "source": []}',
    ):
        Path("b/data.json").write_text(content)
        assert runs.read(Path("b")).state == "finished"
    Path("b/data.json").unlink()
    assert runs.read(Path("b")).settings[runs.DATA] == "not recorded"


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ({"name": "spelt otherwise", "sha256": "a"}, 1),
        ({"name": "text", "path": "/elsewhere", "sha256": "b"}, 2),
    ],
)
def test_a_text_is_known_by_its_hash_and_where_it_was_cut(source, texts):
    made("a")
    made("b", "--data.tokenizer word", data={**data_of(tokenizer="u"), "source": source})
    made("c", "--data.tokenizer gpt2", data=data_of(tokenizer="v", n_bytes=499))
    assert compared("a", "b").texts == texts
    assert compared("a", "c").texts == 2


def test_a_text_without_a_hash_is_known_by_all_but_its_place():
    for name, path in {"a": "/one", "b": "/two"}.items():
        data = {**data_of(tokenizer=name), "source": {"name": "text", "path": path, "revision": 5}}
        made(name, f"--data.source {path}", data=data)
    assert compared("a", "b").texts == 1


def test_equal_parts_of_a_mixture_are_one_text():
    one, two = data_of("x", "t", 300), data_of("y", "t", 700)
    made("a", data={"fingerprint": "m", "mixture": {"x": one, "y": two}})
    made(
        "b",
        "--optim.name sgd",
        data={"fingerprint": "n", "mixture": {"elsewhere/x": {"sequences": 2, **one}, "y": two}},
    )
    found = compared("a", "b")
    assert found.texts == 1
    assert found.groups[0].runs[0].tokenizer == "t"


# ---- the page --------------------------------------------------------------------------------------------------------


@with_pages
@pytest.mark.usefixtures("six")
def test_the_page_draws_each_run_against_steps_tokens_and_seconds(capsys):
    assert said(capsys, "runs/*").endswith("\nruns/compare.html: open it in a browser\n")
    page = Path("runs/compare.html").read_text(encoding="utf-8")
    assert page.count('class="k0" points=') == page.count('class="k1" points=') == 6 * 3 + 1  # and in the legend
    assert page.count("<figure>") == 6
    assert "Group 1 is better than group 2 by 0.0800 ± 0.0115" in page
    for run in runs.find(["runs/*"])[0]:
        assert f'<th scope="row">{run.name}</th>' in page
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|src=|href=|@import|url\(| style=", page)
    assert said(capsys, "runs/*", "--out", "other.html").endswith("other.html: open it in a browser\n")
    assert "compare.html" not in Path("other.html").read_text()  # now matched, and passed over


@with_pages
def test_names_are_escaped_on_the_page_and_one_line_each(capsys):
    names = ["<b>&\"'", "x\x1b[31m\u202ey\n\tz", os.fsdecode(b"\xff")]
    for seed, name in enumerate(names):
        made(f"runs/{name}", f"--train.seed {seed} --data.source </script><b>")
    said(capsys, *(f"runs/{name}" for name in names), "--out", "page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;" in page
    assert "x\\x1b[31m\\u202ey\\n\\tz" in page
    assert "\\xff" in page or "\\udcff" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]|<b>", page)
    assert page.count("</script>") == 2


@with_pages
def test_of_many_groups_six_are_told_apart_and_what_cannot_be_drawn_is_named(capsys):
    for n in range(9):
        made(f"runs/{n}", f"--optim.learning-rate 0.0{n + 1}", 2 + n / 100)
    made("runs/new", "--optim.name sgd", None)
    rows = [{"step": 50, "train/loss": 3.0}, {"step": 100, "train/loss": 2.9, "val/loss": 2.0}]
    made("runs/slow", "--optim.name lion", None).joinpath("metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said(capsys, "runs/*")
    page = Path("runs/compare.html").read_text(encoding="utf-8")
    assert "the other 5 groups</li>" in page
    assert "No curve, as they have no metrics: runs/new." in page
    assert "as they logged no speed: runs/slow." in page
    assert "the best of 10 groups is flattered by the choice" in page
    assert page.count('class="k5"') == 7


@pytest.mark.usefixtures("six")
def test_without_pages_the_text_is_there(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nanogpt_jax.pages", None)
    assert command.main(["runs/*"]) == 0
    out, err = capsys.readouterr()
    assert "Group 1 is better" in out
    assert "no page is written, as nanogpt_jax/pages was removed" in err
    refused(command.main, "runs/* --out page.html", capsys, "--out=page.html needs nanogpt_jax/pages")
    assert not Path("runs/compare.html").exists()


@with_pages
def test_figures_of_a_chart():
    from nanogpt_jax.pages import curves

    assert curves.ticks(0, 100) == pytest.approx([0, 20, 40, 60, 80, 100])
    assert curves.ticks(1.93, 2.41) == pytest.approx([2.0, 2.1, 2.2, 2.3, 2.4])
    assert curves.chart("t", "x", [curves.Line("1", 0, [])], "told") == ""
    dot = curves.chart("t", "x", [curves.Line("1", 0, [(0, 2), (5, 1)]), curves.Line("2", 1, [(0.5, 9)])], "told")
    ((x, y),) = re.findall(r'<circle class="k1" cx="([^"]+)" cy="([^"]+)"', dot)
    assert 0 < float(x) < curves.WIDTH
    assert 0 < float(y) < curves.HEIGHT / 10  # at the top, and not cut off
    flat = curves.chart("t", "x", [curves.Line("1", 0, [(0, 2), (5, 2)])], "told")
    assert "nan" not in flat
    long = [(float(x), 1.0 + x % 2) for x in range(10_000)]
    (points,) = re.findall('points="([^"]+)"', curves.chart("t", "x", [curves.Line("1", 0, long)], "told"))
    assert len(points.split()) <= curves.POINTS + 1
    # a run that breaks does not flatten the others
    broken = [curves.Line("", -1, [(0, 4), (9, 2 + n / 10)]) for n in range(4)]
    drawn = curves.chart("t", "x", [*broken, curves.Line("5", 0, [(0, 4), (9, 1e9)])], "told")
    assert ">1,000,000" not in drawn
    assert ">2.4<" in drawn
    assert f'y="{curves.TOP + 4:.1f}">5<' in drawn  # its label stays in the picture


@with_pages
@pytest.mark.browser
@pytest.mark.usefixtures("six")
def test_the_page_in_a_browser(browser, axe, capsys):
    made("runs/stopped", "--optim.name sgd", until=60)
    said(capsys, "runs/*")
    looked_at(browser, axe, Path("runs/compare.html"))


# ---- many, and measured now ------------------------------------------------------------------------------------------


def test_a_hundred_runs_in_three_seconds_without_jax():
    base = made("base", "--train.steps 1600", None)
    told = json.loads((base / "config.json").read_text())
    rows = [{**row, "step": row["step"] * 16 // 10} for row in lines(2.0, until=1000)]
    metrics = "".join(json.dumps(row) + "\n" for row in rows)
    for n in range(100):
        told["train"]["seed"], told["optim"]["learning_rate"] = n % 5, 0.01 + n // 5 / 1000
        run = Path(f"runs/{n}")
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(told))
        (run / "data.json").write_text(json.dumps(data_of()))
        (run / "metrics.jsonl").write_text(metrics)
    program = (
        "import sys, time; from nanogpt_jax import cli; code = cli.guarded(cli._main, ['compare', 'runs/*']); "
        "print(code, time.process_time(), *({'jax', 'flax', 'orbax'} & set(sys.modules)), file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    code, seconds, *imported = done.stderr.splitlines()[-1].split()
    assert code == "0"
    assert imported == []
    assert float(seconds) < 3
    assert done.stdout.startswith("100 runs in 20 groups\n")


def test_what_is_measured_now_is_what_eval_says(capsys, monkeypatch):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(".", filter="data")
    text = Path("run/config.json").read_text()
    for name, rate in {"worse": "0.01", "again": "0.01", "without": "0.01"}.items():
        shutil.copytree("run", name)
        Path(name, "config.json").write_text(text.replace('"learning_rate": 0.02', f'"learning_rate": {rate}'))
        for path in Path(name).glob("metrics.jsonl"):
            path.write_text(path.read_text().replace("2.69", "2.79"))
    shutil.rmtree("without/checkpoints")
    load = opened.Run.load

    def loaded(run: opened.Run, *how: Any) -> tuple[Any, int]:
        params, step = load(run, *how)
        return (params if run.path.name == "run" else {**params, "wte": params["wte"] * 0.9}), step

    monkeypatch.setattr(opened.Run, "load", loaded)
    told = " ".join(said(capsys, "run", "worse", "--paired").split())
    assert evaluate.main(["run", "worse"]) == 0
    words = capsys.readouterr().out.splitlines()[-1]
    assert "run is better than worse by" in words
    assert f"Measured now on text.txt (val), the same windows for all: {words}" in told
    # a group of several is their mean, and a run that cannot be opened is named
    told = " ".join(said(capsys, "run", "worse", "again", "without", "--paired").split())
    size = words.removeprefix("run is better than worse ")
    assert f"the same windows for all: run is better than group 2 (2 runs) {size}" in told
    assert "Not measured: without: without has no checkpoint yet" in told
    refused(command.main, "worse again --paired", capsys, "all runs are of one group")
    refused(command.main, "run without --paired", capsys, "no run of group 2 can be measured", "no checkpoint yet")
    # an imported model has no metrics, but can be measured
    Path("again/metrics.jsonl").unlink()
    Path("again/import.json").write_text("{}")
    Path("more.txt").write_text(Path("text.txt").read_text()[:300])
    told = " ".join(said(capsys, "run", "again", "--data=more.txt").split())
    assert "Measured now on more.txt, the same windows for all: run is better than again by" in told


# ---- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "which runs? name two or more, or a pattern in quotes: 'runs/*'"),
        ("a", "two or more runs are needed, but only a was found"),
        ("nothing/*", "nothing matches nothing/*\n       there is no folder nothing"),
        ("runs/z*", "nothing matches runs/z*"),
        ("a/*", "two or more runs are needed, but no run was found\n       left out: a/config.json: not a folder"),
        ("a classifier", "but only a was found\n       left out: classifier: a classifier; measure it: nanogpt-jax"),
        ("a nowhere", "no run nowhere"),
        ("a text.txt", "but only a was found\n       left out: text.txt: not a folder"),
        ("a folder", "left out: folder: no run, as it has no config.json"),
        ("a runs", "left out: runs: a folder of runs; compare them: nanogpt-jax compare 'runs/*'"),
        ("a a", "but only a was found\n       left out: a: named twice"),
        ("a ./a/", "left out: a: named twice"),
        ("a damaged", "left out: damaged: damaged/config.json is damaged: "),
        ("a foreign", "unknown setting model.layers (foreign/config.json)"),
        pytest.param("a b --out .", "--out=. is a directory; give a file", marks=with_pages),
        pytest.param("a b --out none/page.html", "--out=none/page.html: there is no directory none", marks=with_pages),
        pytest.param("a b --out=", "--out needs the name of a file", marks=with_pages),
        ("a b --outt page.html", "did you mean --out?"),
        ("a b --data=", "--data is empty"),
        ("a b --checkpoint latest", "--checkpoint=latest is about what is measured now; add --paired"),
        ("a b --paired", "no run of group 1 can be measured\n       Not measured: a: no tokenizer in a/tokenizer"),
        ("a b --data nowhere.txt", "nowhere.txt"),
        ("a b c --paired", "which two groups should be measured?"),
    ],
)
def test_wrong_input(line, words, capsys):
    for name, flags in {"a": "", "b": "--optim.name sgd", "c": "--optim.name lion", "runs/x": ""}.items():
        made(name, flags, None if "c" in line.split() else 2.0)
    for name in ("classifier", "damaged", "foreign"):
        made(name)
    Path("classifier/config.json").write_text('{"classify": {}}')
    Path("damaged/config.json").write_text("{")
    Path("foreign/config.json").write_text('{"model": {"layers": 1}}')
    Path("text.txt").write_text("x")
    Path("folder").mkdir()
    refused(command.main, line, capsys, words)
    assert not Path("compare.html").exists()


@with_pages
def test_a_link_in_the_place_of_the_page_is_not_followed(capsys):
    made("a")
    made("b")
    os.symlink("/dev/null", "compare.html")
    refused(command.main, "a b", capsys, "compare.html is a link, and not a file", "--out")


def test_every_setting_is_of_the_recipe_or_is_known_not_to_be():
    others = {key for key, _ in config.settings.items(Config())} - runs.RECIPE
    assert others == (Config.EXECUTION - {"train.steps"}) | {"train.seed"}
