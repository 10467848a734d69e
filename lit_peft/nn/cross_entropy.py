"""Cross-entropy through a frozen output head, a few rows at a time: [tokens × vocabulary] never exists.

The head is frozen, so the backward pass only needs the gradient of its input. That is known as soon as a row's logits
are: it is computed in the forward pass, and the logits are freed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_peft.nn.autocast import autocast_dtype, without_autocast
from lit_peft.nn.torch_internals import function_transforms_are_active

# Elements of one block of logits on a CPU: 32 MB in fp32. A block has enough rows for a fast matrix product.
_BLOCK, _FEWEST_ROWS = 2**23, 256
# On a GPU, each block costs a dozen launches, so blocks are as large as the memory allows: in fp32 this share of it.
_SHARE_OF_GPU, _MOST_ROWS = 1 / 64, 4096


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the sum over rows of `cross_entropy(f(hidden Wᵀ + bias), targets)`, f(z) = scale·z or its soft cap.

    The softmax is computed in fp32 or higher, as in transformers. Under autocast, products run in its dtype. Gradients
    of gradients are supported, but need all logits at once.

    Args:
        hidden: the head's input and the only tensor with a gradient, shape (rows, d).
        weight: frozen, shape (vocabulary, d).
        targets: token ids, shape (rows,).
        bias: frozen, shape (vocabulary,).
        scale: factor of the logits.
        softcap: c; the scaled logits z become `c · tanh(z / c)`. No soft cap if None.

    Returns:
        A scalar; zero if there are no rows.
    """
    return _cross_entropy(hidden, weight, targets, bias, scale, softcap, False)


def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the log-probability of each row's target; the arguments are those of `head_cross_entropy`.

    The forward pass keeps the gradient of each row, [rows, d]; the backward pass multiplies it by what arrives there.

    Returns:
        Shape (rows,), in fp32 or higher.
    """
    return -_cross_entropy(hidden, weight, targets, bias, scale, softcap, True)


def _rows_at_once(device: torch.device, vocabulary: int) -> int:
    if device.type != "cuda":
        return max(_BLOCK // vocabulary, _FEWEST_ROWS)
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(max(int(memory * _SHARE_OF_GPU) // (4 * vocabulary), _FEWEST_ROWS), _MOST_ROWS)


def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    by_row: bool,
) -> Tensor:
    if function_transforms_are_active():
        dtype = autocast_dtype(hidden.device) or weight.dtype
        return _plain_loss(hidden, targets, weight, bias, dtype, scale, softcap, by_row)
    loss: Tensor = _HeadCrossEntropy.apply(hidden, weight, targets, bias, scale, softcap, by_row)
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
        by_row: bool,
    ) -> Tensor:
        dtype = autocast_dtype(hidden.device) or weight.dtype
        ctx.head = weight, bias, dtype, scale, softcap, by_row
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        precise = torch.promote_types(dtype, torch.float32)
        # One number for each row, or their sum.
        total = torch.zeros(len(hidden) if by_row else (), dtype=precise, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = _rows_at_once(hidden.device, len(weight))
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
                target_logits = logits.gather(1, target)
                logits.sub_(top).exp_()
                mass = logits.sum(-1, keepdim=True)
                losses = mass.log() + top - target_logits
                if by_row:
                    total[part] = losses.squeeze(1)
                else:
                    total += losses.sum()
                if gradient is None:
                    continue
                logits.div_(mass).scatter_add_(1, target, torch.full_like(target_logits, -1.0))
                if softcap is not None:
                    logits *= slope
                if scale != 1.0:
                    logits *= scale
                gradient[part] = torch.mm(logits.to(dtype), weight)
        if gradient is not None:
            ctx.save_for_backward(gradient, hidden, targets)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, hidden, targets = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The gradient may be differentiated again, so it must be a function of `hidden`.
            loss = _plain_loss(hidden, targets, *ctx.head)
            (gradient,) = torch.autograd.grad(loss.sum(), hidden, create_graph=True)
        # The loss of a row depends on that row alone, so its gradient is the kept one times a number.
        return gradient * grad.to(gradient.dtype).reshape(-1, 1), None, None, None, None, None, None


def _plain_loss(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    by_row: bool,
) -> Tensor:
    with without_autocast(hidden.device):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        logits = logits.to(torch.promote_types(dtype, torch.float32)) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, targets, reduction="none" if by_row else "sum")
