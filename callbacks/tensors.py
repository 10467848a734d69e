"""Access to tensors of every kind, for callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors inside a tensor: the local part of a shard, codes and scales of a quantized one."""
    inner: Any = tensor.detach()
    if hasattr(inner, "to_local"):
        inner = inner.to_local()
    if hasattr(inner, "__tensor_flatten__"):
        names, _ = inner.__tensor_flatten__()
        for name in names:
            yield from parts(getattr(inner, name))
    elif not inner.is_meta:
        yield inner


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a module by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
