"""The one error type for users, and what its messages need."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator


class LitPeftError(ValueError):
    """Bad input from the user: one paragraph that names the field, the value and the fix.

    The command line prints only the message (no traceback) and exits with status 2. Values may come from files that
    somebody else wrote, so a message is cut after `MOST` characters, and its control characters are escaped.
    """

    MOST = 2000

    def __init__(self, message: str) -> None:
        super().__init__(printable(message if len(message) <= self.MOST else f"{message[: self.MOST]}…"))


def printable(text: str) -> str:
    """Return a text in one line without characters that would control a terminal, which are escaped (`\\x1b`).

    Line breaks, marks that change the direction of the text, and lone surrogates are escaped as well.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def closest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """Return the choices that are most similar to `name`, to be used in a sentence.

    Args:
        name: what the user wrote.
        choices: the valid names.
        n: the maximum number of choices to return.

    Returns:
        `"'a', 'b'"`: the `n` closest matches, or the first `n` choices if none is close.
    """
    pool = list(dict.fromkeys(choices))
    found = difflib.get_close_matches(name, pool, n=n, cutoff=0.4) or pool[:n]
    return ", ".join(repr(choice) for choice in found)


def causes(exc: BaseException, most: int = 8) -> Iterator[BaseException]:
    """Yield an exception and its causes, the outermost first, at most `most` of them."""
    link: BaseException | None = exc
    for _ in range(most):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def first_line(exc: BaseException) -> str:
    """Return the first line of an exception's message, at most 300 characters; its type's name if it has none."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:300]
