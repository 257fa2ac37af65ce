"""What --over asks for: settings, and the values that each takes. No jax."""

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanogpt_jax.config import UserError, parse
from nanogpt_jax.config.command_line import unknown_setting
from nanogpt_jax.config.settings import types_of

SEED = "train.seed"
FORMS = "NAME=A,B,C, log:FROM:TO:N or lin:FROM:TO:N"
MOST_VALUES, MOST_CONFIGURATIONS = 1000, 10_000
DIGITS = 4  # of a spaced value: so that names of runs stay short
SAMPLE_SEED = 0  # the same command takes the same sample
ALONE = ("mesh.processes", "mesh.coordinator", "mesh.num_processes", "mesh.process_id")  # a sweep is one process


@dataclass(frozen=True)
class Range:
    key: str  # "optim.learning_rate"
    values: tuple[Any, ...]  # typed and different, in the order in which they were given


def read(texts: Sequence[str]) -> list[Range]:
    """What several --over ask for. UserError that names the setting, and what is wrong with its values."""
    ranges = [_range(text) for text in texts]
    keys = [one.key for one in ranges]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--over {key} was given twice; give all its values in one: --over {key}=A,B")
    return ranges


def _range(text: str) -> Range:
    name, equals, given = text.partition("=")
    key = name.strip().replace("-", "_")
    if not equals or not key:
        missing = "values" if key else "setting"
        raise UserError(f"--over={text} has no {missing}\n       give it as {FORMS}")
    if key not in types_of():
        raise unknown_setting(key, "--over")
    if key in ALONE:
        raise UserError(f"--over {key}: a sweep runs in one process, so {key} cannot be swept")
    values = _values(key, types_of()[key], given.strip())
    for i, value in enumerate(values):
        if value in values[:i]:
            fewer = "; it is a whole number: ask for fewer values" if is_spaced(given) else "; give it once"
            raise UserError(f"--over {key}={given} has {shown(value)} twice{fewer}")
    return Range(key, tuple(values))


def is_spaced(given: str) -> bool:
    return re.match(r"\s*(log|lin):", given) is not None


def _values(key: str, hint: Any, given: str) -> list[Any]:
    if hint in (int, float) and (is_spaced(given) or ":" in given):
        return _spaced(key, hint, given)
    # values that have commas themselves, as mixtures do, are separated by semicolons
    parts = given.split(";" if ";" in given or key == "data.mixture" else ",")
    if not all(part.strip() for part in parts):
        raise UserError(f"--over {key}={given} has an empty value\n       give values as {FORMS}")
    try:
        return [parse.coerce(key, hint, part.strip(), "command line") for part in parts]
    except UserError as e:
        raise UserError(f"{e}\n       give values as {FORMS}" if hint in (int, float) else str(e)) from None


def _spaced(key: str, kind: type, given: str) -> list[Any]:
    """log:1e-3:1e-1:7 -> seven values with equal ratios; lin: with equal differences. Both ends are among them."""
    wrong = f"--over {key}={given}"
    way, *parts = given.split(":")
    if way not in ("log", "lin") or len(parts) != 3 or not all(part.strip() for part in parts):
        raise UserError(f"{wrong} needs a start, an end and how many values: log:FROM:TO:N or lin:FROM:TO:N")
    try:
        a, b, n = float(parts[0]), float(parts[1]), int(parts[2])
    except ValueError:
        raise UserError(f"{wrong}: FROM and TO must be numbers, and N a whole number") from None
    if not (math.isfinite(a) and math.isfinite(b) and a < b):
        raise UserError(f"{wrong}: FROM must be below TO, and both finite")
    if way == "log" and a <= 0:
        raise UserError(f"{wrong}: with log:, FROM must be above 0")
    if not 2 <= n <= MOST_VALUES:
        raise UserError(f"{wrong}: N must lie in 2 to {MOST_VALUES}")
    shares = [i / (n - 1) for i in range(n)]
    between = [a * (b / a) ** x if way == "log" else a + (b - a) * x for x in shares]
    rounded = [a, *(float(f"{x:.{DIGITS}g}") for x in between[1:-1]), b]
    return [parse.coerce(key, kind, round(x) if kind is int else x, "--over") for x in rounded]


def grid(ranges: Sequence[Range], sample: int | None) -> list[dict[str, Any]]:
    """All combinations, the last setting's values changing fastest; or `sample` of them at random, in that order.

    UserError if there are too many, or fewer than are asked for.
    """
    total = math.prod(len(one.values) for one in ranges)
    if sample is not None and sample > total:
        raise UserError(f"--sample={sample} exceeds the {total} combinations that --over gives")
    if (sample or total) > MOST_CONFIGURATIONS:
        most = f"at most {MOST_CONFIGURATIONS:,}"
        raise UserError(f"--over gives {total:,} combinations, and a sweep has {most}\n       take some: --sample 20")
    numbers = range(total) if sample is None else sorted(random.Random(SAMPLE_SEED).sample(range(total), sample))
    return [_combination(ranges, number) for number in numbers]


def _combination(ranges: Sequence[Range], number: int) -> dict[str, Any]:
    chosen = {}
    for one in reversed(ranges):
        number, i = divmod(number, len(one.values))
        chosen[one.key] = one.values[i]
    return {one.key: chosen[one.key] for one in ranges}


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """ "optim.learning_rate" -> "learning_rate", unless another of the keys ends in the same way."""
    ends = [key.split(".")[1] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def shown(value: Any) -> str:
    """A value as it is typed on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def label(values: Mapping[str, Any]) -> str:
    """A configuration in words: "learning_rate=0.02, beta1=0.9"."""
    names = short_names(list(values))
    return ", ".join(f"{names[key]}={shown(value)}" for key, value in values.items()) or "the one configuration"
