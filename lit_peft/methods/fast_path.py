"""torch's fused evaluation of transformer layers, which reads weights and does not call the layers inside."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from lit_peft.methods.changes import AddHook, Change, SetAttribute


def fast_path_changes(model: nn.Module, adapted: Collection[str]) -> list[Change]:
    """Return the changes that make torch call the modules inside `nn.TransformerEncoderLayer` also in evaluation mode.

    Args:
        model: the model.
        adapted: the paths of the modules that a method has adapted.
    """
    changes: list[Change] = []
    for path, module in model.named_modules():
        if not any(not path or f"{name}.".startswith(f"{path}.") for name in adapted):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            changes.append(AddHook(path, call_one_by_one, "forward_pre"))
        elif isinstance(module, nn.TransformerEncoder):
            # It turns padded batches into nested tensors, which only the fused evaluation accepts.
            changes.append(SetAttribute(path, "use_nested_tensor", False))
    return changes


def call_one_by_one(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook that does nothing: torch does not use the fused evaluation for a module with hooks."""
