"""A record of the base model, saved with an adapter and checked when the adapter is loaded into a model.

The record has the base's name, a hash of the shapes of its weights, and some of their values. It has values rather than
a hash of bytes because the base may be loaded in another dtype than it had in training.
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
from lit_peft.methods.expert_targets import target_name
from lit_peft.methods.tokens import NAME as TOKEN_ROWS
from lit_peft.methods.tokens import resized_parameters
from lit_peft.models.experts import quantized_experts
from lit_peft.models.hub import cached_commit
from lit_peft.nn.linear import linear_features
from lit_peft.nn.quantized import is_quantized
from lit_peft.nn.quantized_experts import QuantizedStack
from lit_peft.nn.weight_update import WeightUpdate
from lit_peft.util.errors import LitPeftError

KEY = "base"
# Set on a model that was loaded from a source transformers does not know: `pkg:NAME` or a .gguf file.
BASE_ATTRIBUTE = "_lit_peft_base"
_SAMPLED_TENSORS, _SAMPLED_VALUES = 16, 4


def base_record(model: nn.Module) -> dict[str, Any]:
    """Return the record of the base model that a method is attached to, ready for JSON.

    Heads are left out because they depend on the model class. So are parameters that were trained in full, whose
    original values the model no longer has.
    """
    attachment = attachment_of(model)
    saved = [path for found in (attachment, *attachment.below) for path in found.saved]
    adapted = {path: module for found in (attachment, *attachment.below) for path, module in found.adapted.items()}
    trained = sorted({*map(base_name, saved), *resized_parameters(attachment)})
    return {**_record(_base_weights(model, adapted, trained), model), "trained": trained}


def same_base(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Return whether two records of `base_record` are those of the same weights, whatever their names."""
    one, other = recorded.get("sample") or {}, found.get("sample") or {}
    same_shapes = recorded.get("shapes") == found.get("shapes")
    return same_shapes and all(_is_close(one[name], other[name]) for name in one.keys() & other.keys())


def base_name_or_path(model: nn.Module) -> str:
    """Return the name or path that the base was loaded from, or an empty string if it was not loaded."""
    return str(getattr(model, BASE_ATTRIBUTE, None) or getattr(model, "name_or_path", None) or "")


def check_base(model: nn.Module, folder: Path, any_class: bool = False) -> None:
    """Check that a bare model is the base that the adapter in a folder was trained on.

    Args:
        model: the model.
        folder: the adapter's folder.
        any_class: whether the model may be of another class, whose backbone may have parts that the base's had not
            (BERT's pooler) or lack some: only the sampled values are compared then.

    Raises:
        LitPeftError: the shapes or the sampled values of its weights differ from the recorded ones.
    """
    recorded = read_extra(folder).get(KEY)
    if not isinstance(recorded, dict):
        return
    trained = recorded.get("trained")
    found = _record(_base_weights(model, {}, trained if isinstance(trained, list) else []), model)
    if any_class or found["shapes"] == recorded.get("shapes"):
        sample = recorded.get("sample")
        expected = sample if isinstance(sample, dict) else {}
        if all(_is_close(values, expected[name]) for name, values in found["sample"].items() if name in expected):
            return
        difference = "its weights have other values"
    else:
        difference = "its weights have other shapes"
    # Recorded with transformers before 5.24, which kept the revision that a model was loaded from.
    revision = f" (revision {str(recorded['revision'])[:80]})" if recorded.get("revision") else ""
    raise LitPeftError(
        f"{folder} was trained on {str(recorded.get('name'))[:200]!r}{revision}, and this model is {found['name']!r}: "
        f"{difference}. Load the adapter onto its own base, or set check_base=False to use it on this one anyway."
    )


def _record(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Any]:
    prefix = getattr(model, "base_model_prefix", "")
    # A quantized layer stores its weight in another shape.
    quantized: dict[str, tuple[int, ...]] = {
        base_name(f"{path}.weight").removeprefix(f"{prefix}."): linear_features(module)[::-1]
        for path, module in model.named_modules()
        if is_quantized(module) and not isinstance(module, QuantizedStack)
    }
    for path, stack in quantized_experts(model).items():
        name = base_name(path).removeprefix(f"{prefix}.")
        if (codes := weights.pop(f"{name}.weight", None)) is not None:
            weights[name], quantized[name] = codes, tuple(stack.shape)
    shapes = repr(sorted(quantized.get(name, tuple(weight.shape)) for name, weight in weights.items()))
    # Large weights tell models apart best; norms and biases are much the same in many models.
    largest = sorted(weights, key=lambda name: (-weights[name].numel(), name))[:_SAMPLED_TENSORS]
    return {
        "name": base_name_or_path(model) or type(model).__name__,
        "revision": cached_commit(base_name_or_path(model) or ""),
        "shapes": hashlib.sha256(shapes.encode()).hexdigest(),
        "sample": {name: _sample(weights[name]) for name in largest if _can_sample(weights[name])},
    }


def _base_weights(model: nn.Module, adapted: Mapping[str, nn.Module], excluded: Collection[str]) -> dict[str, Tensor]:
    """Return the weights of the base without heads, by name, as they were before a method moved or merged anything."""
    prefix = getattr(model, "base_model_prefix", "")
    start = f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""
    added = tuple(f"{path}." for path in adapted)
    weights: dict[str, Tensor] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = base_name(path)
        if f".{TOKEN_ROWS}." in path:  # a module that shares the weight has them too
            continue
        if name.startswith(start) and name not in excluded and (name != path or not path.startswith(added)):
            weights[name.removeprefix(start)] = parameter
    for path, layer in adapted.items():
        if isinstance(layer, WeightUpdate):
            original = layer.original_weight if layer.original_weight is not None else layer.unmerged_weight
            target = target_name(path, layer)
            name = (target if target != path else f"{path}.weight").removeprefix(start)
            if original is not None and name in weights:
                weights[name] = original
    return weights


def _can_sample(weight: Tensor) -> bool:
    return weight.is_floating_point() and not weight.is_meta and type(weight.data) is Tensor and weight.numel() > 0


def _sample(weight: Tensor) -> list[float]:
    index = torch.linspace(0, weight.numel() - 1, _SAMPLED_VALUES, device=weight.device, dtype=torch.float64).long()
    return [float(f"{value:.6g}") for value in weight.detach().reshape(-1)[index].float().tolist()]


def _is_close(values: list[float], expected: Any) -> bool:
    try:
        return all(math.isclose(a, b, rel_tol=2e-2, abs_tol=1e-6) for a, b in zip(values, expected, strict=True))
    except (TypeError, ValueError, OverflowError):
        return False  # the file has something else than a list of as many numbers
