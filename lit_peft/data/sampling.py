"""The order in which training examples are seen."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class SeededSampler(Sampler[int]):
    """A random order that is a function of the seed and the epoch alone.

    A run that resumes at epoch k therefore sees epoch k in the order the uninterrupted run saw it, which a
    generator that only moves forward cannot give. Lightning calls `set_epoch` at each epoch's start.

    Args:
        length: number of examples.
        seed: of the order.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        # Far apart, so that (seed, epoch + 1) is not (seed + 1, epoch).
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return iter(torch.randperm(self.length, generator=generator).tolist())
