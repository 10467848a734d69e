"""Trained parameters in a dtype that differs from the frozen model's, e.g. fp32 master weights for a bf16 base."""

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
    """Convert every trained parameter of a method to `dtype`.

    The method's layers cast their parameters to the dtype that they compute in. A module of the base with a trained
    parameter (a head, a bias, a norm) gets that parameter in the frozen model's dtype during each forward.

    Args:
        attachment: the method, on its model.
        dtype: the new dtype of the trained parameters; float32 if None, or float64 for a float64 base.
    """
    model, given = attachment.model, dtype
    frozen = _frozen_parameter(model)
    if dtype is None:
        if frozen is None:  # no adapter: the base itself is trained
            return
        dtype = adapter_dtype(frozen)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for change in attachment.changes:
        if isinstance(change, TrainParameter):
            change.record_device_and_dtype()
    if given is not None or (frozen is not None and frozen.dtype != dtype):
        cast_in_forward(attachment)


def use_base_dtype(attachment: Attachment) -> None:
    """Convert every trained parameter of a method to the dtype of the frozen ones."""
    frozen = _frozen_parameter(attachment.model)
    if frozen is not None:
        set_trained_dtype(attachment, frozen.dtype)


def cast_in_forward(attachment: Attachment) -> None:
    """Let modules of the base cast their trained parameters to the frozen model's dtype during each forward."""
    frozen = _frozen_parameter(attachment.model)
    if frozen is None:
        return
    names_by_module: dict[str, list[str]] = {}
    for path in attachment.trained:
        module_path, _, name = path.rpartition(".")
        names_by_module.setdefault(module_path, []).append(name)
    has_cast = {
        hook.path for hook in attachment.hooks if isinstance(getattr(hook.hook, "__self__", None), _CastDuringForward)
    }
    for module_path, names in names_by_module.items():
        if module_path not in has_cast:
            cast = _CastDuringForward(names, frozen)
            attachment.forward_pre_hook(module_path, cast.cast)
            attachment.forward_hook(module_path, cast.restore, always_call=True)


def follow_cast(attachment: Attachment) -> None:
    """Complete a cast of the model in which the trained parameters kept their dtype.

    The base's own parameters, which trained copies replace, get the dtype that the frozen ones have now.
    """
    cast_in_forward(attachment)
    frozen = _frozen_parameter(attachment.model)
    for change in attachment.changes:
        if isinstance(change, TrainParameter) and change.original is not None and frozen is not None:
            change.original.data = change.original.data.to(frozen.dtype)


def _frozen_parameter(model: nn.Module) -> nn.Parameter | None:
    """The first frozen floating-point parameter of a model; None if it has none."""
    return next((p for p in model.parameters() if not p.requires_grad and p.is_floating_point()), None)


class _CastDuringForward:
    """Hooks that cast a module's parameters to the dtype of a frozen parameter while its forward runs."""

    def __init__(self, names: list[str], frozen: nn.Parameter) -> None:
        self.names, self.frozen = names, frozen

    def cast(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: hide each parameter behind an attribute of the same name that holds its cast."""
        dtype = self.frozen.dtype
        for name in self.names:
            parameter = own_parameter(module, name)
            if parameter is not None and parameter.dtype != dtype:
                vars(module)[name] = parameter.to(dtype)

    def restore(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: remove the attributes that hide the parameters."""
        for name in self.names:
            vars(module).pop(name, None)
