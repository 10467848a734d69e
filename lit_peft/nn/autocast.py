"""Autocast inside operations that compute their own gradient. Some devices (`meta`) do not support it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_USUAL = ("cuda", "cpu")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype in which autocast computes products on this device; None if it is off."""
    kind = device.type
    # Every layer asks, so the usual devices are not looked up.
    on = (kind in _USUAL or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products are computed in the dtype of their operands."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
