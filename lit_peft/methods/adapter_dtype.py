"""The type of the trained parameters, which may differ from the type of the frozen model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_peft.methods.changes import TrainParameter
from lit_peft.nn.linear import adapter_dtype
from lit_peft.nn.torch_internals import own_parameter

if TYPE_CHECKING:
    from lit_peft.methods.attachment import Attachment


def set_trained_dtype(attachment: Attachment, dtype: torch.dtype | None = None) -> None:
    """Keep the trained parameters of a method in `dtype`.

    The method's own layers cast their parameters to the type that they compute in. A module of the base that has a
    trained parameter (a head, a bias, a norm) gets it cast to the frozen model's type for each forward.

    Args:
        attachment: the method, on its model.
        dtype: the parameters' type; float32 if None, or float64 for a float64 base.
    """
    model, given = attachment.model, dtype
    frozen = next((p for p in model.parameters() if not p.requires_grad and p.is_floating_point()), None)
    if dtype is None:
        if frozen is None:  # no adapter: the base itself is trained
            return
        dtype = adapter_dtype(frozen)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for change in attachment.changes:
        if isinstance(change, TrainParameter):
            change.note_place()
    if given is not None or (frozen is not None and frozen.dtype != dtype):
        cast_in_forward(attachment)


def cast_in_forward(attachment: Attachment) -> None:
    """Let modules of the base cast their trained parameters to the frozen model's type, for each forward."""
    parameters = attachment.model.parameters()
    frozen = next((p for p in parameters if not p.requires_grad and p.is_floating_point()), None)
    if frozen is None:
        return
    owners: dict[str, list[str]] = {}
    for path in attachment.trained:
        owner, _, name = path.rpartition(".")
        owners.setdefault(owner, []).append(name)
    cast = {hook.path for hook in attachment.hooks if isinstance(getattr(hook.hook, "__self__", None), _Cast)}
    for path, names in owners.items():
        if path not in cast:
            hooks = _Cast(names, frozen)
            attachment.forward_pre_hook(path, hooks.put)
            attachment.forward_hook(path, hooks.take, always_call=True)


def follow_cast(attachment: Attachment) -> None:
    """Complete a cast of the model in which the trained parameters kept their type.

    The base's own parameters, which trained copies replace, get the type that the others have now.
    """
    cast_in_forward(attachment)
    frozen = next((p for p in attachment.model.parameters() if not p.requires_grad and p.is_floating_point()), None)
    for change in attachment.changes:
        if isinstance(change, TrainParameter) and change.original is not None and frozen is not None:
            change.original.data = change.original.data.to(frozen.dtype)


class _Cast:
    def __init__(self, names: list[str], like: nn.Parameter) -> None:
        # In a tuple: the hooks are copied with their module, and `like` must then be the copy's.
        self.names, self.like = names, (like,)

    def put(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: an attribute of the module hides its parameter of the same name."""
        dtype = self.like[0].dtype
        for name in self.names:
            parameter = own_parameter(module, name)
            if parameter is not None and parameter.dtype != dtype:
                vars(module)[name] = parameter.to(dtype)

    def take(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: remove the attributes again."""
        for name in self.names:
            vars(module).pop(name, None)
