"""Regular expressions over the names of a model's modules.

They may come from a file that somebody else wrote, and an expression can take exponential time. So all expressions of
one setting share a limited amount of processor time.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable

import regex

from lit_peft.util.errors import LitPeftError, first_line
from lit_peft.util.type_checks import brief

MAX_LENGTH = 10_000
# The product of all counts `{m,n}`: the time to compile an expression grows with it.
MAX_COUNTS = 100_000
SECONDS = 0.5
_COUNT = re.compile(r"\{(?:\d*,)?(\d+),?\}")
_CAN_BE_SLOW = re.compile(r"[*+?{(]")


def check_expression(field: str, pattern: str) -> None:
    """Check that a setting is a valid regular expression of a moderate size.

    Raises:
        LitPeftError: it is not.
    """
    if len(pattern) > MAX_LENGTH:
        raise LitPeftError(
            f"{field} has a regular expression of {len(pattern):,} characters: name the modules instead."
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as problem:
        raise LitPeftError(f"{field} has the regular expression {brief(pattern)}: {first_line(problem)}.") from None
    if math.prod(int(count) for count in _COUNT.findall(pattern) if int(count)) > MAX_COUNTS:
        raise LitPeftError(
            f"{field} has the regular expression {brief(pattern)}, which repeats its parts more than {MAX_COUNTS:,} "
            "times: name the modules instead."
        )


class Expressions:
    """The regular expressions of one setting, with limited time for all of them.

    Args:
        field: the setting's name, for messages.
        seconds: how much processor time they may take.
    """

    def __init__(self, field: str, seconds: float = SECONDS) -> None:
        self.field, self.left = field, seconds
        self._compiled: dict[tuple[str, str, str], regex.Pattern[str] | re.Pattern[str]] = {}

    def fullmatch(self, pattern: str, name: str, before: str = "", after: str = "") -> bool:
        """Return whether the expression matches the whole name.

        Args:
            pattern: the setting's expression.
            name: a module's name.
            before: a trusted expression for what precedes it in the name.
            after: the same for what follows.

        Raises:
            LitPeftError: the expression is not valid, or the time is used up.
        """
        return self._search(pattern, name, before, after) is not None

    def group(self, pattern: str, name: str, before: str, after: str) -> str | None:
        """Return what the group `found` of `before` or `after` matched; None if the expression does not match."""
        match = self._search(pattern, name, before, after)
        return None if match is None else match.group("found")

    def first(self, patterns: Iterable[str], name: str, before: str = "") -> str | None:
        """Return the first of the expressions that matches the whole name; None if none does."""
        return next((pattern for pattern in patterns if self.fullmatch(pattern, name, before)), None)

    def _search(self, pattern: str, name: str, before: str, after: str) -> regex.Match[str] | re.Match[str] | None:
        key = (pattern, before, after)
        expression = self._compiled.get(key)
        # An expression without repeats and groups takes linear time, and `re` is faster than a match with a time limit.
        if isinstance(expression, re.Pattern):
            return expression.fullmatch(name)
        start = time.thread_time()
        if expression is None:
            check_expression(self.field, pattern)
            module = regex if _CAN_BE_SLOW.search(pattern) else re
            expression = self._compiled[key] = module.compile(f"{before}(?:{pattern}){after}")
        try:
            match: regex.Match[str] | re.Match[str] | None = (
                expression.fullmatch(name)
                if isinstance(expression, re.Pattern)
                else expression.fullmatch(name, timeout=max(self.left, 1e-3))
            )
        except (TimeoutError, MemoryError):
            self.left = 0
            raise self._error(pattern) from None
        self.left -= time.thread_time() - start
        if self.left < 0:
            raise self._error(pattern)
        return match

    def _error(self, pattern: str) -> LitPeftError:
        return LitPeftError(
            f"{self.field} has the regular expression {brief(pattern)}, which takes too long on this model's names: "
            "name the modules instead."
        )
