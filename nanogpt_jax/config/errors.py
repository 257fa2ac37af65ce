"""Errors for people, with suggestions."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. Commands print it without a traceback and exit with `code`."""

    code = 2


class TryAgain(UserError):
    """An error that may pass by itself. Its code, EX_TEMPFAIL of sysexits.h, lets a scheduler run the command again."""

    code = 75


def suggestion(word: str, known: Iterable[str]) -> str:
    """A second line for an error: the known word that starts with `word`, else the nearest; "" if none is near."""
    known = list(known)
    begun = [k for k in known if k.startswith(word)] if len(word) > 4 else []
    near = begun or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"\n       did you mean {near[0]}?" if near else ""
