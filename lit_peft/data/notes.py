"""What happened to the data on the way from the files to the examples."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_peft.data.files import column_values
from lit_peft.data.rows import Split

if TYPE_CHECKING:
    from datasets import Dataset


class Notes:
    """One line for each event: rows that were dropped, texts that were cut, duplicates, overlap.

    Args:
        streaming: the lines come from blocks of a stream; only the first of those that differ in numbers is kept.
    """

    def __init__(self, streaming: bool = False) -> None:
        self.streaming = streaming
        self._lines: dict[str, str] = {}

    def add(self, line: str) -> None:
        """Add a line, and log it on the first process; a line that is there already is ignored."""
        key = re.sub(r"[\d.,]+", "#", line) if self.streaming else line
        if key not in self._lines:
            self._lines[key] = line
            rank_zero_info(line)

    def lines(self) -> list[str]:
        """Return the lines, in the order they were added."""
        return list(self._lines.values())


def drop_cut_column(
    table: Dataset,
    notes: Notes,
    split: Split,
    items: str,
    limit: int,
    *,
    column: str = "cut",
    unit: str = "tokens",
    setting: str = "max_length",
) -> Dataset:
    """Note how much was cut from a table's rows, and return the table without the column that counts it.

    Args:
        table: the tokenized rows.
        notes: takes the note.
        split: the split the rows belong to.
        items: what the rows are ("texts").
        limit: the maximum number of tokens.
        column: the column with the number of units that were cut from each row.
        unit: what the column counts.
        setting: the setting that gave the limit.
    """
    cuts = [cut for cut in column_values(table, column) if cut]
    if cuts:
        notes.add(
            f"data.{split}: {len(cuts):,} of {len(table):,} {items} cut to {limit} tokens (data.{setting}); "
            f"{sum(cuts):,} {unit} lost."
        )
    return table.remove_columns(column)
