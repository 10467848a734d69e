"""The parts of a model that reads images as well as text: its language model, its image encoder, what is between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lit_peft.models.transformers_internals import has_model_class

TOWERS = ("language", "vision", "projector", "all")
"""The names of the parts, and of all of them, as `target_modules` takes them."""
# What stands between image encoder and language model where it is part of the encoder (Qwen-VL).
_PROJECTORS = ("merger", "deepstack_merger_list", "merger_list", "projector", "multi_modal_projector", "connector")


def reads_images(model: Any) -> bool:
    """Return whether a model generates text from images and text."""
    config = getattr(model, "config", None)
    return hasattr(config, "get_text_config") and has_model_class("AutoModelForImageTextToText", config)


def decoder_path(model: Any) -> str:
    """Return the path of the language model, a decoder, in a model that reads images; "" in any other model."""
    is_decoder = reads_images(model) and not getattr(model.config, "is_encoder_decoder", False)
    return language_path(model) if is_decoder else ""


def language_path(model: Any) -> str:
    """Return the path of the language model in a model that combines several; "" if the model is one itself."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return ""
    text = config.get_text_config()
    if text is config:
        return ""
    if reads_images(model):
        return _path_of(model, model.get_decoder())
    if not has_model_class("AutoModelForCausalLM", text):
        return ""
    return next((path for path, module in model.named_modules() if getattr(module, "config", None) is text), "")


def towers(model: Any) -> dict[str, list[str]]:
    """Return the paths of the modules that make up each part of a model that reads images.

    Returns:
        Paths by part: `language`, `vision`, `projector`. Empty lists for a part that the model does not have; an empty
        dict if it is not such a model. The output head, and what reads sounds, belong to no part.
    """
    if not reads_images(model):
        return {}
    language, encoder = language_path(model), model.get_encoder(modality="image")
    if not language or encoder is model:
        return {}
    vision, sound = _path_of(model, encoder), _path_of(model, model.get_encoder(modality="audio"))
    inside = [f"{vision}.{name}" for name, _ in encoder.named_children() if name in _PROJECTORS]
    apart = [path for path in (language, vision, sound) if path]
    # Outside the base model there is the output head, and what a method may have added.
    between = list(_outside(model, _path_of(model, model.base_model), apart))
    return {"language": [language], "vision": [vision], "projector": inside + between}


def tower_of(name: str, parts: dict[str, list[str]]) -> str | None:
    """Return the part that a module belongs to by its name; None if it belongs to none.

    Args:
        name: the full name of the module or of one of its parameters.
        parts: the result of `towers`.
    """
    # A projector may be inside the image encoder.
    for part in ("projector", "vision", "language"):
        if any(f"{name}.".startswith(f"{path}.") for path in parts.get(part, ())):
            return part
    return None


def unread_by(model: Any, parts: dict[str, list[str]]) -> tuple[str, ...]:
    """Return the paths, ending in a dot, of modules of the image encoder whose output the model does not read.

    Args:
        model: the model.
        parts: the result of `towers`.
    """
    found = []
    for path in parts.get("vision", ()):
        encoder = model.get_submodule(path)
        # CLIP's and SigLIP's encoders also pool the patches to one vector.
        found += [f"{path}.{name}." for name, _ in encoder.named_modules() if name.rpartition(".")[2] == "head"]
        layer = getattr(model.config, "vision_feature_layer", None)
        layers = [layer] if isinstance(layer, int) else list(layer or ())
        if not layers:
            continue
        for name, stack in encoder.named_modules():
            if isinstance(stack, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "layer", "blocks"):
                # -1 is the output of the last layer, -2 its input.
                used = max(layer if layer >= 0 else len(stack) + 1 + layer for layer in layers)
                found += [f"{path}.{name}.{index}." for index in range(used, len(stack))]
    return tuple(found)


def describe_towers(module: nn.Module) -> str:
    """Return which parts of a model that reads images are trained, in words; "" for other models."""
    for model in module.modules():
        if parts := towers(model):
            counts = dict.fromkeys(parts, 0)
            for name, parameter in model.named_parameters():
                part = tower_of(name, parts) or "other parts"  # a prompt, an output head
                counts[part] = counts.get(part, 0) + parameter.numel() * parameter.requires_grad
            trained = [f"{part} ({count:,} parameters)" for part, count in counts.items() if count]
            frozen = [part for part in parts if not counts[part]]
            groups = ((trained, "trained"), (frozen, "frozen"))
            return ", ".join(f"{_listed(names)} {state}" for names, state in groups if names)
    return ""


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _path_of(model: nn.Module, wanted: Any) -> str:
    """Return the path of a module in a model; "" if it is the model, or not in it."""
    return next((path for path, module in model.named_modules() if module is wanted), "")


def _outside(model: nn.Module, start: str, apart: list[str]) -> Iterator[str]:
    """Yield the outermost modules with parameters that contain none of the paths `apart`, and are in none of them."""
    for name, module in model.get_submodule(start).named_children():
        path = f"{start}.{name}" if start else name
        if path in apart or ("audio" in name and path not in apart):
            continue
        if any(other.startswith(f"{path}.") for other in apart):
            yield from _outside(model, path, apart)
        elif next(module.parameters(), None) is not None:
            yield path
