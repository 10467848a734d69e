"""LoRA on convolutions, `nn.MultiheadAttention`, layers of one's own, and with a bias: against peft and torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lit_peft
from lit_peft import LitPeftError, LoRASettings
from lit_peft.nn import LoRALayer
from lit_peft.nn.lora_attention import LoRAMultihead


class Net(nn.Module):
    """A layer of each kind that peft adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(6, 4, (3, 1), padding=(1, 0), bias=False)
        self.conv3 = nn.Conv3d(4, 8, 1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.embed(ids).transpose(1, 2))
        x = self.conv3(self.conv2(x.unsqueeze(-1)).unsqueeze(-1)).flatten(2)
        x = self.grouped(x).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.linear(x)
        return out


CASES: list[dict[str, Any]] = [
    {"target_modules": ["conv1", "conv2", "conv3"]},
    {"target_modules": ["conv1", "conv2", "conv3"], "use_dora": True},
    {"target_modules": ["conv1", "grouped"], "r": 4, "use_rslora": True},
    {"target_modules": ["attention", "linear"]},
    {"target_modules": ["conv1", "conv3", "linear"], "lora_bias": True},
    {"target_modules": ["attention", "conv2", "embed"], "rank_pattern": {"attention": 2, "conv2": 3}},
]


def seeded(seed: int = 0) -> tuple[Net, Tensor]:
    torch.manual_seed(seed)
    return Net().eval(), torch.randint(0, 11, (2, 9))


def randomize(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def theirs(settings: dict[str, Any], folder: Path) -> tuple[Any, Net, Tensor]:
    net, ids = seeded()
    model = randomize(peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=settings.pop("r", 2), **settings)))
    model.save_pretrained(folder)
    return model.eval(), net, ids


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return sorted(found, key=lambda grad: (grad.numel(), float(grad.abs().sum())))


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_outputs_and_gradients_are_those_of_pefts_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    model, net, ids = theirs(dict(settings), tmp_path / "theirs")
    bare = net(ids)
    lit_peft.load_adapter(net, tmp_path / "theirs")
    expected, out = model(ids), net(ids)
    assert (expected - bare).abs().max() > 1e-2
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    if "attention" in settings["target_modules"]:
        return  # peft adds the update of the output projection twice, the second time without a gradient
    for own, other in zip(gradients(net, out), gradients(model, expected), strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_peft_loads_what_we_write(settings: dict[str, Any], tmp_path: Path) -> None:
    net, ids = seeded()
    base = copy.deepcopy(net)
    randomize(lit_peft.attach(net, LoRASettings(**{"r": 2, **settings})))
    lit_peft.save_adapter(net, tmp_path / "ours")
    expected = net(ids)
    again = lit_peft.load_adapter(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(again(ids), expected, atol=0, rtol=0)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path / "ours")(ids), expected)


@pytest.mark.parametrize("settings", [case for case in CASES if "grouped" not in case["target_modules"]], ids=str)
def test_merging_and_detaching(settings: dict[str, Any]) -> None:
    net, ids = seeded()
    bare, before = net(ids), copy.deepcopy(net.state_dict())
    randomize(lit_peft.attach(net, LoRASettings(**{"r": 2, **settings})))
    expected = net(ids)
    lit_peft.merge_adapter(net)
    torch.testing.assert_close(net(ids), expected, atol=1e-5, rtol=1e-5)
    lit_peft.unmerge_adapter(net)
    torch.testing.assert_close(net(ids), expected, atol=0, rtol=0)
    merged = lit_peft.merge(copy.deepcopy(net))
    torch.testing.assert_close(merged(ids), expected, atol=1e-5, rtol=1e-5)
    assert set(merged.state_dict()) == set(before)
    lit_peft.detach(net)
    assert torch.equal(net(ids), bare)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_row_adapter_on_convolutions() -> None:
    net, ids = seeded()
    for seed, name in enumerate("ab"):
        lit_peft.add_adapter(net, name, LoRASettings(r=2, target_modules=["conv1", "linear"], lora_bias=name == "b"))
        torch.manual_seed(seed)
        randomize(net)
    alone = []
    for row, name in enumerate("ab"):
        with lit_peft.use_adapter(net, name):
            alone.append(net(ids)[row])
    with lit_peft.row_adapters(net, ["a", "b"]), torch.no_grad():
        torch.testing.assert_close(net(ids), torch.stack(alone))


def test_a_grouped_convolution_refuses_a_merge_and_an_unsuitable_rank() -> None:
    net, _ = seeded()
    with pytest.raises(LitPeftError, match=r"groups=2, and r=3 is no multiple"):
        lit_peft.attach(net, LoRASettings(r=3, target_modules=["grouped"]))
    weight = net.conv1.weight.clone()
    randomize(lit_peft.attach(net, LoRASettings(r=2, target_modules=["conv1", "grouped"])))
    with pytest.raises(LitPeftError, match="groups=2 cannot be merged"):
        lit_peft.merge(net)
    assert torch.equal(net.conv1.base_layer.weight, weight)  # type: ignore[union-attr]


def test_a_bias_of_the_update_needs_a_layer_with_a_bias_to_merge() -> None:
    net, _ = seeded()
    randomize(lit_peft.attach(net, LoRASettings(target_modules=["conv2"], lora_bias=True)))
    with pytest.raises(LitPeftError, match="lora_bias=True"):
        lit_peft.merge(net)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"target_modules": ["embed"]}], ids=str
)
def test_a_bias_of_the_update_is_refused_where_peft_refuses_it(settings: dict[str, Any]) -> None:
    settings = {"target_modules": ["linear"], "lora_bias": True, **settings}
    with pytest.raises(ValueError, match="lora_bias"):
        init = {"init_lora_weights": settings.get("init_lora_weights", True)}
        peft.get_peft_model(seeded()[0], peft.LoraConfig(**{**settings, **init}))
    with pytest.raises(LitPeftError, match="lora_bias=True"):
        lit_peft.attach(seeded()[0], LoRASettings(**settings))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}], ids=str)
def test_an_attention_refuses_settings_that_would_be_ignored(settings: dict[str, Any]) -> None:
    with pytest.raises(LitPeftError, match=f"{next(iter(settings))}.*attention, an nn.MultiheadAttention"):
        lit_peft.attach(seeded()[0], LoRASettings(target_modules=["attention"], **settings))


def test_attentions_with_separate_weights_are_refused() -> None:
    net = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4))
    with pytest.raises(LitPeftError, match="kdim=4"):
        lit_peft.attach(net, LoRASettings(target_modules=["0"]))


@pytest.mark.parametrize("training", [True, False])
def test_the_attention_of_a_transformer_layer_learns(training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 3, 8)
    before = layer(x)
    lit_peft.attach(layer, LoRASettings(target_modules=["self_attn"]))
    assert isinstance(layer.self_attn, LoRAMultihead)
    torch.testing.assert_close(layer(x), before)
    randomize(layer)(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters() if p.requires_grad)
    expected = layer(x)
    torch.testing.assert_close(lit_peft.merge(layer)(x), expected)


class Scaled(nn.Module):
    """A layer that no library knows: a diagonal matrix after a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T * self.scale


class LoRAScaled(LoRALayer):
    def __init__(self, base_layer: Scaled, **settings: Any) -> None:
        super().__init__(base_layer, 8, 8, **settings)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        return out if self.merged else out + x @ self.delta_weight().T * self.base_layer.scale  # type: ignore[operator]


def test_a_registered_layer_is_adapted_saved_and_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), Scaled()), torch.randn(3, 8)
    base = copy.deepcopy(net)
    with pytest.raises(LitPeftError, match="no layer of that name that can be adapted"):
        lit_peft.attach(net, LoRASettings(target_modules=["1"]))
    lit_peft.register_layer(Scaled, LoRAScaled)
    try:
        randomize(lit_peft.attach(net, LoRASettings(target_modules=["0", "1"])))
        expected = net(x)
        lit_peft.save_adapter(net, tmp_path / "adapter")
        torch.testing.assert_close(lit_peft.load_adapter(base, tmp_path / "adapter")(x), expected)
        torch.testing.assert_close(lit_peft.merge(net)(x), expected)
        for name in "ab":
            lit_peft.add_adapter(net, name, LoRASettings(target_modules=["0", "1"]))
        with pytest.raises(LitPeftError, match="LoRAScaled have no method `update`"):
            lit_peft.set_adapter(net, ["a", "b"])
        with pytest.raises(LitPeftError, match="LoRAScaled is registered for Scaled already"):
            lit_peft.register_layer(Scaled, type("Other", (LoRAScaled,), {}))
    finally:
        lit_peft.register_layer(Scaled, None)
    with pytest.raises(LitPeftError, match=r"subclass of lit_peft\.nn\.LoRALayer"):
        lit_peft.register_layer(Scaled, nn.Linear)  # type: ignore[arg-type]
