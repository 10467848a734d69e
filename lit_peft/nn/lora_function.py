"""A linear layer and its LoRA update as one operation: what is saved for the backward pass, and what it computes.

Autograd on the plain formula keeps a dropped copy of the input for every adapted layer, adds two full-size outputs and
two full-size input gradients. Here the input itself is kept (one tensor for all layers that share it, and none where it
is a product whose factors are kept anyway), of the dropout mask one bit per element, and both sums happen inside a
matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_peft.nn.autocast import autocast_dtype, without_autocast
from lit_peft.nn.factors import factors_or_self
from lit_peft.nn.quantized import dequantized


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
    """Return `W x + b + scaling · B A dropout(x)` with W frozen; A and B are cast to the type it is computed in.

    Args:
        x: (..., d_in)
        weight: (d_out, d_in), frozen; a transposed view will do. With `scale`, codes as `QuantizedLinear` stores them.
        bias: (d_out,)
        lora_a: (r, d_in)
        lora_b: (d_out, r)
        scaling: factor on the update.
        dropout: dropout probability on the update's input, 0 when not training.
        scale: (d_out, groups), of a quantized W.
        zero_point: (d_out, groups), of a quantized W.

    Returns:
        (..., d_out)
    """
    if not torch.is_grad_enabled() and not dropout:
        # Nothing is kept, so nothing needs to know of the whole; where a token is decoded, every call counts.
        dense = weight if scale is None else dequantized(weight, scale, zero_point, x.shape[-1]).to(x.dtype)
        if lora_a.dtype != x.dtype:
            lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        base = F.linear(x, dense, None if bias is None else bias.to(x.dtype))
        return base.add_(F.linear(F.linear(x, lora_a), lora_b), alpha=scaling)
    out: Tensor = _LoRALinear.apply(x, weight, bias, lora_a, lora_b, scaling, dropout, scale, zero_point)
    return out


def pack_bits(mask: Tensor) -> Tensor:
    """Return a boolean tensor as bits, eight to a byte."""
    flat = F.pad(mask.reshape(-1).view(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """Return the boolean tensor of that shape that `pack_bits` packed."""
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
        dtype = autocast_dtype(x.device) or x.dtype
        with without_autocast(x.device):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            dropped, bits = rows, None
            if dropout:
                dropped, mask = torch.native_dropout(rows, dropout, True)
                bits = pack_bits(mask)
            low = F.linear(dropped, lora_a.to(dtype)) * scaling
            dense = weight if scale is None else dequantized(weight, scale, zero_point, rows.shape[-1])
            out = F.linear(rows, dense.to(dtype), None if bias is None else bias.to(dtype))
            del dense
            out = torch.addmm(out, low, lora_b.to(dtype).T)
        ctx.save_for_backward(weight, lora_a, lora_b, low, bits, scale, zero_point, *factors_or_self(x))
        ctx.scaling, ctx.dropout, ctx.dtype = scaling, dropout, dtype
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, lora_a, lora_b, low, bits, scale, zero_point, *kept = ctx.saved_tensors
        dtype, needs = ctx.dtype, ctx.needs_input_grad
        grad_x = grad_bias = grad_a = grad_b = None
        with without_autocast(grad.device):
            x = kept[0] if len(kept) == 1 else torch.mul(*kept)
            grad = grad.reshape(-1, grad.shape[-1])
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            mask = None if bits is None else unpack_bits(bits, rows.shape).to(dtype).div_(1 - ctx.dropout)
            grad_low = torch.mm(grad, lora_b.to(dtype)) * ctx.scaling
            if needs[0]:
                dense = weight if scale is None else dequantized(weight, scale, zero_point, x.shape[-1])
                grad_x = torch.mm(grad, dense.to(dtype))
                del dense
                if mask is None:
                    grad_x = torch.addmm(grad_x, grad_low, lora_a.to(dtype))
                else:
                    grad_x.addcmul_(torch.mm(grad_low, lora_a.to(dtype)), mask)
                grad_x = grad_x.view(x.shape).to(x.dtype)
            if needs[2]:
                grad_bias = grad.sum(0)
            if needs[3]:
                grad_a = torch.mm(grad_low.T, rows if mask is None else mask.mul_(rows)).to(lora_a.dtype)
            if needs[4]:
                grad_b = torch.mm(grad.T, low).to(lora_b.dtype)
        return grad_x, None, grad_bias, grad_a, grad_b, None, None, None, None
