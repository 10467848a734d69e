"""Keeping a product for the backward pass as its two factors, which autograd keeps anyway.

A gated MLP feeds `act(gate) · up` to its last layer. The multiplication keeps both factors. A layer that keeps these
rather than the product needs no memory of its own; it multiplies again in the backward pass, with the same result to
the bit.
"""

from __future__ import annotations

from torch import Tensor

from lit_peft.nn.torch_internals import saved_factors, torch_handles_saved_tensors


def factors_or_self(x: Tensor) -> tuple[Tensor, ...]:
    """Return (a, b) with x = a · b if autograd keeps both and they have x's shape, else (x,).

    Under torch's own hooks on saved tensors (checkpointing, offloading), which may drop or move what autograd keeps,
    the result is (x,).
    """
    factors = None if torch_handles_saved_tensors() else saved_factors(x)
    if factors is None or any(factor.shape != x.shape for factor in factors):
        return (x,)
    return factors
