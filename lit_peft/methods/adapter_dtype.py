"""Trained parameters in a dtype that differs from the frozen model's, e.g. fp32 master weights for a bf16 base."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lit_peft.methods.attachment import attachment_of
from lit_peft.methods.changes import TrainParameter
from lit_peft.nn.torch_internals import own_parameter


def set_adapter_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert every trained parameter of a model to `dtype`.

    The methods' layers cast their parameters to the dtype of their input. A module of the base with a trained
    parameter (a head, a bias, a norm) gets that parameter in the frozen model's dtype during each forward.

    Args:
        model: a model with a method attached.
        dtype: the new dtype of the trained parameters.

    Raises:
        LitPeftError: no method is attached.
    """
    attachment = attachment_of(model)
    frozen = next((p for p in model.parameters() if not p.requires_grad and p.is_floating_point()), None)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if frozen is None:
        return
    names_by_module: dict[str, list[str]] = {}
    for path in attachment.trained:
        module_path, _, name = path.rpartition(".")
        names_by_module.setdefault(module_path, []).append(name)
    for change in attachment.changes:
        if isinstance(change, TrainParameter):
            change.record_device_and_dtype()
    for module_path, names in names_by_module.items():
        cast = _CastDuringForward(names, frozen)
        attachment.forward_pre_hook(module_path, cast.cast)
        attachment.forward_hook(module_path, cast.restore, always_call=True)


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
