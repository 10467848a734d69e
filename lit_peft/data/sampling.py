"""The order in which training examples are seen, and the loader that goes on in the middle of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_peft.data.packing import exchanged, pack
from lit_peft.util.errors import LitPeftError

# Batches that are sorted by length together: enough for little padding, few enough for the order to stay random.
_BUCKET = 50


class SeededBatches(DistributedSampler[list[Any]]):
    """Batches of example numbers in a random order that is a function of the seed and the epoch alone.

    A run that resumes at epoch k therefore sees epoch k in the order the uninterrupted run saw it, which a
    generator that only moves forward cannot give. Lightning calls `set_epoch` at each epoch's start.
    Of n processes each takes every n-th example, so that their batches together are one process' batch: the order
    does not hang on their number, and a run may resume on another.

    Args:
        length: number of examples.
        batch_size: examples, or rows of packed ones, to a batch and process.
        seed: of the order.
        lengths: tokens of each example, to make batches of examples of similar lengths, or to pack them; None: neither.
        capacity: tokens of a row, to pack examples into rows: a batch is then a list of lists. Every epoch has as many
            rows, and packs other examples of the same lengths together.
        num_replicas: number of processes that share the examples; the first are repeated to even them out.
        rank: which of them this is.
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
        # What is put in order: examples, or rows of them.
        self.count = length if self.packs is None else len(self.packs)
        super().__init__(range(self.count), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.length, self.batch_size, self.capacity = length, batch_size, capacity
        # Batches at the epoch's start that a resumed run has seen.
        self.start = 0

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes."""
        if epoch != self.epoch:
            self.start = 0
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        # Far apart, so that (seed, epoch + 1) is not (seed + 1, epoch).
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.count, generator=generator)
        if self.lengths is not None and self.packs is None:
            order = bucketed(order, self.lengths, self.batch_size * self.num_replicas, generator)
        places = torch.arange(self.rank, self.total_size, self.num_replicas) % max(self.count, 1)
        rows: list[Any] = order[places].tolist()
        if self.packs is not None and self.lengths is not None:
            others = exchanged(self.lengths, generator).tolist()
            rows = [[others[at] for at in self.packs[row]] for row in rows]
        return iter([rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)][self.start :])


def bucketed(order: torch.Tensor, lengths: torch.Tensor, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Bring a random order to one whose batches hold examples of similar lengths.

    Args:
        order: (n,), the examples.
        lengths: (n,), the length of each.
        batch_size: examples to a batch, over all processes.
        generator: of the order of the batches; a last one that is not full stays the last.
    """
    pieces = order.split(batch_size * _BUCKET)
    order = torch.cat([piece[lengths[piece].argsort(descending=True, stable=True)] for piece in pieces])
    full = len(order) // batch_size
    batches = order[: full * batch_size].view(full, batch_size)[torch.randperm(full, generator=generator)]
    return torch.cat([batches.flatten(), order[full * batch_size :]])


class ByBatch(Dataset[list[Any]]):
    """Examples looked up a batch at a time, by the numbers that `SeededBatches` gives.

    Args:
        examples: a map-style dataset.
    """

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, numbers: list[Any]) -> list[Any]:
        if isinstance(numbers[0], list):
            return [self[row] for row in numbers]
        if hasattr(self.examples, "__getitems__"):
            return list(self.examples.__getitems__(numbers))
        return [self.examples[number] for number in numbers]


def check_plan(state: Mapping[str, int], plan: Mapping[str, int]) -> None:
    """Check that a loader's batches are those of the loader whose place is restored.

    Args:
        state: the place, with its `batches` of the epoch that are done.
        plan: what the order of batches hangs on now, by name.

    Raises:
        LitPeftError: in the middle of an epoch, and they are not.
    """
    for name, now in plan.items():
        if state["batches"] and state.get(name) != now:
            raise LitPeftError(
                f"The checkpoint was written in the middle of an epoch with {name} {state.get(name)}, and now it is "
                f"{now}, so what is left of it is not known: give the data settings it was trained with, or a "
                "checkpoint from an epoch's end."
            )


class StatefulLoader(DataLoader[Any]):
    """A loader of `SeededBatches` whose place in the epoch is saved with the trainer's checkpoints, and restored.

    Each example is therefore seen exactly once in an epoch, wherever the run was interrupted and whatever the number of
    workers. Random numbers of the process are not touched.

    Attributes:
        pending: returns how many batches were given out and are not trained on yet.
    """

    pending: Callable[[], int] | None = None

    def state_dict(self) -> dict[str, int]:
        """The epoch, the batches of it that are done, and what they hang on."""
        sampler = self._batches
        done = getattr(self, "_given", sampler.start) - (self.pending() if self.pending is not None else 0)
        epoch, done = (sampler.epoch + 1, 0) if done >= len(sampler) else (sampler.epoch, done)
        return {"epoch": epoch, "batches": done, **self._plan}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another loader stopped.

        Raises:
            LitPeftError: in the middle of an epoch, and the batches are not those of the other loader.
        """
        check_plan(state, self._plan)
        self._batches.set_epoch(state["epoch"])
        self._batches.start = state["batches"]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Nothing runs before the first batch is asked for, when the epoch is known.
        sampler = self._batches
        self._given = sampler.start
        batches = super().__iter__()
        sampler.start = 0
        for batch in batches:
            self._given += 1
            yield batch

    @property
    def _batches(self) -> SeededBatches:
        assert isinstance(self.sampler, SeededBatches)
        return self.sampler

    @property
    def _plan(self) -> dict[str, int]:
        sampler = self._batches
        return {
            "data.seed": sampler.seed,
            "the number of examples": sampler.length,
            "data.batch_size times devices": sampler.batch_size * sampler.num_replicas,
            "data.group_by_length": int(sampler.lengths is not None and sampler.packs is None),
            "packing into rows of": sampler.capacity or 0,
        }
