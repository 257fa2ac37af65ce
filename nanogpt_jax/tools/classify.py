"""`nanogpt-jax classify train|eval|predict`: name the label of a text with GPT-2 and a head over its last token."""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_jax import cli, config
from nanogpt_jax.classify.settings import ClassifierConfig, with_labels
from nanogpt_jax.config import ModelConfig, UserError, command_line
from nanogpt_jax.config.command_line import CommandLine, Read, flag
from nanogpt_jax.data import labelled, labelled_rows, tokenizer
from nanogpt_jax.data.labelled import LabelledData, Texts
from nanogpt_jax.evaluation import classification
from nanogpt_jax.host import files, terminal
from nanogpt_jax.host.messages import printable
from nanogpt_jax.inference import options
from nanogpt_jax.training import run_dir

USAGE = """usage: nanogpt-jax classify train|eval|predict [ARGUMENTS], or nanogpt-jax classify train --help

  train    make a classifier from labelled texts (.jsonl, .json, .csv, .tsv, .parquet, hf:NAME)
  eval     accuracy, macro-F1 and the confusion matrix of one
  predict  labels and probabilities of texts"""


@dataclass(frozen=True)
class EvalOptions(command_line.Options):
    source: str | None = flag(
        "SOURCE", "other texts: a .jsonl, .json, .csv, .tsv or .parquet file, or hf:NAME[:CONFIG] (default: its own)"
    )
    split: str | None = flag("NAME", "of hf:NAME, the split that is taken (default: test)")
    text_column: str | None = flag("NAME", "where the text stands in SOURCE (default: as in training)")
    label_column: str | None = flag("NAME", "where the label stands in SOURCE (default: as in training)")
    checkpoint: str = flag("WHICH", "best, latest or a step", "best")
    picture: str | None = flag(
        "FILE", "draw the confusion matrix (needs pip install 'nanogpt-jax[plot]'): .svg, .png, .pdf"
    )
    baseline: bool = flag(
        "",
        "beside it, TF-IDF and logistic regression, trained on the run's training texts (needs pip install "
        "'nanogpt-jax[baseline]')",
        False,
    )
    json: bool = flag("", "one JSON object instead of tables", False)


@dataclass(frozen=True)
class PredictOptions(command_line.Options):
    file: str | None = flag("FILE", "a text a line; or a column of a .jsonl, .json, .csv, .tsv or .parquet file")
    text_column: str | None = flag("NAME", "which column (default: as in training)")
    checkpoint: str = flag("WHICH", "best, latest or a step", "best")
    json: bool = flag("", "JSON lines with the probability of every label; of a file, with the text's line, too", False)


EVAL = CommandLine(
    "classify eval",
    EvalOptions,
    "Measures a classifier on its test split (its validation split, if it kept no test texts) or on other labelled "
    "texts.",
    {"RUN": "the directory of a classifier"},
)
PREDICT = CommandLine(
    "classify predict",
    PredictOptions,
    "Prints the likeliest label and its probability, a line for each text. Without TEXT or --file it reads standard "
    "input, a text a line. A blank line or a row without text is skipped: an empty line stands in its place, so that "
    "the first line stays that of the first text.",
    {"RUN": "the directory of a classifier", "[TEXT ...]": "texts; behind --, whatever they begin with"},
)


def main(argv: list[str]) -> int:
    commands = {"train": train, "eval": evaluate, "predict": predict}
    if not argv or (argv[0] not in commands and cli.asks_for_help(argv)):
        print(USAGE)
        return 0
    if argv[0] not in commands:
        raise UserError(f"classify {argv[0]} is none of train, eval, predict{config.suggestion(argv[0], commands)}")
    return commands[argv[0]](argv[1:])


# ---- train: the twin of train.py ------------------------------------------------------------------------------------


def train(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(config.help_text(ClassifierConfig))
        return 0
    command = config.load(argv, ClassifierConfig)
    if command.print_config:
        print(run_dir.describe(command))
        return 0

    from nanogpt_jax.training.signals import stop_on_signals

    def standing() -> str:
        return run_dir.standing(run, ["train", *argv], "classify")

    with run_dir.claim(command) as run, stop_on_signals(standing) as stop:
        goes_on = not command.overwrite and run_dir.checkpoint_steps(run)
        data = labelled.open_data(command.cfg, run=_manifest(run) if goes_on else None)
        run_dir.check_tokenizer(command, data)
        cfg = config.with_vocabulary(command.cfg, data.tokenizer.n_vocab, data.tokenizer.end_of_text, command.origin)
        cfg = with_labels(cfg, len(data.labels), len(data.splits["train"]), command.origin)
        run_dir.prepare(run, command, cfg, data)
        program = config.program("classify")
        then = f"next: {program} eval {config.word(run)}\n      {program} predict {config.word(run)} TEXT"
        if finished := run_dir.finished(run, cfg):
            print(f"{finished}\n{then}")
            return 0
        outcome, best, scores = _train(cfg, run, data, stop)
        if outcome.signal:
            print(f"{outcome.signal.name}: saved step {outcome.step} of {cfg.train.steps} in {run}")
            print(f"go on with the same command: {run_dir.command_again(['train', *argv], name='classify')}")
            return 128 + outcome.signal
        early = "" if outcome.step == cfg.train.steps else f", early (classify.patience={cfg.classify.patience})"
        print(
            f"done at step {outcome.step} after {outcome.seconds:.0f} s{early}; the best checkpoint is step {best}: "
            f"validation {SAY.format(**scores)}\n{then}"
        )
        return 0


def _manifest(run: Path) -> dict[str, Any]:
    """What a run has written down of its data."""
    path = run / "data.json"
    try:
        manifest = json.loads(files.read(path))
        labels, _ = manifest["labels"], manifest["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is missing or damaged ({e})") from None
    if not isinstance(labels, list) or not all(type(label) in (str, int) for label in labels):
        raise UserError(f"{path} is damaged: its labels are {labels!r:.60}")
    return manifest


SAY = "loss {loss:.4f}, accuracy {accuracy:.4f}, macro-F1 {macro_f1:.4f}"


def _train(cfg: ClassifierConfig, directory: Path, data: LabelledData, stop: Any):
    """Settings to a trained classifier -> how it ended, the best checkpoint's step and its validation scores."""
    from nanogpt_jax.distributed.mesh import batch_ways, make_mesh, start
    from nanogpt_jax.model import execution
    from nanogpt_jax.training.checkpoint import load_params
    from nanogpt_jax.training.loop import Outcome, fit, start_state
    from nanogpt_jax.training.optim import head_alone, make_optimizer
    from nanogpt_jax.training.recording import Recording
    from nanogpt_jax.training.step import make_train_step
    from nanogpt_jax.training.task import Task

    platform, t, c = start(), cfg.train, cfg.classify
    mesh = make_mesh(cfg.mesh)
    how = execution.choose(cfg, platform, mesh.size)
    cfg = replace(cfg, model=execution.resolve(cfg.model, platform))
    tx = make_optimizer(cfg.optim, t.steps)
    tx = head_alone(tx) if c.freeze else tx
    weights = class_weights(data.splits["train"].labels, c.n_labels, c.class_weights)
    predict, ways = predict_step(cfg.model, mesh), batch_ways(mesh)
    rows = -(-max(t.micro_batch or t.batch_size, 32) // ways) * ways
    val = data.splits["val"]

    def scores(params: Any, predict: Any = predict) -> dict[str, float]:
        return classification.scores(_log_probabilities(predict, params, val, data.width, rows), val.labels)

    task = Task(
        **vars(objective(cfg, data.width, weights)),
        batch=functools.partial(data.splits["train"].batch, seed=t.seed, batch_size=t.batch_size, width=data.width),
        evaluate=scores,
        summary=f"validation {SAY}",
        criterion=lambda scores: scores["loss"] if c.monitor == "loss" else 1 - scores["macro_f1"],
        tokens_per_step=t.batch_size * len(data.splits["train"].tokens) / len(data.splits["train"]),
        patience=c.patience,
    )
    with Recording(directory, t) as run:
        state = start_state(cfg, tx, task, mesh, run)
        print(_headline(cfg, directory, data, mesh, run.step), flush=True)
        if 0 < c.patience <= run.stale:
            outcome = Outcome(run.step, 0.0, None, {})
        else:
            outcome = fit(cfg, task, state, make_train_step(cfg, tx, mesh, task, how), run, stop)
    if outcome.signal:
        return outcome, None, {}
    then = f"{config.program('classify')} eval {config.word(directory)}"
    params, best = load_params(
        directory, param_shapes(cfg), command=then
    )  # the best, as eval and predict take it: on one device
    return outcome, best, scores(params, predict_step(cfg.model, make_mesh(config.MeshConfig())))


def objective(cfg: ClassifierConfig, width: int, weights: np.ndarray) -> Any:
    """First weights, and the loss of rows [B, W+2]; weights [K] of the labels."""
    from nanogpt_jax.model import classifier
    from nanogpt_jax.training.task import Objective

    init = functools.partial(classifier.init_params, cfg.model, cfg.classify.n_labels)
    loss = functools.partial(classifier.mean_loss, cfg.model, weights=weights, freeze=cfg.classify.freeze)
    return Objective(init, loss, width + 2)


def param_shapes(cfg: ClassifierConfig) -> Any:
    """A classifier's parameters as jax.ShapeDtypeStructs."""
    import jax

    from nanogpt_jax.model import classifier

    return jax.eval_shape(lambda: classifier.init_params(cfg.model, cfg.classify.n_labels, jax.random.key(0)))


def predict_step(cfg: ModelConfig, mesh: Any) -> Callable[[Any, Any], Any]:
    """(a classifier's params, rows [B, W+2] int32) -> log-probabilities of the labels [B, K] float32."""
    import jax

    from nanogpt_jax.distributed.sharding import BATCH, shard
    from nanogpt_jax.model import classifier

    @functools.partial(jax.jit, in_shardings=(None, shard(mesh, BATCH)), out_shardings=shard(mesh))
    def predict(params: Any, rows: jax.Array) -> jax.Array:
        tokens, lengths, _ = classifier.unpack(rows)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.nn.log_softmax(classifier.logits(cfg, params, tokens, lengths))

    return predict


def class_weights(labels: np.ndarray, n_labels: int, kind: str) -> np.ndarray:
    """[K] float32. balanced: N / (K · N_label): each label weighs the same in all, and a text 1 on average."""
    counts = np.bincount(labels, minlength=n_labels)
    return np.asarray(len(labels) / (n_labels * counts) if kind == "balanced" else np.ones(n_labels), np.float32)


def _headline(cfg: ClassifierConfig, run: Path, data: LabelledData, mesh: Any, step: int) -> str:
    import jax

    from nanogpt_jax.model import sizes

    m, c, t, head = cfg.model, cfg.classify, cfg.train, (cfg.model.n_embd + 1) * cfg.classify.n_labels
    begin = f"going on in {run} from step {step}" if step else f"training in {run}"
    trained = f"the {head:,} of the head" if c.freeze else "all"
    split = ", ".join(
        f"{len(texts):,} to {what}"
        for what, texts in zip(("train on", "validate", "test"), data.splits.values(), strict=True)
    )
    counts = ", ".join(f"{printable(label)} {n:,}" for label, n in list(data.manifest["splits"]["train"].items())[:12])
    lines = [
        f"{begin}: GPT-2 of {sizes.n_params(m):,} parameters from {t.init_from}, a head of {head:,}, {trained} "
        f"trained, on {mesh.size} {jax.default_backend()}",
        f"{t.steps} steps of {t.batch_size} texts {data.width} tokens wide; {cfg.data.source}: {split}",
        f"{c.n_labels} labels, in training: {counts}{', ...' if c.n_labels > 12 else ''}",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in data.notes)])


# ---- eval and predict -----------------------------------------------------------------------------------------------


def _log_probabilities(
    predict: Callable[..., Any], params: Any, texts: Texts, width: int, batch_size: int, bar: bool = False
) -> np.ndarray:
    """[N, K] float32, in batches of one shape. With `bar`, progress on a terminal's standard error."""
    from rich.progress import track

    watched = starts = range(0, len(texts), batch_size)
    if bar and sys.stderr.isatty():
        watched = track(starts, "texts", console=terminal.console(), transient=True)
    found = [
        predict(params, texts.rows(np.minimum(np.arange(i, i + batch_size), len(texts) - 1), width)) for i in watched
    ]
    return np.concatenate([np.asarray(x) for x in found])[: len(texts)]


class _Classifier:
    """A run, opened: settings, tokenizer, labels and parameters."""

    def __init__(self, run: Path, checkpoint: str):
        self.run, self.cfg = run, config.read_json(run / "config.json", ClassifierConfig)
        self.tokenizer = tokenizer.load(run / "tokenizer")
        self.manifest = _manifest(run)
        self.labels: list[labelled_rows.Label] = self.manifest["labels"]
        c, m = self.cfg.classify, self.cfg.model
        if len(self.labels) != c.n_labels or self.tokenizer.n_vocab > m.vocab_size:
            raise UserError(
                f"{run} is damaged: {len(self.labels)} labels and {self.tokenizer.n_vocab} tokens, but a model for "
                f"{c.n_labels} and {m.vocab_size}"
            )
        if not run_dir.checkpoint_steps(run):
            raise UserError(f"{run} has no checkpoint yet")
        self._checkpoint = checkpoint

    def load(self) -> None:
        """The parameters: takes seconds, so only when all else is known to be right."""
        import jax

        from nanogpt_jax.model import execution
        from nanogpt_jax.training.checkpoint import load_params

        self.cfg = replace(self.cfg, model=execution.resolve(self.cfg.model, jax.default_backend()))
        self.params, self.step = load_params(self.run, param_shapes(self.cfg), self._checkpoint)

    def encoder(self) -> labelled.Encoder:
        return labelled.Encoder(self.tokenizer, self.cfg.model.block_size, self.cfg.data.keep)

    def log_probabilities(self, texts: Texts) -> np.ndarray:
        from nanogpt_jax.distributed.mesh import make_mesh

        predict = predict_step(self.cfg.model, make_mesh(config.MeshConfig()))
        width, rows = labelled.width_for([texts], self.cfg.model.block_size), min(32, -(-len(texts) // 8) * 8)
        found = _log_probabilities(predict, self.params, texts, width, rows, bar=True)
        if not np.isfinite(found).all():
            raise UserError(f"{self.run} at step {self.step} gives probabilities that are not finite: it has diverged")
        return found


def read_eval(argv: list[str]) -> EvalOptions:
    """UserError if the command line cannot be meant."""
    asked = _of_a_run(EVAL, argv)
    if len(asked.words) > 1:
        raise UserError(f"one run at a time, but got {asked.words[0]} and {asked.words[1]}")
    for key in ("split", "text_column", "label_column"):
        if asked.source is None and getattr(asked, key) is not None:
            raise UserError(f"{command_line.flag_of(key)} says how to read --source, which is not given")
    return asked


def read_predict(argv: list[str]) -> PredictOptions:
    """UserError if the command line cannot be meant. Its words are the run and the texts."""
    asked = _of_a_run(PREDICT, argv)
    texts = asked.words[1:]
    if texts and asked.file is not None:
        raise UserError(f"texts and --file={asked.file} exclude each other; leave one out")
    if any(not text.strip() for text in texts):
        raise UserError("one of the texts is empty, and nothing can be told from that")
    if broken := [text for text in texts if labelled_rows.SURROGATE.search(text)]:
        raise UserError(f"the text {broken[0]!r:.60} is not UTF-8")
    return asked


def _of_a_run(command: CommandLine[Read], argv: list[str]) -> Read:
    asked = command.read(argv)
    if not asked.words or not asked.words[0]:
        raise UserError(f"{command.name} needs the directory of a run\n       see nanogpt-jax {command.name} --help")
    return asked


def evaluate(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(EVAL.help())
        return 0
    asked = read_eval(argv)
    plt = _pyplot(asked.picture) if asked.picture is not None else None
    baseline = _baseline() if asked.baseline else None
    model = _Classifier(options.existing(asked.words[0]), asked.checkpoint)
    data = None
    if asked.source is None or baseline:
        data = labelled.open_data(model.cfg, model.tokenizer, model.manifest)
        if data.fingerprint != model.manifest["fingerprint"]:
            raise UserError(
                f"the data of {model.run} has changed: {model.cfg.data.source} gives other texts now than in training\n"
                "       bring the old texts back, or give others with --source"
            )
    if asked.source is not None:
        d = model.cfg.data
        other = replace(
            d,
            source=asked.source,
            split="test" if asked.split is None else asked.split,
            text_column=d.text_column if asked.text_column is None else asked.text_column,
            label_column=d.label_column if asked.label_column is None else asked.label_column,
        )
        encoder, notes, what = model.encoder(), [], other.source
        examples = labelled.read(other, notes, "--source")
        texts = encoder.encode(examples, model.labels, f"--source={what}")
        notes += [*labelled_rows.contradictions(examples), *encoder.notes()]
    else:
        assert data is not None
        split = "test" if len(data.splits["test"]) else "val"
        texts, what, notes = data.splits[split], f"the {split} split of {model.cfg.data.source}", data.notes
    model.load()
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    found = {f"{model.run} at step {model.step}": model.log_probabilities(texts)}
    if baseline:
        assert data is not None
        balanced = model.cfg.classify.class_weights
        found["TF-IDF + logistic regression"] = baseline(data.splits["train"], texts, len(model.labels), balanced)
    commonest = np.bincount(texts.labels).max() / len(texts)
    results = {name: classification.scores(x, texts.labels) for name, x in found.items()}
    matrices = {
        n: classification.confusion_matrix(texts.labels, x.argmax(1), len(model.labels)) for n, x in found.items()
    }
    if asked.json:
        each = [{"name": n, **results[n], "confusion": matrices[n].tolist()} for n in found]
        about = {"source": what, "texts": len(texts), "labels": model.labels, "commonest": commonest}
        print(json.dumps({**about, "results": each}, ensure_ascii=False, allow_nan=False))
    else:
        print(f"{len(texts)} texts: {what}; the commonest label alone would be right in {commonest:.4f}")
        for name in found:
            print(f"\n{name}: {SAY.format(**results[name])}\n{_table(matrices[name], model.labels)}")
    if plt and asked.picture:
        _draw(plt, matrices[next(iter(found))], model.labels, Path(asked.picture))
    return 0


def predict(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(PREDICT.help())
        return 0
    asked = read_predict(argv)
    run, *texts = asked.words
    model = _Classifier(options.existing(run), asked.checkpoint)
    if asked.file is not None:
        column = model.cfg.data.text_column if asked.text_column is None else asked.text_column
        what, rows = asked.file, labelled.read_texts(Path(asked.file), column)
    elif texts:
        what, rows = "", list(enumerate(texts, start=1))
    else:
        if sys.stdin.isatty():
            raise UserError("nothing to classify: give texts, --file FILE, or pipe lines into it")
        what = "standard input"
        rows = labelled.lines_of(sys.stdin.buffer.read(), what)
    rows, notes = labelled_rows.usable(what, rows) if what else (rows, [])
    lines, texts = zip(*((line, text) for line, text in rows if text), strict=True)
    encoder = model.encoder()
    name = "line {} ({!r:.60})" if what else "text {} ({!r:.60})"
    tokens, starts = encoder.tokens(texts, lambda i: name.format(lines[i], texts[i]), what)
    model.load()
    for note in [*notes, *encoder.notes()]:
        print(f"note: {note}", file=sys.stderr)
    found = iter(np.exp(model.log_probabilities(Texts(list(texts), np.zeros(len(texts), np.int32), tokens, starts))))
    for line, text in rows:
        if not text:
            if not asked.json:
                print()
            continue
        p = next(found)
        best = int(p.argmax())
        if asked.json:
            each = {str(label): round(float(x), 6) for label, x in zip(model.labels, p, strict=True)}
            row = {"label": model.labels[best], "probability": round(float(p[best]), 6), "probabilities": each}
            row = {"line": line, **row} if what else row
            print(json.dumps(row, ensure_ascii=False, allow_nan=False))
        else:
            print(f"{printable(model.labels[best], sys.maxsize)}\t{p[best]:.4f}")
    return 0


# ---- what is shown --------------------------------------------------------------------------------------------------


def _table(confusion: np.ndarray, labels: list[labelled_rows.Label]) -> str:
    """The confusion matrix with precision, recall and F1, for a terminal."""
    names = [printable(label) for label in labels]
    first = max(map(len, [*names, "label"]))
    columns = [name[:12] for name in names]
    widths = [max(len(c), 5) for c in columns]
    head = [f"{'label':<{first}}", *(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))]
    lines = ["rows: the label; columns: what was predicted", "  ".join([*head, "precision  recall      F1"])]
    for name, row, (p, r, f) in zip(names, confusion, classification.precision_recall_f1(confusion), strict=True):
        counts = [f"{n:>{w}}" for n, w in zip(row, widths, strict=True)]
        lines.append("  ".join([f"{name:<{first}}", *counts, f"{p:9.4f}  {r:6.4f}  {f:6.4f}"]))
    return "\n".join(lines)


def _pyplot(picture: str) -> Any:
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"--picture={picture} needs pip install 'nanogpt-jax[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    known = plt.figure().canvas.get_supported_filetypes()
    if _format(Path(picture)) not in known:
        raise UserError(f"--picture={picture} must end in one of {', '.join(f'.{k}' for k in known)}")
    cli.check_file("--picture", picture)
    return plt


def _format(picture: Path) -> str:
    return picture.suffix.lower().lstrip(".")


def _draw(plt: Any, confusion: np.ndarray, labels: list[labelled_rows.Label], path: Path) -> None:
    K = len(labels)
    # between two $ matplotlib reads mathematics
    names = [printable(label)[:24].replace("$", r"\$") for label in labels]
    side = 0.6 * min(K, 60)  # more labels stand closer: a picture of thousands of inches takes all memory
    figure, axis = plt.subplots(figsize=(2.5 + side, 2 + side), layout="constrained")
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(K), names, rotation=45, ha="right")
    axis.set_yticks(range(K), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("label")
    if K <= 30:
        for i, j in np.ndindex(K, K):
            axis.text(j, i, confusion[i, j], ha="center", va="center", color="white" if share[i, j] > 0.5 else "black")
    picture = BytesIO()
    figure.savefig(picture, format=_format(path))
    cli.write_file("--picture", str(path), picture.getvalue())


def _baseline() -> Callable[[Texts, Texts, int, str], np.ndarray]:
    """TF-IDF of words and pairs of words, and logistic regression: what a classifier has to beat."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer  # pyright: ignore[reportMissingImports]
        from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--baseline needs pip install 'nanogpt-jax[baseline]'") from None

    def fitted(train: Texts, texts: Texts, n_labels: int, weights: str) -> np.ndarray:
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
        regression = LogisticRegression(C=10, max_iter=1000, class_weight="balanced" if weights == "balanced" else None)
        regression.fit(words.fit_transform(train.texts), train.labels)
        return np.log(np.maximum(regression.predict_proba(words.transform(texts.texts)), 1e-12))

    return fitted
