"""The changes that a method makes to a model, as plain objects.

Each change names its place by a path and holds the modules and tensors it needs, never a function bound to one model.
So a model can be copied, pickled or sent to another process with its method attached, and the copy undoes its own
changes. `apply` makes a change on the model given, `undo` takes it back; both may be called again and again in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Change(Protocol):
    """One change to a model."""

    def apply(self, model: nn.Module) -> None:
        """Make the change."""

    def undo(self, model: nn.Module) -> None:
        """Take it back: the model is what it was, bit for bit."""


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Split a path into the module that holds its last part, and the name of that part."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


@dataclass
class ReplaceModule:
    """`module` stands at `path` in place of the base's own.

    A module with a method `restore_base` knows best what to put back; for any other the original is kept here.
    """

    path: str
    module: nn.Module
    original: nn.Module | None = None

    def apply(self, model: nn.Module) -> None:
        owner, name = owner_of(model, self.path)
        if not hasattr(type(self.module), "restore_base"):
            self.original = owner.get_submodule(name)
        setattr(owner, name, self.module)

    def undo(self, model: nn.Module) -> None:
        owner, name = owner_of(model, self.path)
        setattr(owner, name, self.module.restore_base() if self.original is None else self.original)  # type: ignore[operator]


@dataclass
class AddModule:
    """A new `module` is registered at `path`."""

    path: str
    module: nn.Module

    def apply(self, model: nn.Module) -> None:
        owner, name = owner_of(model, self.path)
        owner.add_module(name, self.module)

    def undo(self, model: nn.Module) -> None:
        owner, name = owner_of(model, self.path)
        delattr(owner, name)


@dataclass
class SetAttribute:
    """The attribute `name` of the module at `path`, neither a module nor a parameter, has another value."""

    path: str
    name: str
    value: Any
    original: Any = None
    was_set: bool = False

    def apply(self, model: nn.Module) -> None:
        owner = model.get_submodule(self.path)
        self.was_set, self.original = self.name in vars(owner), vars(owner).get(self.name)
        setattr(owner, self.name, self.value)

    def undo(self, model: nn.Module) -> None:
        owner = model.get_submodule(self.path)
        if self.was_set:
            setattr(owner, self.name, self.original)
        else:
            delattr(owner, self.name)


@dataclass
class AddHook:
    """A forward hook, or forward pre-hook, on the module at `path`.

    `hook` must be an object that can be copied and pickled: a method of a module or of a plain object, not a closure.
    """

    path: str
    hook: Callable[..., Any]
    kind: Literal["forward", "forward_pre"]
    with_kwargs: bool = False
    always_call: bool = False
    handle: RemovableHandle | None = None

    def apply(self, model: nn.Module) -> None:
        module = model.get_submodule(self.path)
        if self.kind == "forward_pre":
            self.handle = module.register_forward_pre_hook(self.hook, with_kwargs=self.with_kwargs)
        else:
            self.handle = module.register_forward_hook(
                self.hook, with_kwargs=self.with_kwargs, always_call=self.always_call
            )

    def undo(self, model: nn.Module) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


@dataclass
class TrainParameter:
    """A trained copy stands in place of the base's parameter at `path`; the base's own returns on `undo`.

    The base's own is not on the model meanwhile, so it follows the copy to another device or type when it returns.
    """

    path: str
    copy: nn.Parameter | None = None
    original: nn.Parameter | None = None
    last_seen: tuple[torch.device, torch.dtype] | None = None

    def apply(self, model: nn.Module) -> None:
        owner, name = owner_of(model, self.path)
        self.original = owner.get_parameter(name)
        if self.copy is None:
            self.copy = nn.Parameter(self.original.detach().clone(), requires_grad=True)
        setattr(owner, name, self.copy)
        self.note_place()

    def undo(self, model: nn.Module) -> None:
        owner, name = owner_of(model, self.path)
        assert self.original is not None and self.last_seen is not None
        # Looked up: sharding and `model.to("meta")` put other parameters in the copy's place.
        self.copy = owner.get_parameter(name)
        follow(self.original, self.last_seen, (self.copy.device, self.copy.dtype))
        setattr(owner, name, self.original)

    def note_place(self) -> None:
        """Take the copy's present device and type as those that go with the base's present ones."""
        assert self.copy is not None
        self.last_seen = self.copy.device, self.copy.dtype


def follow(tensor: Tensor, old: tuple[torch.device, torch.dtype], new: tuple[torch.device, torch.dtype]) -> None:
    """Move a tensor, in place, as its model moved from one device and type to another.

    Args:
        tensor: a tensor that was off the model at that time.
        old: device and type that a tensor of the model had before.
        new: what that tensor of the model has now.
    """
    device = new[0] if new[0] != old[0] else tensor.device
    dtype = new[1] if new[1] != old[1] and tensor.is_floating_point() else tensor.dtype
    if (device, dtype) == (tensor.device, tensor.dtype):
        return
    moved = tensor.detach().to(device, dtype)
    if device.type == "meta" or tensor.is_meta:
        torch.utils.swap_tensors(tensor, nn.Parameter(moved, tensor.requires_grad))
    else:
        tensor.data = moved
