"""Text from strangers in an error or a note: short, readable and on one line."""

from collections.abc import Iterable
from typing import Any


def cut(text: str, longest: int = 100) -> str:
    """`text`, cut to `longest` characters, the last three "...", if it is longer."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line of an exception's message, cut; the name of its class if it has none."""
    return cut((str(error).strip() or type(error).__name__).splitlines()[0], longest)


def printable(name: str | int, longest: int = 60) -> str:
    """A name from a file, cut, and quoted if it holds invisible characters: control characters, spaces at its ends.

    If it has more than `longest` characters, its beginning and "...".
    """
    text = str(name)
    if len(text) > longest:
        text = text[:longest] + "..."
    return text if text.isprintable() and text == text.strip() else repr(text)


def listed(words: Iterable[Any]) -> str:
    """1; 1 and 2; 1, 2 and 3; of more than ten, the first ten and how many more."""
    words = [str(word) for word in words]
    if len(words) > 10:
        words = [*words[:10], f"{len(words) - 10:,} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
