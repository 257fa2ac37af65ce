"""A reference: what several runs of one recipe, which differ in their seed alone, have logged; and its file.

Steps are cut twice: into narrow groups (knots), for the mean curve, and into wider blocks, for how runs differ from it.
Both grow with the step, as a loss falls with its logarithm.
"""

# n runs, K knots, B blocks, E evaluations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_jax.config import Config, settings
from nanogpt_jax.host import files

FOLDER = Path(__file__).parent / "references"
FORMAT = 1
LEAST = 5  # runs of a reference
# What decides what a run learns, but for its seed and its data; its steps too, as the schedule ends with them.
LEARNT = frozenset(settings.types_of()) - (Config.EXECUTION - {"train.steps"}) - {
    *("train.seed", "model.vocab_size", "model.end_of_text")  # the last two follow from the data
}  # fmt: skip
KNOT, BLOCK = 1.05, 1.3  # the last step of a group by its first


@dataclass(frozen=True)
class Series:
    """One number of each step: a loss, or the logarithm of a gradient norm."""

    mean: np.ndarray  # [K] over runs and the steps of a knot
    noise: np.ndarray  # [B] standard deviation of single steps about their run's own curve
    runs: np.ndarray  # [n, B] by how much each run is above `mean`, over the steps of a block


@dataclass(frozen=True)
class Reference:
    name: str  # of the config
    settings: dict[str, Any]  # LEARNT
    data: dict[str, Any]  # fingerprint, vocabulary, and tokens to train on and to validate
    seeds: list[int]
    versions: dict[str, str]  # of what computed the runs
    loss: Series
    norm: Series  # ln of the gradient norm
    evaluated: np.ndarray  # [E] steps
    validation: np.ndarray  # [n, E]
    rates: np.ndarray  # [_, 2] (step, learning rate); linear between two of them

    @property
    def n(self) -> int:
        return len(self.validation)

    @property
    def steps(self) -> int:
        return self.settings["train.steps"]

    @functools.cached_property
    def blocks(self) -> np.ndarray:
        """[B] the first step of each."""
        return firsts(self.steps, BLOCK)

    @functools.cached_property
    def knots(self) -> np.ndarray:
        """[K] ln of the middle of each."""
        edges = np.append(firsts(self.steps, KNOT), self.steps + 1)
        return np.log((edges[:-1] + edges[1:] - 1) / 2)

    def without(self, run: int) -> "Reference":
        """The reference of the other runs."""

        def rest(series: Series) -> Series:
            return replace(series, runs=np.delete(series.runs, run, 0))

        return replace(
            self, loss=rest(self.loss), norm=rest(self.norm), validation=np.delete(self.validation, run, 0),
            seeds=self.seeds[:run] + self.seeds[run + 1 :],
        )  # fmt: skip


def firsts(steps: int, ratio: float) -> np.ndarray:
    """The first steps of groups that cover 1 to `steps`. No group is a scrap at the end."""
    found = [1]
    while (after := int(found[-1] * ratio) + 1) <= steps:
        found.append(after)
    if len(found) > 1 and steps - found[-1] + 1 < (found[-1] - found[-2]) / 2:
        found.pop()
    return np.array(found)


# ---- its file --------------------------------------------------------------------------------------------------------


def to_json(one: Reference) -> str:
    def plain(value: Any, digits: int = 4) -> Any:
        if isinstance(value, np.ndarray):
            return value.round(digits).tolist()
        if isinstance(value, Series):
            return {part.name: plain(getattr(value, part.name)) for part in fields(value)}
        return value

    found = {part.name: plain(getattr(one, part.name), 8 if part.name == "rates" else 4) for part in fields(one)}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {"format": FORMAT, **found}.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(text: str | bytes) -> Reference:
    """ValueError if it is damaged."""
    try:
        told = json.loads(text)
        series = [
            Series(**{part.name: _numbers(told[of][part.name]) for part in fields(Series)}) for of in ("loss", "norm")
        ]
        arrays: dict[str, Any] = {name: _numbers(told[name]) for name in ("evaluated", "validation", "rates")}
        plain: dict[str, Any] = {name: told[name] for name in ("name", "settings", "data", "seeds", "versions")}
        arrays["evaluated"] = arrays["evaluated"].astype(int)
        one = Reference(**plain, **arrays, loss=series[0], norm=series[1])
        n, K, B, E = len(one.seeds), len(one.knots), len(one.blocks), len(one.evaluated)
        shapes = [one.validation.shape, one.rates.shape[1:]]
        shapes += [x.shape for each in series for x in (each.mean, each.noise, each.runs)]
        if told["format"] != FORMAT or shapes != [(n, E), (2,), *([(K,), (B,), (n, B)] * 2)] or n < LEAST or not E:
            raise ValueError("its parts do not fit together")
        if not set(one.settings) <= LEARNT or not isinstance(one.data["fingerprint"], str):
            raise ValueError("its settings are not those of this version")
        # settings that are newer than the file: their defaults change nothing
        defaults = {key: value for key, value in settings.items(Config()) if key in LEARNT}
        return replace(one, settings={**defaults, **one.settings})
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise ValueError(f"damaged: {e!r}") from None


def _numbers(value: Any) -> np.ndarray:
    found = np.array(value, np.float64)
    if not np.isfinite(found).all():
        raise ValueError("a number is not finite")
    return found


def known(folder: Path = FOLDER) -> list[Reference]:
    """All references. One that is damaged, or of another version's settings, is no reference."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(from_json(files.read(path)))
        except (OSError, ValueError):
            continue
    return found


# ---- whose it is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    reference: Reference
    same_data: bool  # if not, the source's name and the tokenizer are the reference's, and the tokens are others


def match(cfg: Config, data: dict[str, Any], references: Sequence[Reference]) -> Match | None:
    """The reference of a run's settings and of its data, `facts` of its data.json; None if there is none."""
    mine = {key: value for key, value in settings.items(cfg) if key in LEARNT}
    for one in references:
        other = {key for key in LEARNT if mine[key] != one.settings[key]}
        if any(not key.startswith("data.") for key in other):
            continue
        if data.get("fingerprint") == one.data["fingerprint"]:
            return Match(one, True)
        if not other and data.get("fingerprint"):
            return Match(one, False)
    return None


def facts(manifest: Any) -> dict[str, Any]:
    """What is compared of RUN/data.json; {} if that is damaged."""
    try:
        tokens = {split: int(manifest[split]["tokens"]) for split in ("train", "val")}
        return {"fingerprint": str(manifest["fingerprint"]), "vocabulary": int(manifest["n_vocab"]), **tokens}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return {}
