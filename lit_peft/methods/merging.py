"""Putting LoRAs into the base weights, and into the tensors of another LoRA."""

from __future__ import annotations

from collections import Counter
from typing import TypeGuard

import torch
from torch import nn

from lit_peft.methods.adapters import adapters_of
from lit_peft.methods.attachment import Model, attachment_or_none
from lit_peft.methods.lora import merge, tied_layers
from lit_peft.methods.threads import exclusive
from lit_peft.nn.invocation import InvokedLoRALinear
from lit_peft.nn.lora import LoRALayer
from lit_peft.nn.lora_tied import TiedLoRALinear
from lit_peft.nn.weight_update import WeightUpdate
from lit_peft.util.errors import LitPeftError


@exclusive
@torch.no_grad()
def hotswap_adapter(model: Model, name: str) -> Model:
    """Copy the LoRA `name` into the active LoRA in place, so that a compiled model need not be recompiled.

    `set_adapter` replaces modules, and `torch.compile` recompiles for each adapter. To avoid that, add a LoRA of the
    largest rank to copy into: `add_adapter(model, "slot", LoRASettings(r=...))`. Its previous weights are lost.

    Args:
        model: a model whose active adapter is a LoRA.
        name: the adapter to copy. Its ranks may not exceed the active one's, and it must adapt the same modules or
            some of them.

    Returns:
        The same model.

    Raises:
        LitPeftError: there is no such adapter, or it does not fit into the active one. Nothing is changed.
    """
    adapters = adapters_of(model)
    source, active = adapters.find(name), attachment_or_none(model)
    if source is active:
        return model
    slots = {
        path: layer
        for path, layer in (active.adapted.items() if active is not None else ())
        if _is_plain_lora(layer) and not layer.merged and layer.scaling
    }
    fitting = {
        path: layer
        for path, layer in source.adapted.items()
        if _is_plain_lora(layer) and path in slots and layer.r <= slots[path].r
    }
    if set(fitting) != set(source.adapted) or source.trained or active is None or active.trained:
        problem = next(iter(set(source.adapted) - set(fitting)), "its trained modules or biases")
        raise LitPeftError(
            f"The adapter {name!r} does not fit into the active adapter ({adapters.active!r}) because of {problem}: "
            "only plain LoRAs can be swapped in place, and the active one needs at least the same rank and modules. "
            "Use set_adapter instead."
        )
    for path, slot in slots.items():
        slot.lora_B.zero_()
        if path in fitting:
            layer = fitting[path]
            slot.lora_A[..., : layer.r, :] = layer.lora_A.to(slot.lora_A.device)
            slot.lora_B[..., : layer.r] = layer.lora_B.to(slot.lora_B.device) * (layer.scaling / slot.scaling)
    return model


@exclusive
def merge_adapter(model: Model) -> Model:
    """Fold the active LoRA or (IA)³ into the base weights, for speed. `unmerge_adapter` undoes it, bit for bit.

    Args:
        model: a model whose active adapter is a LoRA.

    Returns:
        The same model.

    Raises:
        LitPeftError: no LoRA is active, a layer is quantized, or an adapted weight is tied to another.
    """
    layers = _lora_layers(model)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = tied_layers(layers)
    if any(uses[id(layer.weight)] > 1 and id(layer) not in tied for layer in layers):
        raise LitPeftError(
            "An adapted weight is tied to the weight of another layer, which would change with it: use "
            "lit_peft.merge(model), which unties them."
        )
    for layer in layers:
        layer.check_mergeable()
    merged: list[WeightUpdate] = []
    try:
        for layer in layers:
            layer.merge(check=False)
            merged.append(layer)
    except BaseException:
        for layer in merged:
            layer.unmerge()
        raise
    return model


@exclusive
def unmerge_adapter(model: Model) -> Model:
    """Undo `merge_adapter` and restore the base weights, bit for bit.

    Args:
        model: a model whose active adapter is a LoRA or (IA)³, merged or not.

    Returns:
        The same model.

    Raises:
        LitPeftError: no LoRA is active.
    """
    for layer in _lora_layers(model):
        layer.unmerge()
    return model


@exclusive
def merge_and_unload(model: Model) -> Model:
    """Fold the active LoRA or (IA)³ into the base weights permanently and remove all adapters.

    Args:
        model: a model whose active adapter is a LoRA.

    Returns:
        The same model, without adapters.

    Raises:
        LitPeftError: nothing is attached, or the attached method is not a weight update.
    """
    adapters = adapters_of(model)
    merge(model)
    adapters.attachments.clear()
    adapters.active = None
    return model


def _is_plain_lora(layer: nn.Module) -> TypeGuard[LoRALayer]:
    """Whether a layer is a LoRA of one product A and one B that left the base weight as it was."""
    return (
        isinstance(layer, LoRALayer)
        and not isinstance(layer, InvokedLoRALinear | TiedLoRALinear)
        and layer.lora_magnitude is None
        and layer.lora_bias is None
        and layer.groups == 1
        and not layer.moved
    )


def _lora_layers(model: nn.Module) -> list[WeightUpdate]:
    attachment = attachment_or_none(model)
    layers = [layer for layer in attachment.adapted.values() if isinstance(layer, WeightUpdate)] if attachment else []
    if not layers:
        raise LitPeftError(
            "No LoRA or (IA)³ is active on this model, so there is nothing to merge: call set_adapter first."
        )
    return layers
