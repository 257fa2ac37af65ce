"""Next-token prediction, as a task of training."""

# B batch, T time

import functools
import math
import operator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanogpt_jax.config import Config, ModelConfig
from nanogpt_jax.data import batches, corpora
from nanogpt_jax.data.dataset import Dataset
from nanogpt_jax.distributed import processes
from nanogpt_jax.evaluation.loss import evaluate, make_score
from nanogpt_jax.model import gpt2, losses, sizes
from nanogpt_jax.model.gpt2 import Params
from nanogpt_jax.training.task import Objective, Scores, Task


def next_token(cfg: ModelConfig) -> Objective:
    """Rows of T+1 tokens: inputs, and as targets the same tokens shifted by one."""
    init, loss = functools.partial(gpt2.init_params, cfg), functools.partial(mean_loss, cfg)
    return Objective(init, loss, cfg.block_size + 1)


def language_model(cfg: Config, mesh: Mesh, data: Dataset) -> Task:
    """Next-token prediction on `data`. The best checkpoint has the least loss over the whole validation split."""
    t, T = cfg.train, cfg.model.block_size
    score = make_score(cfg.model, mesh)
    known = _best_possible("" if cfg.data.mixture else cfg.data.source, data, T)

    def batch(steps: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        return batches.batch(data.train, seed=t.seed, step=steps, batch_size=t.batch_size, block_size=T, rows=rows)

    def scores(params: Params) -> Scores:
        return {
            **evaluate(score, params, data.val, mesh, block_size=T, n_bytes=data.manifest["val"]["bytes"]),
            **known,
        }

    return Task(
        **vars(next_token(cfg.model)),
        batch=batch,
        evaluate=scores,
        summary="validation loss {loss:.4f}"
        + (", the best possible {best_possible:.4f}" if known else "")
        + ", {bits_per_byte:.4f} bits per byte",
        criterion=operator.itemgetter("loss"),
        tokens_per_step=t.batch_size * T,
    )


@functools.lru_cache(maxsize=8)  # a sweep asks for the same one again
def _best_possible(source: str, data: Dataset, T: int) -> Scores:
    best = corpora.best_possible(source, data.val, data.tokenizer, T)
    return {} if best is None else {"best_possible": math.fsum(best.tolist()) / len(best)}


def headline(cfg: Config, run_dir: Path, data: Dataset, mesh: Mesh, step: int) -> str:
    """What is about to be trained, on what, and where it goes: two lines."""
    m, t = cfg.model, cfg.train
    pieces = f", {t.micro_batch} sequences at a time" if t.micro_batch not in (0, t.batch_size) else ""
    alone = processes.count() == 1
    where = f"{mesh.size} {jax.default_backend()}" + ("" if alone else f" in {processes.count()} processes")
    begin = f"going on in {run_dir} from step {step}" if step else f"training in {run_dir}"
    return (
        f"{begin}: GPT-2 of {sizes.n_params(m):,} parameters (n_layer={m.n_layer} n_head={m.n_head} n_embd={m.n_embd} "
        f"block_size={m.block_size}) on {where}\n"
        f"{t.steps} steps of {t.batch_size * m.block_size:,} tokens{pieces}; {cfg.data.title}: {len(data.train):,} "
        f"tokens to train on, {len(data.val):,} to validate, vocabulary {m.vocab_size}"
    )


def mean_loss(cfg: ModelConfig, params: Params, tokens: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy in nats of predicting tokens [B, T+1] from position 1 on -> [] float32."""
    logits = gpt2.forward(cfg, params, tokens[:, :-1], dropout_key=dropout_key)
    return losses.cross_entropy(logits, tokens[:, 1:]).mean()
