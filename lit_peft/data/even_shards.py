"""Evaluation on several processes: equally many examples for each, and none counted twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EvenShards:
    """Examples, repeated from the start until the processes can share them evenly; repeats are marked `surplus`.

    Attributes:
        examples: a map-style dataset of dicts.
        processes: number of processes.
    """

    examples: Any
    processes: int

    def __len__(self) -> int:
        return -(-len(self.examples) // self.processes) * self.processes

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self.examples)
        example: dict[str, Any] = self.examples[index % count]
        return {**example, "surplus": True} if index >= count else example


@dataclass(frozen=True)
class DropSurplus:
    """Drops surplus examples from a batch; a batch of surplus examples only is kept and marked `surplus`.

    Attributes:
        collate: joins examples into a batch.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        real = [example for example in examples if not example.get("surplus")]
        return self.collate(real) if real else {**self.collate(examples), "surplus": True}
