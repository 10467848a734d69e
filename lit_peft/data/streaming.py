"""Training examples that are read during training, from files and hub datasets too large to be read first."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from lit_peft.data.files import ROW_NUMBER, require_columns, stream_file
from lit_peft.data.json_rows import table_of
from lit_peft.data.notes import note_unused_columns
from lit_peft.data.rows import Rows
from lit_peft.data.sources import missing_split, text_options
from lit_peft.util.errors import LitPeftError, causes

# Batches that are tokenized and shuffled together; the last batch of each block may be incomplete.
BATCHES_PER_BLOCK = 32


@dataclass(eq=False)
class Stream(IterableDataset[tuple[int, list[Any] | LitPeftError]]):
    """Blocks of batches made from the rows of a `datasets.IterableDataset`.

    Iterating gives (block number, batches), and (-1, error) at the end if reading failed. The order depends on the seed
    and the epoch only: workers take blocks in turn. Of n processes each takes every n-th example of a block, whose
    first examples are repeated to make the shares even.

    Attributes:
        rows: the rows.
        encode: maps the columns of a block of rows to a list of examples.
        collate: joins examples into a batch.
        batch_size: examples per batch and process.
        seed: seed of the order.
        buffer: rows from which the next one is drawn; 1: the order of the file.
        num_replicas: number of processes.
        rank: index of this process.
        epoch: the epoch to read.
        start: number of blocks to skip.
    """

    rows: Any
    encode: Callable[[dict[str, list[Any]]], list[dict[str, Any]]]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    batch_size: int
    seed: int
    buffer: int
    num_replicas: int = 1
    rank: int = 0
    epoch: int = 0
    start: int = 0

    def __iter__(self) -> Iterator[tuple[int, list[Any] | LitPeftError]]:
        try:
            yield from self._numbered_blocks()
        except LitPeftError as exc:
            # Raised in a worker, its message would be a traceback.
            yield -1, exc

    def _numbered_blocks(self) -> Iterator[tuple[int, list[Any]]]:
        worker = get_worker_info()
        worker_id, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rows = self.rows.shuffle(seed=self.seed, buffer_size=self.buffer) if self.buffer > 1 else self.rows
        rows.set_epoch(self.epoch)
        for number, block in enumerate(read_blocks(rows, self.batch_size * self.num_replicas * BATCHES_PER_BLOCK)):
            if number >= self.start and (number - self.start) % workers == worker_id:
                yield number, self._batches(number, block)

    def _batches(self, number: int, block: dict[str, list[Any]]) -> list[Any]:
        examples = self.encode(block)
        if not examples:
            return []
        if self.buffer > 1:
            random.Random(f"{self.seed} {self.epoch} {number}").shuffle(examples)
        even = -(-len(examples) // self.num_replicas) * self.num_replicas
        share = [examples[index % len(examples)] for index in range(self.rank, even, self.num_replicas)]
        starts = range(0, len(share), self.batch_size)
        return [self.collate(share[start : start + self.batch_size]) for start in starts]


def read_blocks(rows: Any, size: int) -> Iterator[dict[str, list[Any]]]:
    """Read rows in blocks, each a dict of columns.

    Raises:
        LitPeftError: a row cannot be read.
    """
    # `iter(rows)` would divide the files among the workers.
    found, count = rows.iter(size), 0
    while True:
        try:
            block = next(found, None)
        except LitPeftError:
            raise
        except Exception as exc:  # errors of pandas, pyarrow and datasets
            problem = " ".join(str(link).strip() for link in causes(exc))[:300]
            raise LitPeftError(f"data.train: a row after the first {count} could not be read: {problem}") from exc
        if block is None:
            return
        count += len(next(iter(block.values()), ()))
        yield block


def make_stream(data: Any) -> Stream:
    """Return a data module's training rows as a stream of batches.

    Raises:
        LitPeftError: no training data is named, or the file is missing or has an unknown suffix.
    """
    rows = open_rows(data)
    encode = partial(encode_block, data, rows.features)
    return Stream(rows, encode, data.collator("train"), data.batch_size, data.seed, data.shuffle_buffer)


def check_first_rows(data: Any) -> None:
    """Encode the first rows, so that wrong settings show before training starts.

    Raises:
        LitPeftError: the rows are wrong, or none of them has a token to learn.
    """
    rows = open_rows(data)
    if not encode_block(data, rows.features, next(read_blocks(rows, 8), {})):
        raise LitPeftError(
            f"data.train {data.sources['train'] or data.dataset!r}: none of the first rows has a token to learn "
            f"within data.max_length {data.max_length}; raise data.max_length."
        )


def open_rows(data: Any) -> Any:
    """Return a data module's training rows as a `datasets.IterableDataset`."""
    value = data.hub.find("train", data.sources["train"])
    if value is None:
        raise LitPeftError(missing_split(data, "train"))
    if data.hub.has(value):
        return data.hub.splits[value]
    return stream_file(value, "data.train", **text_options(data, "train"))


def encode_block(data: Any, features: Any, block: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Check and tokenize a block of training rows, like a file that has only these rows.

    Args:
        data: the data module, whose hooks check and encode the rows.
        features: the types of the columns; None: infer them from the values.
        block: the columns.
    """
    import datasets

    source, field = data.sources["train"] or str(data.dataset), "data.train"
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table = table_of(block) if features is None else datasets.Dataset.from_dict(block, features=features)
        numbers = None
        if ROW_NUMBER in block:
            numbers, table = block[ROW_NUMBER], table.remove_columns(ROW_NUMBER)
        table = data.prepare_table(table, "train", field, source)
        if numbers is None or len(numbers) != len(table):
            # Rows of a hub dataset, and rows that `prepare_table` made out of one, have no number in the file.
            field, numbers = "a streamed block of data.train", None
        require_columns(table, data.columns("train"), field, source)
        used = (*data.columns("train").values(), *data.optional_columns)
        note_unused_columns(data.notes, "data.train", table.column_names, used)
        rows = Rows(table, list(range(len(table))), field, source, numbers)
        return list(data.encode(data.check_rows(rows, "train"), "train"))
    finally:
        if had_bars:
            datasets.enable_progress_bars()
