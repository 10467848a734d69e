"""Parameters without memory, for tensors that are about to be loaded in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_DEFERRED: ContextVar[bool] = ContextVar("deferred", default=False)


@contextmanager
def deferred_parameters() -> Iterator[None]:
    """Let layers that are made in the block have their parameters on the meta device: `fill` gives them their values.

    Nothing is initialized, and no memory is used twice.
    """
    token = _DEFERRED.set(True)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


def parameter_device(weight: Tensor) -> torch.device:
    """Return the device for the parameters of a layer that adapts `weight`."""
    return torch.device("meta") if _DEFERRED.get() else weight.device


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Give a parameter its value: a tensor without memory becomes the value itself, any other is overwritten.

    Args:
        target: the parameter.
        value: its value, of the same shape.
    """
    if not target.is_meta:
        target.copy_(value)
        return
    torch.utils.swap_tensors(target, nn.Parameter(value.to(target.dtype), target.requires_grad))
