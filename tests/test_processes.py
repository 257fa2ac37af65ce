"""Many processes: the numbers of one, and an end that is clean whatever happens. All with real processes and gloo."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import numbers, refused, steps_of

from nanogpt_jax import cli, config
from nanogpt_jax.distributed import meeting, processes
from nanogpt_jax.distributed.meeting import AGAIN
from nanogpt_jax.host import runtime
from nanogpt_jax.run.run_dir import checkpoint_steps

ROOT = Path(__file__).parent.parent
MODEL = (
    "--model.n-layer 2 --model.n-head 4 --model.n-embd 32 --model.block-size 16 --model.vocab-size 65 "
    "--train.batch-size 16 --optim.warmup-steps 2 --optim.learning-rate 1e-3 --train.steps-per-dispatch 1"
).split()
CASES = [
    "--optim.name muon --mesh.fsdp -1 --model.dropout 0.1",
    "--optim.name adamw --mesh.fsdp -1 --train.micro-batch 4 --model.dropout 0.1 --model.separate-documents true "
    "--model.end-of-text 0",
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Job:
    """Processes of one run, that are killed at the end of a test if they have not ended."""

    def __init__(self, popen: Any, folder: Path, env: dict[str, str]):
        self._popen, self._folder, self._env = popen, folder, env
        self.all: list[subprocess.Popen] = []

    def start(
        self,
        count: int,
        devices: int,
        *words: str,
        program: str = "train.py",
        each: Any = lambda i: [],
        folder: Any = lambda i: "",
    ) -> None:
        port, self.all = free_port(), []
        simulated = f"{self._env['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        for i in range(count):
            place = ["--mesh.coordinator", f"127.0.0.1:{port}", "--mesh.num-processes", str(count)]
            place += ["--mesh.process-id", str(i)]
            command = [sys.executable, str(ROOT / program), *words, *place, *each(i)]
            env = {**self._env, "XLA_FLAGS": simulated}
            with (self._folder / f"{i}.out").open("w") as out, (self._folder / f"{i}.err").open("w") as err:
                self.all.append(self._popen(command, cwd=self._folder / folder(i), env=env, stdout=out, stderr=err))

    def wait(self, seconds: float = 60, but: tuple[int, ...] = ()) -> list[int | None]:
        """The exit codes of all, in `seconds` at most."""
        end = time.monotonic() + seconds
        for i, process in enumerate(self.all):
            if i not in but:
                process.wait(max(end - time.monotonic(), 0.1))
        return [process.poll() for process in self.all]

    def told(self, i: int, stream: str = "err") -> str:
        return (self._folder / f"{i}.{stream}").read_text(encoding="utf-8", errors="replace")


@pytest.fixture
def job(popen, tmp_path, clean_env):
    return Job(popen, tmp_path, {**clean_env, "TF_CPP_MIN_LOG_LEVEL": "3"})


# ---- the same numbers -----------------------------------------------------------------------------------------------


def results(job: Job, folder: Path, count: int, devices: int, cases: list[str]) -> dict[str, np.ndarray]:
    out = folder / f"{count}x{devices}.npz"
    out.unlink(missing_ok=True)
    first = [str(out), json.dumps([case.split() for case in cases]), *MODEL]
    job.start(count, devices, *first, program="tests/many.py")
    assert job.wait(300) == [0] * count, job.told(0) + job.told(count - 1)
    with np.load(out) as found:
        return dict(found)


def alone(case: str) -> tuple[list[float], dict[str, np.ndarray], list[str]]:
    """What one process with one device makes of a case: losses, parameters, hashes of the batches."""
    import hashlib

    import jax

    words, kept = case.split(), []
    for flag, value in zip(words[::2], words[1::2], strict=True):
        kept += [] if flag.startswith("--mesh.") else [flag, value]
    state, losses, batches = steps_of(config.load([*MODEL, *kept]).cfg, 3)
    flat = jax.tree_util.tree_leaves_with_path(state.params)
    params = {"/".join(key.key for key in path): np.asarray(x) for path, x in flat}
    return losses, params, [hashlib.sha256(np.asarray(rows).tobytes()).hexdigest() for rows in batches]


def check_equal(found: dict[str, np.ndarray], cases: list[str]) -> None:
    for number, case in enumerate(cases):
        losses, params, hashes = alone(case)
        assert found[f"{number}/hashes"].tolist() == hashes, case
        np.testing.assert_allclose(found[f"{number}/losses"], losses, atol=2e-6, err_msg=case)
        for name, x in params.items():
            np.testing.assert_allclose(found[f"{number}/params/{name}"], x, atol=5e-5, rtol=0, err_msg=f"{case} {name}")


def check_sharded(found: dict[str, np.ndarray], number: int, ways: int) -> None:
    """Every array that the rules split over fsdp is, and a device holds 1/ways of it."""
    split = [name for name in found if name.startswith(f"{number}/spec/") and "fsdp" in str(found[name])]
    assert len(split) == 6  # wte, wpe and four kernels
    for name in split:
        part, size = found[name.replace("/spec/", "/bytes/")]
        assert part * ways == size, name
    part, size = found[f"{number}/held"]  # with the optimizer's moments; only layer norms and counters are everywhere
    assert size / ways <= part < size / ways * 1.02 + 10_000


@pytest.mark.long
def test_two_processes_with_two_devices_give_the_numbers_of_one(job, tmp_path):
    found = results(job, tmp_path, 2, 2, CASES)
    check_equal(found, CASES)
    check_sharded(found, 0, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(n, d) for n in (1, 2, 4) for d in (1, 2, 8) if n * d <= 16])
def test_the_number_of_processes_and_devices_is_a_layout(job, tmp_path, count, devices):
    """1, 2 and 4 processes with 1, 2 and 8 devices; the same layout twice gives the same bits."""
    ways = count * devices
    cases = [
        f"--optim.name {name} --mesh.fsdp {min(ways, 8)} --mesh.data {ways // min(ways, 8)} --model.dropout {dropout} "
        f"--train.micro-batch {micro} --model.separate-documents {documents} --model.end-of-text 0"
        for name in ("adamw", "muon")
        for dropout, micro, documents in ((0.0, 0, "false"), (0.1, 0, "true"), (0.1, max(8, ways), "false"))
        if micro <= 16
    ]
    cases += [f"--optim.name adamw --mesh.data -1 --train.micro-batch {m}" for m in (8, 4) if m % ways == 0]
    cases += ["--optim.name muon --mesh.tensor 2 --mesh.data -1 --train.micro-batch 8"] * (ways > 1)
    found = results(job, tmp_path, count, devices, cases)
    check_equal(found, cases)
    check_sharded(found, 0, min(ways, 8))
    again = results(job, tmp_path, count, devices, cases)
    assert found.keys() == again.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, again[name], err_msg=name)


# ---- a run, stopped, killed and continued ----------------------------------------------------------------------------

RUN = [
    *MODEL[:8], *MODEL[12:], "--train.batch-size", "24",
    *"--data.source text.txt --train.steps 40 --train.eval-every 20 --train.save-every 4 --train.log-every 1".split(),
    *"--mesh.timeout 50".split(),
]  # fmt: skip
SPLIT = ["--mesh.data", "-1"]
TEXT = "El gato negro persigue al ratón gris; el ratón huye del gato. " * 60


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")


def reached(run: Path, step: int, job: Job, seconds: float = 60) -> None:
    """Wait until the run has logged `step`, or a process has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and all(process.poll() is None for process in job.all):
        if any(row["step"] >= step for row in numbers(run)):
            return
        time.sleep(0.02)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in numbers(run) if "train/loss" in row]


def train_alone(folder: Path, env: dict[str, str], run: str, *words: str, devices: int = 1) -> None:
    env = {**env, "XLA_FLAGS": f"{env['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, str(ROOT / "train.py"), *RUN, "--run-dir", run, *words]
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, timeout=120)


def assert_same_to_rounding(one: Path, other: Path) -> None:
    """Two whole runs, logged step by step."""
    a, b = losses(one), losses(other)
    assert [step for step, _ in a] == [step for step, _ in b] == list(range(1, 41))
    np.testing.assert_allclose([x for _, x in a], [x for _, x in b], atol=2e-5)
    ours, theirs = ([row["val/loss"] for row in numbers(run) if "val/loss" in row] for run in (one, other))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert len(ours) == 2


@pytest.mark.long
def test_a_killed_process_ends_the_other_and_one_process_goes_on_with_the_run(job, tmp_path, text, clean_env):
    job.start(2, 2, *RUN, *SPLIT, "--run-dir", "run")
    reached(tmp_path / "run", 9, job)
    job.all[1].kill()
    began = time.monotonic()
    assert job.wait() == [AGAIN, -signal.SIGKILL]
    assert time.monotonic() - began < 20
    assert "process 1 of 2 is lost: its connection has closed" in job.told(0)
    assert "Traceback" not in job.told(0)
    assert checkpoint_steps(tmp_path / "run")
    train_alone(tmp_path, clean_env, "run")  # elastic: one process with one device
    train_alone(tmp_path, clean_env, "whole")
    assert_same_to_rounding(tmp_path / "run", tmp_path / "whole")


@pytest.mark.long
def test_a_signal_to_any_process_saves_once_and_all_end_with_again(job, tmp_path, text):
    job.start(2, 1, *RUN, *SPLIT, "--run-dir", "run")
    reached(tmp_path / "run", 5, job)
    job.all[1].terminate()
    at = numbers(tmp_path / "run")[-1]["step"]
    assert job.wait() == [AGAIN, AGAIN]
    saved = checkpoint_steps(tmp_path / "run")
    assert saved[-1] <= at + 4  # the call under way and the next one; this process looks late
    assert f"SIGTERM: saved step {saved[-1]} of 40" in job.told(0, "out")
    assert "saved" not in job.told(1, "out")  # process 0 alone speaks
    assert numbers(tmp_path / "run")[-1]["step"] == saved[-1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("who", [0, 1, 2])
def test_signals_to_each_of_three(job, tmp_path, text, number, who):
    job.start(3, 1, *RUN, *SPLIT, "--run-dir", "run")
    reached(tmp_path / "run", 5, job)
    job.all[who].send_signal(number)
    assert job.wait() == [AGAIN] * 3
    assert f"{number.name}: saved step {checkpoint_steps(tmp_path / 'run')[-1]} of 40" in job.told(0, "out")


@pytest.mark.slow
def test_elastic_resume_to_other_layouts_and_back(job, tmp_path, text, clean_env):
    """2 x 4, then 1 x 1, then 4 x 2 with other axes and micro-batches, and 2 x 4 again: one whole run, to rounding."""
    layouts = [
        (2, 4, "--mesh.fsdp 2 --mesh.data 4"), (1, 1, ""), (4, 2, "--mesh.fsdp 8 --train.micro-batch 8"),
        (1, 4, "--mesh.tensor 2 --mesh.data 2 --train.micro-batch 4"), (2, 4, "--mesh.fsdp 2 --mesh.data 4"),
    ]  # fmt: skip
    for (count, devices, more), stop in zip(layouts, (7, 15, 22, 31, 99), strict=True):
        job.start(count, devices, *RUN, "--run-dir", "run", *more.split())
        reached(tmp_path / "run", stop, job)
        if stop < 40:
            job.all[-1].terminate()
        ended = 0 if stop > 40 else AGAIN if count > 1 else 128 + signal.SIGTERM
        assert job.wait() == [ended] * count, job.told(0)
    train_alone(tmp_path, clean_env, "whole")
    assert_same_to_rounding(tmp_path / "run", tmp_path / "whole")


def files_of(run: Path) -> dict[str, bytes]:
    """The arrays of the last checkpoint, as orbax restores them, by name."""
    from helpers import load

    params, _ = load(run, "latest")
    import jax

    return {
        jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.mark.slow
def test_sigkill_of_one_of_two_at_20_random_moments(job, tmp_path, text):
    """The other ends within 60 s with AGAIN and names the lost one; the same command goes on to the same parameters."""
    job.start(2, 1, *RUN, *SPLIT, "--run-dir", "whole")
    assert job.wait(120) == [0, 0]
    whole, chance, hit = files_of(tmp_path / "whole"), random.Random(30), 0
    for trial in range(40):
        who, moment = trial % 2, chance.uniform(0, 9)
        job.start(2, 1, *RUN, *SPLIT, "--run-dir", "run")
        time.sleep(moment)
        before = [process.poll() for process in job.all]
        job.all[who].kill()
        began = time.monotonic()
        codes = job.wait(75)
        seconds = time.monotonic() - began
        print(trial, who, f"{moment:.1f} s", checkpoint_steps(tmp_path / "run")[-1:], codes, f"{seconds:.1f} s")
        if before == [None, None] and codes[1 - who] == 0:  # killed after the last meeting: the run is done
            assert checkpoint_steps(tmp_path / "run")[-1:] == [40]
        elif before == [None, None]:
            hit += 1
            assert codes[1 - who] == AGAIN, job.told(1 - who)
            assert f"process {who} " in job.told(1 - who)
            assert seconds < 60
        if checkpoint_steps(tmp_path / "run")[-1:] == [40]:
            assert files_of(tmp_path / "run") == whole
            shutil.rmtree(tmp_path / "run")
        if hit == 20:
            break
    assert hit == 20
    job.start(2, 1, *RUN, *SPLIT, "--run-dir", "run")
    assert job.wait(120) == [0, 0]
    assert files_of(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_sigstop_of_one_ends_all_within_the_timeout(job, tmp_path, text, who):
    job.start(2, 1, *RUN, *SPLIT, "--run-dir", "run")
    reached(tmp_path / "run", 5, job)
    job.all[who].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert job.wait(60, but=(who,))[1 - who] == AGAIN
    assert time.monotonic() - began < 50
    assert f"process {who} of 2 is lost: nothing was heard from it for 40 s" in job.told(1 - who)
    job.all[who].send_signal(signal.SIGCONT)
    assert job.wait(20)[who] == AGAIN  # it finds the other one gone


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.3, 2.5, 4.0])
def test_sigstop_at_the_start_or_while_restoring(job, tmp_path, text, moment):
    job.start(2, 1, *RUN, *SPLIT, "--run-dir", "run")
    reached(tmp_path / "run", 9, job)
    job.all[0].terminate()
    job.wait()
    job.start(2, 1, *RUN[:-1], "20", *SPLIT, "--run-dir", "run")
    time.sleep(moment)
    job.all[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert job.wait(60, but=(1,))[0] == AGAIN
    assert time.monotonic() - began < 25


@pytest.mark.slow
def test_a_process_that_starts_60_seconds_late_is_waited_for(job, tmp_path, text):
    def late(i: int) -> list[str]:
        time.sleep(60 * i)
        return []

    job.start(2, 1, *RUN[:-2], *SPLIT, "--run-dir", "run", each=late)
    assert job.wait(90) == [0, 0]


# ---- what goes wrong before the first step --------------------------------------------------------------------------


def test_an_error_that_all_have_is_told_once_and_one_of_another_process_by_it(job, tmp_path, text):
    """The mesh needs more devices than there are: both find that out. Then other settings, and other data."""
    job.start(2, 1, *RUN, "--mesh.data", "4", "--run-dir", "run")
    assert job.wait() == [2, 2]
    both = job.told(0) + job.told(1)
    assert both.count("mesh data=4 fsdp=1 tensor=1 needs 4 devices, but only 2 are visible") == 1
    assert "error: process " in both
    assert "Traceback" not in both


@pytest.mark.parametrize(
    ("each", "told"),
    [
        (lambda i: ["--train.seed", str(i)], "process 1: train.seed is 1 here, and 0 in process 0"),
        (lambda i: ["--run-dir", f"run{i}"], "process 1: --run-dir is run1 here, and run0 in process 0"),
        (lambda i: ["--overwrite"] * i, "process 1: --overwrite is True here, and False in process 0"),
    ],
)
def test_processes_with_other_settings_are_refused(job, tmp_path, text, each, told):
    job.start(2, 1, *RUN, *SPLIT, each=each)
    assert job.wait() == [2, 2]
    assert f"error: {told}" in job.told(1)
    assert "process 1 of 2 has ended; its own output says why" in job.told(0)
    assert not (tmp_path / "run0").exists()


@pytest.mark.long
def test_processes_with_other_data_or_another_file_system_are_refused(job, tmp_path, text):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "text.txt").write_text(TEXT[::-1], encoding="utf-8")
    job.start(2, 1, *RUN, *SPLIT, "--run-dir", str(tmp_path / "run"), folder=lambda i: "other" if i else "")
    assert job.wait() == [2, 2]
    assert "error: process 1: the data's fingerprint is" in job.told(1)
    assert not (tmp_path / "run").exists()
    job.start(2, 1, *RUN, *SPLIT, "--run-dir", "run", folder=lambda i: "other" if i else "")
    assert job.wait() == [2, 2]
    assert "error: process 1: --run-dir run is not there, but process 0 has it" in job.told(1)


BY_HAND = "--mesh.coordinator 127.0.0.1:{port} --mesh.num-processes 2 --mesh.timeout 1"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--mesh.coordinator here", "mesh.coordinator=here must be HOST:PORT (command line); for example 10.0.0.1:1234"),
        ("--mesh.coordinator :1234", "mesh.coordinator=:1234 must be HOST:PORT"),
        ("--mesh.coordinator a:b", "mesh.coordinator=a:b must be HOST:PORT"),
        ("--mesh.coordinator a:70000", "mesh.coordinator=a:70000 must be HOST:PORT"),
        ("--mesh.coordinator a:1 --mesh.processes auto", "mesh.coordinator=a:1 and mesh.processes=auto exclude each"),
        ("--mesh.coordinator a:1", "mesh.coordinator=a:1 needs mesh.num_processes and mesh.process_id, too"),
        ("--mesh.num-processes 2", "mesh.num_processes=2 needs mesh.coordinator=HOST:PORT, where process 0 listens"),
        ("--mesh.num-processes 0", "mesh.num_processes=0 must be at least 1"),
        ("--mesh.process-id 1", "mesh.process_id=1 must lie in 0 to 0: there are mesh.num_processes=1"),
        ("--mesh.coordinator a:1 --mesh.num-processes 2 --mesh.process-id 2", "mesh.process_id=2 must lie in 0 to 1"),
        ("--mesh.coordinator a:1 --mesh.num-processes 2 --mesh.process-id -1", "mesh.process_id=-1 must lie in 0 to 1"),
        ("--mesh.coordinator a:1 --mesh.num-processes 2 --mesh.process-id one", "mesh.process_id='one' must be a whole"),
        ("--mesh.timeout 0", "mesh.timeout=0.0 must lie in 1 to 86400 seconds"),
        ("--mesh.timeout 1e9", "mesh.timeout=1000000000.0 must lie in 1 to 86400 seconds"),
        ("--mesh.processes many", "mesh.processes='many' is not one of one, auto"),
        ("--mesh.coordinater a:1", "unknown setting mesh.coordinater (command line)\n       did you mean mesh.coordinator?"),
    ],
)  # fmt: skip
def test_wrong_input(tmp_path, monkeypatch, capsys, line, told):
    monkeypatch.chdir(tmp_path)
    refused(cli.door("train").main, f"--run-dir run {line}".format(port=free_port()), capsys, told)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_a_coordinator_that_does_not_answer_may_do_so_later(tmp_path, monkeypatch, capsys, host):
    """A scheduler may start the command again: process 0 was late, or is starting anew."""
    monkeypatch.chdir(tmp_path)
    place = f"--mesh.coordinator {host}:{free_port()} --mesh.num-processes 2 --mesh.process-id 1 --mesh.timeout 1"
    assert cli.guarded(cli.door("train").main, ["--run-dir", "run", *place.split()]) == AGAIN
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: mesh.coordinator={host}:" in err
    assert "process 0 did not answer within mesh.timeout=1 s (" in err


def test_auto_without_a_scheduler_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI", "TPU", "KUBERNETES", "CLOUD_TPU"))]:
        monkeypatch.delenv(name)
    told = refused(cli.door("train").main, "--run-dir run --mesh.processes auto", capsys)
    assert "mesh.processes=auto, but there is no Slurm, Open MPI, GKE or TPU VM that started this process" in told
    assert "--mesh.coordinator HOST:PORT --mesh.num-processes N --mesh.process-id I" in told


SLURM = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[07-08],a1", "SLURM_NTASKS": "16", "SLURM_PROCID": "9"}
OMPI = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1,10.1.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({**SLURM, "SLURM_LOCALID": "1"}, ("node07", 61441, 9, 16, [1])),
        ({**OMPI, "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, ("10.0.0.1", 61441, 3, 4, [1])),
        ({**SLURM, "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),  # alone: nothing is started
    ],
)
def test_auto_finds_slurm_and_open_mpi(monkeypatch, env, place):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = processes._place(config.MeshConfig(processes="auto"))
    assert place == (found and (found.host, found.port, found.number, found.count, found.devices))


def test_a_port_in_use_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = f"--run-dir run {BY_HAND} --mesh.process-id 0".format(port=port)
        refused(cli.door("train").main, line, capsys, f"{port}: process 0 cannot listen there", "choose another port")


# ---- the meeting alone ----------------------------------------------------------------------------------------------


MEMBER = """
import sys, time
from nanogpt_jax import cli
from nanogpt_jax.distributed.meeting import Hub, Member
def main(argv):
    port, number, count, name, seconds = int(argv[0]), int(argv[1]), int(argv[2]), argv[3], float(argv[4])
    hub = Hub("127.0.0.1", port, count, 20) if number == 0 else None
    member = Member("127.0.0.1", port, number, count, 20)
    print(member.meet("first", number))
    time.sleep(float(argv[5]) if len(argv) > 5 else 0)
    print(member.meet(name, number, seconds))
    member.leave()
    return 0
sys.exit(cli.guarded(main))
"""


def members(popen: Any, *lines: str) -> list[tuple[int, str, str]]:
    """The exit code and the two streams of processes that only meet."""
    port = str(free_port())
    started = [
        popen([sys.executable, "-c", MEMBER, port, *line.split()], stdout=-1, stderr=-1, text=True) for line in lines
    ]
    told = [process.communicate(timeout=30) for process in started]
    return [(process.returncode, *each) for process, each in zip(started, told, strict=True)]


def test_all_get_what_each_brings(popen):
    found = members(popen, *(f"{i} 3 second 9" for i in range(3)))
    assert found == [(0, "[0, 1, 2]\n[0, 1, 2]\n", "")] * 3


def test_who_does_not_come_is_named_and_all_end(popen):
    found = members(popen, "0 3 second 1", "1 3 other 9", "2 3 second 1")
    assert [code for code, _, _ in found] == [AGAIN] * 3
    for number, (_, _, told) in enumerate(found):
        assert told == (
            "error: process 1 of 3 did not reach 'second' within 1 s (mesh.timeout)\n"
            f"       process {number} ends with code 75; start all again, and the run goes on\n"
        )


STRANGERS = [
    ("1 3 a 9", "two processes have mesh.process_id=1; give each its own"),
    ("2 4 a 9", "mesh.num_processes=4 here, and 3 in process 0"),
]


def started(popen: Any, port: int, line: str) -> subprocess.Popen:
    command = [sys.executable, "-c", MEMBER, str(port), *line.split()]
    return popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("stranger", "told"), STRANGERS)
def test_a_wrong_process_at_the_start_ends_all(popen, stranger, told):
    port = free_port()
    run = [started(popen, port, line) for line in ("0 3 a 9", "1 3 a 9")]
    time.sleep(1)
    run.append(started(popen, port, stranger))
    errors = [process.communicate(timeout=20)[1] for process in run]
    assert [process.returncode for process in run] == [2, 2, 2]
    assert all(told in error for error in errors)


@pytest.mark.parametrize(("stranger", "told"), [*STRANGERS, ("0 3 a 9", "is process 0 running already?")])
@pytest.mark.long
def test_a_stranger_later_is_refused_and_the_run_goes_on(popen, stranger, told):
    port = free_port()
    run = [started(popen, port, line) for line in ("0 3 a 9", "1 3 a 9", "2 3 a 9 4")]  # the last one takes 4 s between
    time.sleep(2)
    odd = started(popen, port, stranger)
    assert told in odd.communicate(timeout=20)[1]
    assert odd.returncode == 2
    assert [process.communicate(timeout=20)[0] for process in run] == ["[0, 1, 2]\n[0, 1, 2]\n"] * 3


@pytest.mark.long
def test_who_waits_at_the_start_says_so(popen):
    port = free_port()
    late = started(popen, port, "1 2 a 9")
    time.sleep(7)
    first = started(popen, port, "0 2 a 9")
    assert f"waiting for process 0 at 127.0.0.1:{port} (Connection refused)" in late.communicate(timeout=20)[1]
    assert first.communicate(timeout=20)[1] == ""


def test_words_that_are_no_messages_disturb_nobody():
    port = free_port()
    hub = meeting.Hub("127.0.0.1", port, 1, 20)
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": "x", "of": 1}\n', b"{}\n", b"\xff" * 3000000):
        with socket.create_connection(("127.0.0.1", port)) as stranger, suppress(OSError):
            stranger.sendall(junk)
    member = meeting.Member("127.0.0.1", port, 0, 1, 20)
    assert member.meet("here", 7) == [7]
    member.leave()
    hub.close()
    end = time.monotonic() + 5
    while (left := [t for t in threading.enumerate() if t.name.startswith(runtime.SPARE)]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left  # a command that ends would not wait for them, and end its process at once
