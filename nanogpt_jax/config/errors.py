"""Errors for people, and the word that they may have meant."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the person at the keyboard can mend. The doors print it without a traceback and exit with 2."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """A second line for an error: the known word that begins like it, or else the nearest, if one is near."""
    known = list(known)
    begun = [k for k in known if k.startswith(word)] if len(word) > 4 else []
    near = begun or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"\n       did you mean {near[0]}?" if near else ""
