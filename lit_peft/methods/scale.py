"""The scale of a LoRA's updates: changed for good, or for the time of a block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real

from torch import nn

from lit_peft.methods.adapters import adapters_of
from lit_peft.methods.attachment import Attachment, Model, attachment_of, attachment_or_none
from lit_peft.methods.threads import changing, exclusive
from lit_peft.methods.together import Together
from lit_peft.nn.lora import LoRALayer
from lit_peft.nn.weight_update import WeightUpdate
from lit_peft.util.errors import LitPeftError


@exclusive
def set_scale(model: Model, factor: float, name: str | None = None) -> Model:
    """Multiply the scale that the settings of a LoRA give, `lora_alpha / r`, by a factor. The last call counts.

    `save_adapter` writes the new scale as `lora_alpha`. A checkpoint does not contain it.

    Args:
        model: a model with LoRAs.
        factor: the factor: 1 for the original scale, 0 for the base.
        name: the adapter; None for all that are active.

    Returns:
        The same model.

    Raises:
        LitPeftError: the factor is no finite number, no LoRA is active or has the name, it is merged, or its
            initialization (PiSSA, OLoRA) moved part of the base weight into it.
    """
    _check(factor)
    attachment = attachment_of(model) if name is None else adapters_of(model).find(name)
    for layer in _layers(attachment):
        layer.rescale(float(factor))
    return model


@contextmanager
def rescaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the present scale of all active LoRAs by a factor in the block, as peft's `rescale_adapter_scale`.

    With a factor from 0 to 1, this is WiSE-FT (arXiv:2109.01903): weights between those of the base and the adapted
    model. The block belongs to its thread, as that of `use_adapter`.

    Args:
        model: a model with active LoRAs.
        factor: the factor.

    Raises:
        LitPeftError: see `set_scale`.
    """
    _check(factor)
    with changing(model):
        layers = _layers(attachment_of(model))
        before = [layer.scale_factor for layer in layers]
        for layer in layers:
            layer.rescale(layer.scale_factor * float(factor))
        try:
            yield
        finally:
            for layer, old in zip(layers, before, strict=True):
                layer.rescale(old)


def _check(factor: float) -> None:
    if isinstance(factor, bool) or not isinstance(factor, Real) or not math.isfinite(factor):
        raise LitPeftError(f"factor={factor!r}: give a finite number, e.g. 0.5 for half of the update.")


def _layers(attachment: Attachment) -> list[LoRALayer]:
    """Return the LoRA layers of an attachment whose scale can change."""
    members = list(attachment.members.values()) if isinstance(attachment, Together) else [attachment]
    layers = [layer for member in members for layer in member.adapted.values() if isinstance(layer, LoRALayer)]
    if not layers:
        raise LitPeftError(
            f"The adapter ({attachment.settings.method}) has no LoRA, so its scale cannot be changed: name a LoRA, or "
            "activate one with set_adapter."
        )
    if any(layer.moved for layer in layers):
        raise LitPeftError(
            "The adapter was made with init_lora_weights='pissa' or 'olora', which moved part of the base weight into "
            "it, so another scale would change the base: save it and load the folder, whose update is complete."
        )
    active = attachment_or_none(attachment.model)
    is_active = isinstance(active, Together) and any(member is attachment for member in active.members.values())
    on_model = active.adapted if active is not None and is_active else attachment.adapted
    if any(isinstance(layer, WeightUpdate) and layer.merged for layer in on_model.values()):
        raise LitPeftError("The adapter is merged, so its scale cannot change: call unmerge_adapter first.")
    return layers
