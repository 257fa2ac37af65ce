"""What a source of text is, wherever it comes from."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nanogpt_jax.config import UserError, suggestion
from nanogpt_jax.data import tables
from nanogpt_jax.data.text_file import OnProgress

Block = tuple[str, bool]  # text, and whether a document ends after it


@dataclass(frozen=True)
class Corpus:
    """A source of text, and what is known before it is read."""

    name: str
    identity: str  # equal identities mean equal texts; computed without reading large ones
    origin: dict[str, Any]  # for the manifest
    documents: bool  # False: one text, not divided into documents
    blocks: Callable[[OnProgress], Iterator[Block]]  # in order, not normalised; UserError if unreadable


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text in `field`; "" if it is null."""
    if field not in row:
        raise UserError(_no_field(field, list(row), where))
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: the field {field!r} is not text but {type(value).__name__}\n"
            "       write it as text, or name the field that holds the text with --data.field=NAME"
        )
    try:
        value.encode()
    except UnicodeEncodeError as e:  # JSON's \ud800 alone
        raise UserError(
            f"{where} holds {value[e.start]!r}, which is half a character\n"
            "       take it out, or write the file again with the program that made it"
        ) from None
    return value


def _no_field(field: str, names: list[str], where: str) -> str:
    near = tables.separator_hint(names) or suggestion(field, names)
    return f"{where} has no field {field!r}, but {', '.join(map(repr, names)) or 'none at all'}{near}" + (
        "" if near else "\n       say which one holds the text with --data.field=NAME"
    )


def sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "files"
