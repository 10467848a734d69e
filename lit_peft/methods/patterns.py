"""Settings that differ by module: `rank_pattern` and `alpha_pattern`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.expressions import Expressions

# What may precede a pattern.
_PARENTS = r"(?:.*\.)?"


def pattern_values(patterns: Mapping[str, float], names: Sequence[str], default: float) -> dict[str, float]:
    """Return the value of each name: that of the first pattern that matches it, else the default."""
    first = first_fitting(patterns, names)
    return {name: patterns[first[name]] if name in first else default for name in names}


def first_fitting(patterns: Iterable[str], names: Sequence[str], field: str = "rank_pattern") -> dict[str, str]:
    """Return the first of the patterns that matches each name. Names that none matches are left out.

    Args:
        patterns: regular expressions for a name or the last parts of it.
        names: full names of modules.
        field: the setting's name, for messages.

    Raises:
        LitPeftError: a pattern is not valid, or takes too long.
    """
    expressions, patterns = Expressions(field), list(patterns)
    found = {name: expressions.first(patterns, name, _PARENTS) for name in names}
    return {name: pattern for name, pattern in found.items() if pattern is not None}


def check_patterns(field: str, patterns: Mapping[str, float], adapted: Sequence[str]) -> None:
    """Check that each of the patterns for `pattern_values` applies to a module.

    Raises:
        LitPeftError: a pattern matches no adapted module, or only modules that an earlier pattern matches.
    """
    used = set(first_fitting(patterns, adapted, field).values())
    for pattern in (pattern for pattern in patterns if pattern not in used):
        if first_fitting([pattern], adapted, field):
            raise LitPeftError(
                f"{field} has {pattern!r} after patterns that match all of its modules: the first match counts, so "
                "move it to the front, or remove it."
            )
        ends = [name.rpartition(".")[2] for name in adapted]
        raise LitPeftError(
            f"{field} has {pattern!r}, which matches no adapted module: the closest are "
            f"{closest(pattern.rpartition('.')[2], ends)}."
        )
