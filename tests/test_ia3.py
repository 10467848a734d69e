"""(IA)³: peft's outputs, gradients and folders, the layers of each architecture, merging, and several adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import ALL, DECODERS, ENCODERS, PEFT_TASK, batch, close, learns, make, scramble, trained_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lit_peft
from lit_peft import IA3Settings, LitPeftError
from lit_peft.methods.attachment import attachment_of
from lit_peft.nn.ia3 import IA3Linear
from lit_peft.nn.quantized import QuantizedLinear

SOME = ("llama", "gpt2", "bert", "t5", "bart")


def layers(model: nn.Module) -> dict[str, IA3Linear]:
    return {path: layer for path, layer in attachment_of(model).adapted.items() if isinstance(layer, IA3Linear)}


def ours(name: str, **settings: Any) -> Any:
    """A model with (IA)³ away from its start."""
    model = lit_peft.attach(make(name), IA3Settings(**settings))
    scramble(model)
    return model


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(**batch(name)).logits
    return out


def as_peft(name: str, model: Any) -> Any:
    """The same adapter in peft, made there and given our vectors."""
    found = layers(model)
    config = peft.IA3Config(
        target_modules=list(found),
        feedforward_modules=[path for path, layer in found.items() if layer.is_feedforward],
        task_type=PEFT_TASK[name],
        fan_in_fan_out=any(isinstance(layer.base_layer, Conv1D) for layer in found.values()),
    )
    theirs = peft.get_peft_model(make(name), config)
    for path, layer in found.items():
        vector = theirs.get_submodule(f"base_model.model.{path}").ia3_l["default"]
        vector.data.copy_(layer.ia3_l.detach().view_as(vector))
    return theirs


@pytest.mark.parametrize("name", ALL)
def test_outputs_and_gradients_are_those_of_peft(name: str) -> None:
    model = ours(name)
    theirs = as_peft(name, model)
    for each in (model, theirs):
        each.eval()
        each(**batch(name)).loss.backward()
    close(logits(model, name), logits(theirs, name))
    for path, layer in layers(model).items():
        expected = theirs.get_submodule(f"base_model.model.{path}").ia3_l["default"].grad
        close(layer.ia3_l.grad, expected.flatten(), 1e-4)


@pytest.mark.parametrize("name", SOME)
def test_a_folder_of_ours_is_read_by_peft(name: str, tmp_path: Path) -> None:
    model = ours(name)
    lit_peft.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(make(name), str(tmp_path / "adapter"))
    close(logits(theirs, name), logits(model, name))
    again = lit_peft.load_adapter(make(name), tmp_path / "adapter")
    assert torch.equal(logits(again, name), logits(model, name))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "IA3"


@pytest.mark.parametrize("name", SOME)
def test_a_folder_of_peft_is_read_by_us_and_written_back_the_same(name: str, tmp_path: Path) -> None:
    # peft's own choice of modules, with the head that it trains for this task.
    theirs = peft.get_peft_model(make(name), peft.IA3Config(task_type=PEFT_TASK[name]))
    scramble(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = lit_peft.load_adapter(make(name), tmp_path / "theirs")
    close(logits(model, name), logits(theirs, name))
    lit_peft.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(name), str(tmp_path / "ours"))
    close(logits(again, name), logits(theirs, name))
    stored, written = (peft.utils.load_peft_weights(str(tmp_path / each)) for each in ("theirs", "ours"))
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[key], written[key].cpu()) for key in stored)


def test_trained_modules_go_through_the_folder(tmp_path: Path) -> None:
    model = ours("bert", modules_to_save=["classifier", "bert.encoder.layer.0.attention.self.key.bias"])
    lit_peft.save_adapter(model, tmp_path / "adapter")
    again = lit_peft.load_adapter(make("bert"), tmp_path / "adapter")
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))
    expected = logits(model, "bert")
    close(logits(lit_peft.merge(model), "bert"), expected)


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    lit_peft.save_adapter(ours("llama"), tmp_path / "adapter")
    with pytest.raises(LitPeftError, match="k_proj"):
        lit_peft.load_adapter(make("gpt2"), tmp_path / "adapter", check_base=False)
    config = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text())
    values["target_modules"] = values["target_modules"][1:]
    config.write_text(json.dumps(values))
    with pytest.raises(LitPeftError, match=r"does not fit this model: missing .*, unexpected"):
        lit_peft.load_adapter(make("llama"), tmp_path / "adapter")


EXPECTED = {
    "llama": ({"k_proj", "v_proj", "down_proj"}, {"down_proj"}, 6),
    "phi3": ({"qkv_proj", "down_proj"}, {"down_proj"}, 4),
    "gpt2": ({"c_attn", "c_proj"}, {"c_proj"}, 4),
    "gptj": ({"k_proj", "v_proj", "fc_out"}, {"fc_out"}, 6),
    "bloom": ({"query_key_value", "dense_4h_to_h"}, {"dense_4h_to_h"}, 4),
    "bert": ({"key", "value", "dense"}, {"dense"}, 6),
    "distilbert": ({"k_lin", "v_lin", "lin2"}, {"lin2"}, 6),
    "deberta-v2": ({"key_proj", "value_proj", "dense"}, {"dense"}, 6),
    "modernbert": ({"Wqkv", "Wo"}, {"Wo"}, 4),
    # Two stacks of two layers, and cross-attention in one of them.
    "t5": ({"k", "v", "wo"}, {"wo"}, 16),
    "bart": ({"k_proj", "v_proj", "fc2"}, {"fc2"}, 16),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_keys_values_and_the_ends_of_the_ffns_are_adapted(name: str) -> None:
    named, feedforward, count = EXPECTED[name]
    found = layers(lit_peft.attach(make(name), IA3Settings()))
    assert {path.rpartition(".")[2] for path in found} == named
    assert {path.rpartition(".")[2] for path, layer in found.items() if layer.is_feedforward} == feedforward
    assert len(found) == count
    # Where names occur twice in a layer, those of the FFN alone.
    assert not any(part in path for path in found for part in ("attention.output", "attn.c_proj", "attn.Wo"))


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, "t5", "bart"])
def test_it_starts_at_the_base_learns_and_is_detached(name: str) -> None:
    base = make(name)
    before, state = logits(base, name), copy.deepcopy(base.state_dict())
    model = lit_peft.attach(base, IA3Settings())
    close(logits(model, name), before)
    assert {each.rpartition(".")[2] for each in trained_of(model)} == {"ia3_l"}
    learns(model, batch(name), 0.1)
    lit_peft.detach(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, name), before)


@pytest.mark.parametrize("name", SOME)
def test_merging_gives_the_same_answers_and_is_undone_bit_for_bit(name: str) -> None:
    base = make(name)
    state = copy.deepcopy(base.state_dict())
    model = lit_peft.attach(base, IA3Settings())
    scramble(model)
    expected = logits(model, name)
    lit_peft.merge_adapter(model)
    close(logits(model, name), expected)
    # A layer's bias is scaled with its output.
    moved = {key for key, value in model.state_dict().items() if key.endswith("base_layer.bias")}
    changed = {key for key in moved if not torch.equal(model.state_dict()[key], state[key.replace(".base_layer", "")])}
    assert changed == {f"{p}.base_layer.bias" for p, x in layers(model).items() if not x.is_feedforward and has_bias(x)}
    lit_peft.unmerge_adapter(model)
    assert torch.equal(logits(model, name), expected)
    merged = lit_peft.merge(copy.deepcopy(model))
    close(logits(merged, name), expected)
    assert merged.state_dict().keys() == state.keys()
    lit_peft.detach(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def has_bias(layer: IA3Linear) -> bool:
    return layer.bias is not None


@pytest.mark.parametrize("is_feedforward", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "int8", "int4"])
def test_layers_compute_the_formula(kind: str, is_feedforward: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, requires_grad=True)
    base: Any = Conv1D(6, 8) if kind == "conv1d" else nn.Linear(8, 6)
    if kind.startswith("int"):
        bits = int(kind[3:])
        codes = torch.randint(-7, 8, (6, 8), dtype=torch.int8)
        base = QuantizedLinear(codes, torch.rand(6, 2), None, torch.randn(6), bits)
    nn.init.normal_(base.bias)
    layer = IA3Linear(base, is_feedforward)
    scramble(layer)
    vector = layer.ia3_l.detach()
    expected = base(x * vector) if is_feedforward else base(x) * vector
    out = layer(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert layer.ia3_l.grad is not None and layer.ia3_l.grad.shape == (8 if is_feedforward else 6,)
    assert x.grad is not None
    if kind.startswith("int"):
        with pytest.raises(LitPeftError, match="quantized"):
            layer.merge()
        return
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    merged = base.weight.detach().clone()
    layer.unmerge()
    assert not torch.equal(base.weight, merged) and torch.equal(layer(x), out)


def test_small_changes_count_in_bfloat16() -> None:
    """l is multiplied in float32: 1.003 is 1 in bfloat16, and so would its product be."""
    layer = IA3Linear(nn.Linear(64, 64).bfloat16())
    assert layer.ia3_l.dtype == torch.float32
    torch.manual_seed(0)
    x = torch.randn(32, 64).bfloat16()
    with torch.no_grad():
        before = layer(x)
        layer.ia3_l.fill_(1.003)
        changed = (layer(x) != before).float().mean()
        expected = ((before.float() * 1.003).bfloat16() != before).float().mean()
        assert layer(x).dtype == torch.bfloat16 and changed == expected > 0.1
        layer.ia3_l.fill_(1.0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), before)
        weight = layer.weight.detach().clone()
        layer.ia3_l.fill_(1.003)
        layer.merge()
    assert torch.equal(layer.weight, (weight.float() * layer.ia3_l[:, None]).bfloat16())


def test_settings_choose_the_layers() -> None:
    chosen = layers(ours("llama", target_modules=["q_proj", "up_proj"], layers_to_transform=[1]))
    assert list(chosen) == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert not any(layer.is_feedforward for layer in chosen.values())
    chosen = layers(ours("llama", target_modules="all-linear", exclude_modules=["o_proj"]))
    ends = {path.rpartition(".")[2]: layer.is_feedforward for path, layer in chosen.items()}
    assert ends == {
        "q_proj": False,
        "k_proj": False,
        "v_proj": False,
        "gate_proj": False,
        "up_proj": False,
        "down_proj": True,
    }
    chosen = layers(ours("llama", target_modules=["k_proj", "up_proj"], feedforward_modules=r".*\.up_proj"))
    assert [layer.is_feedforward for layer in chosen.values()] == [False, True] * 2
    assert not any(layer.is_feedforward for layer in layers(ours("llama", feedforward_modules=[])).values())
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    lit_peft.attach(model, IA3Settings(target_modules=["0", "2"], feedforward_modules=["2"]))
    assert [layer.is_feedforward for layer in layers(model).values()] == [False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feedforward_modules": ["up_proj"]}, r"feedforward_modules has 'up_proj', which matches none .*down_proj"),
        ({"feedforward_modules": ".*up_proj"}, r"feedforward_modules has '\.\*up_proj', which matches none"),
        ({"feedforward_modules": "("}, r"feedforward_modules.*\("),
        ({"target_modules": ["embed_tokens"]}, r"target_modules has 'embed_tokens'.*no layer .* that can be adapted"),
        ({"target_modules": ["k_prj"]}, r"target_modules has 'k_prj'.*k_proj"),
        ({"layers_to_transform": [5]}, r"layers_to_transform has 5, but the layers .* 0 to 1"),
        ({"layers_pattern": "layers"}, r"layers_pattern=.* has no effect without layers_to_transform"),
        ({"exclude_modules": ["wo"]}, r"exclude_modules has 'wo'"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    model = make("llama")
    with pytest.raises(LitPeftError, match=message):
        lit_peft.attach(model, IA3Settings(**settings))
    assert not any(isinstance(module, IA3Linear) for module in model.modules())


def test_a_model_of_unknown_layers_needs_names() -> None:
    with pytest.raises(LitPeftError, match=r"target_modules is not set.*feedforward_modules="):
        lit_peft.attach(nn.Sequential(nn.Linear(4, 4)), IA3Settings())


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_rows_of_one_batch_use_different_adapters(name: str) -> None:
    """Two of (IA)³ that scale different layers, one of LoRA on some of them, and the base, in one forward."""
    model = ours(name)
    ends = ["k_proj", "down_proj"] if name == "llama" else ["k", "wo"]
    lit_peft.add_adapter(model, "all", IA3Settings(target_modules="all-linear", feedforward_modules=ends[:1]))
    scramble(model)
    lit_peft.add_adapter(model, "lora", lit_peft.LoRASettings(r=3, target_modules=ends))
    scramble(model)
    names = ["default", "all", "lora", None]
    inputs = {key: torch.cat([value, value + (key == "input_ids")]) for key, value in batch(name).items()}
    with torch.no_grad(), lit_peft.row_adapters(model.eval(), names):
        mixed = model(**inputs).logits
    for row, adapter in enumerate(names):
        with torch.no_grad(), lit_peft.use_adapter(model, adapter):
            close(mixed[row], model(**inputs).logits[row])
    assert not torch.allclose(mixed[0], mixed[3], atol=1e-3)


def test_rows_with_trained_modules_use_different_adapters() -> None:
    model = ours("bert", modules_to_save=["classifier"])
    lit_peft.add_adapter(model, "dora", lit_peft.LoRASettings(r=3, use_dora=True, target_modules=["key"]))
    scramble(model)
    with torch.no_grad(), lit_peft.row_adapters(model.eval(), ["default", "dora"]):
        mixed = model(**batch("bert")).logits
    for row, adapter in enumerate(("default", "dora")):
        with lit_peft.use_adapter(model, adapter):
            close(mixed[row], logits(model, "bert")[row])


def test_adapters_are_switched_and_not_added() -> None:
    model = ours("llama")
    first = logits(model, "llama")
    lit_peft.add_adapter(model, "other", IA3Settings(target_modules=["v_proj"]))
    scramble(model)
    assert not torch.allclose(logits(model, "llama"), first, atol=1e-4)
    model.double()
    lit_peft.set_adapter(model, "default")
    assert layers(model)["model.layers.0.self_attn.k_proj"].ia3_l.dtype == torch.float64
    close(logits(model, "llama").float(), first)
    with pytest.raises(LitPeftError, match="only LoRAs can"):
        lit_peft.set_adapter(model, ["default", "other"])
    with pytest.raises(LitPeftError, match="has no LoRA, so its scale"):
        lit_peft.set_scale(model, 0.5)


def test_a_merged_adapter_is_saved_as_if_it_were_not(tmp_path: Path) -> None:
    model = ours("bert")
    expected = logits(model, "bert")
    lit_peft.merge_adapter(model)
    lit_peft.save_adapter(model, tmp_path / "adapter")
    again = lit_peft.load_adapter(make("bert"), tmp_path / "adapter")
    assert torch.equal(logits(again, "bert"), expected)


def test_new_tokens_are_saved_with_the_vectors(tmp_path: Path) -> None:
    model = ours("llama", trainable_token_indices=[3, 5])
    lit_peft.save_adapter(model, tmp_path / "adapter")
    again = lit_peft.load_adapter(make("llama"), tmp_path / "adapter")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    expected = logits(model, "llama")
    close(logits(lit_peft.merge(model), "llama"), expected)


def test_experts_stay_frozen_and_a_warning_says_so() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "intermediate_size": 8, "vocab_size": 40}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **shape, **experts))
    with pytest.warns(UserWarning, match=r"experts.*\(IA\)³ cannot reach them"):
        lit_peft.attach(model, IA3Settings())
    assert {path.rpartition(".")[2] for path in layers(model)} == {"k_proj", "v_proj"}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_compiled_model_gives_the_same_answers(name: str) -> None:
    model = ours(name)
    expected = logits(model, name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(logits(compiled, name), expected)
