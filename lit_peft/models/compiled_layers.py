"""Compile each transformer layer by itself: layers of the same code share one compilation.

Compiling a whole model takes minutes and one compilation for each kind of call. A layer takes seconds, and all the time
that can be won is inside the layers: Python between small kernels, casts of the adapters, elementwise operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lit_peft.models.architectures import layer_stacks
from lit_peft.nn.torch_internals import compile_training_calls, is_compiled, restore_calls


def compile_layers(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the training calls of a model's transformer layers, each layer by itself.

    Calls in evaluation mode or without gradients stay as they were, so that generation and validation compile nothing.
    Sizes of batches are dynamic: batches of other lengths need no new compilation. Adapters may be attached, switched
    and removed afterwards; a layer that has changed is compiled again in its next training call. Compiling itself
    happens in the first call, and an error of the compiler is raised there.

    Args:
        model: a transformers model, with or without a method attached.
        backend: the backend of `torch.compile`.

    Returns:
        The number of layers.

    Raises:
        LitPeftError: the model has no list of layers of a known structure.
    """
    layers = [layer.module for stack in layer_stacks(model) for layer in stack]
    for layer in layers:
        compile_training_calls(layer, backend)
    return len(layers)


def restore_layers(model: nn.Module) -> None:
    """Undo `compile_layers`."""
    for module in model.modules():
        if is_compiled(module):
            restore_calls(module)
