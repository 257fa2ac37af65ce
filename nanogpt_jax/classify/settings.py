"""The settings of a classifier: those of a language model with other data, one more section and other defaults."""

# ClassifierConfig.data is another class than Config.data:
# pyright: reportIncompatibleVariableOverride=false

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from nanogpt_jax.config import Config, ModelConfig, OptimConfig, TrainConfig, UserError
from nanogpt_jax.config.settings import Origin
from nanogpt_jax.config.validate import MOST_STEPS


@dataclass(frozen=True)
class LabelledConfig:
    source: str = "python"  # a .jsonl, .json, .csv, .tsv or .parquet file, hf:NAME[:CONFIG], or python: prose or code
    split: str = "train"  # the split of hf:NAME
    text_column: str = "text"  # the column with the text
    label_column: str = "label"  # the column with the label: a string or a whole number
    keep: Literal["first", "last"] = "first"  # which model.block_size tokens of a longer text are read
    tokenizer: str = "char"  # char, word, gpt2, bpe:8192 (learned from the texts), or a folder that holds one
    val_fraction: float = 0.1  # share of each label for validation
    test_fraction: float = 0.1  # share of each label for `classify eval`

    @property
    def title(self) -> str:
        return self.source


@dataclass(frozen=True)
class ClassifyConfig:
    freeze: bool = False  # train the head only, not the language model
    class_weights: Literal["none", "balanced"] = "none"  # balanced: a rare label weighs more, n / (n_labels * n_label)
    epochs: int = 5  # passes over the training texts
    monitor: Literal["loss", "macro-f1"] = "loss"  # decides the best checkpoint, on the validation texts
    patience: int = 0  # end the run after so many evaluations without a better one; 0: never
    n_labels: int = 0  # number of labels; 0: as many as the data has


@dataclass(frozen=True)
class ClassifierTrainConfig(TrainConfig):
    steps: int = 0  # optimizer steps; 0: classify.epochs passes
    batch_size: int = 16  # texts a step, over all devices and micro-batches
    micro_batch: int = 0  # texts at a time (gradients accumulate); 0: the whole batch
    eval_every: int = 0  # steps between evaluations on the validation texts; 0: once an epoch


@dataclass(frozen=True)
class ClassifierConfig(Config):
    """All settings of a classifier's run: GPT-2 with a head over the last token."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(block_size=256, dropout=0.1))
    data: LabelledConfig = field(default_factory=LabelledConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig("adamw", 1e-3))
    train: ClassifierTrainConfig = field(default_factory=ClassifierTrainConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)

    COMMAND: ClassVar[str] = "classify train"
    ABOUT: ClassVar[str] = (
        "Trains GPT-2 with a head over the last token's hidden state to predict the label of a text. The flags mean "
        "the same as in train.py; the defaults are for a few thousand labelled texts."
    )
    RUN: ClassVar[str] = "classifier"
    OTHER: ClassVar[str] = (
        "{run} is a language model, not a classifier\n"
        "       train one from it: nanogpt-jax classify train --train.init-from {word} --data.source FILE"
    )
    OWN: ClassVar[frozenset[str]] = frozenset({"model.dropout"})
    EXECUTION: ClassVar[frozenset[str]] = Config.EXECUTION | {"classify.epochs", "classify.patience"}

    def demands(self, check: Callable[..., None]) -> None:
        d, c, t = self.data, self.classify, self.train
        check(self.mesh.num_processes == 1, "mesh.num_processes", "must be 1: one process trains a classifier")
        check(self.mesh.processes == "one", "mesh.processes", "must be one: one process trains a classifier")
        check(t.steps >= 0, "train.steps", "must not be negative")
        check(t.micro_batch >= 0, "train.micro_batch", "must not be negative")
        check(c.epochs >= 1, "classify.epochs", "must be at least 1")
        check(c.patience >= 0, "classify.patience", "must not be negative")
        check(c.n_labels >= 0, "classify.n_labels", "must not be negative")
        check(d.test_fraction >= 0, "data.test_fraction", "must not be negative", "0 keeps no test texts")
        check(
            d.val_fraction + d.test_fraction < 1,
            "data.test_fraction",
            f"and data.val_fraction={d.val_fraction} leave no training texts",
        )
        check(
            not (c.freeze and t.init_from == "scratch"),
            "classify.freeze",
            "would train a head on untrained weights",
            "set train.init_from to a language model's run",
        )


def with_labels(cfg: ClassifierConfig, n_labels: int, n_texts: int, origin: Origin) -> ClassifierConfig:
    """`cfg`, completed with the number of labels and the number of steps in an epoch."""
    if cfg.classify.n_labels not in (0, n_labels):
        raise UserError(
            f"classify.n_labels={cfg.classify.n_labels} ({origin['classify.n_labels']}), but the data has {n_labels} "
            "labels; leave it out"
        )
    epoch, t = -(-n_texts // cfg.train.batch_size), cfg.train
    if not t.steps and cfg.classify.epochs * epoch > MOST_STEPS:
        raise UserError(
            f"classify.epochs={cfg.classify.epochs} are {cfg.classify.epochs * epoch} steps "
            f"({origin['classify.epochs']}), and must be at most {MOST_STEPS}: at most {MOST_STEPS // epoch} epochs"
        )
    return dataclasses.replace(
        cfg,
        classify=dataclasses.replace(cfg.classify, n_labels=n_labels),
        train=dataclasses.replace(t, steps=t.steps or cfg.classify.epochs * epoch, eval_every=t.eval_every or epoch),
    )
