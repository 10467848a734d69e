"""Several named adapters on one base model: add, switch, disable, merge.

Each adapter is an attachment of any method. Only the active one is on the model; the others are detached and stored,
so the active adapter costs no more than a single one, and switching builds nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import nn

from lit_peft.methods.attach import attach
from lit_peft.methods.attachment import Attachment, MethodSettings, Model, attachment_or_none, set_attachment
from lit_peft.methods.lora import merge
from lit_peft.methods.stack import Stack, check_stack, clear_below, names_of, put_below
from lit_peft.methods.threads import changing, exclusive, locked, remember_adapter
from lit_peft.nn.lora import LoRALayer
from lit_peft.util.errors import LitPeftError, closest

DEFAULT = "default"
_KEY = "_lit_peft_adapters"


@dataclass
class Adapters:
    """The named adapters of a model.

    Attributes:
        attachments: every adapter by name, including the active one.
        active: the name of the adapter that is on the model, or several in a stack; None if there is none.
    """

    attachments: dict[str, Attachment] = field(default_factory=dict)
    active: str | Stack | None = None

    def find(self, name: str | Stack) -> Attachment:
        """Return an adapter by name.

        Args:
            name: the adapter's name, or a stack.

        Returns:
            Its attachment; of a stack, that of the last one.

        Raises:
            LitPeftError: there is no adapter of that name, or the adapters cannot be stacked.
        """
        if isinstance(name, Stack):
            check_stack({each: self.find(each) for each in name.names})
            name = name.names[-1]
        if name not in self.attachments:
            fix = "it has none, so call lit_peft.add_adapter first"
            if self.attachments:
                fix = f"use one of {closest(name, self.attachments)}"
            raise LitPeftError(f"There is no adapter {name!r} on this model: {fix}.")
        return self.attachments[name]


def adapters_of(model: nn.Module) -> Adapters:
    """Return the named adapters of a model. An adapter that `attach` added is called `default`.

    Args:
        model: a model with or without adapters.

    Returns:
        The record of its adapters, which later calls update.
    """
    with locked(model):
        adapters = getattr(model, _KEY, None)
        attachment = attachment_or_none(model)
        if not isinstance(adapters, Adapters):
            adapters = Adapters()
            object.__setattr__(model, _KEY, adapters)
        *_, top = names_of(adapters.active) or (None,)
        if top is not None and adapters.attachments[top] is not attachment:
            # The active adapter has been detached or merged since the last call.
            del adapters.attachments[top]
            adapters.active = None
        if attachment is not None and adapters.active is None:
            adapters.attachments[DEFAULT], adapters.active = attachment, DEFAULT
        return adapters


@exclusive
def add_adapter(model: Model, name: str, settings: MethodSettings) -> Model:
    """Attach a new adapter and make it the active one. Existing adapters are kept.

    Args:
        model: a model with or without adapters.
        name: the new adapter's name.
        settings: the method's settings.

    Returns:
        The same model.

    Raises:
        LitPeftError: the name is taken, or the settings do not fit the model. The model is left unchanged.
    """
    with new_adapter(model, name):
        attach(model, settings)
    return model


@contextmanager
def new_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Provide the bare model in the block; what the block attaches becomes the active adapter, called `name`.

    If the block fails, the adapter that was active before is restored.

    Args:
        model: a model with or without adapters.
        name: the new adapter's name.

    Raises:
        LitPeftError: the name is taken.
    """
    with changing(model):
        yield from _new_adapter(model, name)


def _new_adapter(model: nn.Module, name: str) -> Iterator[None]:
    adapters = adapters_of(model)
    if name in adapters.attachments:
        raise LitPeftError(
            f"There is already an adapter {name!r} on this model: choose another name, or call "
            f"lit_peft.delete_adapter(model, {name!r}) first. Trained weights are never replaced silently."
        )
    previous = adapters.active
    _switch(model, adapters, None)
    try:
        yield
    except BaseException:
        _switch(model, adapters, previous)
        raise
    attachment = attachment_or_none(model)
    assert attachment is not None
    # Existing adapters froze the base before this one, so they know what required gradients originally.
    attachment.unfrozen = next((other.unfrozen for other in adapters.attachments.values()), attachment.unfrozen)
    adapters.attachments[name], adapters.active = attachment, name


@exclusive
def set_adapter(model: Model, name: str | Stack | None) -> Model:
    """Make an adapter the active one, for all threads. Nothing is built or copied.

    Threads that use different adapters of one model need `use_adapter` or `row_adapters` instead.

    Args:
        model: a model with adapters.
        name: the adapter to activate, or a `Stack` of them; with None the model computes what its base computes.

    Returns:
        The same model.

    Raises:
        LitPeftError: there is no adapter of that name, or the adapters cannot be stacked.
    """
    adapters = adapters_of(model)
    if name is not None:
        adapters.find(name)
    _switch(model, adapters, name)
    remember_adapter(model)
    return model


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
def delete_adapter(model: Model, name: str) -> Model:
    """Remove an adapter. If it is active, alone or in a stack, no adapter is active afterwards.

    Args:
        model: a model with adapters.
        name: the adapter to remove.

    Returns:
        The same model.

    Raises:
        LitPeftError: there is no adapter of that name.
    """
    adapters = adapters_of(model)
    attachment = adapters.find(name)
    _switch(model, adapters, None if name in names_of(adapters.active) else adapters.active)
    del adapters.attachments[name]
    if not adapters.attachments:
        attachment.unfreeze()
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of a model's adapters, in the order they were added.

    Args:
        model: a model with or without adapters.

    Returns:
        The names.
    """
    return list(adapters_of(model).attachments)


def active_adapter(model: nn.Module) -> str | Stack | None:
    """Return the name of the active adapter.

    Args:
        model: a model with or without adapters.

    Returns:
        The name, or the `Stack`; None if no adapter is active.
    """
    return adapters_of(model).active


@contextmanager
def use_adapter(model: nn.Module, name: str | Stack | None) -> Iterator[None]:
    """Make an adapter the active one in the block, and restore the previous one afterwards.

    The block belongs to its thread: blocks of other threads on the same model wait for it, and forwards outside of
    blocks are refused in the meantime.

    Args:
        model: a model with adapters.
        name: the adapter, or a `Stack`; None for the base model, bit for bit.

    Raises:
        LitPeftError: there is no adapter of that name.
    """
    with changing(model):
        adapters = adapters_of(model)
        previous = adapters.active
        if name is not None:
            adapters.find(name)
        _switch(model, adapters, name)
        try:
            yield
        finally:
            _switch(model, adapters_of(model), previous)


def disable_adapter(model: nn.Module) -> AbstractContextManager[None]:
    """Provide the base model, bit for bit, in the block, and restore the active adapter afterwards.

    Args:
        model: a model with or without adapters.
    """
    return use_adapter(model, None)


@exclusive
def merge_adapter(model: Model) -> Model:
    """Fold the active LoRA into the base weights to speed up inference. `unmerge_adapter` undoes it, bit for bit.

    Args:
        model: a model whose active adapter is a LoRA.

    Returns:
        The same model.

    Raises:
        LitPeftError: no LoRA is active, a layer is quantized, or an adapted weight is tied to another.
    """
    layers = _lora_layers(model)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    if any(uses[id(layer.weight)] > 1 for layer in layers):
        raise LitPeftError(
            "An adapted weight is tied to the weight of another layer, which would change with it: use "
            "lit_peft.merge(model), which unties them."
        )
    merged: list[LoRALayer] = []
    try:
        for layer in layers:
            layer.merge()
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
        model: a model whose active adapter is a LoRA, merged or not.

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
    """Fold the active LoRA into the base weights permanently and remove all adapters.

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
    """Whether a layer is a LoRA without DoRA's magnitude that left the base weight as it was."""
    return isinstance(layer, LoRALayer) and layer.lora_magnitude is None and not layer.moved


def _lora_layers(model: nn.Module) -> list[LoRALayer]:
    attachment = attachment_or_none(model)
    layers = [layer for layer in attachment.adapted.values() if isinstance(layer, LoRALayer)] if attachment else []
    if not layers:
        raise LitPeftError("No LoRA is active on this model, so there is nothing to merge: call set_adapter first.")
    return layers


def _switch(model: nn.Module, adapters: Adapters, name: str | Stack | None) -> None:
    if adapters.active == name:
        return
    if adapters.active is not None:
        active = adapters.find(adapters.active)
        active.suspend()
        clear_below(active)
        set_attachment(model, None)
        adapters.active = None
    if name is not None:
        attachment = adapters.find(name)
        put_below(attachment, [adapters.attachments[below] for below in names_of(name)[:-1]])
        attachment.resume()
        set_attachment(model, attachment)
        adapters.active = name
