"""LoRA in peft's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.errors import LitPeftError
from lit_peft.formats.files import fill as fill_places
from lit_peft.methods.attachment import Attachment, MethodSettings, attachment_of, base_name
from lit_peft.methods.lora import LoRASettings
from lit_peft.nn.lora import LoRAEmbedding

_PREFIX = "base_model.model."

READ = {
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
# The stored weights say these too, or they are about how the weights came to be.
NEUTRAL = {
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
}


def writes(settings: MethodSettings) -> bool:
    """Whether the settings are LoRA's."""
    return isinstance(settings, LoRASettings)


def settings(model: nn.Module, config: dict[str, Any], stored: dict[str, Tensor]) -> LoRASettings:
    """The settings in a folder's configuration."""
    return LoRASettings(**{name: value for name, value in config.items() if name in READ and value is not None})


def fill(model: nn.Module, stored: dict[str, Tensor], folder: Path) -> None:
    """Copy a folder's tensors into the attached LoRA."""
    found = {base_name(name.removeprefix(_PREFIX)): tensor for name, tensor in stored.items()}
    # peft stores the whole module of a vocabulary-sized target; what was not trained is the base's own.
    own = {base_name(name) for name in model.state_dict()}
    fill_places(_places(attachment_of(model)), found, folder, ignored=own)


def config(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    """The configuration of the attached LoRA.

    Raises:
        LitPeftError: the adapter alone does not stand for the trained model.
    """
    settings = attachment.settings
    assert isinstance(settings, LoRASettings)
    if settings.init_lora_weights in ("pissa", "olora"):
        raise LitPeftError(
            f"init_lora_weights={settings.init_lora_weights!r} changed the base weights, so the adapter alone would "
            "not give the same model: call lit_peft.merge(model) and save the merged model."
        )
    first = next(iter(attachment.adapted.values()))
    return {
        **{name: getattr(settings, name) for name in READ},
        "peft_type": "LORA",
        # Full names, so that the reader adapts these modules and no others.
        "target_modules": sorted(attachment.adapted),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": bool(getattr(first, "fan_in_fan_out", False)),
        "modules_to_save": list(settings.modules_to_save) if settings.modules_to_save else None,
    }


def tensors(attachment: Attachment) -> dict[str, Tensor]:
    """The attached LoRA's tensors by peft's names."""
    return {f"{_PREFIX}{name}": place for name, place in _places(attachment).items()}


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
