"""Which layers LoRA can adapt, and the class that adapts each: built in, or registered for a layer of one's own."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lit_peft.methods.targets import is_linear
from lit_peft.nn.lora import LoRAEmbedding, LoRALayer, LoRALinear
from lit_peft.nn.lora_conv import CONVOLUTIONS, LoRAConv
from lit_peft.util.errors import LitPeftError

_REGISTERED: dict[type[nn.Module], type[LoRALayer]] = {}


def register_layer(layer_class: type[nn.Module], lora_class: type[LoRALayer] | None) -> None:
    """Let LoRA adapt a class of layers of your own, wherever `target_modules` names one. Holds for the whole process.

    Args:
        layer_class: the layers, with their subclasses.
        lora_class: a subclass of `lit_peft.nn.LoRALayer` that is made from such a layer and the settings of
            `LoRALayer`: `lora_class(base_layer, **settings)`. It computes `base_layer(x)` and the update in `forward`.
            None removes what was registered.

    Raises:
        LitPeftError: an argument is not such a class, or another class is registered for the layers already.
    """
    if not (inspect.isclass(layer_class) and issubclass(layer_class, nn.Module)):
        raise LitPeftError(f"layer_class={layer_class!r}: give a class of layers, a subclass of torch.nn.Module.")
    if lora_class is None:
        _REGISTERED.pop(layer_class, None)
        return
    if not (inspect.isclass(lora_class) and issubclass(lora_class, LoRALayer)):
        raise LitPeftError(
            f"lora_class={lora_class!r}: give a subclass of lit_peft.nn.LoRALayer that adapts a "
            f"{layer_class.__name__}, or None to remove the one that is registered."
        )
    known = _REGISTERED.setdefault(layer_class, lora_class)
    if known is not lora_class:
        raise LitPeftError(
            f"{known.__name__} is registered for {layer_class.__name__} already: call "
            f"register_layer({layer_class.__name__}, None) first to replace it by {lora_class.__name__}."
        )


def lora_class(module: nn.Module) -> type[Any] | None:
    """Return the class that adapts a layer; None if there is none. `nn.MultiheadAttention` is not among them.

    Of the registered classes, the one for the nearest base class of the layer counts.
    """
    registered = next((_REGISTERED[kind] for kind in type(module).__mro__ if kind in _REGISTERED), None)
    if registered is not None:
        return registered
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding
    if isinstance(module, CONVOLUTIONS):
        return LoRAConv
    return LoRALinear if is_linear(module) else None


def new_layer(base: nn.Module, settings: dict[str, Any]) -> LoRALayer:
    """Return the LoRA layer for a layer that has a class, see `lora_class`.

    Raises:
        LitPeftError: the settings do not suit the layer, or a registered class does not take them.
    """
    kind = lora_class(base)
    assert kind is not None
    try:
        layer: LoRALayer = kind(base, **settings)
    except TypeError as problem:
        if kind not in _REGISTERED.values():
            raise
        raise LitPeftError(
            f"{kind.__name__}, registered for {type(base).__name__}, cannot be made with the settings of LoRALayer "
            f"({', '.join(settings)}): {problem}."
        ) from problem
    return layer


def can_adapt(module: nn.Module) -> bool:
    """Return whether LoRA can adapt a layer that `target_modules` names."""
    return isinstance(module, nn.MultiheadAttention) or lora_class(module) is not None
