"""The record of what a method changed in a model, which makes each change reversible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from lit_peft.methods.changes import (
    AddHook,
    AddModule,
    Change,
    PutBelow,
    ReplaceModule,
    SetAttribute,
    TrainParameter,
    device_and_dtype,
    follow,
    owner_of,
    tied_names,
)
from lit_peft.nn.quantized import is_quantized
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import check_types

Model = TypeVar("Model", bound=nn.Module)
_KEY = "_lit_peft_attachment"


@dataclass(frozen=True)
class MethodSettings:
    """The settings that all methods share.

    Args:
        modules_to_save: names of modules to train in full and to save with the adapter, e.g. a classification head.
            A full parameter name selects a single parameter.
        trainable_token_indices: token ids whose embeddings are trained, as in peft; rows that the base lacks are added.
            A list for the input embeddings (and a head that shares their weight), or lists by the names of modules.

    Raises:
        LitPeftError: a value does not have the type of its field.
    """

    method: ClassVar[str] = ""
    # The usual learning rate of the method, for runs that set none.
    learning_rate: ClassVar[float] = 1e-3
    # Whether a row may hold several examples: the method treats each token alike.
    packs: ClassVar[bool] = True
    # Whether its adapters can be stacked, see `Stack`.
    stacks: ClassVar[bool] = False
    modules_to_save: tuple[str, ...] | list[str] | None = field(default=None, kw_only=True)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Add the method to a model. Every change must go through `attachment`, which can undo it.

        Args:
            model: the frozen model.
            attachment: makes and records the changes.

        Raises:
            LitPeftError: the settings do not fit the model.
        """
        raise NotImplementedError

    def learning_rate_factor(self, name: str) -> float:
        """Return the factor on the learning rate for one parameter.

        Args:
            name: the parameter's name in the model.

        Returns:
            The factor; 1 unless the method has different learning rates.
        """
        return 1.0


@dataclass
class Attachment:
    """A method on a model: a record of every change, which makes each one reversible.

    Attributes:
        model: the model.
        settings: the method's settings.
        changes: the changes, in the order they were made.
        adapted: the method's modules by path.
        trained: paths of base parameters that are trained. A copy of each takes its place.
        unfrozen: names of the base parameters that required gradients before the method was attached.
        irreversible: why the method cannot be detached; None if it can.
        started_from: name of the folder of the adapter that training started from; None if it started anew.
        last_seen: device and dtype of the base when `suspend` was last called.
        tokenizer: the tokenizer to save with the adapter, because it has new tokens; None: the base's own.
    """

    model: nn.Module
    settings: MethodSettings
    changes: list[Change] = field(default_factory=list)
    adapted: dict[str, nn.Module] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    unfrozen: list[str] = field(default_factory=list)
    irreversible: str | None = None
    started_from: str | None = None
    last_seen: tuple[torch.device, torch.dtype] | None = None
    tokenizer: Any = None

    @property
    def saved(self) -> dict[str, nn.Parameter]:
        """The trained copies of base parameters by path, while the method is on the model."""
        # They are looked up each time, because sharding a model replaces its parameters.
        return {path: self.model.get_parameter(path) for path in self.trained}

    @property
    def trained_copies(self) -> dict[str, nn.Parameter]:
        """The trained copies of base parameters by path, while the method is suspended."""
        changes = (change for change in self.changes if isinstance(change, TrainParameter))
        return {change.path: change.copy for change in changes if change.copy is not None}

    @property
    def below(self) -> list[Attachment]:
        """The adapters that this one is stacked on, the first one first; they are frozen."""
        return [change.attachment for change in self.changes if isinstance(change, PutBelow)]

    @property
    def hooks(self) -> list[AddHook]:
        """The hooks among the changes."""
        return [change for change in self.changes if isinstance(change, AddHook)]

    def make(self, change: Change) -> None:
        """Make a change and record it.

        Args:
            change: the change, not applied yet.
        """
        change.apply(self.model)
        self.changes.append(change)

    def replace(self, path: str, module: nn.Module) -> None:
        """Replace the base's module at `path` by `module`.

        Args:
            path: the name of the replaced module in the model.
            module: the new module.
        """
        self._add_to_adapted(path, module)
        self.make(ReplaceModule(path, module))

    def add(self, path: str, module: nn.Module) -> None:
        """Register a new module.

        Args:
            path: the name of the new module in the model, not taken yet.
            module: the new module.
        """
        self._add_to_adapted(path, module)
        self.make(AddModule(path, module))

    def _add_to_adapted(self, path: str, module: nn.Module) -> None:
        module.train(owner_of(self.model, path)[0].training)
        self.adapted[path] = module

    def set(self, path: str, name: str, value: Any) -> None:
        """Set an attribute that is neither a module nor a parameter.

        Args:
            path: the module that gets the attribute; empty for the model itself.
            name: the attribute.
            value: its new value.
        """
        self.make(SetAttribute(path, name, value))

    def forward_pre_hook(self, path: str, hook: Callable[..., Any], with_kwargs: bool = False) -> None:
        """Register a forward pre-hook.

        Args:
            path: the module that gets the hook; empty for the model itself.
            hook: as in torch's `register_forward_pre_hook`. It must be an object that can be copied and pickled, so
                not a closure.
            with_kwargs: whether the hook takes keyword arguments as well.
        """
        self.make(AddHook(path, hook, "forward_pre", with_kwargs))

    def forward_hook(self, path: str, hook: Callable[..., Any], always_call: bool = False) -> None:
        """Register a forward hook.

        Args:
            path: the module that gets the hook; empty for the model itself.
            hook: as in torch's `register_forward_hook`. It must be an object that can be copied and pickled, so not a
                closure.
            always_call: whether the hook also runs after a forward that failed.
        """
        self.make(AddHook(path, hook, "forward", always_call=always_call))

    def train(self, path: str) -> None:
        """Replace a base parameter by a trained copy. Detaching restores the original.

        Args:
            path: the parameter's name in the model.

        Raises:
            LitPeftError: the parameter is the weight of a quantized layer.
        """
        owner, name = owner_of(self.model, path)
        if name == "weight" and is_quantized(owner):
            raise LitPeftError(
                f"{path} is quantized, so its weight cannot be trained: leave it out of modules_to_save, or load the "
                "base without quantization."
            )
        tied = tied_names(self.model, path) if self.ties else []
        change = TrainParameter(path)
        self.make(change)
        for other in tied:
            self.make(TrainParameter(other, change.copy))
        self.trained += [path, *tied]

    @property
    def ties(self) -> bool:
        """Whether parameters that the base ties are trained as one."""
        return bool(getattr(self.settings, "ensure_weight_tying", False))

    def freeze(self) -> None:
        """Freeze the whole model and record which parameters required gradients."""
        # All names of a tied parameter are recorded, because merging may untie it.
        named = self.model.named_parameters(remove_duplicate=False)
        self.unfrozen = [name for name, parameter in named if parameter.requires_grad]
        self.model.requires_grad_(False)

    def unfreeze(self) -> None:
        """Restore which base parameters require gradients. The method must be off the model."""
        names = set(self.unfrozen)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in names)

    def revert(self) -> None:
        """Undo all changes in reverse order and unfreeze the base, which is then as it was, bit for bit.

        Raises:
            LitPeftError: the method trains the base itself.
        """
        self._check_reversible()
        self._undo_changes()
        self.unfreeze()

    def suspend(self) -> None:
        """Take the method off the model until `resume` is called. The base stays frozen.

        Raises:
            LitPeftError: the method trains the base itself.
        """
        self._check_reversible()
        for module in self._modules_with("suspend"):
            module.suspend()
        self._undo_changes()
        self.last_seen = device_and_dtype(self.model)

    def resume(self) -> None:
        """Put a suspended method back on the model, on the base's present device and in its present dtype."""
        self.follow_base()
        if self.unfrozen and self.model.get_parameter(self.unfrozen[0]).requires_grad:
            self.freeze()
        for change in self.changes:
            change.apply(self.model)
        for path, module in self.adapted.items():
            training = owner_of(self.model, path)[0].training
            if module.training != training:
                module.train(training)
        for module in self._modules_with("resume"):
            module.resume()

    def _check_reversible(self) -> None:
        if self.irreversible is not None:
            raise LitPeftError(self.irreversible)

    def _undo_changes(self) -> None:
        for change in reversed(self.changes):
            change.undo(self.model)

    def follow_base(self) -> None:
        """Move the method's tensors as the base was moved while they were off the model."""
        old, new = self.last_seen, device_and_dtype(self.model)
        if old is None or new is None or old == new:
            return
        in_base = {id(parameter) for parameter in self.model.parameters()}
        added = [tensor for module in self.adapted.values() for tensor in (*module.parameters(), *module.buffers())]
        for tensor in (*added, *self.trained_copies.values()):
            if id(tensor) not in in_base:
                # A dtype that differed from the base's was chosen deliberately (fp32 for a bf16 base) and is kept.
                dtype = new[1] if tensor.dtype == old[1] else old[1]
                follow(tensor, old, (new[0], dtype))

    def _modules_with(self, method: str) -> list[Any]:
        """The method's modules that define `suspend` or `resume`."""
        return [module for module in self.adapted.values() if hasattr(type(module), method)]


def base_name(path: str) -> str:
    """Return a parameter's name in the bare model, without the `base_layer` that a wrapped layer adds to it."""
    return path.replace(".base_layer.", ".")


def attachment_of(model: nn.Module) -> Attachment:
    """Return what is attached to a model.

    Args:
        model: a model with a method attached.

    Returns:
        The attachment.

    Raises:
        LitPeftError: no method is attached.
    """
    attachment = attachment_or_none(model)
    if attachment is None:
        raise LitPeftError(
            f"This {type(model).__name__} has no method attached: call lit_peft.attach(model, settings) first."
        )
    return attachment


def attachment_or_none(model: nn.Module) -> Attachment | None:
    """Return what is attached to a model.

    Args:
        model: a model with or without a method attached.

    Returns:
        The attachment; None if no method is attached.
    """
    attachment: Attachment | None = getattr(model, _KEY, None)
    return attachment


def set_attachment(model: nn.Module, attachment: Attachment | None) -> None:
    """Record what is attached to a model. The caller makes the changes themselves.

    Args:
        model: the model.
        attachment: what is now attached; None for nothing.
    """
    if attachment is not None:
        object.__setattr__(model, _KEY, attachment)
    elif attachment_or_none(model) is not None:
        object.__delattr__(model, _KEY)


def attached_model(module: nn.Module) -> nn.Module | None:
    """Return the first module with a method attached, the given one included; None if there is none."""
    return next((inner for inner in module.modules() if attachment_or_none(inner) is not None), None)


def trainable_parameters(model: nn.Module) -> int:
    """Return the number of scalars that are trained in a model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
