"""Deterministic counts of a training step, and fair timing of several."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_peft.util.memory import process_memory

Step = Callable[[], Tensor]


def flops(step: Step) -> int:
    """Floating-point operations of the matrix products in one step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops()


def gradients(model: nn.Module, step: Step) -> list[Tensor]:
    """The gradients of one step, of every trained parameter in turn."""
    model.zero_grad()
    step().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


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


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of the processor for each step, one of each in turn, the first round left out.

    Whatever slows the machine slows all. The processor's seconds leave out what other processes took.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            gc.collect()
            clock, processor = time.perf_counter(), time.process_time()
            step().backward()
            if number:
                seconds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return seconds


def ratio(seconds: dict[str, list[tuple[float, float]]], name: str, *to: str, which: int = 0) -> float:
    """Median over the rounds of one step's time by that of others together: the clock's (0) or the processor's (1)."""
    others = zip(*(seconds[other] for other in to), strict=True)
    return statistics.median(
        own[which] / sum(other[which] for other in row) for own, row in zip(seconds[name], others, strict=True)
    )


def peak_mb(run: Callable[[], object]) -> float:
    """Increase of the resident memory in MB at its highest while `run` runs (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the highest starts anew
    before = process_memory("VmRSS") or 0
    run()
    return ((process_memory("VmHWM") or 0) - before) / 1e6
