"""The only file that uses private names of transformers, or looks at how its models are written.

`tests/test_internals_transformers.py` fails when one of them changes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def has_model_class(auto_class: str, config: Any) -> bool:
    """Return whether an auto class, e.g. `"AutoModelForCausalLM"`, has a model for this config."""
    import transformers

    # The public tables (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, …) cannot be found from an auto class's name.
    return type(config) in getattr(transformers, auto_class)._model_mapping


def is_model_of(auto_class: str, model: nn.Module) -> bool:
    """Return whether a model has the head that an auto class, e.g. `"AutoModelForTokenClassification"`, adds."""
    # All such models are named alike, those whose code comes with their weights included, which no table lists.
    return type(model).__name__.endswith(auto_class.removeprefix("AutoModel"))


def attention_implementation(config: Any) -> str | None:
    """Return the name of a config's attention function, e.g. `"sdpa"`; None if it names none."""
    # `set_attn_implementation` is public, but there is no public way to read it back.
    found: str | None = getattr(config, "_attn_implementation", None)
    return found


def supports_flash_attention(model: nn.Module) -> bool:
    """Return whether transformers can run a model with flash attention, whatever is installed."""
    # Checking it publicly means loading the model with a flash attention that is installed.
    return bool(getattr(model, "_supports_flash_attn", False))


def warns_without_mask(model: nn.Module) -> bool:
    """Return whether a model looks for padding in its input, and warns, if it is given no attention mask."""
    # Nothing but the code shows it. The warning would be wrong where the mask is left out on purpose.
    name = "warn_if_padding_and_no_attention_mask"
    forwards = {inspect.unwrap(type(module).forward) for module in model.modules() if hasattr(module, name)}
    return any(name in forward.__code__.co_names for forward in forwards)


class AttentionConfig:
    """Stands for the config of one attention module and names another attention function.

    Every other attribute is read from the config itself, including those that are set there later.

    Args:
        config: the module's config.
        implementation: the name that the function has in `transformers.AttentionInterface`.
    """

    def __init__(self, config: Any, implementation: str) -> None:
        self.config = config
        self.implementation = implementation

    @property
    def _attn_implementation(self) -> str:
        # Attention modules read this name in each forward pass; a config of their own is the only way to change it for
        # some modules of a model and not for others.
        return self.implementation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":
            raise AttributeError(name)
        return getattr(self.config, name)


def uses_attention_interface(module: nn.Module) -> bool:
    """Return whether an attention module looks up its attention function in `transformers.AttentionInterface`."""
    # Modules with attention code of their own ignore the function that their config names, and nothing else says so.
    return "ALL_ATTENTION_FUNCTIONS" in _names_in_forward(module)


def eager_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that an attention module uses with `attn_implementation="eager"`; None if it has none."""
    # Each model file defines its own, and `AttentionInterface` does not list them.
    homes = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    found = (getattr(home, "eager_attention_forward", None) for home in homes)
    return next((function for function in found if function is not None), None)


def alibi_function(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that builds ALiBi's bias in the module's file; None if it has none."""
    found: Callable[..., Any] | None = getattr(sys.modules[type(module).__module__], "build_alibi_tensor", None)
    return found


@torch.no_grad()
def returns_its_product(module: nn.Linear) -> bool:
    """Return whether a linear layer returns one tensor of `out_features`. Some routers return several tensors."""
    # Subclasses in transformers' models may compute anything, and only a call shows what they return.
    if type(module).forward is nn.Linear.forward or not type(module).__module__.startswith("transformers.models."):
        return True
    training = module.training
    try:
        # In evaluation mode, so that a router draws no random numbers.
        out = module.eval()(module.weight.new_zeros(1, module.in_features))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    finally:
        module.train(training)
    return isinstance(out, Tensor) and out.shape == (1, module.out_features)


def no_split_classes(model: nn.Module) -> set[type[nn.Module]]:
    """Return the classes of the layers that transformers never divides between devices."""
    # The names are in each model class; `device_map` and FSDP need them, and no public attribute has them.
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return {type(module) for module in model.modules() if type(module).__name__ in names}


def computes_next_token_loss(model: nn.Module) -> bool:
    """Return whether a model's forward computes transformers' next-token loss through `self.loss_function`."""
    # Some forwards compute a loss of their own; only their code shows whether they use `loss_function`.
    loss = getattr(model, "loss_function", None)
    return getattr(loss, "__name__", "") == "ForCausalLMLoss" and "loss_function" in _names_in_forward(model)


def own_loss_function(model: nn.Module) -> Any:
    """Return the loss function that was set on this model; None if it uses its class's."""
    return vars(model).get("_loss_function")


def set_own_loss_function(model: nn.Module, function: Any) -> None:
    """Set the loss function of this model, or go back to its class's if `function` is None."""
    # `loss_function` has a public setter but no deleter, and a model must be left as it was found.
    if function is not None:
        model.loss_function = function
    elif "_loss_function" in vars(model):
        del model._loss_function


def clear_quantization_flags(model: nn.Module) -> None:
    """Remove what `from_pretrained` notes on a quantized model, so that `save_pretrained` treats it as a plain one."""
    # `PreTrainedModel.dequantize` only works for bitsandbytes, and keeps part of them.
    for name in ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    config = getattr(model, "config", None)
    for name in ("quantization_config", "_is_quantized"):
        if config is not None and name in vars(config):
            delattr(config, name)


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    """Return the names of globals and attributes that a module's forward uses, below its decorators."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return () if code is None else code.co_names
