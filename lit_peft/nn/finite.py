"""Numbers that are NaN or infinite: find them, and undo an optimizer step that has them, without waiting for a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_peft.nn.torch_internals import copy_all_


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """Return the largest absolute value of some tensors, NaN if one of them has a NaN. Nothing waits for the device."""
    known = [_here(tensor) for tensor in tensors if tensor.numel()]
    # In types of one byte, few operations exist.
    return torch.nn.utils.get_total_norm([t if t.itemsize > 1 else t.float() for t in known], math.inf)


def non_finite_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of those tensors that have a NaN or an infinite value."""
    known = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    if not known or bool(largest(tensor for _, tensor in known).isfinite()):
        return []
    return [name for name, tensor in known if not bool(largest([tensor]).isfinite())]


@torch.no_grad()
def undo_step_if(bad: Tensor, optimizer: Optimizer) -> None:
    """Make the optimizer step that comes next change nothing if `bad`, which the device decides when it gets there.

    The gradients become zero, and the step runs, so that no state becomes NaN. After it, parameters and states are
    those of before; a state that the step created remains that of a zero gradient. Counters that the optimizer keeps on
    the CPU count the step. If not `bad`, every value is what it would have been, bit for bit.

    Args:
        bad: whether the step is to be undone, a boolean scalar on the device of the parameters.
        optimizer: the optimizer; its gradients are complete.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [_here(p.grad) for p in parameters if p.grad is not None]
    _restore_if(bad, gradients, [torch.zeros((), dtype=g.dtype, device=g.device).expand(g.shape) for g in gradients])
    states = (value for p in parameters for value in optimizer.state[p].values() if isinstance(value, Tensor))
    values = [_here(value) for value in (*parameters, *states) if value.device == bad.device and value.numel()]
    restore = _snapshot(bad, values)

    def after_step(*_: Any) -> None:
        handle.remove()
        restore()

    handle = optimizer.register_step_post_hook(after_step)


def _snapshot(bad: Tensor, values: list[Tensor]) -> Callable[[], None]:
    """Copy tensors; return a function that writes the copies back if `bad`."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for value in values:
        groups.setdefault(value.dtype, []).append(value)
    # One tensor for each type, so that it takes few operations however many tensors there are.
    copies = {kind: torch.cat([value.reshape(-1) for value in members]) for kind, members in groups.items()}

    @torch.no_grad()
    def restore() -> None:
        for kind, members in groups.items():
            sizes = [value.numel() for value in members]
            parts = copies.pop(kind).split(sizes)
            _restore_if(bad, members, [part.view(v.shape) for part, v in zip(parts, members, strict=True)])

    return restore


def _restore_if(bad: Tensor, targets: list[Tensor], sources: list[Tensor]) -> None:
    groups: dict[torch.dtype, list[int]] = {}
    for at, target in enumerate(targets):
        groups.setdefault(target.dtype, []).append(at)
    for members in groups.values():
        now = torch.cat([targets[at].reshape(-1) for at in members])
        then = torch.cat([sources[at].reshape(-1) for at in members])
        parts = torch.where(bad, then, now).split([targets[at].numel() for at in members])
        places = [targets[at] for at in members]
        copy_all_(places, [part.view(place.shape) for part, place in zip(parts, places, strict=True)])


def _here(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process has, sharing its memory."""
    inner: Any = tensor.detach()
    return inner.to_local() if hasattr(inner, "to_local") else inner
