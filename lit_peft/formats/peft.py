"""Reading and writing peft's adapter folders (`adapter_config.json` and `adapter_model.safetensors`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lit_peft.errors import LitPeftError
from lit_peft.formats.files import fill, write_json
from lit_peft.methods.attachment import Attachment, Model, attach, attachment_of, base_name, detach
from lit_peft.methods.lora import LoRASettings
from lit_peft.nn.lora import LoRAEmbedding

_PREFIX = "base_model.model."

_READ = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "use_rslora",
    "use_dora",
    "modules_to_save",
}
# These change nothing in how the stored weights act, or say what the weights' shapes say too.
_NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
    "corda_config",
    "eva_config",
    "lora_ga_config",
}


def read(model: Model, folder: Path, config: dict[str, Any]) -> Model:
    """Attach the adapter in a peft folder, whose `adapter_config.json` is `config`, to a bare model.

    Raises:
        LitPeftError: a file is missing, the method or a setting is not one that can be read, or the tensors do not
            fit the model. The model is as it was.
    """
    _check_config(folder, config)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise LitPeftError(f"{folder} has no adapter_model.safetensors: give the folder that peft's save wrote.")
    stored = load_file(weights)
    values = {name: value for name, value in config.items() if name in _READ and value is not None}
    attach(model, LoRASettings(**values))
    try:
        _fill(model, stored, folder)
    except BaseException:
        detach(model)
        raise
    return model


def write(model: nn.Module, folder: Path) -> None:
    """Write the attached LoRA's files, as peft reads them, into an existing folder.

    Raises:
        LitPeftError: nothing is attached, the method is not LoRA, or the adapter does not stand for the whole model.
    """
    attachment = attachment_of(model)
    settings = attachment.settings
    if not isinstance(settings, LoRASettings):
        raise LitPeftError(f"{settings.method!r} cannot be written in peft's format, only 'lora'.")
    if settings.init_lora_weights in ("pissa", "olora"):
        raise LitPeftError(
            f"init_lora_weights={settings.init_lora_weights!r} changed the base weights, so the adapter alone would "
            "not give the same model: call lit_peft.merge(model) and save the merged model."
        )
    first = next(iter(attachment.adapted.values()))
    config = {name: getattr(settings, name) for name in _READ}
    config.update(
        peft_type="LORA",
        # Full names, so that the reader adapts these modules and no others.
        target_modules=sorted(attachment.adapted),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        fan_in_fan_out=bool(getattr(first, "fan_in_fan_out", False)),
        modules_to_save=list(settings.modules_to_save) if settings.modules_to_save else None,
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
        inference_mode=True,
    )
    tensors = {f"{_PREFIX}{name}": place.detach().contiguous() for name, place in _places(attachment).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise LitPeftError(f"{folder}: adapters of type {config.get('peft_type')!r} cannot be read, only 'LORA'.")
    active = sorted(name for name, value in config.items() if name not in _READ | _NEUTRAL and value)
    if active:
        raise LitPeftError(
            f"{folder}/adapter_config.json sets {', '.join(active)}, which would change the result and cannot be read."
        )


def _places(attachment: Attachment) -> dict[str, torch.Tensor]:
    """Each trained tensor under the name peft stores it by, less the prefix."""
    places: dict[str, torch.Tensor] = {}
    for path, layer in attachment.adapted.items():
        middle, end = ("lora_embedding_", "") if isinstance(layer, LoRAEmbedding) else ("lora_", ".weight")
        places[f"{path}.{middle}A{end}"] = layer.lora_A  # type: ignore[assignment]
        places[f"{path}.{middle}B{end}"] = layer.lora_B  # type: ignore[assignment]
        if layer.lora_magnitude is not None:
            places[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude  # type: ignore[assignment]
    places.update({base_name(path): value for path, value in attachment.saved.items()})
    return places


def _fill(model: nn.Module, stored: dict[str, torch.Tensor], folder: Path) -> None:
    found = {base_name(name.removeprefix(_PREFIX)): tensor for name, tensor in stored.items()}
    # peft stores the whole module of a vocabulary-sized target; what was not trained is the base's own.
    own = {base_name(name) for name in model.state_dict()}
    fill(_places(attachment_of(model)), found, folder, ignored=own)
