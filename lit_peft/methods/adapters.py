"""Several named adapters on one base model: add, switch, disable, merge.

Each adapter is an attachment of any method. Only the active one is on the model; the others are detached and stored,
so the active adapter costs no more than a single one, and switching builds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from torch import nn

from lit_peft.methods.attach import attach
from lit_peft.methods.attachment import Attachment, MethodSettings, Model, attachment_or_none, set_attachment
from lit_peft.methods.stack import Stack, check_stack, clear_below, names_of, put_below
from lit_peft.methods.threads import changing, exclusive, locked, remember_adapter
from lit_peft.methods.together import Together
from lit_peft.util.errors import LitPeftError, closest

DEFAULT = "default"
_KEY = "_lit_peft_adapters"
# What can be active: an adapter, several one after the other, several LoRAs at the same time, or none.
Active = str | Stack | tuple[str, ...] | None


@dataclass
class Adapters:
    """The named adapters of a model.

    Attributes:
        attachments: every adapter by name, including the active one.
        active: the name of the adapter that is on the model, or several in a stack, or several at the same time; None
            if there is none.
    """

    attachments: dict[str, Attachment] = field(default_factory=dict)
    active: Active = None

    def find(self, name: str | Stack | tuple[str, ...]) -> Attachment:
        """Return an adapter by name.

        Args:
            name: the adapter's name, or a stack, or the names of several.

        Returns:
            Its attachment; of a stack, that of the last one; of several, one that puts all of them on the model.

        Raises:
            LitPeftError: there is no adapter of that name, or the adapters cannot be active together.
        """
        if isinstance(name, tuple):
            return Together.of({each: self.find(each) for each in name})
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
        active = names_of(adapters.active)
        # Of a stack, the last one is what `detach` and `merge` take away.
        gone = active if isinstance(adapters.active, tuple) else active[-1:]
        is_on = isinstance(attachment, Together) or any(adapters.attachments[name] is attachment for name in gone)
        if gone and not is_on:
            # The active adapter has been detached or merged since the last call.
            for name in gone:
                del adapters.attachments[name]
            adapters.active = None
        if attachment is not None and adapters.active is None:
            adapters.attachments[DEFAULT], adapters.active = attachment, DEFAULT
        return adapters


@exclusive
def add_adapter(model: Model, name: str, settings: MethodSettings, autocast_adapter_dtype: bool = True) -> Model:
    """Attach a new adapter and make it the active one. Existing adapters are kept.

    Args:
        model: a model with or without adapters.
        name: the new adapter's name.
        settings: the method's settings.
        autocast_adapter_dtype: see `attach`.

    Returns:
        The same model.

    Raises:
        LitPeftError: the name is taken, or the settings do not fit the model. The model is left unchanged.
    """
    with new_adapter(model, name):
        attach(model, settings, autocast_adapter_dtype)
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
def set_adapter(model: Model, name: str | Stack | Sequence[str] | None) -> Model:
    """Make an adapter the active one, for all threads. Nothing is built or copied.

    Threads that use different adapters of one model need `use_adapter` or `row_adapters` instead.

    Args:
        model: a model with adapters.
        name: the adapter to activate, or a `Stack` of bottleneck adapters, or a list of LoRAs, whose updates are added
            and which are all trained; with None the model computes what its base computes.

    Returns:
        The same model.

    Raises:
        LitPeftError: there is no adapter of that name, or the adapters cannot be active together.
    """
    adapters = adapters_of(model)
    _switch(model, adapters, _checked(name))
    remember_adapter(model)
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


def active_adapter(model: nn.Module) -> Active:
    """Return the name of the active adapter.

    Args:
        model: a model with or without adapters.

    Returns:
        The name, or the `Stack`, or a tuple of several names; None if no adapter is active.
    """
    return adapters_of(model).active


@contextmanager
def use_adapter(model: nn.Module, name: str | Stack | Sequence[str] | None) -> Iterator[None]:
    """Make an adapter the active one in the block, and restore the previous one afterwards.

    The block belongs to its thread: blocks of other threads on the same model wait for it, and forwards outside of
    blocks are refused in the meantime.

    Args:
        model: a model with adapters.
        name: the adapter, or a `Stack`, or a list of LoRAs; None for the base model, bit for bit.

    Raises:
        LitPeftError: there is no adapter of that name.
    """
    with changing(model):
        adapters = adapters_of(model)
        previous = adapters.active
        _switch(model, adapters, _checked(name))
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


def _checked(name: str | Stack | Sequence[str] | None) -> Active:
    """Return what is to be active, a list of names as a tuple.

    Raises:
        LitPeftError: the list is empty, or a name occurs twice in it.
    """
    if name is None or isinstance(name, str | Stack):
        return name
    names = tuple(name)
    if not names or len(set(names)) < len(names):
        raise LitPeftError(
            f"{list(names)} cannot be active together: give the names of different adapters, or None for the base."
        )
    return names if len(names) > 1 else names[0]


def _switch(model: nn.Module, adapters: Adapters, name: Active) -> None:
    if adapters.active == name:
        return
    active = attachment_or_none(model)
    attachment = None if name is None else adapters.find(name)
    if active is not None:
        active.suspend()
        clear_below(active)
        set_attachment(model, None)
        adapters.active = None
    if name is not None and attachment is not None:
        if isinstance(name, Stack):
            put_below(attachment, [adapters.attachments[below] for below in names_of(name)[:-1]])
        attachment.resume()
        set_attachment(model, attachment)
        adapters.active = name
