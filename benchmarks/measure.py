"""Deterministic counts of a training step, and fair timing of several."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], Tensor]


def flops(step: Step) -> int:
    """Floating-point operations of the matrix products in one step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops()


def saved_bytes(step: Step, model: nn.Module) -> int:
    """Bytes kept for the backward pass, each storage once, the model's own parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    # Kept alive, so that no address is given out twice.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, one of each in turn, the first round left out: whatever slows the machine slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            gc.collect()
            start = time.perf_counter()
            step().backward()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    """Median over the rounds of one step's time by another's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))
