"""Which base an adapter was trained on: written beside it, and checked before it is used on another.

Recorded are the base's name and revision, a hash of its weights' shapes, and a sample of their values. Values, not
bytes, since a base may be loaded in another precision than it was trained in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.formats.files import read_extra
from lit_peft.methods.attachment import attachment_of, base_name
from lit_peft.models.hub import cached_commit
from lit_peft.nn.linear import linear_features
from lit_peft.nn.lora import LoRALayer
from lit_peft.nn.quantized import is_quantized
from lit_peft.util.errors import LitPeftError

KEY = "base"
# Where a model was loaded from, where that is not what transformers knows: `pkg:NAME`, a .gguf file.
NAME = "_lit_peft_base"
_TENSORS, _VALUES = 16, 4


def base_record(model: nn.Module) -> dict[str, Any]:
    """The base of a model with a method attached, as plain data.

    Heads do not count, since a task's head comes and goes with the model class; nor does what was trained in full.
    """
    attachment = attachment_of(model)
    trained = sorted(base_name(name) for name in attachment.saved)
    return {**_record(_weights(model, attachment.adapted, trained), model), "trained": trained}


def base_name_or_path(model: nn.Module) -> str:
    """What the base was called when it was loaded; empty if it was made on the spot."""
    return str(getattr(model, NAME, None) or getattr(model, "name_or_path", None) or "")


def check_base(model: nn.Module, folder: Path) -> None:
    """Refuse the adapter of a folder for a bare model that is not the base it was trained on.

    Raises:
        LitPeftError: the shapes or the sampled values differ from the recorded ones.
    """
    recorded = read_extra(folder).get(KEY)
    if not isinstance(recorded, dict):
        return
    trained = recorded.get("trained")
    ours = _record(_weights(model, {}, trained if isinstance(trained, list) else []), model)
    if ours["shapes"] == recorded.get("shapes"):
        theirs = recorded.get("sample")
        known = theirs if isinstance(theirs, dict) else {}
        if all(_alike(values, known[name]) for name, values in ours["sample"].items() if name in known):
            return
        difference = "its weights have other values"
    else:
        difference = "its weights have other shapes"
    at = f" (revision {str(recorded['revision'])[:80]})" if recorded.get("revision") else ""
    raise LitPeftError(
        f"{folder} was trained on {str(recorded.get('name'))[:200]!r}{at}, and this model is {ours['name']!r}: "
        f"{difference}. Load the adapter onto its own base, or give check_base=False to use it on this one anyway."
    )


def _record(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Any]:
    prefix = getattr(model, "base_model_prefix", "")
    # What a quantized layer stores has another shape than its weight.
    quantized = {
        base_name(f"{path}.weight").removeprefix(f"{prefix}."): linear_features(module)[::-1]
        for path, module in model.named_modules()
        if is_quantized(module)
    }
    shapes = repr(sorted(quantized.get(name, tuple(weight.shape)) for name, weight in weights.items()))
    # The largest say most: norms and biases are alike in many models.
    largest = sorted(weights, key=lambda name: (-weights[name].numel(), name))[:_TENSORS]
    return {
        "name": base_name_or_path(model) or type(model).__name__,
        "revision": cached_commit(base_name_or_path(model) or ""),
        "shapes": hashlib.sha256(shapes.encode()).hexdigest(),
        "sample": {name: _values(weights[name]) for name in largest if _can_sample(weights[name])},
    }


def _weights(model: nn.Module, adapted: Mapping[str, nn.Module], without: Collection[str]) -> dict[str, Tensor]:
    """The base's weights by name, as they were before a method moved or merged anything; no heads."""
    prefix = getattr(model, "base_model_prefix", "")
    below = f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""
    added = tuple(f"{path}." for path in adapted)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = base_name(name)
        if plain.startswith(below) and plain not in without and (plain != name or not name.startswith(added)):
            weights[plain.removeprefix(below)] = parameter
    for path, layer in adapted.items():
        if isinstance(layer, LoRALayer):
            kept = layer.original_weight if layer.original_weight is not None else layer.unmerged_weight
            name = f"{path}.weight".removeprefix(below)
            if kept is not None and name in weights:
                weights[name] = kept
    return weights


def _can_sample(weight: Tensor) -> bool:
    return weight.is_floating_point() and not weight.is_meta and type(weight.data) is Tensor and weight.numel() > 0


def _values(weight: Tensor) -> list[float]:
    places = torch.linspace(0, weight.numel() - 1, _VALUES, device=weight.device, dtype=torch.float64).long()
    return [float(f"{value:.6g}") for value in weight.detach().reshape(-1)[places].float().tolist()]


def _alike(ours: list[float], theirs: Any) -> bool:
    try:
        return all(math.isclose(a, b, rel_tol=2e-2, abs_tol=1e-6) for a, b in zip(ours, theirs, strict=True))
    except (TypeError, ValueError, OverflowError):
        return False  # not a list of as many numbers
