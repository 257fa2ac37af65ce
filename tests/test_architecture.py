"""The rooms and their walls: who may import whom, as data, and read from the code's own imports."""

import ast
import functools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nanogpt_jax import cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nanogpt_jax"

# room -> the other rooms it may import. The doors at the top may import anything.
MAY_IMPORT = {
    "host": set(),
    "config": {"host"},
    "model": {"config"},
    "data": {"config", "host"},
    "distributed": {"config", "host"},
    "run": {"config", "host", "model", "data", "distributed"},
    "training": {"config", "host", "model", "data", "distributed", "evaluation", "run", "normal"},
    "inference": {"config", "host", "model", "data"},
    "evaluation": {"config", "host", "model", "data", "inference", "distributed"},
    "interop": {"config", "host", "model", "data"},
    "classify": {"config", "host", "model", "data", "distributed", "run", "training"},
    "pages": set(),
    "planning": {"config", "host", "model", "distributed", "training"},
    "comparing": {"config", "host", "run", "evaluation"},
    "sweeping": {"config", "host", "model", "data", "distributed", "evaluation", "run", "training"},
    "replaying": {"config", "host", "model", "data", "distributed", "run", "training", "evaluation"},
    "normal": {"config", "host", "run"},
    "lesson": set(),
    "bench": {"config", "host", "cli", "model", "data", "distributed", "training", "inference"},
    "commands": {
        *("config", "host", "cli", "model", "data", "distributed", "run", "training", "inference", "evaluation"),
        *("interop", "classify", "pages", "planning", "comparing", "sweeping", "replaying", "normal", "api"),
    },
    "cli": {"config", "host"},
    "api": {"config", "host", "cli", "model", "data", "distributed", "run", "inference", "evaluation"},
    "__main__": {"cli"},
    "__init__": {"api", "host"},
}
# what one `rm -r` removes: the room, with the commands beside it, if it has any
SLICES = {
    "bench": [],
    "classify": ["commands/classify.py"],
    "interop": ["commands/huggingface.py"],
    "comparing": ["commands/compare.py"],
    "lesson": [],
    "pages": ["commands/attend.py", "commands/report.py"],
    "planning": ["commands/plan.py"],
    "sweeping": ["commands/sweep.py"],
    "replaying": ["commands/replay.py"],
    "normal": ["commands/normal.py"],
}
# files that use a slice if it is there, and stay without it
DO_WITHOUT = {
    "pages": ["commands/compare.py", "commands/sweep.py"],
    "normal": ["commands/compare.py", "commands/report.py", "training/loop.py"],
}
REMOVED = {room for room in SLICES if not (PACKAGE / room).exists()}
PURE = [
    *("model", "training/step.py", "training/state.py", "training/optim.py", "training/spikes.py"),
    *("distributed/sharding.py", "inference/generate.py"),
]
IMPURE_NAMES = {"print", "open", "input"}
IMPURE_MODULES = {"time", "os", "sys", "pathlib", "json", "logging", "random", "datetime", "shutil", "socket"}
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "nanogpt_jax", "configs", "train.py", "sample.py", "tests"}


def modules_of(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@functools.cache
def imported(path: Path) -> list[str]:
    """Every module that a file imports, wherever the import stands: "nanogpt_jax.model.gpt2"."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


ROOMS = sorted({room_of(p) for p in modules_of(PACKAGE)})


def test_every_room_is_in_the_table():
    assert set(ROOMS) == set(MAY_IMPORT) - REMOVED


def was_removed(path: Path) -> bool:
    """Whether a slice went and took this along."""
    gone = [PACKAGE / part for room in REMOVED for part in (room, *SLICES[room])]
    return any(path.resolve().is_relative_to(part) for part in gone)


def test_a_slice_is_known_to_its_command_alone_and_goes_with_it():
    for path in modules_of(PACKAGE):
        place = path.relative_to(PACKAGE).as_posix()
        assert not was_removed(path), f"{place} goes with its slice"
        for room, commands in SLICES.items():
            known = [name for name in imported(path) if f"{name}.".startswith(f"nanogpt_jax.{room}.")]
            assert not known or room_of(path) == room or place in (*commands, *DO_WITHOUT.get(room, [])), (
                f"{place} imports {known[0]}"
            )


def test_a_command_imports_no_other_one():
    for path in modules_of(PACKAGE / "commands"):
        assert not [name for name in imported(path) if name.startswith("nanogpt_jax.commands")], path


def test_the_table_of_commands_has_each_file_of_commands_and_each_is_there():
    places = {PACKAGE / f"{module.replace('.', '/')}.py" for _, module, _ in cli.COMMANDS.values() if "." in module}
    assert [path for path in places if not path.is_file() and not was_removed(path)] == []
    assert {path for path in (PACKAGE / "commands").glob("*.py") if path.stem != "__init__"} <= places


@pytest.mark.parametrize("room", ROOMS)
def test_walls(room):
    for path in [p for p in modules_of(PACKAGE) if room_of(p) == room]:
        for name in imported(path):
            package, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if package == "nanogpt_jax" and other in MAY_IMPORT and other != room:
                assert other in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {name}"


def test_only_checkpoint_imports_orbax_and_only_the_model_and_the_state_import_flax():
    for path in modules_of(PACKAGE):
        names = {name.split(".")[0] for name in imported(path)}
        assert "orbax" not in names or path.name == "checkpoint.py", path
        assert "flax" not in names or room_of(path) == "model" or path.name == "state.py", path
        assert "lm_eval" not in names or path.name == "lm_eval_adapter.py", path  # an extra
        assert "torch" not in names or room_of(path) in ("bench", "interop"), path


# What can run code that stands in a file, and in which files it is meant.
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "builtins"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
FUNCTIONS = {"os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load"}
METHODS = {"import_module", "exec_module", "CDLL", "TaskManager"}
FLAGS = {"shell", "allow_pickle", "trust_remote_code"}
MEANT = {
    "nanogpt_jax/cli.py": {"exec_module", "import_module"},  # the table of commands, train.py and sample.py
    "nanogpt_jax/commands/plan.py": {"compile"},  # the name of a flag
    "nanogpt_jax/bench/worker.py": {"import_module"},  # our own torch_peer.py, if torch is there
    "nanogpt_jax/host/memory.py": {"CDLL"},  # the C library of this process
    "nanogpt_jax/distributed/processes.py": {"CDLL"},  # the same, for a handler of SIGABRT
    "nanogpt_jax/inference/native.py": {"CDLL"},  # our own decode.c, as compiled by this user
    "nanogpt_jax/evaluation/lm_eval_adapter.py": {"TaskManager"},  # the tasks in --include-path may name Python code
}


def runs_code(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found |= {node.id} & (BUILTINS | METHODS)
        elif isinstance(node, ast.Attribute):
            found |= {node.attr} & METHODS | {ast.unparse(node)} & FUNCTIONS
        elif isinstance(node, ast.keyword):
            found |= {node.arg} & FLAGS
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module).split(".")[0]} & MODULES
            found |= {alias.name for alias in node.names} & METHODS
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & FUNCTIONS
    return found


def test_nothing_runs_what_a_stranger_sent():
    files = [*modules_of(PACKAGE), ROOT / "train.py", ROOT / "sample.py"]
    found = {path.relative_to(ROOT).as_posix(): runs_code(path.read_text(encoding="utf-8")) for path in files}
    meant = {place: names for place, names in MEANT.items() if not was_removed(ROOT / place)}
    assert {place: names for place, names in found.items() if names} == meant


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from marshal import loads", "import joblib.memory", "eval(x)", "exec(x)", "f = compile"),
        *("os.system(x)", "from os import popen", "torch.load(x)", "yaml.load(x)", "subprocess.run(x, shell=True)"),
        *("np.load(x, allow_pickle=True)", "load_dataset(x, trust_remote_code=True)", "spec.loader.exec_module(m)"),
        *("importlib.import_module(x)", "ctypes.CDLL(x)", "from lm_eval.tasks import TaskManager"),
    ],
)
def test_what_would_run_it_is_seen(source):
    assert runs_code(source)


def test_settings_are_read_without_jax():
    for room in ("config", "cli", "host"):
        for path in [p for p in modules_of(PACKAGE) if room_of(p) == room]:
            assert not {n.split(".")[0] for n in imported(path)} & {"jax", "flax", "optax", "orbax"}, path


def test_an_import_changes_nothing_of_another_module():
    """No function of one is called for its effect at the top of a file, and none of its names is set."""
    for path in modules_of(PACKAGE):
        body = [] if path.name == "__main__.py" else ast.parse(path.read_text(encoding="utf-8")).body
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        theirs = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
        for node in body:
            changed = (
                node.targets if isinstance(node, ast.Assign) else [node.value] if isinstance(node, ast.Expr) else []
            )
            for x in [x for x in changed if isinstance(x, ast.Attribute | ast.Subscript | ast.Call)]:
                assert ast.unparse(x).partition(".")[0] not in theirs, f"{path}:{node.lineno}"


@pytest.mark.parametrize("place", PURE)
def test_pure_rooms_do_no_io(place):
    for path in modules_of(PACKAGE / place):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not called & IMPURE_NAMES, path
        assert not {name.split(".")[0] for name in imported(path)} & IMPURE_MODULES, path


def test_the_top_level_is_fixed():
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # an unpacked source archive
        names = {p.name for p in ROOT.iterdir()}
    else:
        names = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {n for n in names if not n.startswith(".")} <= TOP_LEVEL


def test_the_doors_fit_on_a_screen():
    for name in ("train.py", "sample.py"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 80, name


def test_a_wheel_brings_every_file_and_runs_without_the_repository(tmp_path, clean_env):
    """pip install of it: the commands, train.py and sample.py as commands, and the configurations by their names."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    for path in [
        p
        for p in PACKAGE.rglob("*")
        if p.is_file() and p.suffix in (".py", ".c", ".md", ".css", ".js", ".html", ".json", ".sh", ".yaml")
    ]:
        assert (site / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), path
    command = [sys.executable, "-m", "nanogpt_jax", "train", "shakespeare_char", "--print-config"]
    env = {**clean_env, "PYTHONPATH": str(site)}
    printed = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert "shakespeare_char.toml" in printed
    subprocess.run([*command[:3], "sample", "--help"], cwd=tmp_path, env=env, capture_output=True, check=True)
