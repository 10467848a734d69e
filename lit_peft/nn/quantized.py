"""Frozen linear layers in 8 and 4 bits that are trained through, and dequantizing any quantized layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_peft.nn.autocast import autocast_dtype, without_autocast
from lit_peft.util.errors import LitPeftError


class QuantizedLinear(nn.Linear):
    """`h = s · (q - z) x + b`, q whole numbers of 8 or 4 bits: a frozen linear layer at a quarter or an eighth of fp32.

    W is dequantized when it is multiplied with, in the forward and again in the backward pass, and kept in neither:
    what autograd would save of a dequantized weight is as large as an unquantized one.

    Args:
        codes: q, int8, shape (out_features, in_features).
        scale: s, shape (out_features, groups): one for each group of `in_features / groups` neighbours in a row.
        zero_point: z, shape as `scale`; None for zero.
        bias: shape (out_features,).
        bits: 8, or 4 for codes from -8 to 7, which are stored two to a byte.

    Shapes:
        input (..., in_features) → output (..., out_features)
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int = 8
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.shape
        self.bits = bits
        self.weight = nn.Parameter(pack_nibbles(codes) if bits == 4 else codes, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("zero_point", zero_point, persistent=False)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W dequantized, in the scale's type or `dtype`, shape (out_features, in_features)."""
        dense = dequantized(self.weight, self.scale, self.zero_point, self.in_features)
        return dense if dtype is None else dense.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self.weight, self.scale, self.zero_point)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `.to(bfloat16)` must not round the scale: the weight would be another.
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.in_features // self.scale.shape[1]}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        ctx.dtype = autocast_dtype(x.device) or x.dtype
        ctx.x_dtype, ctx.width = x.dtype, x.shape[-1]
        ctx.save_for_backward(weight, scale, zero_point)
        with without_autocast(x.device):
            return F.linear(x.to(ctx.dtype), dequantized(weight, scale, zero_point, ctx.width).to(ctx.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device):
            weight, scale, zero_point = ctx.saved_tensors
            dense = dequantized(weight, scale, zero_point, ctx.width).to(ctx.dtype)
            return (grad.to(ctx.dtype) @ dense).to(ctx.x_dtype), None, None, None


def dequantized(weight: Tensor, scale: Tensor, zero_point: Tensor | None, width: int) -> Tensor:
    """Return s · (q - z) of what a `QuantizedLinear` stores, `width` numbers a row."""
    codes = unpack_nibbles(weight, width) if weight.dtype == torch.uint8 else weight
    grouped = codes.reshape(*scale.shape, -1).to(scale.dtype)
    if zero_point is not None:
        grouped = grouped.sub_(zero_point[..., None])
    return grouped.mul_(scale[..., None]).view(codes.shape)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Return whole numbers from -8 to 7, two to a byte along the last dimension."""
    even = F.pad(codes + 8, (0, codes.shape[-1] % 2)).to(torch.uint8)
    return even[..., 0::2] | even[..., 1::2] << 4


def unpack_nibbles(packed: Tensor, width: int) -> Tensor:
    """Return the `width` numbers of each row that `pack_nibbles` packed, as int8."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return codes[..., :width].to(torch.int8) - 8


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is quantized: `QuantizedLinear`, bitsandbytes' layers, a tensor of torchao's."""
    weight = module._parameters.get("weight")
    if weight is None:
        return False
    return not weight.is_floating_point() or type(weight).__module__.startswith("torchao.")


def dense_weight(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return a quantized layer's weight dequantized, shape (out_features, in_features).

    Args:
        module: a layer for which `is_quantized` holds.
        dtype: the type to return it in; float32, or the type it stands for, when None.

    Raises:
        LitPeftError: the layer stores its weight in a way that is not known.
    """
    weight: Any = module.weight
    if isinstance(module, QuantizedLinear):
        dense = module.dense_weight()
    elif type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        if weight.quant_state is None:
            raise LitPeftError("A bitsandbytes layer is quantized when it reaches its device: move the model there.")
        dense = dequantize_4bit(weight.data, weight.quant_state)
    elif type(weight).__name__ == "Int8Params":
        # After the first forward the layer's state holds the codes and their scales.
        state: Any = module.state
        scale = weight.SCB if weight.SCB is not None else state.SCB
        codes = weight.CB if weight.CB is not None else weight.data
        dense = codes.float() * (scale.float() / 127)[:, None]
    elif type(weight).__module__.startswith("torchao."):
        dense = weight.dequantize()
    else:
        raise LitPeftError(
            f"{type(module).__name__} stores its weight as {weight.dtype} in a way that is not known here: quantize "
            "the base with torchao or bitsandbytes, or load it unquantized."
        )
    return dense.detach() if dtype is None else dense.detach().to(dtype)


def dense_linear(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Return a quantized layer as a plain, frozen `nn.Linear` of that type; its bias is kept, not copied."""
    weight = dense_weight(module, dtype)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear.train(module.training)
