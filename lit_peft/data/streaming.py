"""Training examples read while training goes on, for files and hub datasets that are too large to be read first."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lit_peft.data.sampling import check_plan
from lit_peft.util.errors import LitPeftError, causes

# Batches that are tokenized, and put in order, together; at the end of each, one may not be full.
_BLOCK = 32


@dataclass(eq=False)
class Stream(IterableDataset[tuple[int, list[Any] | LitPeftError]]):
    """Blocks of batches, made of the rows of a `datasets.IterableDataset` in their order; at last, what is wrong.

    The order is a function of the seed and the epoch: workers take blocks in turn. Of n processes each takes every n-th
    example of a block; its first are repeated to even them out.

    Attributes:
        rows: the rows.
        encode: columns of a block of rows -> a list of its examples.
        collate: joins examples into a batch.
        batch_size: examples to a batch and process.
        seed: of the order.
        buffer: rows to draw the next one from; 1: the order of the file.
        num_replicas: number of processes.
        rank: which of them this is.
        epoch: the epoch to read.
        start: blocks at its start that are passed over.
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
            yield from self._numbered()
        except LitPeftError as exc:
            # A worker's would be raised with its traceback for a message.
            yield -1, exc

    def _numbered(self) -> Iterator[tuple[int, list[Any]]]:
        worker = get_worker_info()
        mine, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rows = self.rows.shuffle(seed=self.seed, buffer_size=self.buffer) if self.buffer > 1 else self.rows
        rows.set_epoch(self.epoch)
        for number, block in enumerate(blocks(rows, self.batch_size * self.num_replicas * _BLOCK)):
            if number >= self.start and (number - self.start) % workers == mine:
                yield number, self._batches(number, block)

    def _batches(self, number: int, block: dict[str, list[Any]]) -> list[Any]:
        examples = self.encode(block)
        if not examples:
            return []
        if self.buffer > 1:
            random.Random(f"{self.seed} {self.epoch} {number}").shuffle(examples)
        even = -(-len(examples) // self.num_replicas) * self.num_replicas
        share = [examples[at % len(examples)] for at in range(self.rank, even, self.num_replicas)]
        return [self.collate(share[at : at + self.batch_size]) for at in range(0, len(share), self.batch_size)]


def blocks(rows: Any, size: int) -> Iterator[dict[str, list[Any]]]:
    """Read rows in blocks, each a dict of columns.

    Raises:
        LitPeftError: a row cannot be read.
    """
    # Not `iter(rows)`, which shares out files among workers in its own way.
    found, count = rows.iter(size), 0
    while True:
        try:
            block = next(found, None)
        except LitPeftError:
            raise
        except Exception as exc:  # pandas, pyarrow and datasets errors
            problem = " ".join(str(link).strip() for link in causes(exc))[:300]
            raise LitPeftError(f"data.train: a row after the first {count} could not be read: {problem}") from exc
        if block is None:
            return
        count += len(next(iter(block.values()), ()))
        yield block


class StreamLoader(DataLoader[Any]):
    """The batches of a `Stream`; its place is saved with the trainer's checkpoints, as that of `StatefulLoader`.

    Attributes:
        epoch: returns the epoch that begins.
        trained: returns how many batches of the epoch are done; None: those given out.
    """

    epoch: Callable[[], int]
    trained: Callable[[], int | None]

    def state_dict(self) -> dict[str, int]:
        """The epoch, the batches of it that are done, the block they end in, and what they hang on."""
        if not hasattr(self, "_starts"):
            return getattr(self, "_place", None) or self._at(self.epoch(), 0, 0, 0)
        trained = self.trained()
        done = self._given if trained is None else trained
        if self._ended and done >= self._given:
            return self._at(self._epoch + 1, 0, 0, 0)
        block, before = next(start for start in reversed(self._starts) if start[1] <= done or start == self._starts[0])
        return self._at(self._epoch, done, block, done - before)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another loader stopped.

        Raises:
            LitPeftError: in the middle of an epoch, and the batches are not those of the other loader.
        """
        check_plan(state, self._plan)
        self._place: dict[str, int] | None = state

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        stream: Any = self.dataset
        place = getattr(self, "_place", None) or self._at(self.epoch(), 0, 0, 0)
        self._place = None
        self._epoch, self._given, self._ended = place["epoch"], place["batches"], False
        stream.epoch, stream.start = place["epoch"], place["block"]
        skipped = place["within"]
        count = place["batches"] - skipped
        self._starts = [(place["block"], count)]
        for number, batches in super().__iter__():
            if isinstance(batches, LitPeftError):
                raise batches
            # The trainer is a batch behind at the most.
            self._starts = [*self._starts[-3:], (number, count)]
            for batch in batches[skipped:]:
                self._given += 1
                yield batch
            count, skipped = count + len(batches), 0
        self._ended = True

    def _at(self, epoch: int, batches: int, block: int, within: int) -> dict[str, int]:
        return {"epoch": epoch, "batches": batches, "block": block, "within": within, **self._plan}

    @property
    def _plan(self) -> dict[str, int]:
        stream: Any = self.dataset
        return {
            "data.seed": stream.seed,
            "data.shuffle_buffer": stream.buffer,
            "data.batch_size times devices": stream.batch_size * stream.num_replicas,
        }
