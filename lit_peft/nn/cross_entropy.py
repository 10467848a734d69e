"""Cross-entropy through a frozen output head, a few rows at a time: [tokens × vocabulary] never exists.

The head is frozen, so all its backward pass needs is the gradient of its input, and that is known as soon as a row's
logits are: it is computed in the forward pass, and the logits are let go.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_peft.nn.autocast import autocast_dtype, without_autocast

# Elements of one block of logits: 32 MB in fp32, and never fewer rows than a matrix product needs to be quick.
_BLOCK, _FEWEST_ROWS = 2**23, 256


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the sum over rows of `cross_entropy(f(hidden Wᵀ + bias), targets)`, f(z) = scale·z or its soft cap.

    The softmax is computed in fp32 at least, as transformers does. Under autocast the products run in its type.

    Args:
        hidden: (rows, d), the head's input; the only tensor that gets a gradient.
        weight: (vocabulary, d), frozen.
        targets: (rows,) of token ids.
        bias: (vocabulary,), frozen.
        scale: the logits are multiplied by it.
        softcap: c, where the logits z become `c · tanh(z / c)` after the scale.

    Returns:
        A scalar; zero for no rows.
    """
    loss: Tensor = _HeadCrossEntropy.apply(hidden, weight, targets, bias, scale, softcap)
    return loss


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        dtype = autocast_dtype(hidden.device) or weight.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        precise = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(_BLOCK // len(weight), _FEWEST_ROWS)
        with without_autocast(hidden.device):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                target = targets[part, None]
                logits = F.linear(hidden[part].to(dtype), weight, bias).to(precise)
                if scale != 1.0:
                    logits *= scale
                if softcap is not None:
                    logits = logits.div_(softcap).tanh_()
                    slope = 1 - logits.square()
                    logits *= softcap
                top = logits.amax(-1, keepdim=True)
                wanted = logits.gather(1, target)
                logits.sub_(top).exp_()
                mass = logits.sum(-1, keepdim=True)
                total += (mass.log() + top - wanted).sum()
                if gradient is None:
                    continue
                logits.div_(mass).scatter_add_(1, target, torch.full_like(wanted, -1.0))
                if softcap is not None:
                    logits *= slope
                if scale != 1.0:
                    logits *= scale
                gradient[part] = torch.mm(logits.to(dtype), weight)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None, None
