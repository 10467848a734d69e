"""Which rows go where: filters, duplicates, seeded splits and limits, on plain lists of row numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from lit_peft.util.errors import LitPeftError


def normalized(text: str) -> str:
    """Return the form in which two texts count as the same: white space collapsed, ends stripped."""
    return " ".join(text.split())


def matching(rows: Sequence[int], column: Sequence[Any], wanted: Any, name: str, field: str) -> list[int]:
    """Keep the rows whose cell equals a value, or one of a list of values.

    Args:
        rows: row numbers, indices into `column`.
        column: the column's cells.
        wanted: the value, or a list of them; compared as text too, since csv cells are text.
        name: the column's name, for the error.
        field: the setting the rows came from, for the error.

    Raises:
        LitPeftError: no row is left; names values that do occur.
    """
    choices = list(wanted) if isinstance(wanted, (list, tuple, set)) else [wanted]
    texts = {str(choice) for choice in choices}
    kept = [row for row in rows if column[row] in choices or str(column[row]) in texts]
    if not kept:
        seen = list(dict.fromkeys(repr(column[row]) for row in rows))
        more = ", …" if len(seen) > 5 else ""
        raise LitPeftError(
            f"data.where: no row of {field} has {name} = {wanted!r}; {name!r} holds {', '.join(seen[:5])}{more}."
        )
    return kept


def first_of_each(rows: Sequence[int], key: Callable[[int], Hashable]) -> list[int]:
    """Keep the first row of each key, in order."""
    seen: set[Hashable] = set()
    kept = []
    for row in rows:
        this = key(row)
        if this not in seen:
            seen.add(this)
            kept.append(row)
    return kept


def carve(
    rows: Sequence[int], fractions: Mapping[str, float], group: Callable[[int], Hashable], seed: int
) -> dict[str, list[int]]:
    """Split rows at random, keeping rows of one group together.

    The same rows, fractions and seed give the same split. Parts are drawn in the order given, so the
    first part does not depend on the fractions of the later ones.

    Args:
        rows: row numbers.
        fractions: name of each part to take out -> its share of `rows`.
        group: rows with the same group never land in two parts.
        seed: of the draw.

    Returns:
        The parts by name, and "train" with what is left; each in the order of `rows`.

    Raises:
        LitPeftError: a part or the remainder would be empty.
    """
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    place = {row: at for at, row in enumerate(rows)}
    parts: dict[str, list[int]] = {}
    for name, fraction in fractions.items():
        wanted = round(fraction * len(rows))
        part: list[int] = []
        while order and len(part) < wanted:
            part += order.pop()
        parts[name] = sorted(part, key=place.__getitem__)
    parts["train"] = sorted((row for members in order for row in members), key=place.__getitem__)
    for name, part in parts.items():
        if not part:
            raise LitPeftError(
                f"data.{name}: splitting {len(rows)} distinct row(s) ({len(groups)} group(s)) by "
                f"{', '.join(f'{key}_fraction={value}' for key, value in fractions.items())} leaves {name} "
                "without a row; give more rows, other fractions, or a file for each split."
            )
    return parts


def limited(rows: Sequence[int], limit: int | None, seed: int) -> list[int]:
    """Keep at most `limit` rows, drawn at random (files are often sorted by label), in their order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[at] for at in chosen]
