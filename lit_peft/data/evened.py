"""The same number of examples for every process, without counting any twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evened:
    """Examples, made as many as the processes can share out evenly; those repeated for it are marked `surplus`.

    Attributes:
        examples: a map-style dataset of dicts.
        processes: how many processes there are.
    """

    examples: Any
    processes: int

    def __len__(self) -> int:
        return -(-len(self.examples) // self.processes) * self.processes

    def __getitem__(self, at: int) -> dict[str, Any]:
        count = len(self.examples)
        example: dict[str, Any] = self.examples[at % count]
        return {**example, "surplus": True} if at >= count else example


@dataclass(frozen=True)
class RealOnly:
    """Leaves surplus examples out of a batch; a batch of nothing else is kept, and is marked `surplus` itself.

    Attributes:
        collate: joins examples into a batch.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        real = [example for example in examples if not example.get("surplus")]
        return self.collate(real) if real else {**self.collate(examples), "surplus": True}
