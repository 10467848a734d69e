"""Rows of several files as one table, each of which still knows its file and its number there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from lit_peft.data.datasets_internals import get_fingerprint, set_fingerprint
from lit_peft.data.files import column_values, fingerprint
from lit_peft.data.json_rows import table_of
from lit_peft.data.rows import Rows
from lit_peft.data.splits import sample_rows

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Group:
    """Consecutive rows of a joined table that are a set of their own, or a source with a weight.

    Attributes:
        name: the name of the set, or the source.
        weight: the weight of the source; None: the rows are a set with a name.
        start: the first row in the table.
    """

    name: str
    weight: float | None
    start: int


@dataclass(frozen=True)
class JoinedRows(Rows):
    """Rows of several tables.

    Attributes:
        parts: the rows of each file, in order.
        groups: the sets or weighted sources, in order; empty: all rows belong together.
    """

    parts: tuple[Rows, ...] = ()
    groups: tuple[Group, ...] = ()

    def locate(self, index: int) -> str:
        """Return the setting, the file and the row number in it."""
        starts = [0, *accumulate(len(part.table) for part in self.parts[:-1])]
        part = bisect_right(starts, index) - 1
        return self.parts[part].locate(index - starts[part])


@dataclass(frozen=True)
class PlacedRows(Rows):
    """Rows that were read one by one, from one or several files.

    Attributes:
        places: the file of each row, and its number there.
    """

    places: tuple[tuple[str, int], ...] = ()

    def locate(self, index: int) -> str:
        """Return the setting, the file and the row number in it."""
        source, number = self.places[index]
        return f"{self.field} {source!r}, row {number}"


def join_rows(parts: Sequence[Rows], source: str, groups: Sequence[tuple[str, float | None, int]] = ()) -> Rows:
    """Join the rows of several files.

    Args:
        parts: the rows of each file.
        source: the setting's value, in short.
        groups: name, weight and number of parts of each set or weighted source.

    Returns:
        The rows of the only part, or `JoinedRows`.
    """
    if len(parts) == 1 and len(groups) <= 1:
        return parts[0]
    starts = [0, *accumulate(len(part.table) for part in parts)]
    indices = [start + index for start, part in zip(starts, parts, strict=False) for index in part.indices]
    made, at = [], 0
    for name, weight, count in groups:
        made.append(Group(name, weight, starts[at]))
        at += count
    table = join_tables([part.table for part in parts])
    return JoinedRows(table, indices, parts[0].field, source, None, tuple(parts), tuple(made))


def join_tables(tables: Sequence[Dataset]) -> Dataset:
    """Put tables under each other; cells of a column that a table lacks are empty.

    A column whose types differ gets the type that a single file with all of its values would have.
    """
    import datasets

    names = list(dict.fromkeys(name for table in tables for name in table.column_names))
    kinds = {name: [table.features[name] for table in tables if name in table.column_names] for name in names}
    differing = [name for name, found in kinds.items() if any(kind != found[0] for kind in found)]
    plain = [table.remove_columns([name for name in differing if name in table.column_names]) for table in tables]
    parts: list[Any] = []
    if len(differing) < len(names):
        # A table without any of these columns still has its rows.
        features = datasets.Features({name: kinds[name][0] for name in names if name not in differing})
        whole = [_with_columns(part, features, len(table)) for part, table in zip(plain, tables, strict=True)]
        parts.append(datasets.concatenate_datasets(whole))
    if differing:
        parts.append(table_of({name: [cell for table in tables for cell in _cells(table, name)] for name in differing}))
    joined: Dataset = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts, axis=1)
    joined = joined.select_columns(names)
    set_fingerprint(joined, fingerprint("joined", [get_fingerprint(table) for table in tables]))
    return joined


def _with_columns(table: Dataset, features: Any, count: int) -> Dataset:
    """Return a table with exactly these columns; those that it lacks are empty."""
    import datasets
    import pyarrow as pa

    lacking = [name for name in features if name not in table.column_names]
    if not lacking:
        return table
    schema = features.arrow_schema
    empty = pa.Table.from_arrays(
        [pa.nulls(count, schema.field(name).type) for name in lacking],
        schema=datasets.Features({name: features[name] for name in lacking}).arrow_schema,
    )
    added = datasets.Dataset(datasets.table.InMemoryTable(empty))
    return added if not table.column_names else datasets.concatenate_datasets([table, added], axis=1)


def _cells(table: Dataset, name: str) -> list[Any]:
    return column_values(table, name) if name in table.column_names else [None] * len(table)


def groups_of(rows: Rows) -> list[tuple[str, float | None, Rows]]:
    """Return the sets or weighted sources that rows consist of: name, weight and rows; one without a name if none."""
    groups = rows.groups if isinstance(rows, JoinedRows) else ()
    if not groups:
        return [("", None, rows)]
    ends = [*(group.start for group in groups[1:]), len(rows.table)]
    return [
        (group.name, group.weight, replace(rows, indices=[at for at in rows.indices if group.start <= at < end]))
        for group, end in zip(groups, ends, strict=True)
    ]


def limit_rows(rows: Rows, limit: int | None, seed: int) -> Rows:
    """Keep at most `limit` rows, drawn at random; of several named sets, as many of each."""
    if isinstance(rows, JoinedRows) and any(group.weight is None for group in rows.groups):
        kept = [index for _, _, part in groups_of(rows) for index in sample_rows(part.indices, limit, seed)]
    else:
        kept = sample_rows(rows.indices, limit, seed)
    return replace(rows, indices=kept)


def examples_of_sets(examples: Any, sizes: Sequence[int]) -> list[Any]:
    """Return the examples of each set, given the sizes of the sets that follow one another."""
    return [slice_examples(examples, start, end) for start, end in pairwise([0, *accumulate(sizes)])]


def slice_examples(examples: Any, start: int, end: int) -> Any:
    """Return consecutive examples of a table or list."""
    return examples.select(range(start, end)) if hasattr(examples, "select") else examples[start:end]
