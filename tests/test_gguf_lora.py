"""A LoRA as llama.cpp's adapter file: the numbers that its formula adds to the base's own file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_gguf import write_llama
from models import make
from transformers import LlamaConfig, LlamaForCausalLM

import lit_peft
from lit_peft import LitPeftError, LoRASettings
from lit_peft.formats.gguf_lora import write_gguf_lora

gguf = pytest.importorskip("gguf")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, num_key_value_heads=2, max_position_embeddings=64, **shape))


def trained(model: Any, **settings: Any) -> Any:
    lit_peft.attach(model, LoRASettings(r=4, **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Fields and tensors of a GGUF file, by gguf's own reader."""
    reader = gguf.GGUFReader(str(file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3, "rank_pattern": {"k_proj": 2}},
        {"target_modules": ["q_proj", "lm_head"], "alpha_pattern": {"lm_head": 5}},
    ],
)
def test_the_file_adds_what_a_merge_adds(settings: dict[str, Any], tmp_path: Path) -> None:
    base = llama()
    write_llama(tmp_path / "base.gguf", base)
    model = trained(copy.deepcopy(base), **settings)
    write_gguf_lora(model, tmp_path)
    write_llama(tmp_path / "merged.gguf", lit_peft.merge(model))
    fields, updates = read(tmp_path / "adapter.gguf")
    (_, before), (_, after) = read(tmp_path / "base.gguf"), read(tmp_path / "merged.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.lora.alpha"] == settings.get("lora_alpha", 16)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.rpartition(".")[0] for name in updates} == changed and len(updates) == 2 * len(changed)
    for name in changed:
        a, b = updates[f"{name}.lora_a"], updates[f"{name}.lora_b"]
        scale = fields["adapter.lora.alpha"] / b.shape[1]  # as in llama.cpp
        np.testing.assert_allclose(before[name] + scale * b @ a, after[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "name"), [("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gemma", "gemma")])
def test_other_architectures_keep_their_rows(kind: str, name: str, tmp_path: Path) -> None:
    model = trained(make(kind), target_modules=["q_proj", "down_proj"], alora_invocation_tokens=[3, 4])
    write_gguf_lora(model, tmp_path)
    fields, tensors = read(tmp_path / "adapter.gguf")
    assert fields["general.architecture"] == name and list(fields["adapter.alora.invocation_tokens"]) == [3, 4]
    layer = model.model.layers[1].self_attn.q_proj
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight.lora_b"], layer.lora_B.detach().numpy())
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight.lora_a"], layer.lora_A.detach().numpy())
    assert "blk.0.ffn_down.weight.lora_a" in tensors
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "Modelfile").read_text()


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("llama", {"use_dora": True}, "cannot hold use_dora=True"),
        ("llama", {"modules_to_save": ["lm_head"]}, r"cannot hold modules_to_save=\['lm_head'\]"),
        ("llama", {"target_modules": ["embed_tokens"]}, "cannot hold the adapted model.embed_tokens"),
        ("gpt2", {"target_modules": ["c_attn"]}, "model_type='gpt2' is not known to be written as GGUF"),
    ],
)
def test_what_the_file_cannot_hold_is_refused(kind: str, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(LitPeftError, match=words):
        write_gguf_lora(trained(make(kind), **settings), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_export_writes_the_file(tmp_path: Path, decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from lit_peft.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    Path("texts.txt").write_text("".join(f"the film number {n} was good\n" for n in range(12)))
    model = ["--model", "LoRA", "--model.base", str(decoder), "--trainer.max_steps", "1"]
    data = ["--data", "CausalLMData", "--data.train", "texts.txt", "--data.batch_size", "4"]
    assert main(["fit", *model, *data, "--trainer.enable_progress_bar", "false"]) == 0
    checkpoint = str(next(Path("lit_peft_runs").rglob("last.ckpt")))
    assert main(["export", "--ckpt_path", checkpoint, "--output", "new", "--format", "gguf"]) == 0
    assert sorted(file.name for file in Path("new").iterdir()) == ["Modelfile", "adapter.gguf"]
    fields, tensors = read(Path("new/adapter.gguf"))
    assert fields["general.architecture"] == "llama" and len(tensors) == 8
