"""Tokens as people read them: spaces and newlines that are seen, and bytes that are only a part of a character."""

import re
import unicodedata
from collections.abc import Sequence

MARKS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


def shown(token: bytes) -> str:
    """A token's bytes as text in which everything is seen: b" rat\\xc3" -> "␣rat<0xC3>"."""
    return "".join(map(_shown, token.decode("utf-8", "surrogateescape"))) or "<>"


def _shown(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8
        return f"<0x{ord(character) - 0xDC00:02X}>"
    if character in MARKS:
        return MARKS[character]
    if unicodedata.combining(character):
        return f"◌{character}"
    return character if character.isprintable() else f"<U+{ord(character):04X}>"


def pieces(tokens: Sequence[bytes]) -> dict[int, str]:
    """Which tokens hold only a part of a character -> that character; "" if the text ends before it does."""
    ends = _ends(tokens)
    text = b"".join(tokens)
    spans = [(found.start(), found.end()) for found in re.finditer(rb"[\x00-\x7f]|[\xc0-\xff][\x80-\xbf]*", text)]
    found = {}
    for position, token in enumerate(tokens):
        if _is_text(token):
            continue
        start, end = ends[position] - len(token), ends[position]
        cut = [text[a:b] for a, b in spans if a < end and start < b and not (start <= a and b <= end)]
        found[position] = "".join(one.decode("utf-8", "ignore") for one in cut)
    return found


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _ends(tokens: Sequence[bytes]) -> list[int]:
    ends, n = [], 0
    for token in tokens:
        n += len(token)
        ends.append(n)
    return ends


def last_piece(tokens: Sequence[bytes], text: str, word: str) -> int:
    """The position of the token that ends the first `word` of `text`; -1 if it is not there as a word of its own."""
    found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)
    if not found:
        return -1
    end = len(text[: found.end()].encode())
    return next((position for position, n in enumerate(_ends(tokens)) if n >= end), -1)
