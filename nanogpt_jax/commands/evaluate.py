"""nanogpt-jax eval: measures a run on a whole text or on items with an answer, or compares two runs."""

import contextlib
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanogpt_jax import cli, config
from nanogpt_jax.config import UserError, command_line
from nanogpt_jax.config.command_line import COUNT, CommandLine, flag
from nanogpt_jax.data import batches, corpora
from nanogpt_jax.data.corpus import Corpus
from nanogpt_jax.data.dataset import encode, open_data
from nanogpt_jax.data.tokenizer import UnknownText
from nanogpt_jax.evaluation import statistics
from nanogpt_jax.evaluation.statistics import Estimate
from nanogpt_jax.host import files, terminal
from nanogpt_jax.run.opened import Run, newest, open_run

CLEAR = 2.0  # standard errors from which on a difference is called clear


@dataclass(frozen=True)
class Options(command_line.Options):
    data: str | None = flag(
        "SOURCE",
        "any source that train.py takes, read with the run's tokenizer (default: the data of the run)",
        heading="The loss of a whole text: nats a token, perplexity and bits per byte, each with its standard error:",
    )
    field: str | None = flag(
        "NAME", "the column with the text of --data, in rows of .jsonl, .csv, .parquet and the hub (default: text)"
    )
    split: Literal["val", "train"] | None = flag("", "which part of the run's own data (default: val)")
    stride: int = flag(
        "N",
        "windows begin N tokens apart, so that each token is predicted from at least block_size - N tokens before it; "
        "smaller is better and slower (default: block_size, windows side by side)",
        0,
        must=COUNT,
    )
    batch_size: int = flag(
        "N",
        "windows in a call for each device; no figure depends on it (default: by their length)",
        0,
        must=COUNT,
    )
    choices: str | None = flag(
        "FILE",
        'multiple choice: {"ctx", "endings", "label"} as in HellaSwag, or {"query", "choices", "gold"}',
        heading="Items with an answer, one JSON object a line, or hf:NAME[:CONFIG[:SPLIT]] from the Hugging Face hub:",
    )
    last_word: str | None = flag("FILE", 'the last word of each {"text"}, as in LAMBADA')
    lm_eval: str | None = flag(
        "TASKS", "tasks of lm-evaluation-harness, with commas (needs pip install 'nanogpt-jax[lm-eval]')"
    )
    include_path: str | None = flag(
        "DIR", "where lm-eval looks for your own tasks; they may name Python code, which it runs"
    )
    checkpoint: str = flag("WHICH", "best, latest or a step", "best", heading="With either:")
    json: str | None = flag("FILE", "write all figures, with every digit, as JSON")

    @property
    def tasks(self) -> list[str]:
        return self.lm_eval.split(",") if self.lm_eval else []

    @property
    def wants_loss(self) -> bool:
        """The loss is measured unless something else is asked for."""
        return bool(self.data or self.split) or not (self.choices or self.last_word or self.lm_eval)


COMMAND = CommandLine(
    "eval",
    Options,
    "Measures a run. With OTHER, measures both on the same text and says which one is better.",
    {"[RUN]": "a run directory (default: the newest in runs/)", "[OTHER]": "another one, to compare"},
    after="A standard error says how far a figure would move on another text of this kind. It treats stretches of text "
    "(or items) as independent, but not tokens, as neighbours resemble each other. It does not cover another seed of "
    "the same recipe.",
)


@dataclass(frozen=True)
class Text:
    """A text as one run reads it."""

    name: str
    tokens: np.ndarray  # [N]
    n_bytes: int


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(COMMAND.help())
        return 0
    return run(read(argv))


def run(asked: Options) -> int:
    runs = [open_run(Path(word)) for word in asked.words] or [open_run(newest(Path("runs")))]
    _check_places(asked)
    for run in runs:
        if asked.stride > run.cfg.model.block_size:
            raise UserError(f"--stride={asked.stride} exceeds block_size={run.cfg.model.block_size} of {run.path}")
    texts = _texts(asked, runs) if asked.wants_loss else []
    tasks = _lm_eval_tasks(asked) if asked.lm_eval else None  # fails now, and not after minutes

    from nanogpt_jax.evaluation import multiple_choice  # jax takes seconds, so only now

    choices = multiple_choice.read_choices(asked.choices) if asked.choices else []
    words = multiple_choice.read_last_words(asked.last_word) if asked.last_word else []
    columns: list[dict[str, Any]] = []
    scores: list[dict[str, np.ndarray]] = []  # for each run: metric -> a figure for each token or item
    for i, run in enumerate(runs):
        model, step = load(run, asked.checkpoint)
        column: dict[str, Any] = {"run": str(run.path), "step": step}
        found: dict[str, np.ndarray] = {}
        if texts:
            found["nats"] = _nats(model, texts[i], asked, f"loss of {run.path}")
            column["loss"] = _loss(found["nats"], texts[i], run.cfg.model.block_size, asked.stride)
        if choices:
            found |= _prefixed(
                "choices", multiple_choice.score_choices(model, choices, _track(f"choices of {run.path}"))
            )
            column["choices"] = _choices(found, asked.choices)
        if words:
            found |= _prefixed(
                "words", multiple_choice.score_last_words(model, words, _track(f"last words of {run.path}"))
            )
            column["last_word"] = _last_word(found, asked.last_word)
        if tasks:
            column["lm_eval"] = _lm_eval(model, tasks, run.path)
        _print(column)
        columns.append(column)
        scores.append(found)
    result: dict[str, Any] = {"runs": columns}
    if len(runs) == 2:
        result["differences"] = _differences(runs, texts, scores)
        for difference in result["differences"]:
            print(difference["words"])
    if asked.json:
        cli.write_file("--json", asked.json, json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")
    return 0


# ---- the command line -----------------------------------------------------------------------------------------------


def read(argv: list[str]) -> Options:
    """The command line; UserError if it is invalid. No jax here."""
    asked = COMMAND.read(argv)
    if len(asked.words) > 2:
        raise UserError(f"one run, or two to compare, but got {', '.join(asked.words)}")
    for one in fields(asked):
        if getattr(asked, one.name) == "":
            raise UserError(f"{command_line.flag_of(one.name)} is empty")
    if asked.split and asked.data:
        raise UserError("--split is a part of the run's own data; of --data the whole text is measured: leave one out")
    if asked.field and not asked.data:
        raise UserError("--field says how to read --data, which is not given")
    if asked.include_path and not asked.lm_eval:
        raise UserError("--include-path is where --lm-eval looks for tasks; name a task too")
    if asked.lm_eval and len(asked.words) == 2:
        raise UserError("--lm-eval measures one run at a time; leave the other one out")
    if (asked.stride or asked.batch_size) and not asked.wants_loss:
        raise UserError("--stride and --batch-size are about the loss of a text; add --data or --split")
    return asked


def _check_places(asked: Options) -> None:
    if asked.include_path and not Path(asked.include_path).is_dir():
        raise UserError(f"--include-path={asked.include_path} is not a directory")
    if asked.json:
        cli.check_file("--json", asked.json)


# ---- runs and texts -------------------------------------------------------------------------------------------------


def load(run: Run, checkpoint: str = "best"):
    """The run as an `evaluation.likelihood.Model` on all devices that are visible, and the checkpoint's step."""
    import jax

    from nanogpt_jax.distributed.mesh import make_mesh
    from nanogpt_jax.distributed.sharding import shard
    from nanogpt_jax.evaluation.likelihood import Model
    from nanogpt_jax.evaluation.loss import for_scoring

    params, step = run.load(checkpoint)
    mesh = make_mesh(config.MeshConfig(data=-1))
    params = jax.device_put(params, shard(mesh))
    return Model(for_scoring(run.cfg.model, jax.default_backend()), params, run.tokenizer, mesh), step


def _texts(asked: Options, runs: list[Run]) -> list[Text]:
    """The text as each run reads it. UserError unless both are the same text."""
    if asked.data:
        corpus = _read(asked.data, asked.field or "text")
        return [_given_text(asked.data, corpus, run) for run in runs]
    texts = [_own_text(run, asked.split or "val") for run in runs]
    if len(runs) == 2 and _bytes(runs[0], texts[0]) != _bytes(runs[1], texts[1]):
        raise UserError(
            f"the texts of {runs[0].path} ({texts[0].name}) and {runs[1].path} ({texts[1].name}) differ; "
            "give one for both with --data, from which neither has learned"
        )
    return texts


def _read(source: str, field: str) -> Corpus:
    with _named_as_here():
        return corpora.read(source, field=field)


def _given_text(source: str, corpus: Corpus, run: Run) -> Text:
    """A text by --data, encoded as training would."""
    with _named_as_here():
        try:
            tokens, n_bytes = encode(corpus, run.tokenizer)
        except UnknownText as e:
            raise UserError(f"--data={source} cannot be read with the tokenizer of {run.path}: {e}") from None
    if len(tokens) < 2:
        raise UserError(f"--data={source} has {len(tokens)} tokens; at least 2 are needed to predict one")
    return Text(source, tokens, n_bytes)


@contextlib.contextmanager
def _named_as_here() -> Iterator[None]:
    """Renames settings in errors about --data."""
    try:
        yield
    except UserError as e:
        ours = {"--data.source=": "--data=", "data.source=": "--data=", "--data.field=": "--field="}
        raise UserError(functools.reduce(lambda text, name: text.replace(name, ours[name]), ours, str(e))) from None


def _own_text(run: Run, split: str) -> Text:
    """A split of the run's own data; UserError if it is no longer available or has changed."""
    other = "to measure it on another text: --data FILE"
    path = run.path / "data.json"
    try:
        fingerprint = json.loads(files.read(path))["fingerprint"]
    except FileNotFoundError:
        raise UserError(
            f"{run.path} does not say what it was trained on: {path.name} is missing\n       {other}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e})\n       {other}") from None
    try:
        data = open_data(run.cfg.data)
    except UserError as e:
        raise UserError(f"the data of {run.path} is unavailable: {e}\n       {other}") from None
    if data.fingerprint != fingerprint:
        raise UserError(
            f"the data of {run.path} has changed: {run.cfg.data.title} gives other tokens now than it was trained on\n"
            f"       bring the old text back; {other}"
        )
    tokens = data.val if split == "val" else data.train
    if isinstance(tokens, batches.Mixture):
        tokens = np.concatenate(tokens.parts)
    return Text(f"{run.cfg.data.title} ({split})", tokens, data.manifest[split]["bytes"])


def _bytes(run: Run, text: Text) -> bytes:
    """The text itself, without end-of-text tokens."""
    tokens = text.tokens
    if run.tokenizer.end_of_text is not None:
        tokens = tokens[tokens != run.tokenizer.end_of_text]
    return run.tokenizer.decode_bytes(tokens)


# ---- figures --------------------------------------------------------------------------------------------------------


def _nats(model: Any, text: Text, asked: Options, what: str) -> np.ndarray:
    from nanogpt_jax.evaluation.loss import token_nats

    T = model.cfg.block_size
    return token_nats(
        model.score, model.params, text.tokens, model.mesh,
        block_size=T, stride=asked.stride, batch_size=asked.batch_size, track=_track(what),
    )  # fmt: skip


def _loss(nats: np.ndarray, text: Text, block_size: int, stride: int) -> dict[str, Any]:
    starts = statistics.stretches(len(nats), block_size)
    counts = np.diff(np.append(starts, len(nats)))
    loss = statistics.ratio(statistics.sums_between(nats, starts), counts)
    from nanogpt_jax.evaluation.loss import summary

    same = summary(nats, text.n_bytes)  # as training measures it
    return {
        "text": text.name,
        "tokens": len(nats),
        "bytes": text.n_bytes,
        "block_size": block_size,
        "stride": stride or block_size,
        "stretches": len(starts),
        "nats_per_token": Estimate(same["loss"], loss.error),
        "perplexity": Estimate(same["perplexity"], loss.scaled(same["perplexity"]).error),
        "bits_per_byte": Estimate(same["bits_per_byte"], loss.scaled(len(nats) / math.log(2) / text.n_bytes).error),
    }


def _choices(found: dict[str, np.ndarray], source: str | None) -> dict[str, Any]:
    return {
        "source": source,
        "items": len(found["choices acc"]),
        "acc": statistics.mean(found["choices acc"]),
        "acc_norm": statistics.mean(found["choices acc_norm"]),
    }


def _last_word(found: dict[str, np.ndarray], source: str | None) -> dict[str, Any]:
    nats = statistics.mean(found["words nats"])
    perplexity = math.exp(min(nats.value, 700))
    return {
        "source": source,
        "items": len(found["words nats"]),
        "acc": statistics.mean(found["words acc"]),
        "perplexity": Estimate(perplexity, nats.scaled(perplexity).error),
    }


def _prefixed(name: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name} {key}": value for key, value in values.items()}


def _differences(runs: list[Run], texts: list[Text], scores: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """OTHER's figures less RUN's, each on the same stretches of text or the same items."""
    names = [str(run.path) for run in runs]
    a, b = scores
    found = []
    if texts and runs[0].tokenizer.fingerprint == runs[1].tokenizer.fingerprint:
        starts = statistics.stretches(len(a["nats"]), max(run.cfg.model.block_size for run in runs))
        counts = np.diff(np.append(starts, len(a["nats"])))
        sums = statistics.sums_between(b["nats"], starts) - statistics.sums_between(a["nats"], starts)
        found.append(_difference("nats a token", statistics.ratio(sums, counts), names, True))
    elif texts:
        sums, counts = _by_bytes(runs, texts, [a["nats"], b["nats"]])
        bits = statistics.ratio((sums[1] - sums[0]) / math.log(2), counts)
        found.append(_difference("bits a byte", bits, names, True))
    for key in [k for k in a if k != "nats"]:
        less_is_better = key == "words nats"
        what = {
            "choices acc": "acc in multiple choice",
            "choices acc_norm": "acc_norm in multiple choice",
            "words acc": "acc in last words",
            "words nats": "nats a last word",
        }[key]
        found.append(_difference(what, statistics.mean(b[key] - a[key]), names, less_is_better))
    return found


def _difference(what: str, less: Estimate, names: list[str], less_is_better: bool) -> dict[str, Any]:
    """The difference OTHER - RUN, and what it means."""
    ahead, behind = names[::-1] if (less.value < 0) == less_is_better else names
    error = "an unknown error" if less.error is None else f"{less.error:.4f}"
    size = f"by {abs(less.value):.4f} ± {error} {what}, {less.errors:.1f} standard errors"
    if less.value == 0:
        words = f"no difference: 0 ± {error} {what}"
    elif less.errors >= CLEAR:
        words = f"{ahead} is better than {behind} {size}"
    else:
        words = f"no clear difference: {ahead} is ahead of {behind} {size}; below {CLEAR:.0f} that may be chance"
    return {
        "what": what,
        "difference": less,
        "standard_errors": less.errors if math.isfinite(less.errors) else None,
        "better": ahead if less.errors >= CLEAR else None,
        "words": words,
    }


def _by_bytes(runs: list[Run], texts: list[Text], nats: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Each run's nats on the same stretches of text, and their bytes, all [n], for runs with different tokenizers.

    A stretch ends where tokens of both runs end. The first begins after both first tokens, which are not predicted.
    """
    ends = []  # of each token, in bytes
    for run, text in zip(runs, texts, strict=True):
        lengths = np.array([len(run.tokenizer.decode_bytes([i])) for i in range(run.tokenizer.n_vocab)])
        if run.tokenizer.end_of_text is not None:
            lengths[run.tokenizer.end_of_text] = 0
        ends.append(np.cumsum(lengths[text.tokens]))
    common = np.intersect1d(*ends)
    windows = [
        run.cfg.model.block_size * int(common[-1]) // len(text.tokens) for run, text in zip(runs, texts, strict=True)
    ]
    starts = statistics.stretches(int(common[-1]), max(1, *windows))
    cuts = np.unique(common[np.searchsorted(common, np.append(starts, common[-1]))])
    sums = []
    for end, each in zip(ends, nats, strict=True):
        places = np.searchsorted(end, cuts, side="right") - 1  # indices of nats, which begin with the second token
        sums.append(statistics.sums_between(each[places[0] : places[-1]], places[:-1] - places[0]))
    return sums, np.diff(cuts)


def _finite(value: Any) -> Any:
    """`value` for JSON: a number that is not finite becomes null, an estimate an object."""
    if isinstance(value, Estimate):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- lm-eval --------------------------------------------------------------------------------------------------------


def _import_adapter() -> Any:
    try:
        from nanogpt_jax.evaluation import lm_eval_adapter
    except ImportError as e:
        raise UserError(f"--lm-eval needs pip install 'nanogpt-jax[lm-eval]' ({e})") from None
    return lm_eval_adapter


def _lm_eval_tasks(asked: Options) -> Any:
    """The tasks, loaded by lm-eval; UserError if one is unknown or its data is unavailable."""
    _import_adapter()
    from lm_eval.tasks import TaskManager

    wrong = UserError("")
    for defaults in (False, True) if asked.include_path else (True,):  # indexing its own 14,000 takes seconds
        manager = TaskManager(include_path=asked.include_path or None, include_defaults=defaults)
        unknown = [task for task in asked.tasks if task not in manager.all_tasks]
        if unknown:
            near = config.suggestion(unknown[0], manager.all_tasks) or "\n       --include-path DIR adds your own"
            wrong = UserError(f"lm-eval knows no task {unknown[0]}{near}")
            continue
        try:
            return manager.load(asked.tasks)
        except Exception as e:  # from many libraries: YAML, datasets, the network
            wrong = UserError(
                f"--lm-eval={asked.lm_eval} cannot be loaded: {' '.join(str(e).split())[:300]}\n"
                "       a task whose data is on the hub needs the network"
            )
    raise wrong


def _lm_eval(model: Any, tasks: Any, run: Path) -> dict[str, Any]:
    """lm-eval's results: task -> figure -> value."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else its bootstrap forks a process with jax's threads
    from lm_eval.evaluator import evaluate

    lm = _import_adapter().RunLM(model, _track(f"lm-eval on {run}"))
    with contextlib.redirect_stdout(sys.stderr):  # its own progress
        found: Any = evaluate(lm, tasks, bootstrap_iters=1000, log_samples=False)
    return {task: {k: v for k, v in row.items() if k != "alias"} for task, row in found["results"].items()}


# ---- what is shown --------------------------------------------------------------------------------------------------


def _print(column: dict[str, Any]) -> None:
    print(f"{column['run']}, step {column['step']}")
    if loss := column.get("loss"):
        overlap = "" if loss["stride"] == loss["block_size"] else f", {loss['stride']} tokens apart"
        unit = "token" if loss["tokens"] == 1 else "tokens"
        print(f"  {loss['text']}: {loss['tokens']:,} {unit} in windows of {loss['block_size']}{overlap}")
        _row("loss", loss["nats_per_token"], 6, "nats a token")
        _row("perplexity", loss["perplexity"], 4)
        _row("bits per byte", loss["bits_per_byte"], 6)
    if choices := column.get("choices"):
        print(f"  {choices['source']}: {choices['items']:,} items, multiple choice")
        _row("acc", choices["acc"], 4)
        _row("acc_norm", choices["acc_norm"], 4)
    if words := column.get("last_word"):
        print(f"  {words['source']}: {words['items']:,} items, last word")
        _row("acc", words["acc"], 4)
        _row("perplexity", words["perplexity"], 4)
    for task, figures in column.get("lm_eval", {}).items():
        print(f"  {task} (lm-eval)")
        for key, value in figures.items():
            name, _, which = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = figures.get(f"{name}_stderr,{which}")
                _row(name, Estimate(value, error if isinstance(error, float) else None), 4)


def _row(name: str, figure: Estimate, digits: int, unit: str = "") -> None:
    error = "" if figure.error is None else f" ± {figure.error:.{digits}f}"
    print(f"    {name:<14}{figure.value:>{digits + 6}.{digits}f}{error} {unit}".rstrip())


def _track(what: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """A progress bar on a terminal; elsewhere nothing."""

    def track(items: Iterable[Any], n: int) -> Iterable[Any]:
        from rich.markup import escape
        from rich.progress import track

        if not sys.stderr.isatty():
            return items
        return track(items, escape(terminal.visible(what)), n, console=terminal.console(), transient=True)

    return track
