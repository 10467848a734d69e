"""Filters, duplicates, overlap, random splits and limits, on row indices and on `Rows`."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_peft.data.notes import Notes, share_of
from lit_peft.data.rows import Rows, Split
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset

Key = Callable[[int], Hashable]
"""Maps a row index to what makes the row equal to another."""


def filter_rows(indices: Sequence[int], values: Sequence[Any], accepted: Any, column: str, field: str) -> list[int]:
    """Keep the rows whose value in a column is an accepted one.

    Args:
        indices: row indices into `values`.
        values: the column's values.
        accepted: one value, or a list of values; also compared as text, because csv cells are text.
        column: the column's name, for the error message.
        field: the setting the rows came from, for the error message.

    Raises:
        LitPeftError: no row is left; the message lists values that do occur.
    """
    choices = list(accepted) if isinstance(accepted, (list, tuple, set)) else [accepted]
    texts = {str(choice) for choice in choices}
    kept = [index for index in indices if values[index] in choices or str(values[index]) in texts]
    if not kept:
        present = list(dict.fromkeys(repr(values[index]) for index in indices))
        more = ", …" if len(present) > 5 else ""
        raise LitPeftError(
            f"data.where: no row of {field} has {column} = {accepted!r}; {column!r} has the values "
            f"{', '.join(present[:5])}{more}."
        )
    return kept


def drop_duplicates(indices: Sequence[int], key: Key) -> list[int]:
    """Keep the first row of each key, in order."""
    first: dict[Hashable, int] = {}
    for index in indices:
        first.setdefault(key(index), index)
    return list(first.values())


def drop_overlap(indices: Sequence[int], key: Key, held_out: Collection[Hashable], source: str) -> list[int]:
    """Keep the training rows whose key does not occur in validation or test.

    Args:
        indices: the training rows.
        key: maps a row index to its key.
        held_out: the keys of the validation and test rows.
        source: the setting the training rows came from and its value, for the error message.

    Raises:
        LitPeftError: no row is left.
    """
    kept = [index for index in indices if key(index) not in held_out]
    if not kept:
        raise LitPeftError(
            f"{source}: every row also occurs in data.validation or data.test; give each split its own rows."
        )
    return kept


def split_rows(indices: Sequence[int], fractions: Mapping[str, float], group: Key, seed: int) -> dict[str, list[int]]:
    """Split rows at random and keep the rows of a group together.

    The same rows, fractions and seed give the same split. Parts are drawn in the given order, so a part does not
    depend on the fractions of later parts.

    Args:
        indices: row indices.
        fractions: name of each part to draw -> its share of `indices`.
        group: maps a row index to its group; the rows of a group are never in two parts.
        seed: seed of the draw.

    Returns:
        The parts by name, and the remaining rows as "train"; each in the order of `indices`.

    Raises:
        LitPeftError: a part or the remainder would be empty.
    """
    groups: dict[Hashable, list[int]] = {}
    for index in indices:
        groups.setdefault(group(index), []).append(index)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    position = {index: at for at, index in enumerate(indices)}
    parts: dict[str, list[int]] = {}
    for name, fraction in fractions.items():
        size = round(fraction * len(indices))
        part: list[int] = []
        while shuffled and len(part) < size:
            part += shuffled.pop()
        parts[name] = sorted(part, key=position.__getitem__)
    parts["train"] = sorted((index for members in shuffled for index in members), key=position.__getitem__)
    for name, part in parts.items():
        if not part:
            raise LitPeftError(
                f"data.{name}: splitting {len(indices)} distinct row(s) ({len(groups)} group(s)) by "
                f"{', '.join(f'{key}_fraction={value}' for key, value in fractions.items())} leaves no row for "
                f"{name}; give more rows, other fractions, or a file for each split."
            )
    return parts


def sample_rows(indices: Sequence[int], limit: int | None, seed: int) -> list[int]:
    """Keep at most `limit` rows, drawn at random because files are often sorted by label; their order stays."""
    if limit is None or limit >= len(indices):
        return list(indices)
    positions = sorted(random.Random(seed).sample(range(len(indices)), limit))
    return [indices[position] for position in positions]


def without_overlap(found: Mapping[Split, Rows], group_key: Callable[[Dataset], Key], notes: Notes) -> Rows:
    """Return the training rows that do not occur in validation or test.

    Args:
        found: the rows of each split, "train" among them.
        group_key: makes the function that maps a table's row index to its key.
        notes: takes the number of removed rows.

    Raises:
        LitPeftError: no row is left.
    """
    train = found["train"]
    held_out: set[Hashable] = set()
    for split in ("validation", "test"):
        if split in found:
            key = group_key(found[split].table)
            held_out.update(key(index) for index in found[split].indices)
    if not held_out:
        return train
    kept = drop_overlap(train.indices, group_key(train.table), held_out, f"{train.field} {train.source!r}")
    if len(kept) < len(train):
        notes.add(
            f"{train.field}: {share_of(len(train) - len(kept), len(train), 'rows')} removed, because they also occur "
            "in validation or test."
        )
    return replace(train, indices=kept)


def hold_out(
    train: Rows, fractions: Mapping[Split, float], duplicate: Key, group: Key, seed: int, notes: Notes
) -> dict[Split, Rows]:
    """Split the training rows into training rows and held-out rows.

    Args:
        train: the training rows.
        fractions: each split to hold out -> its share of the rows.
        duplicate: maps a row index to its key; the first row of each key is kept.
        group: maps a row index to its group; the rows of a group are never in two splits.
        seed: seed of the draw.
        notes: takes the number of removed duplicates.

    Raises:
        LitPeftError: a split would be empty.
    """
    kept = drop_duplicates(train.indices, duplicate)
    if len(kept) < len(train):
        notes.add(
            f"{train.field}: {share_of(len(train) - len(kept), len(train), 'rows')} removed, because they are "
            "duplicates."
        )
    parts = split_rows(kept, {str(split): fraction for split, fraction in fractions.items()}, group, seed)
    splits: tuple[Split, ...] = ("train", *fractions)
    return {split: replace(train, indices=parts[split]) for split in splits}
