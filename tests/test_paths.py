"""Checkpoints elsewhere: in another folder, in a bucket; and a flipped byte in any file of a sharded one."""

import importlib.util
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers import load, make_state, make_step, numbers, refused, trees, with_flags
from jax.sharding import Mesh

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config, MeshConfig, ModelConfig, OptimConfig, TrainConfig, UserError
from nanogpt_jax.distributed.mesh import make_mesh
from nanogpt_jax.run import checksums, opened, places
from nanogpt_jax.run.bucket import BucketPath
from nanogpt_jax.run.checkpoint import Checkpointer
from nanogpt_jax.run.places import Folder, checkpoint_steps

TEXT = "El gato negro persigue al ratón gris; el ratón huye del gato. " * 60
BASE = (
    "--data.source text.txt --model.block-size 16 --model.n-layer 1 --model.n-head 2 --model.n-embd 16 "
    "--model.dropout 0.1 --train.batch-size 4 --train.eval-every 0 --train.save-every 4 --optim.schedule constant "
    "--optim.warmup-steps 2"
).split()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty directory with a small text, to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanogpt_jax.inference.sampler.opening_and_continuation", lambda *_, **__: "")  # not asked for
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def train(run: str, steps: int, *flags: str) -> int:
    more = [word for word in flags if word != "--overwrite"]
    words = with_flags(BASE, ["--run-dir", run, "--train.steps", str(steps), *more])
    return cli.door("train").main([*words, *(["--overwrite"] if "--overwrite" in flags else [])])


def same(a: Any, b: Any) -> bool:
    return a[1] == b[1] and all((x == y).all() for x, y in zip(*map(jax.tree.leaves, (a[0], b[0])), strict=True))


def inside(folder: Folder) -> set[str]:
    """The names of everything right in a folder."""
    if isinstance(folder, Path):
        return {path.name for path in folder.iterdir()} if folder.exists() else set()
    return {name.split("/")[0] for name in folder.files()}


def the_life_of_a_run(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that keeps its checkpoints in `root` is what one with its own is, and ends up there alone."""
    flags = ("--train.keep", "1", "--train.eval-every", "4", "--optim.learning-rate", "1")  # the best is not the last
    there = ("--train.checkpoints", root, *flags)
    assert train("plain", 12, *flags) == 0
    assert train("r", 8, *there) == 0
    assert train("r", 12, *there) == 0
    assert same(load("r", "latest"), load("plain", "latest"))
    assert numbers("r")[-1] == numbers("plain")[-1]
    assert inside(Path("r/checkpoints")) == {"elsewhere.json"}
    assert checkpoint_steps(Path("r")) == checkpoint_steps(Path("plain")) != [12]
    first = places.folder_of(Path("r"))
    assert inside(first) == {"run.json", *map(str, checkpoint_steps(Path("r")))}
    assert same(opened.open_run(Path("r")).load("12"), load("plain", "12"))

    with monkeypatch.context() as m:  # the new run's first save fails: the old run is back
        m.setattr(checksums, "write", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match=r"could not save step 4 in .*; there is no earlier(.|\n)*No space left"):
            train("r", 4, "--overwrite", *there)
    assert places.folder_of(Path("r")) == first
    assert same(load("r", "latest"), load("plain", "latest"))
    assert inside(places.at(root)) == {first.name}

    assert train("r", 4, "--overwrite", *there) == 0
    second = places.folder_of(Path("r"))
    assert inside(places.at(root)) == {second.name} != {first.name}
    assert checkpoint_steps(Path("r")) == [4]


@pytest.mark.long
def test_a_run_with_its_checkpoints_in_another_folder(place, monkeypatch):
    the_life_of_a_run(f"file://{place}/a%20disk", monkeypatch)
    assert inside(place / "a disk")


@pytest.fixture
def far() -> Callable[..., tuple[Path, Any]]:
    """far() makes a run with checkpoints 10 and 20 elsewhere, and returns it and their folder."""

    def make(root: str = "disk", mesh: Mesh | None = None) -> tuple[Path, Any]:
        run = Path("run")
        run.mkdir()
        places.create(run, root)
        (run / "config.json").write_text(config.to_json(CFG))
        state = trees(make_state(CFG, mesh=mesh))
        with Checkpointer(run, keep=2) as checkpoints:
            for step in (10, 20):
                checkpoints.save(step, state, {}, 1 / step)
        return run, places.folder_of(run)

    return make


CFG = Config(
    model=ModelConfig(block_size=16, vocab_size=65, n_layer=1, n_head=4, n_embd=32),
    optim=OptimConfig(name="adamw"),
    train=TrainConfig(batch_size=8),
)


@pytest.mark.usefixtures("place")
@pytest.mark.long
def test_a_disk_that_is_not_mounted_is_no_run_without_checkpoints(capsys):
    assert train("r", 4, "--train.checkpoints", "disk") == 0
    before = Path("r/metrics.jsonl").read_bytes()
    Path("disk").rename("unmounted")
    words = [
        "the checkpoints of r are in",
        "that is not there",
        "write the new place into r/checkpoints/elsewhere.json",
    ]
    capsys.readouterr()
    for flags in ((), ("--overwrite",)):
        line = [*with_flags(BASE, ["--run-dir", "r", "--train.checkpoints", "disk"]), *flags]
        refused(cli.door("train").main, line, capsys, *words)
    refused(cli.door("sample").main, "r", capsys, *words)
    Path("runs").mkdir()
    shutil.copytree("r", "runs/r")
    with pytest.raises(UserError, match="no run with a checkpoint"):
        opened.newest(Path("runs"))
    assert "note: the checkpoints of runs/r are in" in capsys.readouterr().err
    assert Path("r/metrics.jsonl").read_bytes() == before
    moved = next(Path("unmounted").glob("r-*"))
    Path("r/checkpoints/elsewhere.json").write_text(json.dumps({"folder": str(moved.resolve())}))
    assert train("r", 8, "--train.checkpoints", "unmounted") == 0
    assert checkpoint_steps(Path("r")) == [4, 8]
    Path("r/checkpoints/elsewhere.json").write_text("[]")
    capsys.readouterr()
    refused(cli.door("sample").main, "r", capsys, "elsewhere.json is damaged", '{"folder": "/PLACE/NAME"}')


@pytest.mark.usefixtures("place")
def test_a_run_goes_on_only_where_its_checkpoints_are(capsys):
    assert train("r", 4, "--train.checkpoints", "disk") == 0
    assert train("own", 4) == 0
    capsys.readouterr()
    for run, asked, words in (
        ("r", (), ["train.checkpoints=run (default)", f"go on there: --train.checkpoints={Path.cwd()}/disk"]),
        ("r", ("--train.checkpoints", "other"), ["has its checkpoints in", "but train.checkpoints=other (command"]),
        ("own", ("--train.checkpoints", "disk"), ["own has its checkpoints in own/checkpoints", "leave it out"]),
    ):
        refused(cli.door("train").main, with_flags(BASE, ["--run-dir", run, *asked]), capsys, *words)
    assert checkpoint_steps(Path("r")) == checkpoint_steps(Path("own")) == [4]
    assert not Path("other").exists()


@pytest.mark.usefixtures("place")
def test_overwriting_a_copy_of_a_run_leaves_the_checkpoints_of_the_original(capsys):
    assert train("r", 4, "--train.checkpoints", "disk") == 0
    shutil.copytree("r", "copy")
    assert train("copy", 4, "--overwrite") == 0
    assert "is left, with the checkpoints of the run before" in capsys.readouterr().err
    assert load("r")[1] == 4


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("s3://bucket/x", "train.checkpoints=s3://bucket/x must be a folder or gs://BUCKET/NAME"),
        ("file://disk", "train.checkpoints=file://disk must be file:///PATH"),
        ("gs://b/x y", "train.checkpoints=gs://b/x y must be gs://BUCKET/NAME"),
        ("gs://bucket/x", "train.checkpoints=gs://bucket/x needs pip install gcsfs (command line)"),
        ("text.txt", "cannot write in"),
    ],
)
@pytest.mark.usefixtures("place")
def test_a_place_where_no_checkpoint_can_be_kept_is_refused_before_anything_is_written(
    asked, words, capsys, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gcsfs" else find(name, *more))
    refused(cli.door("train").main, with_flags(BASE, ["--run-dir", "r", "--train.checkpoints", asked]), capsys, words)
    assert not Path("r").exists()
    with pytest.raises(UserError, match="has a name that is not UTF-8"):
        train("r", 4, "--train.checkpoints", "disk\udcff")


@pytest.mark.usefixtures("place")
def test_a_reader_without_the_package_for_buckets_is_told(far, monkeypatch):
    run, _ = far()
    (run / "checkpoints/elsewhere.json").write_text('{"folder": "gs://bucket/run-1"}')
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"cannot read gs://bucket/run-1: ImportError: .*install gcsfs"):
        load(run)


@pytest.mark.usefixtures("place")
def test_damage_is_named_and_the_checkpoint_before_is_offered_with_its_place(far, monkeypatch):
    run, folder = far()
    monkeypatch.setattr(sys, "argv", ["sample.py", "run"])
    flip(folder / "20/params/_METADATA", random.Random(0))
    with pytest.raises(UserError, match=rf"{folder}/20/params/_METADATA has .*\n.*sample.py run --checkpoint=10$"):
        load(run)
    shapes = trees(make_step(CFG).state)
    with Checkpointer(run, 2) as checkpoints, pytest.raises(UserError, match=rf"rm -r {folder}/20\n"):
        checkpoints.restore(shapes)


@pytest.mark.usefixtures("place")
def test_a_killed_save_does_not_count_and_the_next_start_removes_it():
    assert train("r", 4, "--train.checkpoints", "disk") == 0
    folder = places.folder_of(Path("r"))
    killed = Path(f"{folder}/8.orbax-checkpoint-tmp")
    shutil.copytree(folder / "4", killed)
    assert checkpoint_steps(Path("r")) == [4]
    assert train("r", 8, "--train.checkpoints", "disk") == 0
    assert inside(folder) == {"run.json", "4", "8"}


def flip(path: Path, chance: random.Random) -> Callable[[], None]:
    """Flip a bit of a file -> what makes it whole again."""
    whole, bit = path.read_bytes(), chance.randrange(8 * path.stat().st_size)
    content = bytearray(whole)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)

    def heal() -> None:
        path.write_bytes(whole)

    return heal


# ---- sharded ---------------------------------------------------------------------------------------------------------


def every_flip_is_found(run: Path, folder: Path, shapes: dict[str, Any]) -> int:
    """Flips a bit in each file of checkpoint 20 in turn -> how many there are. Checkpoint 10 is offered."""
    chance, tried = random.Random(0), 0
    for path in sorted(p for p in (folder / "20").rglob("*") if p.is_file() and p.stat().st_size):
        heal = flip(path, chance)
        with (
            pytest.raises(UserError, match=rf"{re.escape(str(path))} .*\n +go on from checkpoint 10: rm -r \S+/20\n"),
            Checkpointer(run, keep=2) as checkpoints,
        ):
            checkpoints.restore(shapes)
        heal()
        tried += 1
    with Checkpointer(run, keep=2) as checkpoints:
        assert (checkpoints.restore(shapes) or [0])[0] == 20
    return tried


@pytest.mark.usefixtures("place")
@pytest.mark.long
def test_a_flipped_bit_in_any_file_of_a_sharded_checkpoint_is_found(far):
    cfg = replace(CFG, mesh=MeshConfig(data=2, fsdp=4))
    run, folder = far(mesh=make_mesh(cfg.mesh))
    shapes = trees(make_step(cfg).state)
    assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(shapes["params"]))
    assert every_flip_is_found(run, folder, shapes) > 25


@pytest.mark.slow
def test_the_same_of_two_processes_which_keep_it_elsewhere(place, popen, clean_env):
    flags = with_flags(
        BASE,
        f"--run-dir r --train.checkpoints {place}/disk --train.steps 20 --train.save-every 10 --mesh.fsdp 2 "
        f"--mesh.num-processes 2 --mesh.coordinator localhost:{free_port()}".split(),
    )
    train_py = str(Path(cli.__file__).parent.parent / "train.py")
    both = [popen([sys.executable, train_py, *flags, "--mesh.process-id", str(i)], env=clean_env) for i in (0, 1)]
    assert [process.wait(300) for process in both] == [0, 0]
    run = Path("r")
    cfg = config.read_json(run / "config.json")
    assert checkpoint_steps(run) == [10, 20]
    folder = places.folder_of(run)
    assert {path.name for path in (folder / "20/params").glob("ocdbt.*")} == {"ocdbt.process_0", "ocdbt.process_1"}
    cfg = replace(cfg, mesh=MeshConfig(), model=replace(cfg.model, dropout=0.0))
    assert every_flip_is_found(run, folder, trees(make_step(cfg).state)) > 30


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


# ---- a bucket --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket() -> Any:
    """The URL of a bucket of a small local object store, which speaks as Google's does."""
    port = free_port()
    at = f"http://localhost:{port}"
    program = [sys.executable, str(Path(__file__).parent / "object_store.py"), str(port), "runs"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):  # Google's packages, tensorstore
            patch.setenv(name, at)
        patch.setenv("GOOGLE_CLOUD_PROJECT", "test")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # tensorstore would look for real credentials
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # so would gcsfs, to ask for the bucket's kind
        with subprocess.Popen(program, **quiet) as process:
            until = time.monotonic() + 30
            while time.monotonic() < until:
                try:
                    urllib.request.urlopen(at, timeout=5).close()
                    break
                except urllib.error.HTTPError:
                    break
                except OSError:
                    time.sleep(0.1)
            yield "gs://runs"
            process.kill()


@pytest.mark.bucket
@pytest.mark.usefixtures("place")
def test_a_run_with_its_checkpoints_in_a_bucket(bucket, monkeypatch):
    the_life_of_a_run(f"{bucket}/life", monkeypatch)


def put(path: BucketPath, content: bytes) -> None:
    """Write an object as tensorstore does. The store takes gcsfs's way for a mail, and loses a last line break."""
    name, _, rest = path.url.removeprefix("gs://").partition("/")
    query = urllib.parse.urlencode({"uploadType": "media", "name": rest})
    at = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{name}/o?{query}"
    kind = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(at, content, kind), timeout=30).close()


@pytest.mark.bucket
@pytest.mark.usefixtures("place")
def test_damage_in_a_bucket(bucket, far, monkeypatch):
    run, folder = far(f"{bucket}/damage")
    monkeypatch.setattr(sys, "argv", ["sample.py", "run"])
    chance = random.Random(0)
    names = (folder / "20").files()
    assert len(names) > 25
    for name in names:
        whole = (folder / "20" / name).read_bytes()
        if whole:
            put(folder / "20" / name, bytes([whole[0] ^ 1 << chance.randrange(8)]) + whole[1:])
            assert f"{folder}/20/{name}" in checksums.damage(folder / "20"), name
            put(folder / "20" / name, whole)
    (folder / "20/params/_METADATA").write_bytes(b"[]")
    with pytest.raises(UserError, match=rf"{folder}/20/params/_METADATA has .*\n.*sample.py run --checkpoint=10$"):
        load(run)
    shapes = trees(make_step(CFG).state)
    with Checkpointer(run, 2) as checkpoints, pytest.raises(UserError, match=f"gcloud storage rm -r {folder}/20\n"):
        checkpoints.restore(shapes)
    (folder / "20/checksums.json").unlink()  # as if the save had been killed before its end
    assert checkpoint_steps(run) == [10]
    places.remove_unfinished(folder)
    assert inside(folder) == {"run.json", "10"}
    assert load(run, "latest")[1] == 10


@pytest.mark.bucket
@pytest.mark.usefixtures("place")
def test_a_bucket_that_does_not_answer_is_told(bucket, capsys):
    line = with_flags(BASE, ["--run-dir", "r", "--train.checkpoints", "gs://no-such-bucket/x"])
    refused(cli.door("train").main, line, capsys, "cannot write in gs://no-such-bucket/x/r-")
    assert not Path("r").exists()
    assert isinstance(places.at(bucket), BucketPath)
