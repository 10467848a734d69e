"""Several named adapters on one base: add, switch, disable, merge.

Each adapter is an attachment of its own, whatever its method. The active one is on the model; the others are taken off
and kept, and come back as they were. So the active adapter costs what a single one costs, and switching builds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from lit_peft.methods.attachment import (
    Attachment,
    MethodSettings,
    Model,
    attach,
    attachment_or_none,
    set_attachment,
)
from lit_peft.methods.lora import merge
from lit_peft.nn.lora import LoRALayer
from lit_peft.util.errors import LitPeftError, closest

DEFAULT = "default"
_KEY = "_lit_peft_adapters"


@dataclass
class Adapters:
    """The named adapters of a model.

    Attributes:
        kept: every adapter by name, the active one too.
        active: the name of the one on the model; None while none is.
    """

    kept: dict[str, Attachment] = field(default_factory=dict)
    active: str | None = None

    def find(self, name: str) -> Attachment:
        """The adapter of a name.

        Raises:
            LitPeftError: there is none.
        """
        if name not in self.kept:
            known = closest(name, self.kept) if self.kept else "none"
            raise LitPeftError(f"There is no adapter {name!r} on this model: there are {known}.")
        return self.kept[name]


def adapters_of(model: nn.Module) -> Adapters:
    """The named adapters of a model; one that `attach` put on is called `default`."""
    adapters = getattr(model, _KEY, None)
    attachment = attachment_or_none(model)
    if not isinstance(adapters, Adapters):
        adapters = Adapters()
        object.__setattr__(model, _KEY, adapters)
    if adapters.active is not None and adapters.kept[adapters.active] is not attachment:
        # It was detached or merged since.
        del adapters.kept[adapters.active]
        adapters.active = None
    if attachment is not None and adapters.active is None:
        adapters.kept[DEFAULT], adapters.active = attachment, DEFAULT
    return adapters


def add_adapter(model: Model, name: str, settings: MethodSettings) -> Model:
    """Attach a new adapter beside those that are there, and make it the active one.

    Args:
        model: a model, bare or with adapters.
        name: the new adapter's name.
        settings: the method's settings.

    Raises:
        LitPeftError: there is an adapter of that name, or the settings do not fit. The model is as it was.
    """
    with new_adapter(model, name):
        attach(model, settings)
    return model


@contextmanager
def new_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Within the block the model is bare; what it attaches becomes the adapter `name`, the active one.

    Raises:
        LitPeftError: there is an adapter of that name. If the block fails, the model is as it was.
    """
    adapters = adapters_of(model)
    if name in adapters.kept:
        raise LitPeftError(
            f"There is an adapter {name!r} on this model already: give another name, or call "
            f"lit_peft.delete_adapter(model, {name!r}) first, so that trained weights are never silently replaced."
        )
    before = adapters.active
    _switch(model, adapters, None)
    try:
        yield
    except BaseException:
        _switch(model, adapters, before)
        raise
    attachment = attachment_or_none(model)
    assert attachment is not None
    # The base was frozen already if there are other adapters; they know what it was before.
    attachment.unfrozen = next((kept.unfrozen for kept in adapters.kept.values()), attachment.unfrozen)
    adapters.kept[name], adapters.active = attachment, name


def set_adapter(model: Model, name: str | None) -> Model:
    """Make an adapter the active one; with None, the model answers as its base. Nothing is built or copied.

    Raises:
        LitPeftError: there is no adapter of that name.
    """
    adapters = adapters_of(model)
    if name is not None:
        adapters.find(name)
    _switch(model, adapters, name)
    return model


@torch.no_grad()
def hotswap_adapter(model: Model, name: str) -> Model:
    """Copy the LoRA `name` into the active one, in place: no module changes, so that a compiled model runs on as it is.

    Switching by `set_adapter` makes `torch.compile` compile once for each adapter; make a LoRA to swap into instead, of
    the largest rank: `add_adapter(model, "slot", LoRASettings(r=...))`. What the active one held is lost.

    Args:
        model: a model whose active adapter is a LoRA.
        name: the adapter to copy, of no larger rank, on some or all of the active one's modules.

    Raises:
        LitPeftError: there is no such adapter, or it does not fit into the active one. Nothing has changed.
    """
    adapters, slots = adapters_of(model), {}
    source, active = adapters.find(name), attachment_or_none(model)
    if source is active:
        return model
    for path, layer in active.adapted.items() if active is not None else ():
        if (
            isinstance(layer, LoRALayer)
            and layer.lora_magnitude is None
            and not (layer.merged or layer.moved)
            and layer.scaling
        ):
            slots[path] = layer
    fitting = {
        path: layer
        for path, layer in source.adapted.items()
        if isinstance(layer, LoRALayer) and layer.lora_magnitude is None and not layer.moved
        if path in slots and layer.r <= slots[path].r
    }
    if set(fitting) != set(source.adapted) or source.trained or active is None or active.trained:
        wrong = next(iter(set(source.adapted) - set(fitting)), "trained modules or biases")
        raise LitPeftError(
            f"The adapter {name!r} does not fit into the active one ({adapters.active!r}) at {wrong}: plain LoRAs can "
            "be swapped in place, into one of at least their rank that adapts at least their modules."
        )
    for path, slot in slots.items():
        slot.lora_B.zero_()
        if path in fitting:
            layer = fitting[path]
            slot.lora_A[: layer.r] = layer.lora_A.to(slot.lora_A.device)
            slot.lora_B[:, : layer.r] = layer.lora_B.to(slot.lora_B.device) * (layer.scaling / slot.scaling)
    return model


def delete_adapter(model: Model, name: str) -> Model:
    """Let an adapter go; if it is the active one, the model answers as its base afterwards.

    Raises:
        LitPeftError: there is no adapter of that name.
    """
    adapters = adapters_of(model)
    attachment = adapters.find(name)
    _switch(model, adapters, None if adapters.active == name else adapters.active)
    del adapters.kept[name]
    if not adapters.kept:
        attachment.unfreeze()
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in the order they were added."""
    return list(adapters_of(model).kept)


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter, None while the model answers as its base."""
    return adapters_of(model).active


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base, bit for bit."""
    before = adapters_of(model).active
    set_adapter(model, None)
    try:
        yield
    finally:
        set_adapter(model, before)


def merge_adapter(model: Model) -> Model:
    """Fold the active LoRA into the base weights for speed; `unmerge_adapter` takes it out again, bit for bit.

    Raises:
        LitPeftError: no LoRA is active, a layer is quantized, or an adapted weight is tied to another.
    """
    layers = _lora_layers(model)
    shared: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    if any(shared[id(layer.weight)] > 1 for layer in layers):
        raise LitPeftError(
            "An adapted weight is tied to another layer's, which would change with it: use "
            "lit_peft.merge(model), which unties them."
        )
    done: list[LoRALayer] = []
    try:
        for layer in layers:
            layer.merge()
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    return model


def unmerge_adapter(model: Model) -> Model:
    """Undo `merge_adapter`: the base weights are what they were, bit for bit.

    Raises:
        LitPeftError: no LoRA is active.
    """
    for layer in _lora_layers(model):
        layer.unmerge()
    return model


def merge_and_unload(model: Model) -> Model:
    """Fold the active LoRA into the base weights for good and return the plain model; other adapters are let go.

    Raises:
        LitPeftError: nothing is attached, or the attached method is not a weight update.
    """
    adapters = adapters_of(model)
    merge(model)
    adapters.kept.clear()
    adapters.active = None
    return model


def _lora_layers(model: nn.Module) -> list[LoRALayer]:
    attachment = attachment_or_none(model)
    layers = [layer for layer in attachment.adapted.values() if isinstance(layer, LoRALayer)] if attachment else []
    if not layers:
        raise LitPeftError("No LoRA is active on this model, so there is nothing to merge: call set_adapter first.")
    return layers


def _switch(model: nn.Module, adapters: Adapters, name: str | None) -> None:
    if adapters.active == name:
        return
    if adapters.active is not None:
        adapters.kept[adapters.active].suspend()
        set_attachment(model, None)
        adapters.active = None
    if name is not None:
        adapters.kept[name].resume()
        set_attachment(model, adapters.kept[name])
        adapters.active = name
