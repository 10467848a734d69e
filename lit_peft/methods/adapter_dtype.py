"""What is trained in a type of its own, whatever the type of the frozen model: fp32 master weights, for one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lit_peft.methods.attachment import attachment_of
from lit_peft.methods.changes import TrainParameter
from lit_peft.nn.torch_internals import own_parameter


def set_adapter_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep every trained parameter of a model with a method attached in `dtype`.

    The methods' own layers cast their parameters to the type they compute in. A module of the model itself that has a
    trained parameter (a head, a bias, a norm) gets it cast to the frozen model's type for the length of each forward.

    Args:
        model: a model with a method attached.
        dtype: the parameters' type.
    """
    attachment = attachment_of(model)
    frozen = next((p for p in model.parameters() if not p.requires_grad and p.is_floating_point()), None)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if frozen is None:
        return
    owners: dict[str, list[str]] = {}
    for path in attachment.trained:
        owner, _, name = path.rpartition(".")
        owners.setdefault(owner, []).append(name)
    for change in attachment.changes:
        if isinstance(change, TrainParameter):
            change.note_place()
    for path, names in owners.items():
        cast = _Cast(names, frozen)
        attachment.forward_pre_hook(path, cast.put)
        attachment.forward_hook(path, cast.take, always_call=True)


class _Cast:
    def __init__(self, names: list[str], like: nn.Parameter) -> None:
        # In a tuple: the hooks are copied with their module, and `like` is to be the copy's.
        self.names, self.like = names, (like,)

    def put(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: an attribute of the module hides its parameter of the same name."""
        dtype = self.like[0].dtype
        for name in self.names:
            parameter = own_parameter(module, name)
            if parameter is not None and parameter.dtype != dtype:
                vars(module)[name] = parameter.to(dtype)

    def take(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: the parameter shows again."""
        for name in self.names:
            vars(module).pop(name, None)
