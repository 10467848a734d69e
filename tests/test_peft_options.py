"""Options that peft's users know: another scale, renamed tensors, no second copy, the base's dtype, safe merges."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lit_peft
from lit_peft import AdapterPSettings, LitPeftError, LoRASettings, PromptTuningSettings

TINY = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.arange(12).view(2, 6)
SETTINGS = {"r": 2, "target_modules": ["q_proj", "v_proj", "embed_tokens"], "rank_pattern": {"v_proj": 3}}


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, **HEADS)).eval()


def randomize(model: nn.Module, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of peft."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(**SETTINGS))
    randomize(model)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    return tmp_path / "theirs"


# ------------------------------------------------------------------------------------------------ scale


@pytest.mark.parametrize("factor", [0, 0.5, -2])
def test_a_rescaled_block_is_pefts(factor: float, folder: Path) -> None:
    theirs = peft.PeftModel.from_pretrained(llama(), folder)
    model = lit_peft.load_adapter(llama(), folder)
    before = model(IDS).logits
    with rescale_adapter_scale(theirs, factor), lit_peft.rescaled(model, factor):
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
        with lit_peft.rescaled(model, 1.5), rescale_adapter_scale(theirs, 1.5):
            torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(IDS).logits, before)
    with pytest.raises(RuntimeError, match="inside"), lit_peft.rescaled(model, factor):
        raise RuntimeError("inside")
    assert torch.equal(model(IDS).logits, before)


def test_a_scale_is_set_saved_and_merged(folder: Path, tmp_path: Path) -> None:
    model = lit_peft.set_scale(lit_peft.load_adapter(llama(), folder), 3)
    lit_peft.set_scale(model, 0.5)
    expected = model(IDS).logits
    theirs = peft.PeftModel.from_pretrained(llama(), folder)
    with rescale_adapter_scale(theirs, 0.5):
        torch.testing.assert_close(expected, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    again = peft.PeftModel.from_pretrained(llama(), lit_peft.save_adapter(model, tmp_path / "scaled"))
    torch.testing.assert_close(again(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    lit_peft.merge_adapter(model)
    for change in (lambda: lit_peft.set_scale(model, 1), lambda: lit_peft.rescaled(model, 1).__enter__()):
        with pytest.raises(LitPeftError, match="unmerge_adapter"):
            change()
    torch.testing.assert_close(lit_peft.merge(model)(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_scale_of_one_of_several(folder: Path) -> None:
    model = llama()
    for name in "ab":
        lit_peft.load_adapter(model, folder, name=name)
    lit_peft.set_scale(model, -1, "a")
    lit_peft.set_adapter(model, ["a", "b"])
    torch.testing.assert_close(model(IDS).logits, llama()(IDS).logits)
    lit_peft.set_scale(model, 1)
    with lit_peft.rescaled(model, 0.5):
        halves = model(IDS).logits
    lit_peft.set_adapter(model, "b")
    torch.testing.assert_close(model(IDS).logits, halves)


@pytest.mark.parametrize(
    ("settings", "factor", "why"),
    [
        (AdapterPSettings(), 2, "has no LoRA"),
        (LoRASettings(init_lora_weights="pissa"), 2, "'pissa' or 'olora'"),
        (LoRASettings(), float("nan"), "factor=nan"),
        (LoRASettings(), True, "factor=True"),
    ],
)
def test_scales_that_make_no_sense(settings: Any, factor: float, why: str) -> None:
    with pytest.raises(LitPeftError, match=why):
        lit_peft.set_scale(lit_peft.attach(llama(), settings), factor)


# ---------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("full_names", [False, True])
def test_tensors_are_renamed(full_names: bool, folder: Path, tmp_path: Path) -> None:
    expected = lit_peft.load_adapter(llama(), folder)(IDS).logits
    if full_names:
        model = lit_peft.load_adapter(llama(), folder)
        folder = lit_peft.save_adapter(model, tmp_path / "ours")
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace(".model.layers.", ".decoder.blocks."): value for name, value in tensors.items()}
    save_file(renamed, old / "adapter_model.safetensors")
    config = (old / "adapter_config.json").read_text()
    (old / "adapter_config.json").write_text(config.replace('"model.layers.', '"decoder.blocks.'))
    with pytest.raises(LitPeftError):
        lit_peft.load_adapter(llama(), old)
    mapping = {r"^decoder\.blocks": "model.layers", "^decoder": "not used, because the first match counts"}
    with pytest.raises(LitPeftError, match=r"key_mapping has '\^decoder'"):
        lit_peft.load_adapter(llama(), old, key_mapping=mapping)
    del mapping["^decoder"]
    model = lit_peft.load_adapter(llama(), old, key_mapping=mapping)
    assert torch.equal(model(IDS).logits, expected)
    if not full_names:
        theirs = peft.PeftModel.from_pretrained(llama(), old, key_mapping=mapping)
        torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mapping", "why"),
    [({"(": ""}, "no regular expression"), ({r"layers\.\d": "layers.0"}, "same name"), ({"q": r"\3"}, "replacement")],
)
def test_mappings_that_are_wrong(mapping: dict[str, str], why: str, folder: Path) -> None:
    model = llama()
    with pytest.raises(LitPeftError, match=why):
        lit_peft.load_adapter(model, folder, key_mapping=mapping)
    assert lit_peft.adapter_names(model) == []


def test_loading_without_a_second_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lit_peft.load_adapter(llama(), folder)(IDS).logits
    model = llama()
    state = torch.get_rng_state()
    made: list[torch.Size] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _noted(made, empty(*a, **k)))
    lit_peft.load_adapter(model, folder, low_cpu_mem_usage=True)
    assert made == [] and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(IDS).logits, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(isinstance(p, nn.Parameter) and p.device.type == "cpu" for p in trained) and len(trained) == 10
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in trained)
    lit_peft.detach(model)
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)
    monkeypatch.undo()
    lit_peft.load_adapter(llama(), folder)
    assert not torch.equal(torch.get_rng_state(), state)


def _noted(made: list[torch.Size], tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_meta:
        made.append(tensor.shape)
    return tensor


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_loading_every_kind_of_tensor_without_a_second_copy(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, **HEADS, attention_bias=True)
    base = LlamaForCausalLM(config).eval()
    model = lit_peft.attach(copy.deepcopy(base), LoRASettings(r=2, **settings))
    randomize(model)
    lit_peft.save_adapter(model, tmp_path / "adapter")
    again = lit_peft.load_adapter(copy.deepcopy(base), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_model_without_memory_gets_the_adapters_weights(folder: Path) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**TINY, **HEADS))
    lit_peft.load_adapter(model, folder, check_base=False)
    assert {p.device.type for p in model.parameters() if p.requires_grad} == {"cpu"}
    assert {p.device.type for p in model.parameters() if not p.requires_grad} == {"meta"}
    base = {name.replace(".base_layer.", "."): name for name, p in model.named_parameters() if not p.requires_grad}
    values = llama().state_dict()
    model.load_state_dict({base[name]: values[name] for name in base}, strict=False, assign=True)
    model.model.rotary_emb = llama().model.rotary_emb
    expected = lit_peft.load_adapter(llama(), folder)(IDS).logits
    torch.testing.assert_close(model.eval()(IDS).logits, expected)


def test_options_of_lora_are_refused_elsewhere(tmp_path: Path) -> None:
    for settings, option in (
        (AdapterPSettings(), "key_mapping"),
        (AdapterPSettings(), "low_cpu_mem_usage"),
        (PromptTuningSettings(prompt_tuning_init="RANDOM"), "low_cpu_mem_usage"),
    ):
        path = tmp_path / f"{settings.method}_{option}"
        lit_peft.save_adapter(lit_peft.attach(llama(), settings), path)
        with pytest.raises(LitPeftError, match=f"{option}=.*leave it out"):
            lit_peft.load_adapter(llama(), path, **{option: {"a": "b"} if option == "key_mapping" else True})


@pytest.mark.parametrize("settings", [LoRASettings(modules_to_save=["lm_head"]), AdapterPSettings()], ids=str)
def test_the_dtype_of_the_base(settings: Any, tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    lit_peft.attach(model, settings, autocast_adapter_dtype=False)
    randomize(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.bfloat16}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in trained)
    path = lit_peft.save_adapter(model, tmp_path / "adapter")
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        again = lit_peft.load_adapter(llama().to(torch.bfloat16), path, autocast_adapter_dtype=autocast)
        assert {p.dtype for p in again.parameters() if p.requires_grad} == {dtype}
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    other = lit_peft.add_adapter(llama().to(torch.bfloat16), "a", settings, autocast_adapter_dtype=False)
    assert {p.dtype for p in other.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"alora_invocation_tokens": [3]}], ids=str)
def test_adapterhubs_format_has_no_place_for_them(settings: dict[str, Any], tmp_path: Path) -> None:
    model = lit_peft.attach(llama(), LoRASettings(**settings))
    with pytest.raises(LitPeftError, match=f"no place for {next(iter(settings))}"):
        lit_peft.save_adapter(model, tmp_path / "adapter", format="adapterhub")


# ---------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("what", ["adapter", "sum"])
def test_a_merge_that_would_not_be_finite_changes_nothing(what: str) -> None:
    model = llama().half()
    before = copy.deepcopy(model.state_dict())
    lit_peft.attach(model, LoRASettings(r=1, lora_alpha=1))
    randomize(model)
    # The last layer: those before it must not be written either.
    last = model.model.layers[-1].self_attn.v_proj
    with torch.no_grad():
        last.lora_B.fill_(float("inf") if what == "adapter" else 3e4)
        last.lora_A.fill_(4.0)
    for merge in (lit_peft.merge_adapter, lit_peft.merge):
        with pytest.raises(LitPeftError, match=f"come from the {what}"):
            merge(model)
    lit_peft.detach(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
