"""Folders of methods that neither peft nor AdapterHub has: settings by name, and every trained tensor by its name.

A method needs no code here: its settings are a dataclass, and its tensors are the model's parameters that it trains.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_peft.formats.base_record import base_name_or_path
from lit_peft.formats.files import copy_tensors, write_json
from lit_peft.formats.untrusted import ElementLimit, read_tensors
from lit_peft.methods.attach import attach, detach
from lit_peft.methods.attachment import MethodSettings, Model, attachment_of
from lit_peft.methods.registry import all_settings
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief, check_types

KEY = "lit_peft_method"
_WEIGHTS = "adapter_model.safetensors"


def write(model: nn.Module, folder: Path) -> None:
    """Write the settings and the trained tensors of what is attached into an existing folder.

    Raises:
        LitPeftError: a setting cannot be written as JSON.
    """
    settings: Any = attachment_of(model).settings
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    try:
        json.dumps(values)
    except (TypeError, ValueError) as problem:
        raise LitPeftError(f"The settings of {settings.method!r} cannot be saved as JSON: {problem}.") from problem
    config = {KEY: settings.method, "settings": values, "base_model_name_or_path": base_name_or_path(model) or None}
    tensors = {name: tensor.detach().contiguous() for name, tensor in _trained(model).items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def read(model: Model, folder: Path, config: dict[str, Any]) -> Model:
    """Attach the adapter in a folder that `write` wrote, whose `adapter_config.json` is `config`, to a bare model.

    Raises:
        LitPeftError: the method is not known, a file is missing, or settings or tensors do not fit the model. The model
            is as it was.
    """
    known = {kind.method: kind for kind in all_settings() if "method" in vars(kind)}
    kind = known.get(config[KEY]) if isinstance(config[KEY], str) else None
    if kind is None:
        raise LitPeftError(
            f"{folder} holds an adapter of the method {brief(config[KEY])}, which is not known: import the module that "
            f"defines it first. The closest known ones are {closest(str(config[KEY]), known)}."
        )
    stored = read_tensors(folder, _WEIGHTS)
    if stored is None:
        raise LitPeftError(f"{folder} has no {_WEIGHTS}: give the folder that save_adapter wrote.")
    settings = _settings(kind, config.get("settings"), folder)
    # First without memory for the tensors: the folder may ask for more than it stores.
    with torch.device("meta"), ElementLimit(stored, f"{folder}/adapter_config.json"):
        attach(model, settings)
    try:
        needed = {name: tuple(tensor.shape) for name, tensor in _trained(model).items()}
    finally:
        detach(model)
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if needed != found:
        wrong = sorted(name for name in needed.keys() | found.keys() if needed.get(name) != found.get(name))
        raise LitPeftError(
            f"{folder} does not fit this model: {wrong[0]} is {found.get(wrong[0], 'not stored')} in the folder and "
            f"{needed.get(wrong[0], 'not trained')} in the model."
        )
    attach(model, settings)
    try:
        copy_tensors(_trained(model), stored, folder)
    except BaseException:
        detach(model)
        raise
    return model


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _settings(kind: type[MethodSettings], values: Any, folder: Path) -> MethodSettings:
    """Build the settings from what the folder says."""
    names = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(values, dict):
        raise LitPeftError(f"{folder}/adapter_config.json has no settings: give the folder that save_adapter wrote.")
    for name in values:
        if name not in names:
            raise LitPeftError(
                f"{folder}/adapter_config.json sets {name!r}, which {kind.__name__} does not have: the closest are "
                f"{closest(name, names)}."
            )
    check_types(kind, values, f"{folder}/adapter_config.json: ")
    return kind(**values)
