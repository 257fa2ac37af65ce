"""A classifier as a task of training, as training/language_model.py is for language models."""

# N texts, B batch, W width of the padded texts, Y labels

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nanogpt_jax.classify import head, scores
from nanogpt_jax.classify.data import LabelledData, Texts
from nanogpt_jax.classify.settings import ClassifierConfig
from nanogpt_jax.config import ModelConfig
from nanogpt_jax.distributed.mesh import batch_ways
from nanogpt_jax.distributed.sharding import BATCH, path_name, shard
from nanogpt_jax.host import progress
from nanogpt_jax.host.messages import printable
from nanogpt_jax.model import sizes
from nanogpt_jax.model.gpt2 import Params
from nanogpt_jax.training.task import Objective, Scores, Task

# the last layer, where distributed/sharding.py has the rules for GPT-2
HEAD_RULES = ((r"head/kernel$", P("fsdp")), (r"head/bias$", P()))

Predict = Callable[[Params, np.ndarray], jax.Array]


def classifier(cfg: ClassifierConfig, mesh: Mesh, data: LabelledData) -> Task:
    """Predicting the labels of `data`. classify.monitor on the validation split decides the best checkpoint."""
    t, c, train = cfg.train, cfg.classify, data.splits["train"]
    predict, at_once = predict_step(cfg.model, mesh), texts_at_once(cfg, mesh)
    return Task(
        **vars(objective(cfg, data.width, class_weights(train.labels, c.n_labels, c.class_weights))),
        batch=functools.partial(train.batch, seed=t.seed, batch_size=t.batch_size, width=data.width),
        evaluate=lambda params: evaluate(predict, params, data.splits["val"], data.width, at_once),
        summary=f"validation {scores.SUMMARY}",
        criterion=lambda found: found["loss"] if c.monitor == "loss" else 1 - found["macro_f1"],
        tokens_per_step=t.batch_size * len(train.tokens) / len(train),
        patience=c.patience,
    )


def objective(cfg: ClassifierConfig, width: int, weights: np.ndarray) -> Objective:
    """Initial weights, and the loss of rows [B, W+2]; weights [Y] of the labels."""
    init = functools.partial(head.init_params, cfg.model, cfg.classify.n_labels)
    loss = functools.partial(head.mean_loss, cfg.model, weights=weights, freeze=cfg.classify.freeze)
    return Objective(init, loss, width + 2, rules=HEAD_RULES)


def param_shapes(cfg: ClassifierConfig) -> Params:
    """A classifier's parameters as jax.ShapeDtypeStructs."""
    return jax.eval_shape(lambda: head.init_params(cfg.model, cfg.classify.n_labels, jax.random.key(0)))


def class_weights(labels: np.ndarray, n_labels: int, kind: str) -> np.ndarray:
    """[Y] float32. balanced: N / (Y · N_label), so that all labels weigh the same, and texts weigh 1 on average."""
    counts = np.bincount(labels, minlength=n_labels)
    return np.asarray(len(labels) / (n_labels * counts) if kind == "balanced" else np.ones(n_labels), np.float32)


def head_alone(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for the head only; other parameters do not change, and need no moments."""

    def part(path: tuple, _leaf: object) -> str:
        return "head" if path_name(path).startswith("head/") else "body"

    return optax.partition(
        {"head": tx, "body": optax.set_to_zero()}, functools.partial(jax.tree_util.tree_map_with_path, part)
    )


# ---- asking a classifier --------------------------------------------------------------------------------------------


def predict_step(cfg: ModelConfig, mesh: Mesh) -> Predict:
    """(a classifier's params, rows [B, W+2] int32) -> log-probabilities of the labels [B, Y] float32."""

    @functools.partial(jax.jit, in_shardings=(None, shard(mesh, BATCH)), out_shardings=shard(mesh))
    def predict(params: Params, rows: jax.Array) -> jax.Array:
        tokens, lengths, _ = head.unpack(rows)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.nn.log_softmax(head.logits(cfg, params, tokens, lengths))

    return predict


def texts_at_once(cfg: ClassifierConfig, mesh: Mesh) -> int:
    """B of an evaluation during training: a micro-batch or 32, whichever is more, rounded up for the devices."""
    ways = batch_ways(mesh)
    return -(-max(cfg.train.micro_batch or cfg.train.batch_size, 32) // ways) * ways


def log_probabilities(
    predict: Predict, params: Params, texts: Texts, width: int, batch_size: int, bar: bool = False
) -> np.ndarray:
    """[N, Y] float32, in batches of one shape. With `bar`, shows the progress."""
    starts = range(0, len(texts), batch_size)
    watched = progress.over("texts", starts, len(starts)) if bar else starts
    found = [
        predict(params, texts.rows(np.minimum(np.arange(i, i + batch_size), len(texts) - 1), width)) for i in watched
    ]
    return np.concatenate([np.asarray(x) for x in found])[: len(texts)]


def evaluate(predict: Predict, params: Params, texts: Texts, width: int, batch_size: int) -> Scores:
    """Loss, accuracy and macro-F1 of all `texts`."""
    return scores.scores(log_probabilities(predict, params, texts, width, batch_size), texts.labels)


# ---- words for it ----------------------------------------------------------------------------------------------------


def headline(cfg: ClassifierConfig, run: Path, data: LabelledData, mesh: Mesh, step: int) -> str:
    """What is about to be trained, on what, and where it goes: three lines, and notes on the data."""
    m, c, t, n_head = cfg.model, cfg.classify, cfg.train, (cfg.model.n_embd + 1) * cfg.classify.n_labels
    begin = f"going on in {run} from step {step}" if step else f"training in {run}"
    trained = f"the {n_head:,} of the head" if c.freeze else "all"
    split = ", ".join(
        f"{len(texts):,} to {what}"
        for what, texts in zip(("train on", "validate", "test"), data.splits.values(), strict=True)
    )
    counts = ", ".join(f"{printable(label)} {n:,}" for label, n in list(data.manifest["splits"]["train"].items())[:12])
    lines = [
        f"{begin}: GPT-2 of {sizes.n_params(m):,} parameters from {t.init_from}, a head of {n_head:,}, {trained} "
        f"trained, on {mesh.size} {jax.default_backend()}",
        f"{t.steps} steps of {t.batch_size} texts {data.width} tokens wide; {cfg.data.source}: {split}",
        f"{c.n_labels} labels, in training: {counts}{', ...' if c.n_labels > 12 else ''}",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in data.notes)])
