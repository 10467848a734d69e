"""(IA)³ in peft's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_peft.formats.files import copy_tensors
from lit_peft.formats.peft_modules import (
    PREFIX,
    modules_with_weights,
    outermost_modules,
    parameter_paths,
    train_what_differs,
)
from lit_peft.formats.untrusted import check_names
from lit_peft.methods.attachment import Attachment, MethodSettings, attachment_of, base_name
from lit_peft.methods.ia3 import IA3Settings
from lit_peft.methods.targets import find_targets, is_linear
from lit_peft.nn.ia3 import IA3Linear
from lit_peft.nn.linear import stores_transposed
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import check_types

_FILE = "adapter_config.json"
READ = {"target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"}
# The start, which the stored tensors replace, and what follows from the layers.
NEUTRAL = {"fan_in_fan_out", "init_ia3_weights"}


def writes(settings: MethodSettings) -> bool:
    """Return whether these are (IA)³'s settings."""
    return isinstance(settings, IA3Settings)


def settings(model: nn.Module, config: dict[str, Any], stored: dict[str, Tensor]) -> IA3Settings:
    """Return the settings in a folder's configuration.

    Raises:
        LitPeftError: a value has the wrong type, or matches nothing in the model.
    """
    values = {name: value for name, value in config.items() if name in READ and value is not None}
    check_types(IA3Settings, values, f"{_FILE}: ")
    for name in ("feedforward_modules", "modules_to_save"):
        check_names(values.get(name) or (), f"{_FILE}: {name}")
    if "target_modules" not in values:
        raise LitPeftError(f"{_FILE} has no target_modules, which peft always writes: the folder is incomplete.")
    modules_to_save = modules_with_weights(model, values.get("modules_to_save") or (), stored)
    targets = find_targets(
        model,
        values["target_modules"],
        values.get("exclude_modules"),
        modules_to_save=modules_to_save,
        strict=False,
        source=f"{_FILE}: ",
        can_adapt=is_linear,
    )
    return IA3Settings(
        target_modules=targets,
        # peft compares names by their last letters. What it found is in the shapes: (1, d_in), and else (d_out, 1).
        feedforward_modules=[path for path in targets if _scales_input(stored.get(f"{PREFIX}{path}.ia3_l"))],
        modules_to_save=modules_to_save or None,
    )


def _scales_input(vector: Tensor | None) -> bool:
    return vector is not None and vector.dim() == 2 and vector.shape[0] == 1


def load_tensors(model: nn.Module, stored: dict[str, Tensor], folder: Path) -> None:
    """Copy a folder's tensors into the attached (IA)³, and train each base parameter that differs from the stored one.

    Raises:
        LitPeftError: the tensors do not fit the model.
    """
    attachment = attachment_of(model)
    found = {base_name(name.removeprefix(PREFIX)): tensor for name, tensor in stored.items()}
    parameters = parameter_paths(model)
    train_what_differs(attachment, parameters, found, _trained(attachment))
    copy_tensors(_trained(attachment), found, folder, ignored=parameters)


def config(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    """Return the configuration of the attached (IA)³."""
    layers = _layers(attachment)
    saved = [f".{name}" for name in attachment.settings.modules_to_save or ()]
    return {
        "peft_type": "IA3",
        "task_type": None,
        # Full names, so that peft adapts these modules and no others.
        "target_modules": sorted(layers),
        "feedforward_modules": sorted(path for path, layer in layers.items() if layer.is_feedforward),
        "exclude_modules": None,
        "fan_in_fan_out": any(stores_transposed(layer.base_layer) for layer in layers.values()),
        "init_ia3_weights": True,
        # Full names here too: peft takes every module whose name ends in the letters of one of these.
        "modules_to_save": outermost_modules(model, saved, ".") or None,
    }


def tensors(attachment: Attachment) -> dict[str, Tensor]:
    """Return the attached (IA)³'s tensors by peft's names."""
    return {f"{PREFIX}{name}": tensor for name, tensor in _trained(attachment).items()}


def _layers(attachment: Attachment) -> Mapping[str, IA3Linear]:
    return {path: layer for path, layer in attachment.adapted.items() if isinstance(layer, IA3Linear)}


def _trained(attachment: Attachment) -> dict[str, Tensor]:
    """Return every trained tensor by the name and in the shape that peft gives it, without the prefix."""
    vectors = {
        f"{path}.ia3_l": layer.ia3_l.detach().unsqueeze(0 if layer.is_feedforward else 1)
        for path, layer in _layers(attachment).items()
    }
    return {**vectors, **{base_name(path): tensor for path, tensor in attachment.saved.items()}}
