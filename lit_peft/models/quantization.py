"""Quantized frozen bases: by torchao on every device, by bitsandbytes, and in 8-bit floating point for new GPUs."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lit_peft.models.experts import dequantize_experts, experts_left_out, quantize_experts
from lit_peft.models.transformers_internals import clear_quantization_flags
from lit_peft.nn.float8 import Float8Linear
from lit_peft.nn.quantized import QuantizedLinear, dense_linear, is_quantized
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.lazy import is_instance
from lit_peft.util.memory import page_out

# The arguments of transformers' loader for each name. torchao's names are applied after loading, layer by layer.
_BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "llm-int8": {"load_in_8bit": True},
}
_TORCHAO = {"int8": 8, "int4": 4}
GROUP_SIZE = 32
# Of lit_peft itself: see `lit_peft.nn.float8`.
_FP8 = "fp8"
NAMES = (*_TORCHAO, *_BITSANDBYTES, _FP8)


def check_quantization(quantization: str | Mapping[str, Any] | None) -> None:
    """Check a quantization setting.

    Raises:
        LitPeftError: it is unknown, or its library is not installed; the message names the fix.
    """
    if quantization is None:
        return
    if isinstance(quantization, str):
        if quantization not in NAMES:
            raise LitPeftError(
                f"quantization={quantization!r} is not known: use {closest(quantization, NAMES)}, or a quantization "
                "config of transformers as a dictionary with quant_method."
            )
        library = "torchao" if quantization in _TORCHAO else "bitsandbytes" if quantization in _BITSANDBYTES else ""
    elif "quant_method" not in quantization:
        raise LitPeftError(
            f"quantization={dict(quantization)} has no quant_method: give one that transformers knows, e.g. "
            "{quant_method: bitsandbytes, load_in_4bit: true}."
        )
    else:
        library = str(quantization["quant_method"])
    if library in ("torchao", "bitsandbytes") and importlib.util.find_spec(library) is None:
        raise LitPeftError(
            f"quantization={quantization!r} needs {library}, which is not installed: pip install "
            "'lit-peft[quantization]'."
        )


def loading_arguments(
    quantization: str | Mapping[str, Any] | None, dtype: torch.dtype, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the arguments of transformers' `from_pretrained` that quantize the model while it is loaded.

    Args:
        quantization: a setting that `check_quantization` accepts.
        dtype: the dtype of the computation.
        skip: names of the task's heads, which are not quantized.

    Raises:
        LitPeftError: transformers does not accept the dictionary.
    """
    if quantization is None or (isinstance(quantization, str) and quantization not in _BITSANDBYTES):
        return {}
    if isinstance(quantization, str):
        from transformers import BitsAndBytesConfig

        settings = {**_BITSANDBYTES[quantization], "bnb_4bit_compute_dtype": dtype}
        # If no names are given, transformers skips the output embeddings and tied weights.
        return {"quantization_config": BitsAndBytesConfig(**settings, llm_int8_skip_modules=list(skip) or None)}
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return {"quantization_config": AutoQuantizationConfig.from_dict(dict(quantization))}
    except (TypeError, ValueError, ImportError, AttributeError, KeyError, AssertionError) as problem:
        raise LitPeftError(
            f"quantization={dict(quantization)} is not accepted by transformers: {problem}; check its arguments."
        ) from problem


def quantize(model: nn.Module, quantization: str | Mapping[str, Any] | None, skip: tuple[str, ...] = ()) -> None:
    """Quantize a model's linear layers in place, except heads and tied weights, so that gradients pass through them.

    `fp8` has one scale for each row, and quantizes activations as well. `int8` has one scale for each row. `int4` has
    one for each group of `GROUP_SIZE` weights, or for each row if that is not a divisor of the row's size. A mixture's
    experts that are stored as one parameter are quantized one by one, see `lit_peft.nn.quantized_experts`; a warning
    says how much of the model are experts that are not.

    Args:
        model: a transformers model, as it was loaded.
        quantization: the setting. `fp8` and torchao's names are quantized here; with others, the loader has done it.
        skip: names of the task's heads, which are not quantized.

    Raises:
        LitPeftError: the model has no linear layer to quantize.
    """
    if isinstance(quantization, str) and quantization not in _BITSANDBYTES:
        from transformers.quantizers.base import get_keys_to_not_convert

        skipped = set(get_keys_to_not_convert(model))
        found = [
            (path, module)
            for path, module in model.named_modules()
            if type(module) is nn.Linear and path not in skipped and path.partition(".")[0] not in skip
        ]
        if not found:
            raise LitPeftError(
                f"quantization={quantization!r}: {type(model).__name__} has no linear layers that can be quantized so "
                "(GPT-2's are Conv1D): use 'nf4' or 'llm-int8' of bitsandbytes, or no quantization."
            )
        for path, module in found:
            original = module.weight
            if quantization == _FP8:
                _put(model, path, Float8Linear(module.weight, module.bias).train(module.training))
            else:
                _put(model, path, _by_torchao(module, quantization))
            # The weights' file stays mapped until loading ends; its pages would add to the quantized weights.
            page_out(original)
    elif quantization is not None:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and _is_weight_only(module.weight):
                _put(model, path, _trainable_through(module))
            elif hasattr(module, "support_avx512bf16_for_cpu"):
                # Otherwise, evaluation on a CPU changes the weights' layout for good and rounds scales to bfloat16.
                module.support_avx512bf16_for_cpu = False
    if quantization is not None:
        quantize_experts(model, quantization, skip)
        # A tensor that is mapped from the weights' file keeps the entire file open.
        for tensor in (*model.parameters(), *model.buffers()):
            if type(tensor.data) is torch.Tensor and tensor.is_floating_point():
                tensor.data = tensor.data.clone()
        about = experts_left_out(model, of_quantized=False)
        if about is not None:
            warnings.warn(f"quantization={quantization!r}: {about}, so they are not quantized.", stacklevel=2)


def _by_torchao(module: nn.Linear, quantization: str) -> QuantizedLinear:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    if quantization == "int8":
        config: Any = Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        grouped = module.in_features % GROUP_SIZE == 0
        granularity = PerGroup(GROUP_SIZE) if grouped else PerAxis(0)
        config = IntxWeightOnlyConfig(weight_dtype=_int4(), granularity=granularity)
    quantize_(module, config)
    return _trainable_through(module)


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every quantized layer by a plain one, and those of experts, so that transformers saves the model."""
    dequantize_experts(model, dtype)
    for path, module in list(model.named_modules()):
        if is_quantized(module):
            _put(model, path, dense_linear(module, dtype))
    clear_quantization_flags(model)


def _is_weight_only(weight: Any) -> bool:
    """Whether a tensor of torchao consists of codes and scales, and activations are not quantized."""
    return (
        is_instance(weight, "torchao.quantization", "Int8Tensor", "IntxUnpackedToInt8Tensor")
        and getattr(weight, "act_quant_kwargs", None) is None
        and getattr(weight, "act_pre_scale", None) is None
        and getattr(weight, "activation_quantization", None) is None
    )


def _trainable_through(module: nn.Linear) -> QuantizedLinear:
    weight: Any = module.weight
    bits = 4 if getattr(weight, "target_dtype", None) == _int4() else 8
    # torchao also stores a zero point when all of it is zero.
    zero_point = weight.zero_point if weight.zero_point is not None and weight.zero_point.any() else None
    layer = QuantizedLinear(weight.qdata, weight.scale, zero_point, module.bias, bits)
    return layer.train(module.training)


def _int4() -> Any:
    # torch's type stubs lack it.
    return torch.int4  # type: ignore[attr-defined]


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
