"""A linear layer and its LoRA update as one operation, which saves memory and time in the backward pass.

With the plain formula, autograd keeps a dropped-out copy of the input for each adapted layer, adds two full-size
outputs and adds two full-size input gradients. This operation keeps the input itself (one tensor for all layers that
share it, and none if it is a product whose factors are kept anyway) and one bit per element for the dropout mask, and
it does both additions inside a matrix product.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_peft.nn.autocast import autocast_dtype, without_autocast
from lit_peft.nn.factors import factors_or_self
from lit_peft.nn.quantized import dequantized
from lit_peft.nn.torch_internals import reshaped, version_of

_AS_IT_IS = nullcontext()


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float = 0.0,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Return `W x + b + scaling · B A dropout(x)` with W frozen; A and B are cast to the dtype of the computation.

    Gradients of any order are supported. Forward-mode derivatives and `torch.func` transforms are not: the layers use
    the plain formula there.

    Args:
        x: shape (..., d_in).
        weight: frozen, shape (d_out, d_in); may be a transposed view. With `scale`, the codes of a `QuantizedLinear`.
        bias: shape (d_out,).
        lora_a: shape (r, d_in).
        lora_b: shape (d_out, r).
        scaling: factor of the update.
        dropout: dropout probability of the update's input; 0 when not training.
        scale: scale of a quantized W, shape (d_out, groups).
        zero_point: zero point of a quantized W, shape (d_out, groups).

    Returns:
        Shape (..., d_out).
    """
    if not torch.is_grad_enabled() and not dropout:
        # Nothing is kept for a backward pass. When single tokens are decoded, the cost of each call matters.
        dense = weight if scale is None else dequantized(weight, scale, zero_point, x.shape[-1]).to(x.dtype)
        if lora_a.dtype != x.dtype:
            lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        base = F.linear(x, dense, None if bias is None else bias.to(x.dtype))
        low = F.linear(x, lora_a)
        if x.is_cuda and low.dtype == lora_b.dtype == base.dtype:  # not under autocast; one launch less
            base.view(-1, base.shape[-1]).addmm_(low.view(-1, low.shape[-1]), lora_b.t(), alpha=scaling)
            return base
        return base.add_(F.linear(low, lora_b), alpha=scaling)
    out: Tensor = _LoRALinear.apply(x, weight, bias, lora_a, lora_b, scaling, dropout, scale, zero_point)
    return out


def pack_bits(mask: Tensor) -> Tensor:
    """Return a boolean tensor as bits, eight to a byte."""
    flat = F.pad(mask.reshape(-1).view(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """Return the boolean tensor of this shape that `pack_bits` packed."""
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flat.view(-1)[: shape.numel()].view(torch.bool).view(shape)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        dropout: float,
        scale: Tensor | None,
        zero_point: Tensor | None,
    ) -> Tensor:
        cast = autocast_dtype(x.device)
        dtype = x.dtype if cast is None else cast
        with _AS_IT_IS if cast is None else without_autocast(x.device):
            rows = in_dtype(x.reshape(-1, x.shape[-1]), dtype)
            dropped, bits = rows, None
            if dropout:
                dropped, mask = torch.native_dropout(rows, dropout, True)
                bits = pack_bits(mask)
            a, b = in_dtype(lora_a, dtype), in_dtype(lora_b, dtype)
            low = F.linear(dropped, a)
            dense = weight if scale is None else dequantized(weight, scale, zero_point, rows.shape[-1])
            base = F.linear(rows, in_dtype(dense, dtype), None if bias is None else in_dtype(bias, dtype))
            del dense
            base.addmm_(low, b.t(), alpha=scaling)
        kept = factors_or_self(x)
        # The casts of A and B are kept, too.
        cast_ab = (None, None) if a is lora_a else (a, b)
        ctx.save_for_backward(weight, lora_a, lora_b, *cast_ab, low, bits, scale, zero_point, *kept)
        ctx.scaling, ctx.dropout, ctx.dtype = scaling, dropout, dtype
        ctx.x = (weakref.ref(x), version_of(x)) if len(kept) > 1 else None
        # The result must not be a view: torch forbids in-place operations on a view that is made here.
        return base if x.dim() == 2 else reshaped(base, (*x.shape[:-1], base.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, lora_a, lora_b, a, b, low, bits, scale, zero_point, *kept = ctx.saved_tensors
        # For gradients of gradients: no operation in place, and all as functions of x, A and B.
        again = torch.is_grad_enabled()
        dtype, needs, scaling = ctx.dtype, ctx.needs_input_grad, ctx.scaling
        grad_x = grad_bias = grad_a = grad_b = None
        with _AS_IT_IS if autocast_dtype(grad.device) is None else without_autocast(grad.device):
            x = _input(ctx, kept) if again else kept[0] if len(kept) == 1 else torch.mul(*kept)
            grad = grad.reshape(-1, grad.shape[-1])
            rows = in_dtype(x.reshape(-1, x.shape[-1]), dtype)
            mask = None if bits is None else unpack_bits(bits, rows.shape).to(dtype).div_(1 - ctx.dropout)
            if again or a is None:
                a, b = in_dtype(lora_a, dtype), in_dtype(lora_b, dtype)
            grad_low = torch.mm(grad, b)
            if needs[0]:
                dense = weight if scale is None else dequantized(weight, scale, zero_point, x.shape[-1])
                grad_x = torch.mm(grad, in_dtype(dense, dtype))
                del dense
                if mask is None:
                    add_product = grad_x.addmm if again else grad_x.addmm_
                    grad_x = add_product(grad_low, a, alpha=scaling)
                else:
                    add_masked = grad_x.addcmul if again else grad_x.addcmul_
                    grad_x = add_masked(torch.mm(grad_low, a), mask, value=scaling)
                grad_x = in_dtype(grad_x.view(x.shape), x.dtype)
            if needs[2]:
                grad_bias = grad.sum(0)
            if mask is not None and (again or needs[3]):
                rows = mask * rows if again else mask.mul_(rows)
            # With beta=0 the first tensor only gives the shape, and the factor costs no operation of its own.
            if needs[3]:
                grad_a = in_dtype(torch.addmm(a, grad_low.t(), rows, beta=0, alpha=scaling), lora_a.dtype)
            if needs[4]:
                low = F.linear(rows, a) if again else low
                grad_b = in_dtype(torch.addmm(b, grad.t(), low, beta=0, alpha=scaling), lora_b.dtype)
        return grad_x, None, grad_bias, grad_a, grad_b, None, None, None, None


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in a dtype: itself, without a call of torch, if it has the dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _input(ctx: Any, kept: list[Tensor]) -> Tensor:
    """Return x with its graph: x itself while it exists, since its own gradient may be asked for, else a · b."""
    if len(kept) == 1:
        return kept[0]
    reference, version = ctx.x
    x = reference()
    return torch.mul(*kept) if x is None or version_of(x) != version else x
