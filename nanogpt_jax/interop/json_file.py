"""JSON from strangers: read with limits, and shortened for messages."""

import json
import math
import os
import reprlib
from pathlib import Path
from typing import Any

from nanogpt_jax.config import UserError
from nanogpt_jax.host.messages import first_line

DEEPEST = 100  # levels of nested objects and lists
LARGEST = 1 << 28  # bytes

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 3, 6, 6, 4


def shown(value: Any) -> str:
    """`value` for a message; if it is long, its beginning and its end."""
    return _short.repr(value)


def is_file(path: Path) -> bool:
    """Whether there is a file at `path`. UserError if there is anything else, which must not be ignored silently."""
    if os.path.isfile(path) or not os.path.lexists(path):
        return os.path.isfile(path)
    what = "leads nowhere" if not os.path.exists(path) else "is a directory" if os.path.isdir(path) else "is not a file"
    raise UserError(f"{path} {what}\n       remove it, or download it again")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. NaN and infinities, which are not valid JSON, are read as null."""
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{path} is damaged: {size:,} bytes are too many for a file of settings")
        found = json.loads(path.read_bytes(), parse_constant=lambda _: None, parse_float=_finite)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except RecursionError:
        raise _too_deep(path) from None
    except ValueError as e:
        raise UserError(
            f"{path} is not JSON ({first_line(e)})\n       {path.name} is damaged: download it again"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    level: list[Any] = [found]
    for _ in range(DEEPEST):
        inside = [x for outer in level for x in (outer.values() if isinstance(outer, dict) else outer)]
        level = [x for x in inside if isinstance(x, dict | list)]
        if not level:
            return found
    raise _too_deep(path)


def _too_deep(path: Path) -> UserError:
    return UserError(f"{path} is damaged: its lists and objects are nested more than {DEEPEST} deep")


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None
