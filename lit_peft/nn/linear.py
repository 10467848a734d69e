"""Facts about linear layers, however they store their weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def linear_features(module: nn.Module, fan_in_fan_out: bool | None = None) -> tuple[int, int]:
    """Return the widths of a linear layer's input and output.

    Args:
        module: `nn.Linear` or a relative of it, or a layer that has a weight alone.
        fan_in_fan_out: whether that weight is stored as (in_features, out_features), as transformers' `Conv1D` does;
            found from the layer's type when None.
    """
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    rows, columns = module.get_parameter("weight").shape
    transposed = stores_transposed(module) if fan_in_fan_out is None else fan_in_fan_out
    return (rows, columns) if transposed else (columns, rows)


def stores_transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight as (in_features, out_features): transformers' `Conv1D`."""
    return type(module).__name__ == "Conv1D"


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """Return the type of an adapter's parameters beside a frozen weight.

    Half-precision bases keep fp32 adapters: small updates vanish in bf16's 8 bits of mantissa.
    """
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm, RMSNorm or a model's own kind of them: one weight for each feature."""
    weight = getattr(module, "weight", None)
    vector = isinstance(weight, Tensor) and weight.dim() == 1
    return vector and not isinstance(module, nn.PReLU) and next(module.children(), None) is None
