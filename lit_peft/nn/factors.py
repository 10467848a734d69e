"""A product that a layer would keep for its backward pass, kept as its factors, which autograd keeps already.

A gated MLP feeds `act(gate) · up` to its last layer. The multiplication keeps both factors; a layer that keeps them
rather than the product keeps nothing more, and multiplies once again in its backward pass: the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Whether layers keep factors in place of a product; False: the product itself.
KEEP_FACTORS = True


def under_torch_hooks() -> bool:
    """Whether hooks of torch's own on saved tensors are active, as in a layer that is checkpointed or offloaded."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__.startswith("torch.")


def factors_or_self(x: Tensor) -> tuple[Tensor, ...]:
    """Return (a, b) of x's shape with x = a · b where autograd holds both already, else (x,).

    Under hooks of torch's own on saved tensors (checkpointing, offloading), which may drop or move what autograd holds,
    it is (x,).
    """
    node = x.grad_fn
    if not KEEP_FACTORS or node is None or node.name() != "MulBackward0":
        return (x,)
    if under_torch_hooks():
        return (x,)
    factors = (node._saved_self, node._saved_other)  # type: ignore[attr-defined]
    if any(factor is None or factor.shape != x.shape for factor in factors):
        return (x,)
    return factors
