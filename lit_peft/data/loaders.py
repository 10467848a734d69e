"""Loaders of training and evaluation batches; those of training save their position and resume there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from lit_peft.data.even_shards import DropSurplus, EvenShards
from lit_peft.data.sampling import ByBatch, Mixture, SeededBatches
from lit_peft.data.streaming import Stream
from lit_peft.util.errors import LitPeftError

TRAINING_WORKERS = 2
Collate = Callable[[list[Any]], dict[str, Any]]


def training_loader(
    examples: Any,
    collate: Collate,
    batch_size: int,
    seed: int,
    trainer: pl.Trainer | None,
    num_workers: int | None = 0,
    lengths: Sequence[int] | None = None,
    capacity: int | None = None,
    mixture: Mixture | None = None,
) -> StatefulLoader:
    """Make the loader of training batches.

    Args:
        examples: a map-style dataset.
        collate: joins examples into a batch.
        batch_size: examples, or packed rows, per batch and process.
        seed: seed of the order.
        trainer: the trainer that takes the batches, if there is one.
        num_workers: number of worker processes; None: `TRAINING_WORKERS` to train on a GPU, else none.
        lengths: see `SeededBatches`.
        capacity: see `SeededBatches`.
        mixture: see `SeededBatches`.
    """
    if num_workers is None:
        num_workers = default_workers(trainer)
        if num_workers:
            # Otherwise tokenizers warns in each of them; the texts are tokens by now.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = StatefulLoader(
        ByBatch(examples),
        batch_size=None,
        sampler=SeededBatches(len(examples), batch_size, seed, lengths, capacity, mixture, **_shard(trainer)),
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
        **_worker_settings(num_workers),
    )
    loader.pending = lambda: _pending_batches(trainer)
    return loader


def streaming_loader(stream: Stream, trainer: pl.Trainer | None, num_workers: int | None = 0) -> StreamLoader:
    """Make the loader of a stream's batches.

    Args:
        stream: the batches; its number of processes is set from the trainer.
        trainer: the trainer that takes the batches, if there is one.
        num_workers: number of worker processes.

    Raises:
        LitPeftError: the trainer counts epochs, but the length of an epoch is unknown.
    """
    if trainer is not None and (trainer.max_steps == -1 or trainer.max_epochs not in (None, -1)):
        raise LitPeftError(
            "data.streaming is set, so the number of rows of an epoch is unknown: set trainer.max_steps and leave "
            "max_epochs out."
        )
    for name, value in _shard(trainer).items():
        setattr(stream, name, value)
    # Workers learn the epoch when they start.
    settings = {**_worker_settings(num_workers), "persistent_workers": False}
    loader = StreamLoader(stream, batch_size=None, generator=torch.Generator().manual_seed(stream.seed), **settings)
    loader.epoch = lambda: 0 if trainer is None else trainer.current_epoch
    loader.processed = lambda: _processed_batches(trainer)
    return loader


def evaluation_loader(
    examples: Any,
    collate: Collate,
    batch_size: int,
    num_workers: int | None = 0,
    processes: int = 1,
    sampler: Iterable[int] | None = None,
) -> DataLoader[Any]:
    """Make a loader of examples in their order.

    Args:
        examples: a map-style dataset.
        collate: joins examples into a batch.
        batch_size: examples per batch and process.
        num_workers: number of worker processes.
        processes: number of processes that share the examples, to give each equally many; 1: leave them as they are.
        sampler: indices of the examples to load; None: all.
    """
    if processes > 1:
        examples, collate = EvenShards(examples, processes), DropSurplus(collate)
    return DataLoader(
        examples, batch_size=batch_size, sampler=sampler, collate_fn=collate, **_worker_settings(num_workers)
    )


def default_workers(trainer: pl.Trainer | None) -> int:
    """Return how many processes prepare training batches if the setting leaves it open."""
    # A GPU would wait for this process, which starts the GPU's work as well.
    on_gpu = torch.cuda.is_available() if trainer is None else trainer.strategy.root_device.type == "cuda"
    return min(TRAINING_WORKERS, (os.cpu_count() or 1) - 1) if on_gpu else 0


def _worker_settings(num_workers: int | None) -> dict[str, Any]:
    return {
        "num_workers": num_workers or 0,
        "persistent_workers": bool(num_workers),
        "pin_memory": torch.cuda.is_available(),
    }


def _shard(trainer: pl.Trainer | None) -> dict[str, int]:
    """Return `num_replicas` and `rank`, if several processes train."""
    return getattr(trainer, "distributed_sampler_kwargs", None) or {}


def _batch_counts(trainer: pl.Trainer | None) -> tuple[int, int] | None:
    """Return how many batches of the epoch the trainer has taken and how many it has trained on; None: not training."""
    if trainer is None or trainer.state.fn != "fit":
        return None
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.ready), int(progress.processed)


def _pending_batches(trainer: pl.Trainer | None) -> int:
    """Return how many batches the trainer has taken but not trained on; it may save after an exception."""
    taken, processed = _batch_counts(trainer) or (0, 0)
    return taken - processed


def _processed_batches(trainer: pl.Trainer | None) -> int | None:
    """Return how many batches of the epoch were trained on (the trainer fetches one ahead); None: not training."""
    counts = _batch_counts(trainer)
    return None if counts is None else counts[1]


def check_plan(state: Mapping[str, int], plan: Mapping[str, int]) -> None:
    """Check that a loader makes the same batches as the loader whose position is restored.

    Between two epochs the batches may differ; a line is printed then.

    Args:
        state: the saved position, with the number of `batches` of the epoch that were trained on.
        plan: what the batches depend on now, by name.

    Raises:
        LitPeftError: the position is in the middle of an epoch, and the batches differ.
    """
    for name, now in plan.items():
        if state.get(name) == now:
            continue
        if state["batches"]:
            raise LitPeftError(
                f"The checkpoint was written in the middle of an epoch with {name} {state.get(name)}, and now it is "
                f"{now}, so the rest of the epoch is not known: give the data settings of that run, or a checkpoint "
                "from the end of an epoch."
            )
        if name in state:
            rank_zero_only(print)(f"{'resumed:':<11}{name} was {state[name]} and is {now} now", flush=True)


class StatefulLoader(DataLoader[Any]):
    """A loader of `SeededBatches` whose position in the epoch is saved with the trainer's checkpoints.

    Each example is therefore seen exactly once in an epoch, wherever the run was interrupted and whatever the number of
    workers. Global random generators are not used.

    Attributes:
        pending: returns how many of the batches given out are not trained on yet.
    """

    pending: Callable[[], int] | None = None

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of its batches that were trained on, and what the batches depend on."""
        sampler = self._batches
        done = getattr(self, "_given", sampler.start) - (self.pending() if self.pending is not None else 0)
        epoch, done = (sampler.epoch + 1, 0) if done >= len(sampler) else (sampler.epoch, done)
        return {"epoch": epoch, "batches": done, **self._plan}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at another loader's position.

        Raises:
            LitPeftError: the position is in the middle of an epoch, and this loader makes other batches.
        """
        check_plan(state, self._plan)
        self._batches.set_epoch(state["epoch"])
        self._batches.start = state["batches"]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Nothing runs before the first batch is asked for: only then is the epoch set.
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
            **({} if sampler.mixture is None else {"the weights of data.train": sampler.mixture.digest}),
        }


class StreamLoader(DataLoader[Any]):
    """The batches of a `Stream`; its position is saved like that of `StatefulLoader`.

    Attributes:
        epoch: returns the epoch that starts.
        processed: returns how many batches of the epoch were trained on; None: all that were given out.
    """

    epoch: Callable[[], int]
    processed: Callable[[], int | None]

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of its batches that were trained on, their last block, and the settings."""
        if not hasattr(self, "_starts"):
            return getattr(self, "_position", None) or self._state(self.epoch(), 0, 0, 0)
        processed = self.processed()
        done = self._given if processed is None else processed
        if self._ended and done >= self._given:
            return self._state(self._epoch + 1, 0, 0, 0)
        block, before = next(start for start in reversed(self._starts) if start[1] <= done or start == self._starts[0])
        return self._state(self._epoch, done, block, done - before)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at another loader's position.

        Raises:
            LitPeftError: the position is in the middle of an epoch, and this loader makes other batches.
        """
        check_plan(state, self._plan)
        self._position: dict[str, int] | None = state

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        stream: Any = self.dataset
        position = getattr(self, "_position", None) or self._state(self.epoch(), 0, 0, 0)
        self._position = None
        self._epoch, self._given, self._ended = position["epoch"], position["batches"], False
        stream.epoch, stream.start = position["epoch"], position["block"]
        skipped = position["within"]
        count = position["batches"] - skipped
        # The first batch of each of the latest blocks: (block number, batches before it).
        self._starts = [(position["block"], count)]
        for number, batches in super().__iter__():
            if isinstance(batches, LitPeftError):
                raise batches
            # The trainer is at most one batch behind.
            self._starts = [*self._starts[-3:], (number, count)]
            for batch in batches[skipped:]:
                self._given += 1
                yield batch
            count, skipped = count + len(batches), 0
        self._ended = True

    def _state(self, epoch: int, batches: int, block: int, within: int) -> dict[str, int]:
        return {"epoch": epoch, "batches": batches, "block": block, "within": within, **self._plan}

    @property
    def _plan(self) -> dict[str, int]:
        stream: Any = self.dataset
        return {
            "data.seed": stream.seed,
            "data.shuffle_buffer": stream.buffer,
            "data.batch_size times devices": stream.batch_size * stream.num_replicas,
            "packing into rows of": stream.capacity or 0,
            "the order of a stream": stream.ORDER,
            **({} if stream.reader.weights is None else {"the weights of data.train": stream.reader.digest}),
        }
