"""Whether a module's parameters have changed, for results that are computed from them once and kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lit_peft.nn.torch_internals import version_of


def weights_state(module: nn.Module) -> tuple[Any, ...] | None:
    """Return a value that differs after any change to the module's parameters: in place, to other memory or dtype.

    None means that the result must be computed again: gradients are needed, or the parameters are inference tensors,
    which do not count changes in place.
    """
    if torch.is_grad_enabled():
        return None
    state = tuple((p.data_ptr(), version_of(p), p.dtype) for p in module.parameters())
    return None if any(version is None for _, version, _ in state) else state
