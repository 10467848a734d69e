"""The order in which training examples come, as a function of the seed and the epoch."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

from lit_peft.data.packing import pack, swap_equal_lengths

# Batches sorted by length together: enough for little padding, few enough for the order to stay random.
_BATCHES_PER_BUCKET = 50


class Drawn(list[Any]):
    """The indices or examples of a training batch, for collators that draw something anew for each example.

    Attributes:
        key: names the epoch, and of a stream the block, of which they are.
        places: the place of each in the order of that epoch or block, the same for any number of processes.
    """

    def __init__(self, items: Iterable[Any], key: str, places: Sequence[int]) -> None:
        super().__init__(items)
        self.key, self.places = key, places


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
        mixture: chooses the examples of each epoch from several sources; None: each example occurs once. Packed rows
            keep the choice of the first epoch, so that their number stays the same.
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
        mixture: Mixture | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.mixture = mixture
        self.lengths = None if lengths is None else torch.as_tensor(lengths)
        self.packs = None
        if self.lengths is not None and capacity is not None:
            if mixture is not None:
                self.lengths = self.lengths[mixture.choose(0, seed)]
            self.packs = pack(self.lengths.tolist(), capacity)
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
        chosen = None if self.mixture is None else self.mixture.choose(0 if self.packs else self.epoch, self.seed)
        if chosen is not None and self.packs is None:
            order = chosen[order]
        if self.lengths is not None and self.packs is None:
            order = bucket_by_length(order, self.lengths, self.batch_size * self.num_replicas, generator)
        share = torch.arange(self.rank, self.total_size, self.num_replicas) % max(self.count, 1)
        rows: list[Any] = order[share].tolist()
        if self.packs is not None and self.lengths is not None:
            swap = swap_equal_lengths(self.lengths, generator)
            swapped = (swap if chosen is None else chosen[swap]).tolist()
            rows = [[swapped[index] for index in self.packs[row]] for row in rows]
        places, starts = range(self.rank, self.total_size, self.num_replicas), range(0, len(rows), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        return iter([Drawn(rows[part], str(self.epoch), places[part]) for part in parts[self.start :]])


def weights_digest(*values: Sequence[float]) -> int:
    """Return a number that differs for other values; it is the same in every process."""
    return zlib.crc32(repr([[float(value) for value in part] for part in values]).encode())


@dataclass(frozen=True)
class Mixture:
    """Examples of several sources, in shares that weights determine.

    An epoch has as many examples as the sources together. A source with the share w has w times as many of them: some
    of its examples, if it has more, and else each of them as often as any other, give or take one. The next epoch
    continues where this one stopped, so that all examples of a large source come before any of them comes again.

    Attributes:
        sizes: number of examples of each source; they follow one another in the dataset.
        weights: weight of each source, above 0; only their ratios count.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def counts(self) -> list[int]:
        """The number of examples of each source in an epoch, at least 1."""
        total, parts = sum(self.sizes), [sum(self.sizes) * weight / sum(self.weights) for weight in self.weights]
        counts = [max(1, int(part)) for part in parts]
        # The examples that rounding left, to those who lost most.
        by_loss = sorted(range(len(parts)), key=lambda source: counts[source] - parts[source])
        for source in by_loss[: max(0, total - sum(counts))]:
            counts[source] += 1
        return counts

    @property
    def digest(self) -> int:
        """A number that differs for other sizes or weights."""
        return weights_digest(self.sizes, self.weights)

    def choose(self, epoch: int, seed: int) -> torch.Tensor:
        """Return the example indices of an epoch, source by source."""
        chosen = []
        starts = [0, *accumulate(self.sizes)]
        for source, (start, size, count) in enumerate(zip(starts, self.sizes, self.counts, strict=False)):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + source + 1) % 2**63)
            order = torch.randperm(size, generator=generator)
            chosen.append(start + order[torch.arange(epoch * count, (epoch + 1) * count) % size])
        return torch.cat(chosen)


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
        if isinstance(indices, Drawn):
            return Drawn(self[list(indices)], indices.key, indices.places)
        if isinstance(indices[0], list):
            return [self[row] for row in indices]
        if hasattr(self.examples, "__getitems__"):
            return list(self.examples.__getitems__(indices))
        return [self.examples[index] for index in indices]
