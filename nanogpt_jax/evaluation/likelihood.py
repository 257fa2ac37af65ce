"""log p(continuation | context), for multiple choice, last words and lm-eval."""

# B rows, W width of a row, E groups of rows (1), V vocab

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from nanogpt_jax.config import ModelConfig, UserError
from nanogpt_jax.data.tokenizer import Tokenizer, check_fit
from nanogpt_jax.distributed.mesh import batch_ways
from nanogpt_jax.evaluation.loss import Score, Track, make_score, read_back, rows, silent
from nanogpt_jax.inference.sampler import bucket, prompt_ids
from nanogpt_jax.model import gpt2


@dataclass(frozen=True)
class Model:
    """A trained model, ready for scoring."""

    cfg: ModelConfig
    params: gpt2.Params
    tokenizer: Tokenizer
    mesh: Mesh
    score: Score = field(init=False)

    def __post_init__(self) -> None:
        check_fit(self.tokenizer, self.cfg.vocab_size)
        object.__setattr__(self, "score", make_score(self.cfg, self.mesh))


class Likelihood(NamedTuple):
    nats: float  # log p(continuation | context), at most 0
    greedy: bool  # each of its tokens is the likeliest


def encode_pair(model: Model, context: str, continuation: str, where: str) -> tuple[list[int], list[int]]:
    """Tokens of the context, at least one, and of the continuation, at most block_size. `where` is for errors.

    lm-eval's rules: spaces at the end of the context belong to the continuation. Because byte pairs may join at the
    boundary, the continuation is the tokens of the whole text after as many as the context alone has.
    """
    kept = context.rstrip()
    try:
        first = model.tokenizer.encode(kept).tolist()
        rest = model.tokenizer.encode(context + continuation).tolist()[len(first) :]
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    if not rest:
        raise UserError(f"{where}: nothing to predict after the context")
    if len(rest) > model.cfg.block_size:
        raise UserError(
            f"{where}: {len(rest)} tokens to predict do not fit into the model's context of {model.cfg.block_size}"
        )
    return first or prompt_ids(model.tokenizer, ""), rest


def log_likelihoods(
    model: Model, pairs: Sequence[tuple[list[int], list[int]]], track: Track = silent
) -> list[Likelihood]:
    """The likelihood of each (context, continuation) in tokens. If a context is too long, its end is used.

    Rows are padded on the right to a few lengths, so that a program is compiled for each length and not for each item.
    """
    T, ways = model.cfg.block_size, batch_ways(model.mesh)
    sequences = [np.array((context + rest)[-(T + 1) :], np.int32) for context, rest in pairs]
    lengths = np.array([bucket(len(s) - 1, T) for s in sequences], np.int64)
    batches: list[np.ndarray] = []  # which sequences are computed together
    for length in np.unique(lengths)[::-1].tolist():
        members, B = np.flatnonzero(lengths == length), rows(length) * ways
        batches += [members[i : i + B] for i in range(0, len(members), B)]

    def calls():
        for members in track(batches, len(batches)):
            length = int(lengths[members[0]])
            tokens = np.zeros((1, rows(length) * ways, length + 1), np.int32)
            for row, i in enumerate(members):
                tokens[0, row, : len(sequences[i])] = sequences[i]
            yield model.score(model.params, tokens)

    found: dict[int, Likelihood] = {}
    for members, (nats, likeliest) in zip(batches, read_back(calls()), strict=True):
        for row, i in enumerate(members.tolist()):
            end = len(sequences[i]) - 1
            part = slice(end - len(pairs[i][1]), end)
            if not np.isfinite(nats[0, row, part]).all():
                raise UserError("the model gives likelihoods that are not finite: it has diverged")
            found[i] = Likelihood(-math.fsum(nats[0, row, part].tolist()), bool(likeliest[0, row, part].all()))
    return [found[i] for i in range(len(pairs))]
