"""LoRA in peft's format."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_peft.formats.files import copy_tensors
from lit_peft.formats.peft_experts import (
    as_peft,
    check_rows,
    expert_layers,
    from_peft,
    parameter_names,
    parameters_in_file,
)
from lit_peft.formats.peft_layers import (
    attentions,
    check_tied,
    conv_as_peft,
    layers_from_peft,
    projection_tensors,
    tied_heads_of,
    tied_modules,
    tied_tensors,
    ties_in_peft,
)
from lit_peft.formats.peft_modules import (
    PREFIX,
    modules_with_weights,
    outermost_modules,
    parameter_paths,
    train_what_differs,
)
from lit_peft.formats.peft_task import task_type
from lit_peft.formats.untrusted import check_names
from lit_peft.methods.attachment import Attachment, MethodSettings, attachment_of, base_name
from lit_peft.methods.layer_kinds import can_adapt, lora_class
from lit_peft.methods.lora import LoRASettings
from lit_peft.methods.patterns import first_fitting, pattern_values
from lit_peft.methods.targets import default_targets, find_targets
from lit_peft.methods.tokens import token_rows
from lit_peft.methods.tying import tied_heads, tying_matters
from lit_peft.nn.expert_lora import ExpertLoRA
from lit_peft.nn.lora import InitLoRA, LoRAEmbedding, LoRALayer, LoRALinear
from lit_peft.nn.lora_conv import LoRAConv
from lit_peft.nn.lora_tied import TiedLoRALinear
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief, check_types

_FILE = "adapter_config.json"
_LORA_A = re.compile(r"\.lora_(embedding_)?A(\.|$)")
_MAX_PATTERNS = 10_000
# Initializations that leave the base weights unchanged, or whose change can be computed from the base weights again.
_SUPPORTED_INITS = {"gaussian", "orthogonal", "eva", "pissa", "olora"}

READ = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "init_lora_weights",
    "use_rslora",
    "use_dora",
    "alora_invocation_tokens",
    "ensure_weight_tying",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
}
# They follow from the stored tensors, or only matter during training.
NEUTRAL = {
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
}


def writes(settings: MethodSettings) -> bool:
    """Return whether these are LoRA's settings."""
    return isinstance(settings, LoRASettings)


def settings(model: nn.Module, config: dict[str, Any], stored: dict[str, Tensor]) -> LoRASettings:
    """Return the settings in a folder's configuration.

    Raises:
        LitPeftError: a value has the wrong type, the initialization cannot be reproduced, or a rank is larger than that
            of the stored tensors.
    """
    values = {name: value for name, value in config.items() if name in READ and value is not None}
    # peft's default, which is not ours.
    values.setdefault("lora_alpha", 8)
    init = values.pop("init_lora_weights", True)
    if not isinstance(init, bool | str):
        raise LitPeftError(f"{_FILE}: init_lora_weights={brief(init)} is not a value that peft writes.")
    check_types(LoRASettings, values, f"{_FILE}: ")
    for name in ("rank_pattern", "alpha_pattern"):
        values.setdefault(name, {})
        if len(values[name]) > _MAX_PATTERNS:
            count = len(values[name])
            raise LitPeftError(f"{_FILE}: {name} has {count:,} patterns, which is more than any model has modules.")
    if isinstance(init, str) and init not in _SUPPORTED_INITS:
        raise LitPeftError(
            f"{_FILE}: init_lora_weights={brief(init)} changed the base weights in a way that cannot be reproduced: "
            "save the adapter with peft's path_initial_model_for_weight_conversion, or save the merged model."
        )
    check_names(values.get("modules_to_save"), f"{_FILE}: modules_to_save")
    modules_to_save = modules_with_weights(model, values.get("modules_to_save") or (), stored)
    layers = values.pop("layers_to_transform", None)
    exclude_modules, patterns = values.pop("exclude_modules", None), values.pop("layers_pattern", None)
    parameters, linear = parameters_in_file(model, values.pop("target_parameters", None) or ())
    # peft adapts its default modules only where it has some for the model, and then it writes them down.
    named = values.get("target_modules")
    if named is None:
        named = [] if parameters else default_targets(model)
    targets: list[str] = []
    if named or not (parameters or linear):
        targets = find_targets(
            model,
            named,
            exclude_modules,
            None if layers == [] else layers,
            patterns,
            modules_to_save,
            strict=False,
            source=f"{_FILE}: ",
            with_experts=bool(parameters),
            can_adapt=can_adapt,
        )
    targets += [path for path in linear if path not in targets]
    if values.get("lora_dropout") and any(lora_class(model.get_submodule(path)) is None for path in targets):
        # peft ignores it for these layers, and applies it to others.
        warnings.warn(
            f"{_FILE}: lora_dropout={values.pop('lora_dropout')} is left out, because an nn.MultiheadAttention, which "
            "the adapter is on, computes without it.",
            stacklevel=2,
        )
    # Where it has no effect in peft, peft goes on.
    if values.get("ensure_weight_tying") and (
        ties_in_peft(config) and tying_matters(model, targets, modules_to_save, False)
    ):
        _check_tied_patterns(model, targets, values)
    else:
        values.pop("ensure_weight_tying", None)
    # peft ignores names and patterns that match nothing; our settings must not have any.
    values["target_modules"], values["modules_to_save"] = targets, modules_to_save or None
    values["target_parameters"] = parameters or None
    names = [*targets, *parameters]
    for name in ("rank_pattern", "alpha_pattern"):
        used = set(first_fitting(values[name], names, f"{_FILE}: {name}").values())
        values[name] = {pattern: value for pattern, value in values[name].items() if pattern in used}
    ranks = pattern_values(values["rank_pattern"], names, values.get("r", 8))
    rank = max(ranks.values())
    lora_a = (tensor for name, tensor in stored.items() if _LORA_A.search(name))
    stored_rank = max([0, *(tensor.shape[0] for tensor in lora_a if tensor.dim() and tensor.numel())])
    if rank > stored_rank:
        raise LitPeftError(
            f"{_FILE}: r={values.get('r', 8)} with rank_pattern={brief(values['rank_pattern'])} is more than the "
            f"stored tensors have (rank {stored_rank}): the folder is incomplete."
        )
    # The rows of a parameter are those of all its experts, so their number says less about the rank.
    check_rows(model, {name: int(ranks[name]) for name in parameters}, stored, PREFIX)
    known_init: InitLoRA = "pissa" if init == "pissa" else "olora" if init == "olora" else "kaiming"
    return LoRASettings(**values, init_lora_weights=known_init)


def _independent_of_order(patterns: Mapping[str, float], adapted: list[str]) -> Mapping[str, float]:
    """Return patterns that give each module the same value when sorted, as they are in the file.

    These are the given patterns if possible, else the modules' full names.
    """
    first = first_fitting(patterns, adapted)
    if first_fitting(sorted(patterns), adapted) == first:
        return patterns
    return {re.escape(path): patterns[pattern] for path, pattern in first.items()}


def _check_tied_patterns(model: nn.Module, targets: list[str], values: Mapping[str, Any]) -> None:
    """Refuse patterns that give a head another scale than the embedding, whose update it shares: they are not tied."""
    embedding, heads = tied_heads(model) or ("", [])
    for name, default in (("rank_pattern", values.get("r", 8)), ("alpha_pattern", values["lora_alpha"])):
        first = pattern_values(values[name], [embedding, *heads], default)
        if {embedding, *heads} & set(targets) and len(set(first.values())) > 1:
            raise LitPeftError(
                f"{_FILE}: {name} gives {brief(first)}, and ensure_weight_tying=True says that they share one update: "
                "give them the same value."
            )


def _with_heads(attachment: Attachment, patterns: Mapping[str, float]) -> Mapping[str, float]:
    """Return patterns that give a head the value of the embedding that it shares its update with, as peft needs it."""
    tied = tied_heads_of(attachment)
    first = first_fitting(patterns, list(tied.values()))
    return {**{re.escape(head): patterns[first[path]] for head, path in tied.items() if path in first}, **patterns}


def load_tensors(model: nn.Module, stored: dict[str, Tensor], folder: Path) -> None:
    """Copy a folder's tensors into the attached LoRA, and train each base parameter that differs from the stored one.

    Raises:
        LitPeftError: the tensors do not fit the model.
    """
    attachment = attachment_of(model)
    of_experts = from_peft(attachment, {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}, folder)
    found = {
        base_name(name.removeprefix(PREFIX)): tensor
        for name, tensor in stored.items()
        if name.removeprefix(PREFIX) not in of_experts
        # With bias="all" peft saves the biases in a trained module's wrapper in addition to the module's own.
        and not re.search(r"\.(original_module|modules_to_save)\.", name)
    }
    parameters = parameter_paths(model)
    train_what_differs(attachment, parameters, found, _trained_tensors(attachment))
    targets = {base_name(name): tensor for name, tensor in _trained_tensors(attachment).items()}
    # A bias that is not stored is the base's own.
    unchanged = {base_name(name) for name in attachment.saved if name.endswith(".bias")} - set(found)
    targets = {name: tensor for name, tensor in targets.items() if name not in unchanged}
    # A folder may have a trained copy under one of the names that share it.
    there = {id(tensor) for name, tensor in targets.items() if name in found}
    targets = {name: tensor for name, tensor in targets.items() if name in found or id(tensor) not in there}
    shared = [f"{path}.lora_{factor}.weight" for path in tied_heads_of(attachment) for factor in "AB"]
    copy_tensors(targets, layers_from_peft(attachment, found), folder, ignored={*parameters, *shared})
    check_tied(attachment, found, folder)
    own = {
        f"{name}.{factor}.weight": getattr(layer, factor)
        for name, layer in expert_layers(attachment).items()
        for factor in ("lora_A", "lora_B")
    }
    copy_tensors(own, of_experts, folder)


def config(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    """Return the configuration of the attached LoRA.

    If the initialization moved part of the base weights into the LoRA, it is that of a LoRA of twice the rank on the
    original weights.
    """
    settings = attachment.settings
    assert isinstance(settings, LoRASettings)
    layers, parameters = _layers(attachment), parameter_names(attachment)
    first = next(iter(layers.values()), None)
    modules = sorted({*layers, *attentions(attachment)})
    moved = getattr(first, "moved", False)
    # The scale must not change: it is alpha / r, or alpha / sqrt(r).
    rank_factor, alpha_factor = (2, 2**0.5 if settings.use_rslora else 2) if moved else (1, 1)
    factors = {layer.scale_factor for layer in attachment.adapted.values() if isinstance(layer, LoRALayer)}
    if factors != {1.0}:
        alpha_factor *= factors.pop()
    ranks, alphas = (
        _independent_of_order(_with_heads(attachment, patterns), [*modules, *parameters])
        for patterns in (settings.rank_pattern, settings.alpha_pattern)
    )
    modules_to_save = [f".{name}" for name in (*(settings.modules_to_save or ()), *tied_modules(attachment))]
    return {
        **{name: getattr(settings, name) for name in READ},
        "r": settings.r * rank_factor,
        "lora_alpha": settings.lora_alpha * alpha_factor,
        "rank_pattern": {name: value * rank_factor for name, value in ranks.items()},
        "alpha_pattern": {name: value * alpha_factor for name, value in alphas.items()},
        "init_lora_weights": True,
        # peft looks for the tokens in models of this task only.
        **({"task_type": task_type(model)} if settings.alora_invocation_tokens else {}),
        "peft_type": "LORA",
        # Full names, so that peft adapts these modules and no others.
        "target_modules": modules,
        "target_parameters": sorted(parameters) or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": bool(getattr(first, "fan_in_fan_out", False)),
        # Full names here too: peft takes every module whose name ends in the letters of one of these.
        "modules_to_save": outermost_modules(model, modules_to_save, ".") or None,
    }


def tensors(attachment: Attachment) -> dict[str, Tensor]:
    """Return the attached LoRA's tensors by peft's names, relative to the original base weights."""
    found = _trained_tensors(attachment)
    for path, layer in attachment.adapted.items():
        if isinstance(layer, LoRALinear | LoRAConv) and not isinstance(layer, TiedLoRALinear):
            found[f"{path}.lora_A.weight"], found[f"{path}.lora_B.weight"] = layer.plain()
        if isinstance(layer, LoRAConv):
            found.update(conv_as_peft(path, layer, found))
    found.update(projection_tensors(attachment))
    found.update(tied_tensors(attachment))
    for name, layer in expert_layers(attachment).items():
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = as_peft(layer)
    # The format has no tensors that share memory.
    once = {id(tensor) for tensor in found.values()}
    return {f"{PREFIX}{name}": _own(tensor, once) for name, tensor in found.items()}


def _own(tensor: Tensor, first_seen: set[int]) -> Tensor:
    """Return a tensor, or a copy of it the second time."""
    if id(tensor) in first_seen:
        first_seen.discard(id(tensor))
        return tensor
    return tensor.detach().clone()


def _layers(attachment: Attachment) -> dict[str, Any]:
    layers = {path: layer for path, layer in attachment.adapted.items() if isinstance(layer, LoRALayer)}
    return {path: layer for path, layer in layers.items() if not isinstance(layer, ExpertLoRA)}


def _trained_tensors(attachment: Attachment) -> dict[str, Tensor]:
    """Return every trained tensor by the name that peft gives it, without the prefix."""
    found: dict[str, Tensor] = {}
    for path, rows in token_rows(attachment).items():
        found[f"{path}.token_adapter.trainable_tokens_delta"] = rows.weight
    for path, layer in _layers(attachment).items():
        if isinstance(layer, TiedLoRALinear):
            continue
        middle, end = ("lora_embedding_", "") if isinstance(layer, LoRAEmbedding) else ("lora_", ".weight")
        found[f"{path}.{middle}A{end}"] = layer.lora_A
        found[f"{path}.{middle}B{end}"] = layer.lora_B
        if layer.lora_bias is not None:
            found[f"{path}.lora_B.bias"] = layer.lora_bias
        if layer.lora_magnitude is not None:
            found[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude
    found.update(projection_tensors(attachment, as_peft=False))
    found.update(attachment.saved)
    return found
