"""The order in which training examples come, as a function of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

from lit_peft.data.packing import pack, swap_equal_lengths

# Batches sorted by length together: enough for little padding, few enough for the order to stay random.
_BATCHES_PER_BUCKET = 50


class SeededBatches(DistributedSampler[list[Any]]):
    """Batches of example indices in a random order that depends on the seed and the epoch only.

    A run that resumes at epoch k sees the order of epoch k in the uninterrupted run, which a generator that only moves
    forward cannot give. Lightning calls `set_epoch` at the start of each epoch. Of n processes each takes every n-th
    example, so that their batches together are the batch of a single process: the order does not depend on the number
    of processes, and a run may resume on another number.

    Args:
        length: number of examples.
        batch_size: examples, or packed rows, per batch and process.
        seed: seed of the order.
        lengths: tokens of each example, to batch examples of similar lengths or to pack them; None: neither.
        capacity: tokens of a packed row; a batch is then a list of lists. Every epoch has the same number of rows, and
            packs other examples of the same lengths together. None: no packing.
        num_replicas: number of processes that share the examples; the first examples are repeated to make shares even.
        rank: index of this process.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        capacity: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.lengths = None if lengths is None else torch.as_tensor(lengths)
        self.packs = pack(lengths, capacity) if lengths is not None and capacity is not None else None
        # The number of things to order: examples, or packed rows.
        self.count = length if self.packs is None else len(self.packs)
        super().__init__(range(self.count), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.length, self.batch_size, self.capacity = length, batch_size, capacity
        # Batches at the start of the epoch to skip, because a run that resumes has seen them.
        self.start = 0

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        if epoch != self.epoch:
            self.start = 0
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        # A large factor, so that (seed, epoch + 1) differs from (seed + 1, epoch).
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.count, generator=generator)
        if self.lengths is not None and self.packs is None:
            order = bucket_by_length(order, self.lengths, self.batch_size * self.num_replicas, generator)
        share = torch.arange(self.rank, self.total_size, self.num_replicas) % max(self.count, 1)
        rows: list[Any] = order[share].tolist()
        if self.packs is not None and self.lengths is not None:
            swapped = swap_equal_lengths(self.lengths, generator).tolist()
            rows = [[swapped[index] for index in self.packs[row]] for row in rows]
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return iter(batches[self.start :])


def bucket_by_length(
    order: torch.Tensor, lengths: torch.Tensor, batch_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Rearrange a random order so that each batch has examples of similar lengths.

    Args:
        order: (n,), the example indices.
        lengths: (n,), tokens of each example.
        batch_size: examples per batch, over all processes.
        generator: draws the order of the batches; an incomplete last batch stays last.

    Returns:
        (n,), the example indices.
    """
    buckets = order.split(batch_size * _BATCHES_PER_BUCKET)
    order = torch.cat([bucket[lengths[bucket].argsort(descending=True, stable=True)] for bucket in buckets])
    full = len(order) // batch_size
    batches = order[: full * batch_size].view(full, batch_size)[torch.randperm(full, generator=generator)]
    return torch.cat([batches.flatten(), order[full * batch_size :]])


class ByBatch(Dataset[list[Any]]):
    """Reads the examples of a whole batch at a time, by the indices that `SeededBatches` gives.

    Args:
        examples: a map-style dataset.
    """

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, indices: list[Any]) -> list[Any]:
        if isinstance(indices[0], list):
            return [self[row] for row in indices]
        if hasattr(self.examples, "__getitems__"):
            return list(self.examples.__getitems__(indices))
        return [self.examples[index] for index in indices]
