"""Experts of a mixture that are stored as one parameter: no linear layers, so what looks for layers skips them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.nn.expert_codes import KINDS
from lit_peft.nn.expert_lora import ExpertLoRA
from lit_peft.nn.quantized_experts import QuantizedStack, QuantizedWeight, expert_weight, make_dense
from lit_peft.util.memory import page_out

# What the kinds of bitsandbytes that have no like for experts stand for.
_LIKE = {"llm-int8": "int8"}


def stacked_experts(model: nn.Module) -> dict[str, Tensor]:
    """Return the unquantized parameters that hold the weights of several experts, by name, adapted or not.

    These are matrices stacked along a first dimension. Convolutions are not among them, nor an adapter's own matrices.
    """
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    passed_over = (*convolutions, ExpertLoRA)
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, passed_over):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            stacked = parameter.dim() == 3 and min(parameter.shape) > 1
            named = parameter.dim() == 2 and not isinstance(module, nn.Linear) and "experts" in name.split(".")
            # One bias for each expert is a matrix too.
            named = named and not name.endswith("bias")
            if (stacked or named) and parameter.is_floating_point():
                found[name] = parameter
    return found


def quantized_experts(model: nn.Module) -> dict[str, QuantizedStack]:
    """Return the quantized weights of experts, by the names that their parameters had."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedStack)}


def adaptable_weights(model: nn.Module) -> dict[str, Any]:
    """Return the parameters of a model by name; quantized weights of experts are operands that stand for them."""
    found: dict[str, Any] = {}
    stacks = quantized_experts(model)
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        found[path if path in stacks and last == "weight" else name] = parameter
    for path, stack in stacks.items():
        found[path] = stack.operand()
    return found


def weight_named(model: nn.Module, name: str) -> Any:
    """Return a parameter, or the operand that stands for it, by the parameter's name."""
    path, _, last = name.rpartition(".")
    return expert_weight(model.get_submodule(path), last)


def quantize_experts(model: nn.Module, quantization: str | Mapping[str, Any], skip: tuple[str, ...] = ()) -> None:
    """Quantize the weights of a mixture's experts in place, each expert on its own.

    Args:
        model: a transformers model, as it was loaded.
        quantization: `int8`, `int4`, `nf4`, `nf4-dq`, `fp4`, `fp4-dq`, `llm-int8` (as `int8`), `fp8`, or a config of
            bitsandbytes as a dictionary. With others, experts stay as they are.
        skip: names of the task's heads, which are not quantized.
    """
    kind = _kind(quantization)
    if kind is None:
        return
    for name, weight in stacked_experts(model).items():
        path, _, last = name.rpartition(".")
        experts = model.get_submodule(path)
        named = any("expert" in part or "moe" in part for part in path.lower().split("."))
        has_count = any("experts" in attribute for attribute in vars(experts))
        if weight.dim() != 3 or not (named or has_count) or name.partition(".")[0] in skip:
            continue
        is_transposed = bool(getattr(experts, "is_transposed", False))
        stack = QuantizedStack(weight, kind, is_transposed)
        delattr(experts, last)
        experts.add_module(last, stack.train(experts.training))
        page_out(weight)


def _kind(quantization: str | Mapping[str, Any]) -> str | None:
    """Return the kind of `QuantizedStack` for a setting; None if there is none."""
    if isinstance(quantization, str):
        kind = _LIKE.get(quantization, quantization)
        return kind if kind in KINDS else None
    if quantization.get("quant_method") != "bitsandbytes":
        return None
    if quantization.get("load_in_8bit"):
        return "int8"
    doubled = "-dq" if quantization.get("bnb_4bit_use_double_quant") else ""
    return f"{quantization.get('bnb_4bit_quant_type', 'fp4')}{doubled}" if quantization.get("load_in_4bit") else None


def dequantize_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Put parameters of this dtype in the place of quantized weights of experts."""
    for name in quantized_experts(model):
        path, _, last = name.rpartition(".")
        make_dense(model.get_submodule(path), last, dtype)


def experts_left_out(model: nn.Module, of_quantized: bool = True) -> str | None:
    """Return a sentence on the share of a model's weights in stacked experts without a LoRA; None if there are none.

    Args:
        model: the model.
        of_quantized: whether quantized experts count.
    """
    adapted = {id(_identity(layer.weight)) for layer in model.modules() if isinstance(layer, ExpertLoRA)}
    experts: dict[str, Any] = {**stacked_experts(model), **(quantized_experts(model) if of_quantized else {})}
    left = {name: weight for name, weight in experts.items() if id(weight) not in adapted}
    if not left:
        return None
    total = sum(parameter.numel() for parameter in model.parameters())
    total += sum(stack.numel() - stack.weight.numel() for stack in quantized_experts(model).values())
    share = sum(weight.numel() for weight in left.values()) / total
    return (
        f"{share:.0%} of the weights of {type(model).__name__} are experts that are stored as one parameter for all of "
        f"them (e.g. {next(iter(left))}), not as linear layers"
    )


def _identity(weight: Any) -> Any:
    return weight.stack if isinstance(weight, QuantizedWeight) else weight


def experts_adapted(model: nn.Module) -> str | None:
    """Return a sentence on what a LoRA on stacked experts trains; None if the model has none."""
    layers = [layer for layer in model.modules() if isinstance(layer, ExpertLoRA) and layer.stack]
    if not layers:
        return None
    trained = sum(parameter.numel() for layer in layers for parameter in layer.parameters(recurse=False))
    experts = sorted({layer.stack[0] for layer in layers})
    count = f"{experts[0]}" if len(experts) == 1 else f"{experts[0]} to {experts[-1]}"
    return f"LoRA on {len(layers)} parameters × {count} experts trains {trained:,} parameters"
