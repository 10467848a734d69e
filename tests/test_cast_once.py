"""A and B in half precision are cast once while they do not change, and never used when they have."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lit_peft
from lit_peft.nn.cast_once import CastOnce
from lit_peft.nn.lora import LoRALinear


class Casts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def made() -> tuple[LoRALinear, torch.Tensor]:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 6).bfloat16(), r=2)
    nn.init.normal_(layer.lora_B)
    return layer.eval(), torch.randn(2, 3, 8).bfloat16()


def test_tokens_are_decoded_without_casts() -> None:
    layer, x = made()
    with torch.no_grad():
        first = layer(x)
        with Casts() as casts:
            assert torch.equal(layer(x), first)
    assert casts.count == 0
    torch.testing.assert_close(layer(x).detach(), first, rtol=2e-2, atol=2e-2)  # with gradients, by other code


def in_place(layer: LoRALinear) -> None:
    layer.lora_A.mul_(2)


def other_memory(layer: LoRALinear) -> None:
    layer.lora_B.data = layer.lora_B.data * 2


def other_parameter(layer: LoRALinear) -> None:
    layer.lora_A = nn.Parameter(layer.lora_A * 2)


def loaded(layer: LoRALinear) -> None:
    layer.load_state_dict({**layer.state_dict(), "lora_B": layer.lora_B * 2})


def stepped(layer: LoRALinear) -> None:
    for parameter in (layer.lora_A, layer.lora_B):
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.5).step()


@pytest.mark.parametrize("change", [in_place, other_memory, other_parameter, loaded, stepped])
def test_a_change_is_seen(change) -> None:  # type: ignore[no-untyped-def]
    layer, x = made()
    with torch.no_grad():
        before = layer(x)
        for _ in range(3):
            change(layer)
            after = layer(x)
            fresh = layer.base_layer(x) + layer.scaling * (x @ layer.lora_A.bfloat16().T @ layer.lora_B.bfloat16().T)
            torch.testing.assert_close(after, fresh, rtol=2e-2, atol=2e-2)
    assert not torch.equal(before, after)


def test_nothing_is_kept_while_a_layer_trains() -> None:
    """Optimizers of bitsandbytes change weights where torch does not count it."""
    layer, x = made()
    with torch.no_grad():
        for mode in (False, True):
            before = layer.train(mode)(x)
            version = layer.lora_B._version
            torch.from_numpy(layer.lora_B.detach().numpy()).mul_(2)  # the same memory, another counter
            assert layer.lora_B._version == version
            assert not torch.equal(layer.train(True)(x), before)
            assert torch.equal(layer.eval()(x), layer.train(True)(x))


def test_nothing_is_kept_in_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with torch.no_grad():
        before = layer(x)
        torch.from_numpy(layer.lora_B.detach().numpy()).mul_(2)
        assert not torch.equal(layer(x), before)


def test_other_dtypes_and_copies() -> None:
    layer, x = made()
    with torch.no_grad():
        layer(x)
        twin, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        assert torch.equal(twin(x), layer(x)) and torch.equal(pickled(x), layer(x))
        assert twin._cast is not layer._cast
        layer.base_layer.half()
        assert layer(x.half()).dtype == torch.float16
    assert not any("cast" in name for name in layer.state_dict())


def test_inference_tensors_are_cast_each_time() -> None:
    cast = CastOnce()
    with torch.inference_mode():
        a, b = torch.ones(2, 3), torch.ones(4, 2)
        cast(a, b, torch.bfloat16)
        a.mul_(3)
        assert cast(a, b, torch.bfloat16)[0].max() == 3


def test_generation_is_the_same_as_with_gradients() -> None:
    from models import make, scramble

    model = make("llama").bfloat16()
    lit_peft.attach(model, lit_peft.LoRASettings(r=4, target_modules="all-linear"))
    scramble(model)
    ids = torch.randint(3, 61, (2, 7))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        without = model(ids).logits
    torch.testing.assert_close(without, model(ids).logits, rtol=0, atol=0.05)
