"""What happened to the data on the way from the files to the examples."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_peft.data.files import column_values
from lit_peft.data.rows import Split

if TYPE_CHECKING:
    from datasets import Dataset

# A larger share of lost supervised tokens is a warning.
_WARN_SHARE = 0.05
# The maximum length that a warning suggests loses at most this share.
_SUGGESTED_SHARE = 0.01
# Columns that look like a part of the example; one that no setting reads is noted.
MEANINGFUL_COLUMNS = {
    *("tools", "functions", "documents", "chat_template_kwargs", "system", "system_prompt", "history"),
    *("input", "context", "weight", "weights", "sample_weight", "loss_weight", "train", "is_impossible"),
    *("image", "images", "audio", "audios", "video", "videos"),
}


class Notes:
    """One line for each event: rows that were dropped, texts that were cut, duplicates, overlap.

    The lines are logged by the first process. Those of a stream, which come during training, are warnings.

    Args:
        streaming: the lines come from blocks of a stream; only the first of those that differ in numbers is kept.
        silent: keep the lines without logging them.
    """

    def __init__(self, streaming: bool = False, silent: bool = False) -> None:
        self.streaming = streaming
        self.silent = silent
        self._lines: dict[str, str] = {}

    def add(self, line: str, warn: bool = False, once: bool = False) -> None:
        """Add a line; a line that is there already is ignored.

        Args:
            line: the line.
            warn: emit it as a warning too.
            once: the line is about all of the data, also when it is streamed.
        """
        key = re.sub(r"[\d.,]+", "#", line) if self.streaming and not once else line
        if key in self._lines:
            return
        if self.streaming and not once:
            line += " (in one block of the stream)"
        self._lines[key] = line
        if self.silent:
            return
        if warn or (self.streaming and not once):
            rank_zero_warn(line)
        else:
            rank_zero_info(line)

    def lines(self) -> list[str]:
        """Return the lines, in the order they were added."""
        return list(self._lines.values())


def share_of(count: int, total: int, items: str) -> str:
    """Return a count with its share, such as "2 of 8 rows (25.0 %)"."""
    return f"{count:,} of {total:,} {items} ({100 * count / total:.1f} %)"


def note_unused_columns(notes: Notes, field: str, columns: Collection[str], used: Collection[str | None]) -> None:
    """Note the columns that look like a part of the example but that no setting reads.

    Args:
        notes: takes the note.
        field: the setting the table was read from ("data.train").
        columns: the columns of the table.
        used: the columns that are read.
    """
    unused = [column for column in columns if column.lower() in MEANINGFUL_COLUMNS and column not in used]
    if unused:
        names = ", ".join(map(repr, unused))
        notes.add(f"{field}: column {names} not used." if len(unused) == 1 else f"{field}: columns {names} not used.")


def note_missing_end(notes: Notes, tokenizer: Any) -> None:
    """Note that a tokenizer has no token to end a text with."""
    if tokenizer.eos_token_id is None:
        notes.add("The tokenizer has no end-of-text token (eos_token), so the model does not learn to stop.", warn=True)


def note_lost_labels(
    notes: Notes,
    split: Split,
    lengths: Sequence[int],
    supervised: Sequence[int],
    lost: Sequence[int],
    limit: int,
    *,
    unit: str = "tokens",
    setting: str = "max_length",
) -> None:
    """Note how much of what is learned was cut; a large share is a warning that suggests another limit.

    Args:
        notes: takes the note.
        split: the split the rows belong to.
        lengths: tokens of each row before cutting.
        supervised: number of labels of each row before cutting.
        lost: number of labels of each row that were cut.
        limit: the maximum number of tokens.
        unit: what has a label.
        setting: the setting that gave the limit.
    """
    if not sum(lost):
        return
    line = (
        f"data.{split}: {share_of(sum(lost), sum(supervised), f'{unit} to learn')} lost, because data.{setting} is "
        f"{limit}"
    )
    if sum(lost) <= _WARN_SHARE * sum(supervised):
        notes.add(f"{line}.")
        return
    suggested, longest = suggest_limit(lengths, supervised, limit), max(lengths)
    advice = f"to {longest} to lose none"
    if suggested < longest:
        advice = f"to {suggested} to lose at most {100 * _SUGGESTED_SHARE:.0f} %, or {advice}"
    notes.add(f"{line}: set data.{setting} {advice}.", warn=True)


def suggest_limit(lengths: Sequence[int], supervised: Sequence[int], limit: int) -> int:
    """Return the smallest limit above the present one that loses at most 1 % of the labels.

    A row that is cut by n tokens loses at most n labels, so the share is at most what is counted here.
    """
    low, high = limit, max(lengths)
    while low < high:
        middle = (low + high) // 2
        lost = sum(min(count, max(0, length - middle)) for length, count in zip(lengths, supervised, strict=True))
        if lost <= _SUGGESTED_SHARE * sum(supervised):
            high = middle
        else:
            low = middle + 1
    return high


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
            f"data.{split}: {share_of(len(cuts), len(table), items)} cut to {limit} tokens (data.{setting}); "
            f"{sum(cuts):,} {unit} lost."
        )
    return table.remove_columns(column)
