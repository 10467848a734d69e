"""Properties of linear layers, whichever way they store their weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_peft.util.lazy import is_instance


def linear_features(module: nn.Module, fan_in_fan_out: bool | None = None) -> tuple[int, int]:
    """Return the sizes of a linear layer's input and output.

    Args:
        module: `nn.Linear` or a similar layer; it needs at least a two-dimensional `weight`.
        fan_in_fan_out: whether that weight has the shape (in_features, out_features), as in transformers' `Conv1D`;
            taken from the layer's type when None.
    """
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    rows, columns = module.get_parameter("weight").shape
    transposed = stores_transposed(module) if fan_in_fan_out is None else fan_in_fan_out
    return (rows, columns) if transposed else (columns, rows)


def stores_transposed(module: nn.Module) -> bool:
    """Return whether a layer's weight has the shape (in_features, out_features): transformers' `Conv1D`."""
    return is_instance(module, "transformers.pytorch_utils", "Conv1D")


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the parameters of an adapter for a frozen weight.

    It is float32 even for half-precision weights, because small updates are lost in bf16's 8-bit mantissa.
    """
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a LayerNorm, RMSNorm or a model's own version of them: one weight per feature."""
    weight = getattr(module, "weight", None)
    is_vector = isinstance(weight, Tensor) and weight.dim() == 1
    return is_vector and not isinstance(module, nn.PReLU) and next(module.children(), None) is None


def is_frozen_linear(head: nn.Module) -> bool:
    """Return whether a module is a plain linear layer of floating-point numbers of which nothing is trained."""
    return (
        isinstance(head, nn.Linear)
        and type(head.weight) is nn.Parameter
        and head.weight.is_floating_point()
        and not any(parameter.requires_grad for parameter in head.parameters())
    )
