"""The recipes for clusters: the script and the manifest are valid, and a job that is stopped or killed goes on.

No Slurm: `srun` and `scontrol` are stand-ins on the PATH. The processes that they start are real.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import kubernetes_validate
import numpy as np
import pytest
import yaml
from helpers import load, numbers

from nanogpt_jax import config
from nanogpt_jax.distributed.meeting import AGAIN
from nanogpt_jax.run.run_dir import checkpoint_steps

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "nanogpt_jax" / "distributed" / "recipes"
SCRIPT, MANIFEST = RECIPES / "slurm.sh", RECIPES / "jobset.yaml"
PAGE = RECIPES.parent / "README.md"

# srun, as far as slurm.sh uses it: N tasks with Slurm's variables; a signal goes to all; --wait seconds after the first
# has ended, the others are killed; the exit code is the highest, 128 + n for signal n.
SRUN = """
import os, signal, subprocess, sys, time
words = sys.argv[1:]
first = next(i for i, word in enumerate(words) if not word.startswith("-"))
options = dict(word.lstrip("-").split("=") for word in words[:first])
assert options["kill-on-bad-exit"] == "0", options
count = int(os.environ["SLURM_NTASKS"])
step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
place = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]
tasks = [subprocess.Popen(words[first:], env={**os.environ, **step, **place[i]}) for i in range(count)]
signal.signal(signal.SIGTERM, lambda number, frame: [task.send_signal(number) for task in tasks])
with open("tasks.new", "w") as f:
    print(os.getpid(), *[task.pid for task in tasks], file=f)
os.rename("tasks.new", "tasks")
while all(task.poll() is None for task in tasks):
    time.sleep(0.05)
end = time.monotonic() + int(options["wait"])
while any(task.poll() is None for task in tasks):
    if time.monotonic() > end:
        [task.kill() for task in tasks]
    time.sleep(0.05)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""
SCONTROL = """
import sys
with open("requeued", "a") as f:
    print(*sys.argv[1:], file=f)
"""
MODULE = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from nanogpt_jax.cli import main; sys.exit(main())"
SMALL = (
    "--model.n-layer 2 --model.n-head 2 --model.n-embd 32 --model.block-size 32 --train.batch-size 8 --train.steps 60 "
    "--train.eval-every 30 --train.save-every 10 --train.log-every 5 --train.steps-per-dispatch 1 --mesh.data -1 "
    "--mesh.timeout 60 --data.val-fraction 0.01"
).split()


class Cluster:
    """Runs slurm.sh as Slurm would, and the programs that it calls from a folder of our own."""

    def __init__(self, popen: Any, folder: Path, env: dict[str, str]):
        self._popen, self._folder, self._bin = popen, folder, folder / "bin"
        self._jobs: list[subprocess.Popen] = []
        self._bin.mkdir()
        self.command("srun", SRUN)
        self.command("scontrol", SCONTROL)
        self.command("nanogpt-jax", MODULE)
        # Slurm's port is made of the job's number: processes of one machine have different ones
        slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}
        self._env = {**env, **slurm, "PATH": f"{self._bin}:{env['PATH']}", "TF_CPP_MIN_LOG_LEVEL": "3"}

    def command(self, name: str, code: str) -> None:
        path = self._bin / name
        path.write_text(f"#!{sys.executable} -I\n{code}", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(self, *words: str, restarts: int = 0) -> subprocess.Popen:
        (self._folder / "tasks").unlink(missing_ok=True)
        count = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        with (self._folder / "log").open("w") as log:
            job = self._popen(
                ["bash", str(SCRIPT), *words],
                cwd=self._folder,
                env={**self._env, **count},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._jobs.append(job)
        return job

    def end(self, job: subprocess.Popen) -> int:
        """Waits for the end of a job -> its exit code."""
        return job.wait(150)

    def pids(self) -> list[int]:
        """Of srun, and of its tasks."""
        return [int(word) for word in (self._folder / "tasks").read_text().split()]

    def told(self) -> str:
        return (self._folder / "log").read_text(encoding="utf-8", errors="replace")

    def requeued(self) -> list[str]:
        path = self._folder / "requeued"
        return path.read_text().splitlines() if path.exists() else []

    def kill(self) -> None:
        for job in self._jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)


@pytest.fixture
def cluster(popen, tmp_path, clean_env) -> Iterator[Cluster]:
    cluster = Cluster(popen, tmp_path, clean_env)
    yield cluster
    cluster.kill()


def wait_until(true: Callable[[], Any], job: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not true():
        assert job.poll() is None, "ended too early"
        assert time.monotonic() < end
        time.sleep(0.02)


def check_goes_on(cluster: Cluster, folder: Path, job: subprocess.Popen, code: int) -> None:
    """After the interrupted `job`: requeued, and its second start ends as if there had been one."""
    assert cluster.end(job) == 0, cluster.told()
    assert f"code {code}, again" in cluster.told()
    assert cluster.requeued() == [f"requeue {os.getpid()}"]
    before = checkpoint_steps(folder / "run")[-1]
    assert 0 < before < 60
    assert cluster.end(cluster.start(*SMALL, "--run-dir", "run", restarts=1)) == 0, cluster.told()
    assert f"going on in run from step {before}:" in cluster.told()
    whole = cluster.start(*SMALL, "--run-dir", "whole")
    assert cluster.end(whole) == 0, cluster.told()
    assert len(cluster.requeued()) == 1
    assert numbers(folder / "run") == numbers(folder / "whole")
    for which in ("best", "latest"):
        (a, step), (b, same) = load(folder / "run", which), load(folder / "whole", which)
        assert step == same
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.long
def test_a_slurm_job_that_is_stopped_saves_and_goes_on_bit_for_bit(cluster, tmp_path):
    job = cluster.start(*SMALL, "--run-dir", "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, job)  # a step is done
    os.kill(cluster.pids()[0], signal.SIGTERM)  # Slurm's warning reaches every task
    check_goes_on(cluster, tmp_path, job, AGAIN)


@pytest.mark.slow
def test_a_slurm_job_of_which_a_task_is_killed_goes_on_bit_for_bit(cluster, tmp_path):
    job = cluster.start(*SMALL, "--run-dir", "run")
    wait_until(lambda: checkpoint_steps(tmp_path / "run"), job)
    os.kill(cluster.pids()[2], signal.SIGKILL)
    check_goes_on(cluster, tmp_path, job, 128 + signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True), (75, 49, True), (75, 50, False), (137, 0, True)],
)
def test_a_slurm_job_starts_again_if_that_helps_and_not_without_end(cluster, code, restarts, again):
    cluster.command("srun", f"raise SystemExit({code})")
    assert cluster.end(cluster.start(restarts=restarts)) == (0 if again else code)
    assert cluster.requeued() == ([f"requeue {os.getpid()}"] if again else [])


def test_shellcheck_finds_nothing():
    path = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert path
    found = subprocess.run([path, str(SCRIPT)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def options_of(script: str) -> dict[str, str]:
    """Its #SBATCH lines."""
    return dict((line.split("=", 1) + [""])[:2] for line in re.findall(r"^#SBATCH --(\S+)$", script, re.M))


def test_slurm_warns_the_processes_and_gives_each_of_them_sight_of_all_gpus():
    script = SCRIPT.read_text(encoding="utf-8")
    options = options_of(script)
    assert options["signal"].startswith("TERM@")  # without B:, which would warn the script alone
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert {"requeue", "open-mode"} <= set(options)
    assert not {"gpus-per-task", "gpu-bind"} & set(options)


def test_the_commands_of_the_recipes_are_understood(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    texts = SCRIPT.read_text(encoding="utf-8"), PAGE.read_text(encoding="utf-8")
    batch = [words for text in texts for words in re.findall(r"^[# ]*sbatch .*slurm\.sh (.*)$", text, re.M)]
    assert len(batch) == 3
    (within,) = re.findall(r'nanogpt-jax train "\$@" (.*) \|\|', texts[0])
    for words in batch:
        command = config.load([*shlex.split(words), *shlex.split(within)])
        assert command.cfg.mesh.processes == "auto"
    slice_ = re.findall(r'--worker=all --command="(?:.* && )?\S+ train\.py (.*)"$', texts[1], re.M)
    assert len(slice_) == 1
    assert config.load(shlex.split(slice_[0])).cfg.mesh.processes == "auto"


def test_the_manifest_fits_kubernetes_schema_and_jobsets_names():
    manifest = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(manifest["spec"]) == {"replicatedJobs"}  # no failurePolicy: a Job that fails ends it
    (jobs,) = manifest["spec"]["replicatedJobs"]
    assert set(jobs) == {"name", "template"}
    # what JobSet makes of it, checked against the schema of Kubernetes itself; a key that it does not know is an error
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **jobs["template"]}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)

    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    program, name, *flags = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["command"]]
    assert (program, name) == ("nanogpt-jax", "train")
    mesh = config.load(flags).cfg.mesh
    assert mesh.num_processes == spec["completions"] == spec["parallelism"]
    assert mesh.process_id == 1
    set_name = manifest["metadata"]["name"]
    host, _, port = mesh.coordinator.partition(":")
    assert host == f"{set_name}-{jobs['name']}-0-0.{set_name}"
    assert port.isdecimal()


def test_kubernetes_starts_a_pod_again_if_that_helps():
    """What podFailurePolicy says of an exit code: its first rule that fits, and else it counts."""
    spec = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    rules = [
        (rule["action"], rule["onExitCodes"]) for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    ]
    assert {(on["containerName"], on["operator"]) for _, on in rules} == {(container["name"], "In")}

    def action(code: int) -> str:
        return next((action for action, on in rules if code in on["values"]), "Count")

    assert [action(code) for code in (AGAIN, 1, 2, 137)] == ["Ignore", "FailJob", "FailJob", "Count"]
    assert spec["backoffLimit"] > 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # or there is no podFailurePolicy
