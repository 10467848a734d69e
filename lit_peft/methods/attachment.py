"""How a method goes onto a model and off again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_peft.nn.quantized import is_quantized
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import check_types

Model = TypeVar("Model", bound=nn.Module)
_KEY = "_lit_peft_attachment"


@dataclass(frozen=True)
class MethodSettings:
    """What every method's settings share.

    Args:
        modules_to_save: names of modules trained in full and stored with the adapter, e.g. a classification head; a
            single parameter by its full name.
    """

    method: ClassVar[str] = ""
    # What the method is commonly trained with, where the user gives none.
    learning_rate: ClassVar[float] = 1e-3
    # Whether each token is treated as its own, so that a row may hold several examples.
    packs: ClassVar[bool] = True
    modules_to_save: tuple[str, ...] | list[str] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Put the method onto the frozen model, every change through `attachment`."""
        raise NotImplementedError

    def learning_rate_factor(self, name: str) -> float:
        """How many times the learning rate the parameter of this name gets."""
        return 1.0


@runtime_checkable
class Suspendable(Protocol):
    """A module that keeps more than its own parameters, which it has to bring back itself."""

    def suspend(self) -> None:
        """Note what is lost when the module is taken off its model."""

    def resume(self) -> None:
        """Bring that back, on the model again."""


@dataclass
class Attachment:
    """The record of what was done to a model, and so of how to undo it."""

    model: nn.Module
    settings: MethodSettings
    undo: list[Callable[[], object]] = field(default_factory=list)
    redo: list[Callable[[], object]] = field(default_factory=list)
    adapted: dict[str, nn.Module] = field(default_factory=dict)
    owners: dict[str, nn.Module] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    hooks: list[tuple[Callable[[], object], Callable[[], object]]] = field(default_factory=list)
    # The trained copies while the method is off its model.
    kept: dict[str, nn.Parameter] = field(default_factory=dict)
    _found: list[Suspendable] | None = None

    @property
    def saved(self) -> dict[str, nn.Parameter]:
        """The copies trained in place of the model's own parameters, by path, as the model holds them now."""
        # Looked up, not kept: sharding a model puts other parameters in their places.
        return {path: self.model.get_parameter(path) for path in self.trained}

    def replace(self, path: str, module: nn.Module, restore: Callable[[], nn.Module]) -> None:
        """Put `module` at `path`; `restore` gives the module to put back."""
        parent, _, name = path.rpartition(".")
        owner = self.model.get_submodule(parent)
        module.train(owner.training)
        setattr(owner, name, module)
        self.adapted[path], self.owners[path] = module, owner
        # Straight into the dict from here on: what `setattr` checks holds, and takes most of a switch's time.
        inner = owner._modules
        self.did(lambda: inner.update({name: module}), lambda: inner.update({name: restore()}))

    def add(self, path: str, module: nn.Module) -> None:
        """Register a new `module` at `path`, where the model had none."""
        parent, _, name = path.rpartition(".")
        owner = self.model.get_submodule(parent)
        module.train(owner.training)
        owner.add_module(name, module)
        self.adapted[path], self.owners[path] = module, owner
        self.did(lambda: owner.add_module(name, module), lambda: delattr(owner, name))

    def set(self, owner: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of a module of the model that is neither a module nor a parameter."""
        had, original = name in vars(owner), vars(owner).get(name)
        setattr(owner, name, value)
        self.did(
            lambda: setattr(owner, name, value),
            lambda: setattr(owner, name, original) if had else delattr(owner, name),
        )

    def hook(self, handle: RemovableHandle) -> None:
        """Take note of a hook that was registered, to remove it again."""
        dicts = [handle.hooks_dict_ref(), *(reference() for reference in handle.extra_dict_ref)]
        entries = [(hooks, hooks[handle.id]) for hooks in dicts if hooks is not None and handle.id in hooks]
        self.hooks.append((lambda: [hooks.update({handle.id: hook}) for hooks, hook in entries], handle.remove))
        self.did(*self.hooks[-1])

    def train(self, path: str) -> None:
        """Train a copy of the parameter at `path` in its place; the original returns at detach.

        Raises:
            LitPeftError: it is the weight of a quantized layer.
        """
        parent, _, name = path.rpartition(".")
        owner = self.model.get_submodule(parent)
        original = owner.get_parameter(name)
        if name == "weight" and is_quantized(owner):
            raise LitPeftError(
                f"{path} is quantized and cannot be trained itself: leave it out of modules_to_save, or load the base "
                "unquantized."
            )
        copy = nn.Parameter(original.detach().clone(), requires_grad=True)
        setattr(owner, name, copy)
        self.trained.append(path)
        self.did(lambda: setattr(owner, name, copy), lambda: setattr(owner, name, original))

    def train_modules(self, names: tuple[str, ...] | list[str]) -> None:
        """Train every parameter of each module whose name is, or ends in, one of `names`; else the parameter so named.

        Raises:
            LitPeftError: no module with parameters is called by one of them, and no parameter.
        """
        paths = [path for path, module in self.model.named_modules() if path and any(True for _ in module.parameters())]
        single = {base_name(path): path for path, _ in self.model.named_parameters(remove_duplicate=False)}
        for name in names:
            named = [path for path in paths if path == name or path.endswith("." + name)]
            found = [
                f"{path}.{inner}" for path in named for inner, _ in self.model.get_submodule(path).named_parameters()
            ]
            if not found and name in single:
                found = [single[name]]
            if not found:
                raise LitPeftError(
                    f"modules_to_save names {name!r}, and {type(self.model).__name__} has no module with parameters of "
                    f"that name: the closest are {closest(name, [path.rpartition('.')[2] for path in paths])}."
                )
            for path in found:
                if path not in self.trained:
                    self.train(path)

    def did(self, again: Callable[[], object], undo: Callable[[], object]) -> None:
        """Take note of a change that was made: how to make it again, and how to undo it."""
        self.redo.append(again)
        self.undo.append(undo)

    def revert(self) -> None:
        """Undo everything, the last change first."""
        for step in reversed(self.undo):
            step()

    def suspend(self) -> None:
        """Undo everything, to `resume` later: the model is the bare base meanwhile."""
        for module in self._suspendable():
            module.suspend()
        self.kept = self.saved
        self.revert()

    def resume(self) -> None:
        """Make every change again, in the order they were made."""
        for step in self.redo:
            step()
        for path, module in self.adapted.items():
            training = self.owners[path].training
            if module.training != training:
                module.train(training)
        for kept in self._suspendable():
            kept.resume()

    def _suspendable(self) -> list[Suspendable]:
        # Asking a protocol is slow, and the answer stays.
        if self._found is None:
            self._found = [module for module in self.adapted.values() if isinstance(module, Suspendable)]
        return self._found


def base_name(path: str) -> str:
    """The name that a parameter inside an adapted layer has in the bare model."""
    return path.replace(".base_layer.", ".")


def attachment_of(model: nn.Module) -> Attachment:
    """The record of what is attached to `model`.

    Raises:
        LitPeftError: nothing is.
    """
    found = attachment_or_none(model)
    if found is None:
        raise LitPeftError(
            f"This {type(model).__name__} has no method attached: call lit_peft.attach(model, settings) first."
        )
    return found


def attachment_or_none(model: nn.Module) -> Attachment | None:
    """The record of what is attached to `model`, if anything is."""
    found: Attachment | None = getattr(model, _KEY, None)
    return found


def set_attachment(model: nn.Module, attachment: Attachment | None) -> None:
    """Say what is attached to `model`; putting it there is the caller's."""
    object.__setattr__(model, _KEY, attachment)


def attached_model(module: nn.Module) -> nn.Module | None:
    """The first module inside `module`, itself included, that has a method attached; None if there is none."""
    return next((inner for inner in module.modules() if getattr(inner, _KEY, None) is not None), None)


def attach(model: Model, settings: MethodSettings) -> Model:
    """Freeze `model` and attach the method that `settings` describe, in place.

    Args:
        model: any transformers model, or any `nn.Module` the settings' targets exist in.
        settings: the method's settings, e.g. `LoRASettings(r=8)`.

    Returns:
        The same model; only the method's parameters require gradients.

    Raises:
        LitPeftError: a method is attached already, or the settings do not fit the model. The model is as it was.
    """
    if getattr(model, _KEY, None) is not None:
        raise LitPeftError(
            f"This {type(model).__name__} has {attachment_of(model).settings.method!r} attached already: call "
            "lit_peft.detach(model) before attaching again, so that trained weights are never silently replaced."
        )
    attachment = Attachment(model, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            attachment.did(
                lambda p=parameter: p.requires_grad_(False),  # type: ignore[misc]
                lambda p=parameter: p.requires_grad_(True),  # type: ignore[misc]
            )
    try:
        settings.attach_to(model, attachment)
        if settings.modules_to_save:
            attachment.train_modules(settings.modules_to_save)
    except BaseException:
        attachment.revert()
        raise
    object.__setattr__(model, _KEY, attachment)
    return model


def detach(model: Model) -> Model:
    """Take the method off again: the base model, bit for bit.

    Raises:
        LitPeftError: nothing is attached, or it trained the base itself.
    """
    attachment_of(model).revert()
    object.__delattr__(model, _KEY)
    return model


def trainable_parameters(model: nn.Module) -> int:
    """The number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
