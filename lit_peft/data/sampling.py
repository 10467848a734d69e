"""The order in which training examples are seen."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DistributedSampler


class SeededSampler(DistributedSampler[int]):
    """A random order that is a function of the seed and the epoch alone.

    A run that resumes at epoch k therefore sees epoch k in the order the uninterrupted run saw it, which a
    generator that only moves forward cannot give. Lightning calls `set_epoch` at each epoch's start.
    Of n processes each takes every n-th example, so that their batches together are one process' batch: the order
    does not hang on their number, and a run may resume on another.

    Args:
        length: number of examples.
        seed: of the order.
        num_replicas: number of processes that share the examples; the first are repeated to even them out.
        rank: which of them this is.
    """

    def __init__(self, length: int, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(length), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.length = length

    def __iter__(self) -> Iterator[int]:
        # Far apart, so that (seed, epoch + 1) is not (seed + 1, epoch).
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.length, generator=generator)
        places = torch.arange(self.rank, self.total_size, self.num_replicas) % max(self.length, 1)
        return iter(order[places].tolist())
