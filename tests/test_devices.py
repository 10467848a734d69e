"""Every tensor is made where the model is: shown without an accelerator, by torch's fake tensors.

They carry shape, type and device, and refuse operations across devices.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import batch, make, trained_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

import lit_peft
from lit_peft.nn.cross_entropy import head_cross_entropy
from lit_peft.nn.lora import LoRAEmbedding, LoRALinear
from lit_peft.nn.lora_function import lora_linear
from lit_peft.nn.quantized import QuantizedLinear
from lit_peft.nn.rows import LoRARows

DEVICE = torch.device("lazy", 0)  # of the devices besides the CPU, one that every build of torch can make views on
SETTINGS: dict[str, Any] = {
    "LoRA": lit_peft.LoRASettings(r=2, target_modules="all-linear", lora_dropout=0.1),
    "LoRA plain": lit_peft.LoRASettings(r=2),
    "DoRA": lit_peft.LoRASettings(r=2, use_dora=True, lora_dropout=0.1),
    "IA3": lit_peft.IA3Settings(),
    "AdapterH": lit_peft.AdapterHSettings(bottleneck_size=4, dropout=0.1),
    "AdapterP": lit_peft.AdapterPSettings(bottleneck_size=4, use_gating=True, scaling="channel"),
    "Parallel": lit_peft.ParallelSettings(bottleneck_size=4, scaling="learned"),
    "PrefixTuning": lit_peft.PrefixTuningSettings(num_virtual_tokens=3),
    "PTuningV2": lit_peft.PTuningV2Settings(num_virtual_tokens=3, positions="adapterhub"),
    "PromptTuning": lit_peft.PromptTuningSettings(num_virtual_tokens=3),
    "PromptTuning sequence": lit_peft.PromptTuningSettings(num_virtual_tokens=3, positions="sequence"),
    "PTuning": lit_peft.PTuningSettings(num_virtual_tokens=3, encoder_hidden_size=8),
}


pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode()


def moved(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    with no_dispatch():
        shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, shape, DEVICE)


def move(mode: FakeTensorMode, model: nn.Module, dtype: torch.dtype | None = None) -> None:
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    tensor = moved(mode, parameter).to(dtype or parameter.dtype)
                    module._parameters[name] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    module._buffers[name] = moved(mode, tensor)


def runs(mode: FakeTensorMode, model: nn.Module, name: str) -> None:
    with mode:
        inputs = {key: moved(mode, value) for key, value in batch(name).items()}
        for training in (True, False):
            model.train(training)
            output = model(**inputs)
            assert output.loss.device == DEVICE and output.logits.device == DEVICE
            output.loss.backward()
            with torch.no_grad():
                assert model(**inputs).loss.device == DEVICE
    for parameter, value in trained_of(model).items():
        assert value.grad is not None and value.grad.device == DEVICE, parameter


@pytest.mark.parametrize("name", ["bert", "t5"])
@pytest.mark.parametrize("method", SETTINGS)
def test_a_model_moved_after_it_was_adapted(mode: FakeTensorMode, method: str, name: str) -> None:
    model = lit_peft.attach(make(name), SETTINGS[method])
    move(mode, model)
    runs(mode, model, name)


@pytest.mark.parametrize("name", ["llama", "bart"])
@pytest.mark.parametrize("method", SETTINGS)
def test_a_half_precision_model_adapted_where_it_is(mode: FakeTensorMode, method: str, name: str) -> None:
    model = make(name)
    move(mode, model, torch.bfloat16)
    with mode:
        lit_peft.attach(model, SETTINGS[method])
    runs(mode, model, name)


def lora(x: torch.Tensor, made: Any) -> torch.Tensor:
    return lora_linear(x, made(6, 8), made(6), made(2, 8, grad=True), made(6, 2, grad=True), 2.0, 0.1)


def lora_on_codes(x: torch.Tensor, made: Any) -> torch.Tensor:
    codes, scale, zero = made(6, 4).to(torch.uint8), made(6, 2), made(6, 2)
    return lora_linear(x, codes, None, made(2, 8, grad=True), made(6, 2, grad=True), 2.0, 0.0, scale, zero)


def embedding(x: torch.Tensor, made: Any) -> torch.Tensor:
    base = nn.Embedding.from_pretrained(made(9, 8).to(torch.bfloat16))
    base.embed_scale = 2.0  # as Gemma's
    out: torch.Tensor = LoRAEmbedding(base, r=2, use_dora=True)(made(2, 3).long())
    assert out.dtype == torch.bfloat16
    return out + x.sum()


def of_rows(x: torch.Tensor, made: Any) -> torch.Tensor:
    layer = LoRALinear(nn.Linear(8, 6, device=x.device), r=2)
    out: torch.Tensor = LoRARows(layer.base_layer, [layer], torch.tensor([0, 1]))(x)
    return out


OPERATIONS: dict[str, Any] = {
    "LoRA in one operation": lora,
    "LoRA on 4 bits": lora_on_codes,
    "4 bits": lambda x, made: QuantizedLinear(made(6, 8).to(torch.int8), made(6, 2), made(6, 2), made(6), 4)(x),
    "embedding": embedding,
    "rows": of_rows,
    "head": lambda x, made: head_cross_entropy(x.flatten(0, 1), made(9, 8), made(6).long(), made(9), 2.0, 30.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation(mode: FakeTensorMode, name: str) -> None:
    def made(*shape: int, grad: bool = False) -> torch.Tensor:
        return moved(mode, torch.empty(shape)).requires_grad_(grad)

    with mode:
        x = made(2, 3, 8, grad=True)
        out = OPERATIONS[name](x, made)
        out.sum().backward()
    assert out.device == DEVICE and x.grad is not None and x.grad.device == DEVICE
