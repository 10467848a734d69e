"""Frozen linear layers in 8-bit floating point (e4m3), multiplied as such by the tensor cores of Hopper and newer GPUs.

Each row of W has one scale, and so has each row of the input, which is quantized for each product. This is not exact:
a number keeps its 4 leading bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.autocast import autocast_dtype, without_autocast
from lit_peft.nn.quantized import QuantizedLinear
from lit_peft.nn.torch_internals import scaled_product

E4M3 = torch.float8_e4m3fn
# The kernel wants sizes that are multiples of this.
_MULTIPLE = 16


class Float8Linear(QuantizedLinear):
    """`h = W x + b` with W frozen, in e4m3 with one scale for each row; the input is quantized in the same way.

    The gradient of x is the product of the quantized W and the quantized gradient. W is stored twice, row by row and
    column by column, as the two products need it: together as much memory as in bf16.

    On GPUs without such tensor cores, on CPUs and for other sizes than multiples of 16, the same numbers are multiplied
    in a wider dtype, which is slow.

    Args:
        weight: shape (out_features, in_features), in floating point.
        bias: shape (out_features,).

    Shapes:
        input (..., in_features) → output (..., out_features)
    """

    columns: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        codes, scale = to_float8(weight.detach())
        # As integers: `.to(bfloat16)` casts every tensor of floating point.
        super().__init__(codes.view(torch.uint8), scale, None, bias)
        self.register_buffer("columns", codes.t().contiguous().view(torch.uint8), persistent=False)
        self.dense_dtype = weight.dtype

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W dequantized, shape (out_features, in_features), in the dtype that it had if `dtype` is None."""
        dense = self.weight.view(E4M3).to(self.scale.dtype) * self.scale
        return dense.to(dtype or self.dense_dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = _Float8Product.apply(rows, self.weight, self.columns, self.scale)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, e4m3"


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes, scale) with x ≈ codes · scale: e4m3 of x's shape, and fp32 with one number for each row.

    Args:
        x: shape (rows, n).
    """
    # The largest number of e4m3, as a literal: `torch.compile` takes a global number as one that may change.
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0
    return (x / scale).to(E4M3), scale


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
        ctx.dtype, ctx.x_dtype = autocast_dtype(x.device) or x.dtype, x.dtype
        ctx.save_for_backward(columns, scale)
        with without_autocast(x.device):
            return _multiplied(*to_float8(x.to(ctx.dtype)), weight.view(E4M3), scale.t(), ctx.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns, scale = ctx.saved_tensors
        with without_autocast(grad.device):
            # The scales of W's rows belong to the sum, so they go into the gradient before it is quantized.
            scaled = grad.to(ctx.dtype) * scale.t().to(ctx.dtype)
            ones = torch.ones_like(columns[:, :1], dtype=scale.dtype).t()
            out = _multiplied(*to_float8(scaled), columns.view(E4M3), ones, ctx.dtype)
        return out.to(ctx.x_dtype), None, None, None


def _multiplied(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `(x · x_scale) (weight.t() · weight_scale)`: x (rows, n), weight (m, n), scales (rows, 1) and (1, m)."""
    if multiplies_float8(x.device) and not (len(weight) % _MULTIPLE or x.shape[1] % _MULTIPLE):
        return scaled_product(x, weight.t(), x_scale, weight_scale).to(dtype)
    return (F.linear(x.float(), weight.float()) * x_scale * weight_scale).to(dtype)


@torch.compiler.assume_constant_result
def multiplies_float8(device: torch.device) -> bool:
    """Return whether a device multiplies e4m3 with one scale for each row: Hopper and newer GPUs do."""
    on_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return on_nvidia and torch.cuda.get_device_capability(device) >= (9, 0)
