"""Quantized frozen bases: by torchao, on every device, and by bitsandbytes."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.nn.quantized import QuantizedLinear, dense_linear, is_quantized
from lit_peft.util.errors import LitPeftError, closest

# What each name means to transformers' loader; those of torchao are done after loading, layer by layer.
_BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "llm-int8": {"load_in_8bit": True},
}
_TORCHAO = {"int8": 8, "int4": 4}
GROUP_SIZE = 32
NAMES = (*_TORCHAO, *_BITSANDBYTES)


def check_quantization(quantization: str | Mapping[str, Any] | None) -> None:
    """Refuse a quantization that is not known, or whose library is missing.

    Raises:
        LitPeftError: that is so; the message names the setting and the fix.
    """
    if quantization is None:
        return
    if isinstance(quantization, str):
        if quantization not in NAMES:
            raise LitPeftError(
                f"quantization={quantization!r} is not known: use {closest(quantization, NAMES)}, or a quantization "
                "config of transformers as a dictionary with its quant_method."
            )
        library = "torchao" if quantization in _TORCHAO else "bitsandbytes"
    elif "quant_method" not in quantization:
        raise LitPeftError(
            f"quantization={dict(quantization)} has no quant_method: give the one of transformers, e.g. "
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
    """The arguments that have transformers' `from_pretrained` quantize while it loads.

    Args:
        quantization: a setting that `check_quantization` has passed.
        dtype: the type to compute in.
        skip: names of the task's heads, which are left as they are.

    Raises:
        LitPeftError: transformers does not take the dictionary.
    """
    if quantization is None or (isinstance(quantization, str) and quantization in _TORCHAO):
        return {}
    if isinstance(quantization, str):
        from transformers import BitsAndBytesConfig

        settings = {**_BITSANDBYTES[quantization], "bnb_4bit_compute_dtype": dtype}
        # Without names of its own, transformers leaves out the output embeddings and what is tied.
        return {"quantization_config": BitsAndBytesConfig(**settings, llm_int8_skip_modules=list(skip) or None)}
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return {"quantization_config": AutoQuantizationConfig.from_dict(dict(quantization))}
    except (TypeError, ValueError, ImportError, AttributeError, KeyError, AssertionError) as problem:
        raise LitPeftError(f"quantization={dict(quantization)} is not one transformers knows: {problem}") from problem


def quantize(model: nn.Module, quantization: str | Mapping[str, Any] | None, skip: tuple[str, ...] = ()) -> None:
    """Quantize a model's linear layers in place, all but its heads and what is tied, and make torchao's trainable.

    `int8` has one scale for each row; `int4` one for each group of `GROUP_SIZE` weights, or for each row where that
    does not divide its width.

    Args:
        model: a transformers model, as it was loaded.
        quantization: the setting; only torchao's names quantize here.
        skip: names of the task's heads, which are left as they are.

    Raises:
        LitPeftError: the model has no linear layer to quantize.
    """
    if isinstance(quantization, str) and quantization in _TORCHAO:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
        from transformers.quantizers.base import get_keys_to_not_convert

        kept = set(get_keys_to_not_convert(model))
        found = [
            (path, module)
            for path, module in model.named_modules()
            if type(module) is nn.Linear and path not in kept and path.partition(".")[0] not in skip
        ]
        if not found:
            raise LitPeftError(
                f"quantization={quantization!r}: {type(model).__name__} has no linear layers that torchao can quantize "
                "(GPT-2 has Conv1D): use 'nf4' or 'llm-int8', which bitsandbytes does, or none."
            )
        for path, module in found:
            if quantization == "int8":
                config: Any = Int8WeightOnlyConfig(set_inductor_config=False)
            else:
                grouped = module.in_features % GROUP_SIZE == 0
                granularity = PerGroup(GROUP_SIZE) if grouped else PerAxis(0)
                config = IntxWeightOnlyConfig(weight_dtype=_int4(), granularity=granularity)
            original = module.weight
            quantize_(module, config)
            _put(model, path, _trainable_through(module))
            _let_go(original)
    elif quantization is not None:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and _is_weight_only(module.weight):
                _put(model, path, _trainable_through(module))
            elif hasattr(module, "support_avx512bf16_for_cpu"):
                # Else evaluation on a CPU lays the weights out anew, their scales rounded to bfloat16, for good.
                module.support_avx512bf16_for_cpu = False
    if quantization is not None:
        # Tensors that are mapped from the weights' file hold on to all of it.
        for tensor in (*model.parameters(), *model.buffers()):
            if type(tensor.data) is torch.Tensor and tensor.is_floating_point():
                tensor.data = tensor.data.clone()


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every quantized linear layer a plain one, in place, so that transformers saves the model as any other."""
    for path, module in list(model.named_modules()):
        if is_quantized(module):
            _put(model, path, dense_linear(module, dtype))
    config = getattr(model, "config", None)
    for name in ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    for name in ("quantization_config", "_is_quantized"):
        if config is not None and name in vars(config):
            delattr(config, name)


def _is_weight_only(weight: Any) -> bool:
    """Whether a tensor of torchao's is plain codes and scales, and activations are not quantized."""
    return (
        type(weight).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor")
        and getattr(weight, "act_quant_kwargs", None) is None
        and getattr(weight, "act_pre_scale", None) is None
        and getattr(weight, "activation_quantization", None) is None
    )


def _trainable_through(module: nn.Linear) -> QuantizedLinear:
    weight: Any = module.weight
    bits = 4 if getattr(weight, "target_dtype", None) == _int4() else 8
    # torchao keeps a zero point even where it is zero throughout.
    zero_point = weight.zero_point if weight.zero_point is not None and weight.zero_point.any() else None
    layer = QuantizedLinear(weight.qdata, weight.scale, zero_point, module.bias, bits)
    return layer.train(module.training)


def _int4() -> Any:
    # Of torch since 2.3, and not in its type stubs.
    return vars(torch)["int4"]


def _let_go(tensor: Tensor) -> None:
    """Give back the memory of a tensor that nobody reads any more.

    The pages of a mapped weights file stay resident until the whole file is unmapped: at the end of loading the process
    would hold all of it beside the quantized weights.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu" and tensor.is_contiguous():
        page = mmap.PAGESIZE
        # Whole pages of this tensor's alone.
        start, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
        if end > start:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
