"""Runs as a comparison sees them, read from their files alone: no jax, no checkpoint, a few milliseconds each."""

import glob
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_jax import config
from nanogpt_jax.config import Config, UserError, parse, settings
from nanogpt_jax.host import files, messages, terminal
from nanogpt_jax.run import metrics, origin
from nanogpt_jax.run.opened import existing
from nanogpt_jax.run.run_dir import IMPORTED, LOCK, PAGES

try:
    import fcntl
except ImportError:  # Windows has no such locks: a run that is training there counts as stopped
    fcntl = None

# What decides how a run ends, but for its seed: its steps too, as the schedule ends with them; not how it was computed.
RECIPE = frozenset(settings.types_of()) - (Config.EXECUTION - {"train.steps"}) - {"train.seed"}
DATA, EXTENDED, UNKNOWN = "data.fingerprint", "extended", "not recorded"  # said beside the settings
NATS, BITS = "nats a token", "bits a byte"
LARGEST_STEP = 2**53
PAGE = "compare.html"
# what our own commands leave beside runs: passed over in silence
OURS = (PAGE, *PAGES, LOCK, "sweep.json", "sweep.csv", "sweep.html", "best.toml")

Curve = list[tuple[int, float]]  # (step, value), steps ascending


@dataclass(frozen=True)
class Run:
    path: Path
    name: str  # the path, safe to print and to put into a page
    settings: dict[str, Any]  # every one, with DATA and EXTENDED
    recipe: str  # equal for runs that differ in their seed alone
    text: str  # equal for equal validation texts, whatever the tokenizer
    tokenizer: str  # equal for equal tokenizers
    state: str  # finished, running, stopped, diverged, imported, or without metrics
    step: int  # the last one in the metrics
    validation: dict[str, Curve]  # NATS and BITS -> of the whole validation split
    training: Curve  # nats a token, of single batches
    clock: Curve  # seconds of training until a step
    notes: tuple[str, ...]  # what was not read

    @property
    def seed(self) -> int:
        return self.settings["train.seed"]

    @property
    def tokens_per_step(self) -> int:
        return self.settings["train.batch_size"] * self.settings["model.block_size"]

    @property
    def speed(self) -> float | None:
        """Tokens a second of training; None if it logged no speed."""
        return self.clock[-1][0] * self.tokens_per_step / self.clock[-1][1] if self.clock else None

    def final(self, unit: str) -> float | None:
        """The validation loss at the last step; None if the run did not get there."""
        return self.validation[unit][-1][1] if self.state == "finished" and self.validation[unit] else None

    def best(self, unit: str) -> tuple[int, float] | None:
        """(step, validation loss) of its best evaluation; None without one."""
        return min(self.validation[unit], key=lambda point: point[1], default=None)

    def seconds(self, step: int) -> float | None:
        """Seconds of training until `step`, between and beyond two lines of metrics at their speed."""
        before = (0, 0.0)
        for after in self.clock:
            if after[0] >= step or after is self.clock[-1]:
                return before[1] + (step - before[0]) * (after[1] - before[1]) / (after[0] - before[0])
            before = after
        return None


def find(words: list[str]) -> tuple[list[Run], dict[str, str]]:
    """The runs that `words` name, paths or patterns, and what else they name: its name -> why it is left out.

    A shell turns an unquoted pattern into paths, so both are treated alike. UserError if a path does not exist, if a
    pattern matches nothing, or if fewer than two runs are found.
    """
    runs: list[Run] = []
    left_out: dict[str, str] = {}
    seen: dict[str, str] = {}  # the real path -> how it was typed
    for word in words:
        is_pattern = glob.has_magic(word) and not os.path.lexists(word)
        paths = sorted(glob.glob(word)) if is_pattern else [word]
        if not paths:
            raise UserError(f"nothing matches {word}{_nearby(word)}")
        for path in map(Path, paths):
            name, real = shown(path), os.path.realpath(path)
            if not is_pattern and not os.path.lexists(path):
                existing(path)  # says what there is instead
            if _is_ours(path):
                continue
            if real in seen:
                if name not in left_out and (name != seen[real] or not is_pattern):
                    left_out[name] = "named twice" if name == seen[real] else f"the same run as {seen[real]}"
                continue
            seen[real] = name
            try:
                if why := _not_wanted(path):
                    left_out[name] = why
                else:
                    runs.append(read(path))
            except (UserError, OSError) as e:
                left_out[name] = messages.first_line(e)
    if len(runs) < 2:
        found = "no run was" if not runs else f"only {runs[0].name} was"
        reasons = "".join(f"\n       left out: {name}: {why}" for name, why in left_out.items())
        raise UserError(f"two or more runs are needed, but {found} found{reasons}")
    return runs, left_out


def shown(path: Path) -> str:
    """A path as one line that can be printed: control characters and bytes that are not UTF-8 are escaped."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    return terminal.visible(text).replace("\n", "\\n").replace("\t", "\\t")


def read(path: Path) -> Run:
    """UserError if it is not a language model's run, or damaged."""
    cfg = config.read_json(existing(path) / "config.json")
    rows, notes = _rows(path)
    training, nats, bits = (_points(rows, key) for key in ("train/loss", "val/loss", "val/bits_per_byte"))
    broke = [(row["step"], 0.0) for row in rows if row.get(metrics.DIVERGED)]
    step = max([at for curve in (training, nats, bits, broke) for at, _ in curve], default=0)
    data, found = _data(path), dict(settings.items(cfg))
    found[DATA] = data.get("fingerprint", UNKNOWN)[:16]
    found[EXTENDED] = origin.read(path).get("extended", [])
    return Run(
        path, shown(path), found, _recipe(found), _text(data), _tokenizer(data, cfg),
        _state(path, cfg.train.steps, rows, nats), step, {NATS: nats, BITS: bits}, training,
        _clock(rows, cfg.train.batch_size * cfg.model.block_size), tuple(notes),
    )  # fmt: skip


# ---- what a path is --------------------------------------------------------------------------------------------------


def _is_ours(path: Path) -> bool:
    return path.name in OURS and files.kind_of(path) == "file"


def _not_wanted(path: Path) -> str:
    """Why `path` is left out of a comparison, "" if it is not."""
    if os.path.lexists(path / "config.json"):
        is_one = _holds(parse.is_classifier, path)
        return f"a classifier; measure it: {config.program('classify eval')} {config.word(path)}" if is_one else ""
    if any(path.glob("*/config.json")):
        return f"a folder of runs; compare them: {config.program('compare')} {config.quoted(f'{path}/*')}"
    return "no run, as it has no config.json" if path.is_dir() else "not a folder"


def _holds(test: Any, path: Path) -> bool:
    try:
        return test(path)
    except UserError:  # damaged: `read` says so
        return False


def _nearby(pattern: str) -> str:
    """Where a pattern's folder ends to exist."""
    folder = Path(pattern).parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return "" if folder.is_dir() else f"\n       there is no folder {folder}"


def _state(path: Path, steps: int, rows: list[dict[str, Any]], nats: Curve) -> str:
    if nats and nats[-1][0] >= steps:
        return "finished"
    if _is_training(path):
        return "running"
    if any(row.get(metrics.DIVERGED) for row in rows):
        return "diverged"
    if rows:
        return "stopped"
    return "imported" if os.path.lexists(path / IMPORTED) else "without metrics"


def _is_training(path: Path) -> bool:
    """Whether a process holds the run's lock. Asking takes it too, shared and for a moment, and changes nothing."""
    if fcntl is None:
        return False
    try:
        file = os.open(path / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as e:
        return isinstance(e, BlockingIOError)
    finally:
        os.close(file)
    return False


# ---- its settings and its data ---------------------------------------------------------------------------------------


def _recipe(found: dict[str, Any]) -> str:
    """What runs of one group share. Equal data is equal wherever it lay and however it was spelt."""
    keys = RECIPE if found[DATA] == UNKNOWN else {key for key in RECIPE if not key.startswith("data.")}
    return json.dumps({key: found[key] for key in sorted({*keys, DATA, EXTENDED})}, sort_keys=True)


def _data(path: Path) -> dict[str, Any]:
    """data.json, {} if it is missing or damaged, as no loss depends on it."""
    try:
        found = json.loads(files.read(path / "data.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("fingerprint"), str) else {}


def _text(data: dict[str, Any]) -> str:
    """Equal for equal validation texts, as far as data.json can tell: the source's hash, and where it was cut."""

    def one(part: dict[str, Any]) -> Any:
        source = part.get("source")
        facts = source if isinstance(source, dict) else {"?": data.get("fingerprint")}
        sizes = part.get("val")
        known = facts.get("sha256") or {key: value for key, value in facts.items() if key != "path"}
        return [known, part.get("val_fraction"), sizes.get("bytes") if isinstance(sizes, dict) else None]

    if not data:
        return UNKNOWN
    parts = data.get("mixture")
    several = list(parts.values()) if isinstance(parts, dict) else [data]
    return json.dumps([one(part) for part in several if isinstance(part, dict)], sort_keys=True, default=str)


def _tokenizer(data: dict[str, Any], cfg: Config) -> str:
    """Its fingerprint; without one, what the settings say of it."""
    parts = data.get("mixture")
    for part in [data, *(parts.values() if isinstance(parts, dict) else ())]:
        found = part.get("tokenizer") if isinstance(part, dict) else None
        if isinstance(found, dict) and isinstance(found.get("fingerprint"), str):
            return found["fingerprint"]
    return f"{cfg.data.tokenizer} of {cfg.model.vocab_size}"


# ---- its metrics -----------------------------------------------------------------------------------------------------


def _rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl in the order of their steps, and what of it could not be read."""
    place = path / "metrics.jsonl"
    try:
        rows = metrics.read_metrics(place)
        lines = [line for line in files.read(place).splitlines() if line.strip()] if place.exists() else []
    except OSError as e:
        return [], [f"cannot read metrics.jsonl: {e.strerror or e}"]
    good = [row for row in rows if type(row["step"]) is int and 0 <= row["step"] <= LARGEST_STEP]
    damaged = len(lines) - len(good)
    notes = [f"{damaged} damaged line{'s' * (damaged > 1)} of metrics.jsonl left out"] if damaged else []
    return sorted(good, key=lambda row: row["step"]), notes


def _points(rows: list[dict[str, Any]], key: str) -> Curve:
    return list({row["step"]: value for row in rows if (value := _number(row.get(key))) is not None}.items())


def _number(value: Any) -> float | None:
    """A finite number; None for anything else that JSON can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _clock(rows: list[dict[str, Any]], tokens_per_step: int) -> Curve:
    """Seconds of training until each logged step, from the tokens a second of each stretch of steps between two lines.

    The metrics hold no time. Their speed leaves out compiling and evaluating, and so do these seconds.
    """
    clock: Curve = []
    step, seconds = 0, 0.0
    for at, speed in _points(rows, "tokens_per_second"):
        if speed > 0 and at > step:
            step, seconds = at, seconds + (at - step) * tokens_per_step / speed
            clock.append((step, seconds))
    return clock
