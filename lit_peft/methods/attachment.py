"""How a method goes onto a model and off again, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from lit_peft.methods.changes import (
    AddHook,
    AddModule,
    Change,
    ReplaceModule,
    SetAttribute,
    TrainParameter,
    follow,
    owner_of,
)
from lit_peft.methods.saving import SaveAdapter
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


@dataclass
class Attachment:
    """What was done to a model: the record of every change, and so of how to undo it.

    Attributes:
        model: the model.
        settings: the method's settings.
        changes: the changes, in the order they were made.
        adapted: the method's modules by path.
        trained: paths of the base's own parameters that are trained, as copies in their places.
        unfrozen: names of the base's parameters that required gradients before the method was attached.
        irreversible: why the method cannot be taken off again; None if it can.
        last_seen: device and type of the base when the method was last taken off it.
    """

    model: nn.Module
    settings: MethodSettings
    changes: list[Change] = field(default_factory=list)
    adapted: dict[str, nn.Module] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    unfrozen: list[str] = field(default_factory=list)
    irreversible: str | None = None
    last_seen: tuple[torch.device, torch.dtype] | None = None

    @property
    def saved(self) -> dict[str, nn.Parameter]:
        """The copies trained in place of the base's own parameters, by path, while they are on the model."""
        # Looked up, not kept: sharding a model puts other parameters in their places.
        return {path: self.model.get_parameter(path) for path in self.trained}

    @property
    def trained_copies(self) -> dict[str, nn.Parameter]:
        """The same copies while they are off the model."""
        records = (change for change in self.changes if isinstance(change, TrainParameter))
        return {record.path: record.copy for record in records if record.copy is not None}

    @property
    def hooks(self) -> list[AddHook]:
        """The hooks among the changes."""
        return [change for change in self.changes if isinstance(change, AddHook)]

    def make(self, change: Change) -> None:
        """Make a change and record it."""
        change.apply(self.model)
        self.changes.append(change)

    def replace(self, path: str, module: nn.Module) -> None:
        """Put `module` at `path`, in place of the base's own."""
        self._adopt(path, module)
        self.make(ReplaceModule(path, module))

    def add(self, path: str, module: nn.Module) -> None:
        """Register a new `module` at `path`, where the model has none."""
        self._adopt(path, module)
        self.make(AddModule(path, module))

    def _adopt(self, path: str, module: nn.Module) -> None:
        module.train(owner_of(self.model, path)[0].training)
        self.adapted[path] = module

    def set(self, path: str, name: str, value: Any) -> None:
        """Set an attribute of the module at `path` that is neither a module nor a parameter."""
        self.make(SetAttribute(path, name, value))

    def forward_pre_hook(self, path: str, hook: Callable[..., Any], with_kwargs: bool = False) -> None:
        """Register a forward pre-hook on the module at `path`; arguments as torch's `register_forward_pre_hook`."""
        self.make(AddHook(path, hook, "forward_pre", with_kwargs))

    def forward_hook(self, path: str, hook: Callable[..., Any], always_call: bool = False) -> None:
        """Register a forward hook on the module at `path`; arguments as torch's `register_forward_hook`."""
        self.make(AddHook(path, hook, "forward", always_call=always_call))

    def train(self, path: str) -> None:
        """Train a copy of the parameter at `path` in its place; the original returns at detach.

        Raises:
            LitPeftError: it is the weight of a quantized layer.
        """
        owner, name = owner_of(self.model, path)
        if name == "weight" and is_quantized(owner):
            raise LitPeftError(
                f"{path} is quantized, so its weight cannot be trained: leave it out of modules_to_save, or load the "
                "base without quantization."
            )
        self.make(TrainParameter(path))
        self.trained.append(path)

    def train_modules(self, names: tuple[str, ...] | list[str]) -> None:
        """Train every parameter of each module whose name is, or ends in, one of `names`; else the parameter so named.

        Raises:
            LitPeftError: no module with parameters, and no parameter, has one of the names.
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
                    f"modules_to_save names {name!r}, but {type(self.model).__name__} has no module with parameters of "
                    f"that name: the closest are {closest(name, [path.rpartition('.')[2] for path in paths])}."
                )
            for path in found:
                if path not in self.trained:
                    self._warn_if_tied(path, name)
                    self.train(path)

    def _warn_if_tied(self, path: str, name: str) -> None:
        """Say that a parameter shared with other modules is trained in one of them alone."""
        parameter = self.model.get_parameter(path)
        others = [
            other
            for other, shared in self.model.named_parameters(remove_duplicate=False)
            if shared is parameter and other != path
        ]
        if others:
            warnings.warn(
                f"modules_to_save={name!r}: {path} shares its weight with {', '.join(others[:3])} in the base. Only "
                f"the copy at {path} is trained; the weight there is no longer shared.",
                stacklevel=5,
            )

    def freeze(self) -> None:
        """Freeze the whole model, and note which parameters required gradients."""
        # Every name of a tied parameter: merging may untie it.
        named = self.model.named_parameters(remove_duplicate=False)
        self.unfrozen = [name for name, parameter in named if parameter.requires_grad]
        self.model.requires_grad_(False)

    def unfreeze(self) -> None:
        """Let the base's parameters require gradients again that did before. The method must be off the model."""
        for name in self.unfrozen:
            self.model.get_parameter(name).requires_grad_(True)

    def revert(self) -> None:
        """Undo everything, the last change first: the base is what it was, bit for bit.

        Raises:
            LitPeftError: the method trained the base itself.
        """
        self._check_reversible()
        self._undo_changes()
        self.unfreeze()

    def suspend(self) -> None:
        """Take the method off, to `resume` later. The model is the bare base meanwhile, and stays frozen.

        Raises:
            LitPeftError: the method trained the base itself.
        """
        self._check_reversible()
        for module in self._modules_with("suspend"):
            module.suspend()
        self._undo_changes()
        self.last_seen = _place_of(self.model)

    def resume(self) -> None:
        """Put the method back on, on the device and in the type that the base has by now."""
        self._follow_the_base()
        if self.unfrozen and self.model.get_parameter(self.unfrozen[0]).requires_grad:
            self.freeze()
        for change in self.changes:
            change.apply(self.model)
        for path, module in self.adapted.items():
            training = owner_of(self.model, path)[0].training
            if module.training != training:
                module.train(training)
        for kept in self._modules_with("resume"):
            kept.resume()

    def _check_reversible(self) -> None:
        if self.irreversible is not None:
            raise LitPeftError(self.irreversible)

    def _undo_changes(self) -> None:
        for change in reversed(self.changes):
            change.undo(self.model)

    def _follow_the_base(self) -> None:
        old, new = self.last_seen, _place_of(self.model)
        if old is None or new is None or old == new:
            return
        base = {id(parameter) for parameter in self.model.parameters()}
        own = [tensor for module in self.adapted.values() for tensor in (*module.parameters(), *module.buffers())]
        for tensor in (*own, *self.trained_copies.values()):
            if id(tensor) not in base:
                # A type other than the base's was chosen for it (fp32 beside bf16), and stays.
                kept_dtype = tensor.dtype != old[1]
                follow(tensor, old, (new[0], old[1] if kept_dtype else new[1]))

    def _modules_with(self, method: str) -> list[Any]:
        """The method's modules that have something to do themselves when they are taken off, or put back on."""
        return [module for module in self.adapted.values() if hasattr(type(module), method)]


def _place_of(model: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Device and type of a model's first parameter of floating point; None if it has none."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return None if first is None else (first.device, first.dtype)


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
    attachment.freeze()
    try:
        settings.attach_to(model, attachment)
        if settings.modules_to_save:
            attachment.train_modules(settings.modules_to_save)
        if attachment.adapted and hasattr(model, "save_pretrained"):
            attachment.set("", "save_pretrained", SaveAdapter(model))
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
