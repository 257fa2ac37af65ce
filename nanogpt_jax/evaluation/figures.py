"""The figures that `eval` reports of one run, each with its standard error, from the scores of tokens and items."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nanogpt_jax.evaluation import statistics
from nanogpt_jax.evaluation.loss import perplexity, summary
from nanogpt_jax.evaluation.multiple_choice import Choice
from nanogpt_jax.evaluation.statistics import Estimate
from nanogpt_jax.evaluation.texts import Text


def of_text(nats: np.ndarray, text: Text, block_size: int, stride: int) -> dict[str, Any]:
    """The loss of a text from each token's nats [N-1]. `stride` 0: windows side by side."""
    starts = statistics.stretches(len(nats), block_size)
    counts = np.diff(np.append(starts, len(nats)))
    loss = statistics.ratio(statistics.sums_between(nats, starts), counts)
    same = summary(nats, text.n_bytes)  # as training measures it
    found = {
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
    best = text.best_possible(block_size, stride)
    if best is not None:
        figures = {"best_possible": best, "above_best": nats - best}  # the second is surer: stretch by stretch
        found |= {name: statistics.ratio(statistics.sums_between(x, starts), counts) for name, x in figures.items()}
    return found


def of_choices(found: dict[str, np.ndarray], items: Sequence[Choice], source: str | None) -> dict[str, Any]:
    """From `multiple_choice.score_choices`; of each group too, if the items name one."""
    acc, acc_norm = statistics.mean(found["acc"]), statistics.mean(found["acc_norm"])
    figures = {"source": source, "items": len(items), "acc": acc, "acc_norm": acc_norm}
    members: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        members.setdefault(item.group, []).append(number)
    if any(members):
        of_group = {
            group or "(no group)": {"items": len(those)}
            | {name: statistics.mean(found[name][those]) for name in ("acc", "acc_norm")}
            for group, those in members.items()
        }
        figures["groups"] = of_group
    return figures


def of_last_words(found: dict[str, np.ndarray], source: str | None) -> dict[str, Any]:
    """From `multiple_choice.score_last_words`."""
    nats = statistics.mean(found["nats"])
    guesses = perplexity(nats.value)
    return {
        "source": source,
        "items": len(found["nats"]),
        "acc": statistics.mean(found["acc"]),
        "perplexity": Estimate(guesses, nats.scaled(guesses).error),
    }


def finite(value: Any) -> Any:
    """`value` for JSON: a number that is not finite becomes null, an estimate an object."""
    if isinstance(value, Estimate):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
