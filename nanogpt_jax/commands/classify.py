"""`nanogpt-jax classify train|eval|predict`: predict the label of a text with GPT-2 and a head over its last token."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_jax import cli, config
from nanogpt_jax.classify import data as labelled
from nanogpt_jax.classify import rows as labelled_rows
from nanogpt_jax.classify import scores, shown
from nanogpt_jax.classify.data import LabelledData, Texts
from nanogpt_jax.classify.opened import Classifier, read_manifest
from nanogpt_jax.classify.settings import ClassifierConfig, with_labels
from nanogpt_jax.config import Command, UserError, command_line
from nanogpt_jax.config.command_line import CommandLine, Read, flag
from nanogpt_jax.host.messages import printable
from nanogpt_jax.run import plan, run_dir

USAGE = """usage: nanogpt-jax classify train|eval|predict [ARGUMENTS], or nanogpt-jax classify train --help

  train    make a classifier from labelled texts (.jsonl, .json, .csv, .tsv, .parquet, hf:NAME)
  eval     accuracy, macro-F1 and the confusion matrix of one
  predict  labels and probabilities of texts"""


@dataclass(frozen=True)
class EvalOptions(command_line.Options):
    source: str | None = flag(
        "SOURCE", "other texts: a .jsonl, .json, .csv, .tsv or .parquet file, or hf:NAME[:CONFIG] (default: its own)"
    )
    split: str | None = flag("NAME", "the split of hf:NAME (default: test)")
    text_column: str | None = flag("NAME", "the column with the text in SOURCE (default: as in training)")
    label_column: str | None = flag("NAME", "the column with the label in SOURCE (default: as in training)")
    checkpoint: str = flag("WHICH", "best, latest or a step", "best")
    picture: str | None = flag(
        "FILE", "draw the confusion matrix (needs pip install 'nanogpt-jax[plot]'): .svg, .png, .pdf"
    )
    baseline: bool = flag(
        "",
        "compare with TF-IDF and logistic regression, trained on the run's training texts (needs pip install "
        "'nanogpt-jax[baseline]')",
        False,
    )
    json: bool = flag("", "print one JSON object instead of tables", False)


@dataclass(frozen=True)
class PredictOptions(command_line.Options):
    file: str | None = flag("FILE", "a text a line; or a column of a .jsonl, .json, .csv, .tsv or .parquet file")
    text_column: str | None = flag("NAME", "the column with the texts (default: as in training)")
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
    {"RUN": "the directory of a classifier", "[TEXT ...]": "texts; after --, they may begin with dashes"},
)


def main(argv: list[str]) -> int:
    commands = ("train", "eval", "predict")
    if not argv or (argv[0] not in commands and cli.asks_for_help(argv)):
        print(USAGE)
        return 0
    name, *rest = argv
    if name not in commands:
        raise UserError(f"classify {name} is none of train, eval, predict{config.suggestion(name, commands)}")
    end = rest.index("--") if name == "predict" and "--" in rest else len(rest)  # texts follow it
    if cli.asks_for_help(rest[:end]):
        print({"train": lambda: config.help_text(ClassifierConfig), "eval": EVAL.help, "predict": PREDICT.help}[name]())
        return 0
    asked = read(argv)
    if isinstance(asked, Command):
        return train(asked, argv)
    return evaluate(asked) if isinstance(asked, EvalOptions) else predict(asked)


def read(argv: list[str]) -> Command | EvalOptions | PredictOptions:
    """What `train` is to do, or what `eval` or `predict` is asked; UserError if that is invalid. No jax here."""
    name, *rest = argv
    if name == "train":
        return config.load(rest, ClassifierConfig)
    return read_eval(rest) if name == "eval" else read_predict(rest)


def read_eval(argv: list[str]) -> EvalOptions:
    """UserError if the command line is invalid."""
    asked = _of_a_run(EVAL, argv)
    if len(asked.words) > 1:
        raise UserError(f"one run at a time, but got {asked.words[0]} and {asked.words[1]}")
    for key in ("split", "text_column", "label_column"):
        if asked.source is None and getattr(asked, key) is not None:
            raise UserError(f"{command_line.flag_of(key)} says how to read --source, which is not given")
    return asked


def read_predict(argv: list[str]) -> PredictOptions:
    """UserError if the command line is invalid. Its words are the run and the texts."""
    asked = _of_a_run(PREDICT, argv)
    texts = asked.words[1:]
    if texts and asked.file is not None:
        raise UserError(f"texts and --file={asked.file} exclude each other; leave one out")
    if any(not text.strip() for text in texts):
        raise UserError("one of the texts is empty; remove it")
    if broken := [text for text in texts if labelled_rows.SURROGATE.search(text)]:
        raise UserError(f"the text {broken[0]!r:.60} is not UTF-8")
    return asked


def _of_a_run(command: CommandLine[Read], argv: list[str]) -> Read:
    asked = command.read(argv)
    if not asked.words or not asked.words[0]:
        raise UserError(f"{command.name} needs the directory of a run\n       see nanogpt-jax {command.name} --help")
    return asked


# ---- train: the twin of train.py ------------------------------------------------------------------------------------


def train(command: Command, argv: list[str]) -> int:
    if command.print_config:
        print(plan.describe(command))
        return 0

    from nanogpt_jax.host.signals import stop_on_signals

    with run_dir.claim(command) as run, stop_on_signals(lambda: run_dir.standing(run, argv, "classify")) as stop:
        goes_on = not command.overwrite and run_dir.checkpoint_steps(run)
        data = labelled.open_data(command.cfg, run=read_manifest(run) if goes_on else None)
        run_dir.check_tokenizer(command, data)
        cfg = config.with_vocabulary(command.cfg, data.tokenizer.n_vocab, data.tokenizer.end_of_text, command.origin)
        cfg = with_labels(cfg, len(data.labels), len(data.splits["train"]), command.origin)
        run_dir.prepare(run, command, cfg, data)
        program = config.program("classify")
        then = f"next: {program} eval {config.word(run)}\n      {program} predict {config.word(run)} TEXT"
        if finished := run_dir.finished(run, cfg):
            print(f"{finished}\n{then}")
            return 0
        outcome, best, found = _train(cfg, run, data, stop)
        if outcome.signal:
            print(f"{outcome.signal.name}: saved step {outcome.step} of {cfg.train.steps} in {run}")
            print(f"go on with the same command: {config.command_again(argv, name='classify')}")
            return 128 + outcome.signal
        early = "" if outcome.step == cfg.train.steps else f", early (classify.patience={cfg.classify.patience})"
        print(
            f"done at step {outcome.step} after {outcome.seconds:.0f} s{early}; the best checkpoint is step {best}: "
            f"validation {scores.SUMMARY.format(**found)}\n{then}"
        )
        return 0


def _train(cfg: ClassifierConfig, directory: Path, data: LabelledData, stop: Any):
    """Settings to a trained classifier -> how it ended, the best checkpoint's step and its validation scores."""
    from nanogpt_jax.classify import task as classification
    from nanogpt_jax.distributed.mesh import make_mesh, start
    from nanogpt_jax.model import execution
    from nanogpt_jax.run.checkpoint import load_params
    from nanogpt_jax.run.recording import Recording
    from nanogpt_jax.training.loop import fit, start_state
    from nanogpt_jax.training.optim import make_optimizer
    from nanogpt_jax.training.step import make_train_step

    platform, mesh = start(), make_mesh(cfg.mesh)
    cfg, how = execution.choose(cfg, platform, mesh.size)
    task = classification.classifier(cfg, mesh, data)
    tx = make_optimizer(cfg.optim, cfg.train.steps)
    tx = classification.head_alone(tx) if cfg.classify.freeze else tx
    step = make_train_step(cfg, tx, mesh, task, how)
    with Recording(directory, cfg.train) as run:
        state = start_state(cfg, step, run)
        print(classification.headline(cfg, directory, data, mesh, run.step), flush=True)
        outcome = fit(cfg, task, state, step, run, stop)
    if outcome.signal:
        return outcome, None, {}
    then = f"{config.program('classify')} eval {config.word(directory)}"
    params, best = load_params(directory, classification.param_shapes(cfg), command=then)
    alone = classification.predict_step(cfg.model, make_mesh(config.MeshConfig()))  # as in eval and predict
    at_once = classification.texts_at_once(cfg, mesh)
    return outcome, best, classification.evaluate(alone, params, data.splits["val"], data.width, at_once)


# ---- eval and predict -----------------------------------------------------------------------------------------------


def evaluate(asked: EvalOptions) -> int:
    plt = cli.pyplot("--picture", asked.picture) if asked.picture is not None else None
    baseline = _baseline() if asked.baseline else None
    model = Classifier(Path(asked.words[0]), asked.checkpoint)
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
        weights = model.cfg.classify.class_weights
        found["TF-IDF + logistic regression"] = baseline.log_probabilities(data.splits["train"], texts, weights)
    commonest = np.bincount(texts.labels).max() / len(texts)
    results = {name: scores.scores(x, texts.labels) for name, x in found.items()}
    matrices = {n: scores.confusion_matrix(texts.labels, x.argmax(1), len(model.labels)) for n, x in found.items()}
    if asked.json:
        each = [{"name": n, **results[n], "confusion": matrices[n].tolist()} for n in found]
        about = {"source": what, "texts": len(texts), "labels": model.labels, "commonest": commonest}
        print(json.dumps({**about, "results": each}, ensure_ascii=False, allow_nan=False))
    else:
        print(f"{len(texts)} texts: {what}; the commonest label alone would be right in {commonest:.4f}")
        for name in found:
            print(f"\n{name}: {scores.SUMMARY.format(**results[name])}\n{shown.table(matrices[name], model.labels)}")
    if plt and (place := asked.picture):
        drawn = shown.picture(plt, matrices[next(iter(found))], model.labels, cli.format_of(place))
        cli.write_file("--picture", place, drawn)
    return 0


def predict(asked: PredictOptions) -> int:
    run, *texts = asked.words
    model = Classifier(Path(run), asked.checkpoint)
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


def _baseline() -> Any:
    try:
        from nanogpt_jax.classify import baseline
    except ImportError:
        raise UserError("--baseline needs pip install 'nanogpt-jax[baseline]'") from None
    return baseline
