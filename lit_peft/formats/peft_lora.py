"""LoRA in peft's format."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.formats.files import copy_tensors
from lit_peft.formats.untrusted import is_quick, matching
from lit_peft.methods.attachment import Attachment, MethodSettings, attachment_of, base_name
from lit_peft.methods.lora import LoRASettings
from lit_peft.methods.targets import default_targets, find_targets, first_fitting, is_linear, pattern_values
from lit_peft.nn.lora import InitLoRA, LoRAEmbedding, LoRALinear
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief, check_types

_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_A = re.compile(r"\.lora_(embedding_)?A(\.|$)")
_MOST_PATTERNS = 10_000
# Starts that leave the base weights as they are, and those that are computed from them alone.
_STARTS = {"gaussian", "orthogonal", "eva", "pissa", "olora"}

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
    "init_lora_weights",
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
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
}


def writes(settings: MethodSettings) -> bool:
    """Whether the settings are LoRA's."""
    return isinstance(settings, LoRASettings)


def settings(model: nn.Module, config: dict[str, Any], stored: dict[str, Tensor]) -> LoRASettings:
    """The settings in a folder's configuration.

    Raises:
        LitPeftError: a value is of another kind than peft writes, a start cannot be had again, or a rank is larger than
            the stored tensors.
    """
    values = {name: value for name, value in config.items() if name in READ and value is not None}
    # peft's own where a file leaves it out, and not ours.
    values.setdefault("lora_alpha", 8)
    start = values.pop("init_lora_weights", True)
    if not isinstance(start, bool | str):
        raise LitPeftError(f"{_FILE}: init_lora_weights={brief(start)} is not a value peft writes there.")
    check_types(LoRASettings, values, f"{_FILE}: ")
    names = [name for name, module in model.named_modules() if is_linear(module) or isinstance(module, nn.Embedding)]
    for name in ("target_modules", "exclude_modules"):
        pattern = values.get(name)
        if isinstance(pattern, str) and pattern != "all-linear" and not is_quick(pattern, f"{_FILE}: {name}"):
            (values[name],) = matching([pattern], names, f"{_FILE}: {name}")
    for name in ("rank_pattern", "alpha_pattern"):
        values[name] = _quick_patterns(values.get(name, {}), names, f"{_FILE}: {name}")
    lists = values.get("layers_pattern") or []
    for pattern in [lists] if isinstance(lists, str) else lists:
        if not is_quick(pattern, f"{_FILE}: layers_pattern"):
            raise LitPeftError(
                f"{_FILE}: layers_pattern={pattern[:80]!r} can take forever (nested repeats): name the list of layers."
            )
    if isinstance(start, str) and start not in _STARTS:
        raise LitPeftError(
            f"{_FILE}: init_lora_weights={brief(start)} changed the base weights in a way that cannot be "
            "had again: save it with peft's path_initial_model_for_weight_conversion, or merged."
        )
    # peft takes `pre_classifier` for a `classifier`, and then stores it, too; a folder of ours does not.
    named = values.get("modules_to_save") or ()
    ours = tuple(f".{name}" for name in named)
    saved = [
        path
        for path in _modules(model, named)
        if f".{path}".endswith(ours) or any(name.startswith(f"{_PREFIX}{path}.") for name in stored)
    ]
    layers = values.pop("layers_to_transform", None)
    targets = find_targets(
        model,
        values["target_modules"] if "target_modules" in values else default_targets(model),
        values.pop("exclude_modules", None),
        None if layers == [] else layers,
        values.pop("layers_pattern", None),
        saved,
        strict=False,
    )
    # What matches nothing, peft passes over; settings of ours may not say it.
    values["target_modules"], values["modules_to_save"] = targets, saved or None
    for name in ("rank_pattern", "alpha_pattern"):
        used = set(first_fitting(values[name], targets).values())
        values[name] = {pattern: value for pattern, value in values[name].items() if pattern in used}
    wanted = max(pattern_values(values["rank_pattern"], targets, values.get("r", 8)).values())
    stored_rank = max([0, *(t.shape[0] for name, t in stored.items() if _A.search(name) and t.dim() and t.numel())])
    if wanted > stored_rank:
        raise LitPeftError(
            f"{_FILE}: r={values.get('r', 8)} with rank_pattern={brief(values['rank_pattern'])} is "
            f"more than the stored tensors have (rank {stored_rank}): the folder is not whole."
        )
    known: InitLoRA = "pissa" if start == "pissa" else "olora" if start == "olora" else "kaiming"
    return LoRASettings(**values, init_lora_weights=known)


def _quick_patterns(patterns: dict[str, float], names: list[str], where: str) -> dict[str, float]:
    """The same patterns, those that may be slow spelt out as the names they match.

    Raises:
        LitPeftError: there are too many, or one is not valid, or takes forever.
    """
    if len(patterns) > _MOST_PATTERNS:
        raise LitPeftError(f"{where} has {len(patterns):,} patterns, more than any model has modules for.")
    slow = [pattern for pattern in patterns if not is_quick(pattern, where)]
    found = matching([rf"(.*\.)?({pattern})" for pattern in slow], names, where) if slow else []
    spelt = {pattern: [re.escape(name) for name in own] for pattern, own in zip(slow, found, strict=True)}
    quick: dict[str, float] = {}
    for pattern, value in patterns.items():
        for key in spelt.get(pattern, [pattern]):
            quick.setdefault(key, value)  # the first that fits counts
    return quick


def _in_any_order(patterns: Mapping[str, float], adapted: list[str]) -> Mapping[str, float]:
    """Patterns that give each module the same value when they are sorted, as a file has them: names, where need be."""
    first = first_fitting(patterns, adapted)
    if first_fitting(sorted(patterns), adapted) == first:
        return patterns
    return {re.escape(path): patterns[pattern] for path, pattern in first.items()}


def load_tensors(model: nn.Module, stored: dict[str, Tensor], folder: Path) -> None:
    """Copy a folder's tensors into the attached LoRA; what the base has otherwise is trained as well.

    Raises:
        LitPeftError: as `lit_peft.formats.files.copy_tensors`.
    """
    found = {
        base_name(name.removeprefix(_PREFIX)): tensor
        for name, tensor in stored.items()
        # With bias="all" peft stores the biases of a trained module's wrapper besides the module's own.
        if not re.search(r"\.(original_module|modules_to_save)\.", name)
    }
    attachment = attachment_of(model)
    own = {base_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in set(found) - set(_places(attachment)):
        # peft also stores some of the base's own tensors: whole vocabularies, what bias="all" takes for a bias.
        if name in own and not _same(model.get_parameter(own[name]), found[name]):
            attachment.train(own[name])
    places = {base_name(name): place for name, place in _places(attachment).items()}
    # Biases that were not stored are the base's.
    biases = {base_name(name) for name in attachment.saved if name.endswith(".bias")} - set(found)
    copy_tensors({name: place for name, place in places.items() if name not in biases}, found, folder, ignored=own)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours.detach().cpu(), theirs.to(ours.dtype))


def _modules(model: nn.Module, names: Collection[str], before: str = "") -> list[str]:
    """The outermost modules whose names, with `before` in front, end in one of `names`, as peft finds them."""
    found: list[str] = []
    for path, _ in model.named_modules():
        if (
            path
            and f"{before}{path}".endswith(tuple(names))
            and not any(path.startswith(f"{outer}.") for outer in found)
        ):
            found.append(path)
    return found


def config(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    """The configuration of the attached LoRA; of a plain one of twice the rank where part of the base moved into it."""
    settings = attachment.settings
    assert isinstance(settings, LoRASettings)
    first = next(iter(attachment.adapted.values()))
    moved = getattr(first, "moved", False)
    # The scale stays: it is alpha / r, or alpha / sqrt(r).
    rank, alpha = (2, 2**0.5 if settings.use_rslora else 2) if moved else (1, 1)
    ranks, alphas = (
        _in_any_order(patterns, list(attachment.adapted))
        for patterns in (settings.rank_pattern, settings.alpha_pattern)
    )
    return {
        **{name: getattr(settings, name) for name in READ},
        "r": settings.r * rank,
        "lora_alpha": settings.lora_alpha * alpha,
        "rank_pattern": {name: value * rank for name, value in ranks.items()},
        "alpha_pattern": {name: value * alpha for name, value in alphas.items()},
        "init_lora_weights": True,
        "peft_type": "LORA",
        # Full names, so that the reader adapts these modules and no others.
        "target_modules": sorted(attachment.adapted),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": bool(getattr(first, "fan_in_fan_out", False)),
        # Full names here, too: peft takes any module whose name ends in the letters of one of these.
        "modules_to_save": _modules(model, [f".{name}" for name in settings.modules_to_save or ()], ".") or None,
    }


def tensors(attachment: Attachment) -> dict[str, Tensor]:
    """The attached LoRA's tensors by peft's names, for the base as it was."""
    places = _places(attachment)
    for path, layer in attachment.adapted.items():
        if isinstance(layer, LoRALinear):
            places[f"{path}.lora_A.weight"], places[f"{path}.lora_B.weight"] = layer.plain()
    return {f"{_PREFIX}{name}": place for name, place in places.items()}


def _places(attachment: Attachment) -> dict[str, torch.Tensor]:
    """Each trained tensor under the name peft stores it by, less the prefix."""
    places: dict[str, torch.Tensor] = {}
    for path, layer in attachment.adapted.items():
        middle, end = ("lora_embedding_", "") if isinstance(layer, LoRAEmbedding) else ("lora_", ".weight")
        places[f"{path}.{middle}A{end}"] = layer.lora_A  # type: ignore[assignment]
        places[f"{path}.{middle}B{end}"] = layer.lora_B  # type: ignore[assignment]
        if layer.lora_magnitude is not None:
            places[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude  # type: ignore[assignment]
    places.update(attachment.saved)
    return places
