"""The only file that uses private names of torch. `tests/test_internals_torch.py` fails when one of them changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether calling the module runs hooks, which code that reads its weight directly would skip."""
    # torch registers hooks publicly but has no public way to ask for them.
    return bool(module._forward_hooks or module._forward_pre_hooks)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter that the module itself registered, even while an attribute of the same name hides it."""
    # `get_parameter` and `getattr` return the attribute that hides the parameter.
    return module._parameters.get(name)


def version_of(tensor: Tensor) -> int | None:
    """Return a number that grows with each in-place change; None for inference tensors, which do not count them."""
    # Autograd keeps this counter for its own checks and does not publish it.
    return None if tensor.is_inference() else tensor._version


def saved_factors(product: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return (a, b) if `product` is the result of `a * b` and autograd keeps both tensors; else None."""
    # A node's saved tensors have no public accessor. Saving them again costs no memory.
    node = product.grad_fn
    if node is None or node.name() != "MulBackward0":
        return None
    first, second = node._saved_self, node._saved_other  # type: ignore[attr-defined]
    return None if first is None or second is None else (first, second)


def torch_handles_saved_tensors() -> bool:
    """Return whether torch's own hooks on saved tensors are active: activation checkpointing or offloading."""
    # `torch.autograd.graph` can push such hooks but not list them.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__.startswith("torch.")


def function_transforms_are_active() -> bool:
    """Return whether `torch.func` transforms (vmap, jvp, …) or forward-mode derivatives are being computed."""
    # An autograd function with one plain backward formula supports neither, and torch only says so by raising.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called, after which hooks are compiled into the call."""
    # `nn.Module.compile` is public, but the compiled call is not.
    return module._compiled_call_impl is not None


def lerp_all_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Move each tensor towards its end in place: `tensor + weight * (end - tensor)`, in a few kernel launches."""
    # torch's own optimizers use this list operation; a public one does not exist.
    torch._foreach_lerp_(list(tensors), list(ends), weight)
