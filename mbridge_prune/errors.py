"""The one error class a user is meant to read, and the hint that goes with a misspelt word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error the user can mend: printed as one line, exit code 2.

    The message says what was wrong, what was expected, and what to do.
    """


def nearest(word: object, choices: Iterable[object]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice closest to ``word``, or an empty string."""
    by_lower = {str(choice).lower(): str(choice) for choice in choices}
    match = difflib.get_close_matches(str(word).lower(), list(by_lower), n=1)
    return f" (did you mean {by_lower[match[0]]!r}?)" if match else ""
