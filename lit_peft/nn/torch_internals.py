"""The only file that uses private names of torch. `tests/test_internals_torch.py` fails when one of them changes."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Hook = TypeVar("Hook", bound=Callable[..., Any])


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether calling the module runs hooks, which code that reads its weight directly would skip."""
    # torch registers hooks publicly but has no public way to ask for them.
    return bool(module._forward_hooks or module._forward_pre_hooks)


def runs_last(hook: Hook) -> Hook:
    """Mark a function as a hook that must see what all other hooks of its kind have done; see `keep_last`."""
    hook.runs_last = True  # type: ignore[attr-defined]
    return hook


def keep_last(module: nn.Module) -> None:
    """Move the hooks marked with `runs_last` behind those that were registered after them."""
    # Hooks run in the order of these dictionaries, and torch can only put a new one first or last.
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "runs_last", False)]:
            hooks.move_to_end(key)  # type: ignore[attr-defined]


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter that the module itself registered, even while an attribute of the same name hides it."""
    # `get_parameter` and `getattr` return the attribute that hides the parameter.
    return module._parameters.get(name)


def version_of(tensor: Tensor) -> int | None:
    """Return a number that grows with each in-place change; None for inference tensors, which do not count them."""
    # Autograd keeps this counter for its own checks and does not publish it.
    return None if tensor.is_inference() else tensor._version


def reshaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a contiguous tensor in another shape, as a tensor of its own on the same memory; give up the first one."""
    # `view` is public, but an autograd function that returns a view forbids changing its result in place.
    return torch.ops.aten._unsafe_view.default(tensor, shape)


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


def backward_is_running() -> bool:
    """Return whether autograd computes gradients in this thread, where checkpointed layers are computed again."""
    # torch has no public way to ask.
    return torch._C._current_graph_task_id() != -1


def function_transforms_are_active() -> bool:
    """Return whether `torch.func` transforms (vmap, jvp, …) or forward-mode derivatives are being computed."""
    # An autograd function with one plain backward formula supports neither, and torch only says so by raising.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def weights_read_by(module: nn.Module) -> frozenset[str]:
    """Return the names of children whose `weight` a module uses in its own code and that it does not (only) call.

    A replacement for such a child is not called: `nn.MultiheadAttention` hands `out_proj.weight` to a function. A child
    that is called as well counts in state-space layers, which have a convolution `conv1d`: they call it on CPUs, and
    use its weight in a fused CUDA kernel.
    """
    kind: Any = type(module)
    return _weights_read(kind)


@cache
def _weights_read(kind: Any) -> frozenset[str]:
    # Nothing but the code shows this, and a layer that is never called would be trained without any effect.
    reads: set[str] = set()
    calls: set[str] = set()
    names: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, function in vars(base).items():
            if callable(function) and "init" not in name and name != "reset_parameters":
                for steps in _instructions(function):
                    _note(steps, reads, calls, names)
    return frozenset(reads if "conv1d" in names else reads - calls)


def _instructions(function: Any) -> Iterator[list[dis.Instruction]]:
    """Yield the instructions of a function and of those inside it, below its decorators."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    left = [] if code is None else [code]
    while left:
        code = left.pop()
        left += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        yield [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL", "PUSH_NULL")]


def _note(steps: list[dis.Instruction], reads: set[str], calls: set[str], names: set[str]) -> None:
    for step, weight, *rest in zip(steps, steps[1:], steps[2:], steps[3:], strict=False):
        if step.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            continue
        names.add(step.argval)
        # From Python 3.12 on, the lowest bit says that the attribute is called.
        if step.opname == "LOAD_METHOD" or (sys.version_info >= (3, 12) and (step.arg or 0) & 1):
            calls.add(step.argval)
        after = [other.argval for other in rest]
        only_type = after[0] in ("dtype", "device", "shape") or after == ["torch", "Tensor"]
        if weight.opname == "LOAD_ATTR" and weight.argval == "weight" and not only_type:
            reads.add(step.argval)


def scaled_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """Return `(a · a_scale) (b · b_scale)` in bf16, for 8-bit a, row by row in memory, and b, column by column.

    Args:
        a: e4m3, shape (rows, n).
        b: e4m3, shape (n, columns).
        a_scale: fp32, shape (rows, 1).
        b_scale: fp32, shape (1, columns).
    """
    # The public `scaled_mm` takes private names for the kinds of scales.
    return torch._scaled_mm(
        a,
        b,
        scale_a=a_scale,
        scale_b=b_scale.contiguous(),
        out_dtype=torch.bfloat16,
        use_fast_accum=a.is_cuda,
    )


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called, after which hooks are compiled into the call."""
    # `nn.Module.compile` is public, but the compiled call is not.
    return module._compiled_call_impl is not None


def compile_training_calls(module: nn.Module, backend: str | Callable[..., Any]) -> None:
    """Have the module's calls in training mode and with gradients run compiled code, for batches of any size.

    Its other calls stay eager.
    """
    # `nn.Module.compile` would compile every call, and so each kind of evaluation and generation by itself.
    import torch._dynamo

    # Otherwise code that was compiled before an adapter's hooks changed would be run after it.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    compiled = torch.compile(module._call_impl, backend=backend, dynamic=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        is_training = module.training and torch.is_grad_enabled()
        return compiled(*args, **kwargs) if is_training else module._call_impl(*args, **kwargs)

    module._compiled_call_impl = call


def restore_calls(module: nn.Module) -> None:
    """Undo `compile_training_calls`, or torch's own `module.compile()`."""
    # torch has no public way back.
    module._compiled_call_impl = None


def lerp_all_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Move each tensor towards its end in place: `tensor + weight * (end - tensor)`, in a few kernel launches."""
    # torch's own optimizers use this list operation; a public one does not exist.
    torch._foreach_lerp_(list(tensors), list(ends), weight)


def copy_all_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each tensor into its target, in a few kernel launches."""
    # As above.
    torch._foreach_copy_(list(targets), list(sources))


def computed_buffers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the buffers that are not part of a `state_dict`, each as its module and its name."""
    # Only `state_dict` shows publicly which they are, and it gathers the weights of sharded models.
    return [
        (owner, name)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if name in owner._non_persistent_buffers_set and buffer.is_floating_point()
    ]


class DtypeKeepingDict(nn.ModuleDict):
    """A `ModuleDict` whose modules move between devices but are never cast to another type."""

    # `to`, `half` and `bfloat16` all call this private method of every module, and casts have no public hook.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DtypeKeepingDict:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)
