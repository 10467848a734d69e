"""Training examples that are read during training, from files and hub datasets too large to be read first."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from lit_peft.data.encoding import no_progress_bars
from lit_peft.data.files import column_values, require_columns
from lit_peft.data.joined import PlacedRows
from lit_peft.data.json_rows import table_of
from lit_peft.data.lengths import encode_to_length
from lit_peft.data.notes import note_unused_columns
from lit_peft.data.packing import pack, train_collator
from lit_peft.data.rows import ROW_NUMBER, Rows
from lit_peft.data.sampling import Drawn, weights_digest
from lit_peft.data.sources import Piece, missing_split, pieces_of, source_sets
from lit_peft.util.errors import LitPeftError, causes

# Batches that are tokenized and shuffled together; the last batch of each block may be incomplete.
BATCHES_PER_BLOCK = 32
# Rows of a block for each packed row of a batch, so that a block fills many packed rows.
_ROWS_PER_PACK = 8
# Rows that are read to choose the default of `data.max_length`.
_SAMPLED_ROWS = 2_000


class StreamedRow(NamedTuple):
    """A row on its way from a file to a block.

    Attributes:
        source: the file, or the dataset and its split.
        number: the number of the row there, from 1.
        cells: the columns.
    """

    source: str
    number: int
    cells: dict[str, Any]


@dataclass(frozen=True)
class RowReader:
    """Reads the training rows in an order that depends on the seed and the epoch only.

    Without weights, the files are read one after another, in an order that is drawn for each epoch unless `buffer` is
    1. With weights, the source of each row is drawn with their probabilities; a source that ends starts again, and the
    epoch ends when each source has been read to its end.

    Attributes:
        data: the data module, for the settings that reading depends on.
        sources: the pieces of each source.
        weights: the weight of each source; None: no mixture.
        seed: seed of the order.
        buffer: rows from which the next one is drawn; 1: the order of the files.
    """

    data: Any
    sources: tuple[tuple[Piece, ...], ...]
    weights: tuple[float, ...] | None
    seed: int
    buffer: int

    @property
    def digest(self) -> int:
        """A number that differs for other weights."""
        return weights_digest(self.weights or ())

    def blocks(self, epoch: int, size: int) -> Iterator[list[StreamedRow]]:
        """Yield the rows of an epoch in blocks; the last one may be smaller.

        Raises:
            LitPeftError: a row cannot be read.
        """
        rows = shuffled(self._rows(epoch), self.buffer, random.Random(f"{self.seed} {epoch} rows"))
        while block := list(islice(rows, size)):
            yield block

    def _rows(self, epoch: int) -> Iterator[StreamedRow]:
        if self.weights is None:
            yield from self._one_source([piece for pieces in self.sources for piece in pieces], f"{epoch}")
            return
        draw = random.Random(f"{self.seed} {epoch} sources")
        passes = [0] * len(self.sources)
        open_sources = [self._one_source(pieces, f"{epoch}") for pieces in self.sources]
        unfinished = set(range(len(self.sources)))
        choices = range(len(self.sources))
        while True:
            (source,) = draw.choices(choices, self.weights)
            row = next(open_sources[source], None)
            if row is None:
                unfinished.discard(source)
                if not unfinished:
                    return
                passes[source] += 1
                open_sources[source] = self._one_source(self.sources[source], f"{epoch} {source} {passes[source]}")
                row = next(open_sources[source], None)
                if row is None:
                    raise LitPeftError(f"data.train {self.sources[source][0].name!r} has no rows; leave it out.")
            yield row

    def _one_source(self, pieces: Any, key: str) -> Iterator[StreamedRow]:
        order = list(pieces)
        if self.buffer > 1:
            random.Random(f"{self.seed} {key} files").shuffle(order)
        for piece in order:
            number = 0
            rows = piece.rows(self.data)
            while True:
                try:
                    row = next(rows, None)
                except LitPeftError:
                    raise
                except Exception as exc:  # errors of pandas, pyarrow and datasets
                    problem = " ".join(str(link).strip() for link in causes(exc))[:300]
                    raise LitPeftError(
                        f"data.train {piece.name!r}: a row after the first {number} could not be read: {problem}"
                    ) from exc
                if row is None:
                    break
                number += 1
                yield StreamedRow(piece.name, number, row)


def shuffled(rows: Iterator[Any], buffer: int, draw: random.Random) -> Iterator[Any]:
    """Yield each row once, in an order drawn from a buffer of so many rows."""
    waiting = list(islice(rows, buffer - 1))
    for row in rows:
        # The new row may be the one that is drawn.
        at = draw.randrange(buffer)
        if at == len(waiting):
            yield row
        else:
            yield waiting[at]
            waiting[at] = row
    draw.shuffle(waiting)
    yield from waiting


@dataclass(eq=False)
class Stream(IterableDataset[tuple[int, list[Any] | LitPeftError]]):
    """Blocks of batches made from streamed rows.

    Iterating gives (block number, batches), and (-1, error) at the end if reading failed. The order depends on the seed
    and the epoch only: workers take blocks in turn. Of n processes each takes every n-th example (or packed row) of a
    block, whose first ones are repeated to make the shares even.

    Attributes:
        reader: reads the rows.
        encode: maps a block of rows to a list of examples.
        collate: joins examples, or lists of them, into a batch.
        batch_size: examples, or packed rows, per batch and process.
        capacity: tokens of a packed row, which has examples of one block only; None: no packing.
        num_replicas: number of processes.
        rank: index of this process.
        epoch: the epoch to read.
        start: number of blocks to skip.
    """

    # Raise it when the same seed gives another order.
    ORDER: ClassVar[int] = 2

    reader: RowReader
    encode: Callable[[list[StreamedRow]], list[dict[str, Any]]]
    collate: Callable[[list[Any]], dict[str, Any]]
    batch_size: int
    capacity: int | None = None
    num_replicas: int = 1
    rank: int = 0
    epoch: int = 0
    start: int = 0

    @property
    def seed(self) -> int:
        """The seed of the order."""
        return self.reader.seed

    @property
    def buffer(self) -> int:
        """Rows from which the next one is drawn."""
        return self.reader.buffer

    def __iter__(self) -> Iterator[tuple[int, list[Any] | LitPeftError]]:
        try:
            yield from self._numbered_blocks()
        except LitPeftError as exc:
            # Raised in a worker, its message would be a traceback.
            yield -1, exc

    def _numbered_blocks(self) -> Iterator[tuple[int, list[Any]]]:
        worker = get_worker_info()
        worker_id, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        size = self.batch_size * self.num_replicas * BATCHES_PER_BLOCK
        if self.capacity is not None:
            size *= _ROWS_PER_PACK
        for number, block in enumerate(self.reader.blocks(self.epoch, size)):
            if number >= self.start and (number - self.start) % workers == worker_id:
                yield number, self._batches(number, block)

    def _batches(self, number: int, block: list[StreamedRow]) -> list[Any]:
        examples: list[Any] = self.encode(block)
        if not examples:
            return []
        draw = random.Random(f"{self.seed} {self.epoch} {number}")
        if self.capacity is not None:
            packs = pack([len(example["input_ids"]) for example in examples], self.capacity)
            examples = [[examples[index] for index in row] for row in packs]
        if self.buffer > 1 or self.capacity is not None:
            draw.shuffle(examples)
        even = -(-len(examples) // self.num_replicas) * self.num_replicas
        places = range(self.rank, even, self.num_replicas)
        share = [examples[index % len(examples)] for index in places]
        parts = [slice(start, start + self.batch_size) for start in range(0, len(share), self.batch_size)]
        return [self.collate(Drawn(share[part], f"{self.epoch} {number}", places[part])) for part in parts]


def make_stream(data: Any) -> Stream:
    """Return a data module's training rows as a stream of batches.

    Raises:
        LitPeftError: no training data is named, or the file is missing or has an unknown suffix.
    """
    capacity = data.max_length if data.packing else None
    return Stream(open_rows(data), partial(encode_block, data), train_collator(data), data.batch_size, capacity)


def check_first_rows(data: Any) -> None:
    """Encode the first rows of each source, so that wrong settings show before training starts.

    Raises:
        LitPeftError: the rows are wrong, or none of them has a token to learn.
    """
    reader = open_rows(data)
    names = ", ".join(piece.name for pieces in reader.sources for piece in pieces)
    for pieces in reader.sources:
        first = RowReader(data, (pieces[:1],), None, data.seed, 1)
        if not encode_block(data, next(first.blocks(0, 8), [])):
            raise LitPeftError(
                f"data.train {names!r}: none of the first rows has a token to learn within data.max_length "
                f"{data.max_length}; raise data.max_length."
            )
    if reader.weights is not None:
        total = sum(reader.weights)
        shares = (
            f"{100 * weight / total:.3g} % from {pieces[0].name}{' and others' if len(pieces) > 1 else ''}"
            for weight, pieces in zip(reader.weights, reader.sources, strict=True)
        )
        data.notes.add(f"data.train: each row is drawn with these probabilities: {', '.join(shares)}.", once=True)


def open_rows(data: Any) -> RowReader:
    """Return the reader of a data module's training rows.

    Raises:
        LitPeftError: no training data is named, or a glob or folder has no files.
    """
    sets = source_sets(data, "train")
    if not sets:
        raise LitPeftError(missing_split(data, "train"))
    named = sets[0].sources
    weights = tuple(source.weight for source in named if source.weight is not None)
    pieces = tuple(tuple(pieces_of(data, source, "train")) for source in named)
    return RowReader(data, pieces, weights or None, data.seed, data.shuffle_buffer)


def encode_block(data: Any, block: list[StreamedRow]) -> list[dict[str, Any]]:
    """Check and tokenize a block of training rows, like a file that has only these rows.

    Args:
        data: the data module, whose hooks check and encode the rows.
        block: the rows.
    """
    if not block:
        return []
    with no_progress_bars():
        rows = _rows_of(data, block)
        return list(encode_to_length(data, data.check_rows(rows, "train"), "train"))


def _rows_of(data: Any, block: list[StreamedRow]) -> Rows:
    """Return a block as rows of a table with the columns that the task reads."""
    field, source = "data.train", block[0].source
    names = dict.fromkeys(name for row in block for name in row.cells)
    table = table_of({name: [row.cells.get(name) for row in block] for name in names})
    table = data.prepare_table(table, "train", field, source)
    require_columns(table, data.columns("train"), field, source)
    used = (*data.columns("train").values(), *data.optional_columns)
    note_unused_columns(data.notes, field, table.column_names, used)
    indices = list(range(len(table)))
    numbers: Any = range(1, len(block) + 1)
    if ROW_NUMBER in table.column_names:
        numbers = column_values(table, ROW_NUMBER)
    if len(table) == len(numbers):
        places = tuple((block[number - 1].source, block[number - 1].number) for number in numbers)
        return PlacedRows(table, indices, field, source, None, places)
    # Rows that `prepare_table` made out of one have no number in the file.
    return Rows(table, indices, "a streamed block of data.train", source)


def training_sample(data: Any) -> Rows | None:
    """Return training rows to measure; of a stream, the first ones. None if there are none."""
    if not data.streaming:
        found: Rows | None = data.rows.get("train")
        return found
    if not source_sets(data, "train"):
        return None
    with no_progress_bars():
        return next((_rows_of(data, block) for block in open_rows(data).blocks(0, _SAMPLED_ROWS)), None)
