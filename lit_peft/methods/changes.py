"""The changes that a method makes to a model, as plain objects.

Each change refers to its module by path and holds the modules and tensors that it needs, but no function bound to one
model. So a model can be copied, pickled or sent to another process with its method attached, and the copy can undo
its own changes. `apply` and `undo` can alternate any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_peft.nn.torch_internals import keep_last


class Change(Protocol):
    """One change to a model."""

    def apply(self, model: nn.Module) -> None:
        """Make the change to `model`."""

    def undo(self, model: nn.Module) -> None:
        """Undo the change: `model` is then as it was, bit for bit."""


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that owns what `path` names, and its name in that module.

    Args:
        model: the model that the path starts from.
        path: the path of a module or parameter, e.g. `layers.0.weight`.

    Returns:
        The owner and the last part of the path.
    """
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def tied_names(model: nn.Module, path: str) -> list[str]:
    """Return the other names of a parameter that several modules share.

    Args:
        model: the model.
        path: one name of the parameter.

    Returns:
        Its other names; empty if the parameter is not shared.
    """
    parameter = model.get_parameter(path)
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, other in named if other is parameter and name != path]


@dataclass
class ReplaceModule:
    """Replaces the module at `path` by `module`.

    If `module` has a method `restore_base`, its result is put back; otherwise the replaced module is.
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
    """Registers a new `module` at `path`."""

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
    """Sets the attribute `name`, neither a module nor a parameter, of the module at `path`."""

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
    """Registers a forward hook or a forward pre-hook on the module at `path`.

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
        keep_last(module)

    def undo(self, model: nn.Module) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


@dataclass
class TrainParameter:
    """Replaces the base parameter at `path` by a trained copy.

    While the original is off the model, it does not follow the model to another device or dtype. `undo` moves it as
    its copy was moved.
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
        self.record_device_and_dtype()

    def undo(self, model: nn.Module) -> None:
        owner, name = owner_of(model, self.path)
        assert self.original is not None and self.last_seen is not None
        # Sharding and `model.to("meta")` replace the copy by another parameter.
        self.copy = owner.get_parameter(name)
        follow(self.original, self.last_seen, (self.copy.device, self.copy.dtype))
        setattr(owner, name, self.original)

    def record_device_and_dtype(self) -> None:
        """Record the copy's device and dtype, from which `undo` sees how the model was moved since."""
        assert self.copy is not None
        self.last_seen = self.copy.device, self.copy.dtype


@dataclass
class PutBelow:
    """Puts an adapter on the model, frozen and under other names, before the one that is stacked on it.

    Attributes:
        attachment: the adapter, a suspended `Attachment`.
        place: its place in the stack, from 0, which is in the names of its modules.
        frozen: what has been frozen: the adapter's module, or None for the model, and the name of the parameter.
    """

    attachment: Any
    place: int
    frozen: list[tuple[nn.Module | None, str]] = field(default_factory=list)

    def apply(self, model: nn.Module) -> None:
        self._rename(lambda path: f"{path}_below_{self.place}")
        self.attachment.resume()
        for module in self.attachment.adapted.values():
            self._freeze(module, {name: p for name, p in module.named_parameters() if p.requires_grad})
        self._freeze(None, self.attachment.saved)

    def _freeze(self, module: nn.Module | None, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            self.frozen.append((module, name))

    def undo(self, model: nn.Module) -> None:
        for module, name in self.frozen:
            (model if module is None else module).get_parameter(name).requires_grad_(True)
        self.frozen.clear()
        self.attachment.suspend()
        self._rename(lambda path: path.removesuffix(f"_below_{self.place}"))

    def _rename(self, rename: Callable[[str], str]) -> None:
        attachment = self.attachment
        for change in attachment.changes:
            if isinstance(change, AddModule):
                change.path = rename(change.path)
        attachment.adapted = {rename(path): module for path, module in attachment.adapted.items()}


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Return device and dtype of a model's first floating-point parameter.

    Args:
        model: any model.

    Returns:
        The device and dtype; None if the model has no such parameter.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return None if first is None else (first.device, first.dtype)


def follow(tensor: Tensor, old: tuple[torch.device, torch.dtype], new: tuple[torch.device, torch.dtype]) -> None:
    """Move a tensor in place, as its model was moved from one device and dtype to another.

    Args:
        tensor: a tensor of any shape that was off the model at that time.
        old: device and dtype of a tensor of the model before the move.
        new: device and dtype of the same tensor after it.
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
