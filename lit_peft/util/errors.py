"""The one error type users see, and the helper that suggests what they may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator


class LitPeftError(ValueError):
    """Bad input from the user: one paragraph naming the field, the value and the fix.

    The command line prints the message alone (no traceback) and exits with status 2. Values may come from files that
    somebody else wrote: what is longer than `MOST` characters is cut.
    """

    MOST = 2000

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= self.MOST else f"{message[: self.MOST]}…")


def closest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """Return the choices nearest to `name`, ready to stand in a sentence.

    Args:
        name: what the user wrote.
        choices: what exists.
        n: how many to name at most.

    Returns:
        `"'a', 'b'"`: the `n` closest matches, or the first `n` choices if none is close.
    """
    pool = list(dict.fromkeys(choices))
    found = difflib.get_close_matches(name, pool, n=n, cutoff=0.4) or pool[:n]
    return ", ".join(repr(choice) for choice in found)


def causes(exc: BaseException, most: int = 8) -> Iterator[BaseException]:
    """Yield an exception and what led to it, the outermost first, `most` at the most."""
    link: BaseException | None = exc
    for _ in range(most):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def first_line(exc: BaseException) -> str:
    """Return the first line of an exception's message (its type's name if it has none), 300 characters at most."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:300]
