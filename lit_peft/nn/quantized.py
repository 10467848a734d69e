"""Frozen linear layers in 8 and 4 bits that gradients pass through, and dequantizing any quantized layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.autocast import autocast_dtype, without_autocast
from lit_peft.nn.torch_internals import function_transforms_are_active
from lit_peft.util.errors import LitPeftError
from lit_peft.util.lazy import is_instance

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class QuantizedLinear(nn.Linear):
    """`h = s · (q - z) x + b` with q integers of 8 or 4 bits: a frozen linear layer with 1/4 or 1/8 of fp32's memory.

    W is dequantized for each product, in the forward and in the backward pass, and is never kept: autograd would keep
    a dequantized weight as large as the unquantized one.

    Args:
        codes: q, int8, shape (out_features, in_features).
        scale: s, shape (out_features, groups): one for each group of `in_features / groups` neighbours in a row.
        zero_point: z, shape as `scale`; None for zero.
        bias: shape (out_features,).
        bits: 8, or 4 for codes from -8 to 7, which are stored two to a byte.

    Shapes:
        input (..., in_features) → output (..., out_features)
    """

    scale_bits: Tensor
    zero_point: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int = 8
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.shape
        self.bits = bits
        self.weight = nn.Parameter(pack_nibbles(codes) if bits == 4 else codes, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]
        # The scale is stored as integers: `.to(bfloat16)` would round it, and with it the weight.
        self.scale_dtype = scale.dtype
        self.register_buffer("scale_bits", scale.view(_INTEGERS[scale.element_size()]), persistent=False)
        self.register_buffer("zero_point", zero_point, persistent=False)

    @property
    def scale(self) -> Tensor:
        """s, shape (out_features, groups)."""
        return self.scale_bits.view(self.scale_dtype)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W dequantized, shape (out_features, in_features), in the scale's dtype if `dtype` is None."""
        dense = dequantized(self.weight, self.scale, self.zero_point, self.in_features)
        return dense if dtype is None else dense.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if function_transforms_are_active():
            return F.linear(x, self.dense_weight(x.dtype), self.bias)
        out: Tensor = _Product.apply(x, self.weight, self.scale, self.zero_point)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        group_size = self.in_features // self.scale_bits.shape[1]
        return f"{super().extra_repr()}, bits={self.bits}, group_size={group_size}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        ctx.dtype = autocast_dtype(x.device) or x.dtype
        ctx.x_dtype, ctx.width = x.dtype, x.shape[-1]
        ctx.save_for_backward(weight, scale, zero_point)
        with without_autocast(x.device):
            return F.linear(x.to(ctx.dtype), dequantized(weight, scale, zero_point, ctx.width).to(ctx.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device):
            weight, scale, zero_point = ctx.saved_tensors
            dense = dequantized(weight, scale, zero_point, ctx.width).to(ctx.dtype)
            return (grad.to(ctx.dtype) @ dense).to(ctx.x_dtype), None, None, None


def dequantized(weight: Tensor, scale: Tensor, zero_point: Tensor | None, width: int) -> Tensor:
    """Return s · (q - z) of the codes that a `QuantizedLinear` stores, `width` numbers in each row."""
    codes = unpack_nibbles(weight, width) if weight.dtype == torch.uint8 else weight
    grouped = codes.reshape(*scale.shape, -1).to(scale.dtype)
    if zero_point is not None:
        grouped = grouped.sub_(zero_point[..., None])
    return grouped.mul_(scale[..., None]).view(codes.shape)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Return integers from -8 to 7 packed along the last dimension, two to a byte."""
    even = F.pad(codes + 8, (0, codes.shape[-1] % 2)).to(torch.uint8)
    return even[..., 0::2] | even[..., 1::2] << 4


def unpack_nibbles(packed: Tensor, width: int) -> Tensor:
    """Return the `width` integers of each row that `pack_nibbles` packed, as int8."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return codes[..., :width].to(torch.int8) - 8


def is_quantized(module: nn.Module) -> bool:
    """Return whether a layer's weight is quantized: integers, 8-bit floating point, or a tensor type of torchao."""
    weight = next((p for name, p in module.named_parameters(recurse=False) if name == "weight"), None)
    if weight is None:
        return False
    return not weight.is_floating_point() or weight.element_size() == 1 or _is_torchao(weight)


def _is_torchao(weight: Tensor) -> bool:
    base = is_instance(weight, "torchao.utils", "TorchAOBaseTensor")
    return base or is_instance(weight, "torchao.quantization", "NF4Tensor")


def check_dequantizable(module: nn.Module) -> None:
    """Check that lit_peft can dequantize a quantized layer, or quantized experts.

    Raises:
        LitPeftError: its weight is stored in an unknown way.
    """
    weight: Any = module.weight
    bitsandbytes = is_instance(weight, "bitsandbytes.nn", "Params4bit", "Int8Params")
    # `QuantizedStack`, whose module imports this one.
    is_stack = hasattr(module, "dense_stack")
    if not (isinstance(module, QuantizedLinear) or is_stack or bitsandbytes or _is_torchao(weight)):
        raise LitPeftError(
            f"{type(module).__name__} stores its weight as {weight.dtype} in a way that lit_peft cannot dequantize: "
            "quantize the base with torchao or bitsandbytes, or load it unquantized."
        )


def dense_weight(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return a quantized layer's weight dequantized, shape (out_features, in_features).

    Args:
        module: a layer for which `is_quantized` is true.
        dtype: the dtype of the result; when None, the one that the quantized weight stands for.

    Raises:
        LitPeftError: the weight is stored in an unknown way.
    """
    check_dequantizable(module)
    weight: Any = module.weight
    if isinstance(module, QuantizedLinear):
        dense = module.dense_weight()
    elif is_instance(weight, "bitsandbytes.nn", "Params4bit"):
        from bitsandbytes.functional import dequantize_4bit

        if weight.quant_state is None:
            raise LitPeftError(
                "bitsandbytes quantizes a layer when it is moved to its device: move the model there first."
            )
        dense = dequantize_4bit(weight.data, weight.quant_state)
    elif is_instance(weight, "bitsandbytes.nn", "Int8Params"):
        # The first forward pass moves the codes and their scales to the layer's state.
        state: Any = module.state
        scale = weight.SCB if weight.SCB is not None else state.SCB
        codes = weight.CB if weight.CB is not None else weight.data
        dense = codes.float() * (scale.float() / 127)[:, None]
    else:
        dense = weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.dequantize()
    return dense.detach() if dtype is None else dense.detach().to(dtype)


def dense_linear(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Return a quantized layer as a plain, frozen `nn.Linear` of this dtype, with the same bias (not a copy)."""
    weight = dense_weight(module, dtype)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear.train(module.training)
