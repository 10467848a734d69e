"""New tokens: only their rows are trained, and peft reads what is saved and the other way round."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from conftest import WORDS
from lightning.pytorch.callbacks import ModelCheckpoint
from models import QUIET, close, make, scramble
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_peft
from lit_peft import LitPeftError, LoRASettings
from lit_peft.cli import main
from lit_peft.methods.attachment import attachment_of

# The models have 61 tokens.
NEW = [61, 62, 63]
IDS = torch.tensor([[3, 61, 7, 5], [62, 8, 61, 9]])
# Weights of embeddings and head: shared, or not; gemma and bart scale, gptj's head has a bias.
TIED, UNTIED = ["gpt2", "gemma", "opt", "t5", "bart"], ["llama", "gptj", "phi"]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    model.eval()
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **more).logits
    return found


def settings(name: str, indices: Any = None) -> LoRASettings:
    """Rows of the head too, where it has a weight of its own."""
    model = make(name)
    paths = {id(module): path for path, module in model.named_modules()}
    both = [paths[id(module)] for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    chosen = indices or NEW
    return LoRASettings(r=4, trainable_token_indices=chosen if name in TIED else {path: chosen for path in both})


def trained(name: str) -> Any:
    model = lit_peft.attach(make(name), settings(name))
    scramble(model)
    return model


# peft 0.21.2 leaves out the bias of a head whose rows it trains.
WITHOUT_BIAS = [*TIED, "llama"]


@pytest.mark.parametrize("name", TIED + UNTIED)
def test_peft_reads_what_is_saved(name: str, tmp_path: Path) -> None:
    model = trained(name)
    assert model.config.vocab_size == 64 and logits(model).shape[-1] == 64
    lit_peft.save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = [tensor for key, tensor in stored.items() if "trainable_tokens_delta" in key]
    assert len(rows) == (1 if name in TIED else 2) and all(len(tensor) == 3 for tensor in rows)
    assert not [key for key in stored if "embed_tokens.weight" in key or "lm_head.weight" in key]
    base = make(name)
    base.resize_token_embeddings(64)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    if name in WITHOUT_BIAS:
        close(logits(theirs), logits(model))
    # And a base that nobody resized, here.
    close(logits(lit_peft.load_adapter(make(name), tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("name", WITHOUT_BIAS)
def test_what_peft_wrote_is_read(name: str, tmp_path: Path) -> None:
    base = make(name)
    base.resize_token_embeddings(64)
    start = copy.deepcopy(base)
    given = settings(name).trainable_token_indices
    target = {"gpt2": ["c_attn"], "t5": ["q"]}.get(name, ["q_proj"])
    config = peft.LoraConfig(r=4, target_modules=target, trainable_token_indices=given, init_lora_weights=False)
    theirs = peft.get_peft_model(base, config)
    for key, parameter in theirs.named_parameters():
        if "trainable_tokens_delta" in key:
            parameter.data.normal_()
    theirs.save_pretrained(tmp_path / "adapter")
    wanted = logits(theirs)
    for bare in (start, make(name)):
        close(logits(lit_peft.load_adapter(bare, tmp_path / "adapter")), wanted)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_only_the_rows_are_trained_and_detaching_restores_the_base(name: str) -> None:
    model = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = logits(model, IDS % 61)
    lit_peft.attach(model, settings(name))
    # Before training, the rows are the mean of the others, and nothing else changes.
    close(logits(model, IDS % 61)[..., :61], wanted)
    embeddings = model.get_input_embeddings()
    mean = before[next(key for key in before if before[key].shape[0] == 61 and before[key].dim() == 2)].mean(0)
    close(
        attachment_of(model).adapted[next(p for p in attachment_of(model).adapted if "token_rows" in p)].weight[0], mean
    )
    names = [key for key, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in key]
    assert len(names) == (1 if name in TIED else 2) and all(key.endswith("token_rows.weight") for key in names)
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    model(input_ids=IDS, labels=IDS, **more).loss.backward()
    for key in names:
        assert model.get_parameter(key).grad.abs().sum() > 0
    assert not embeddings.weight.requires_grad
    lit_peft.detach(model)
    assert model.config.vocab_size == 61 and embeddings.num_embeddings == 61
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    close(logits(model, IDS % 61), wanted)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_loss_and_its_gradients_are_those_of_full_tables(name: str) -> None:
    """Compared with a model whose tables are trained whole, in the rows of the new tokens."""
    model = lit_peft.attach(make(name), settings(name))
    full = make(name)
    full.resize_token_embeddings(64)
    with torch.no_grad():
        for table in {full.get_input_embeddings(), full.get_output_embeddings()}:
            table.weight[61:] = table.weight[:61].mean(0)
    full.requires_grad_(True)
    from lit_peft.tasks.causal_lm import CausalLM

    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    task = CausalLM()
    with task.loss_only(model):
        loss = task.run(model, batch).loss
    loss.backward()
    other = full(**batch).loss
    other.backward()
    close(loss, other)
    rows = [m for p, m in attachment_of(model).adapted.items() if p.endswith("token_rows")]
    tables = [full.get_input_embeddings().weight.grad[61:]]
    if name in UNTIED:
        tables.append(full.get_output_embeddings().weight.grad[61:])
    for mine, theirs in zip(rows, tables, strict=True):
        close(mine.weight.grad, theirs)


def test_rows_that_the_base_has_are_trained_without_new_ones() -> None:
    model = make("llama")
    wanted = logits(model, IDS % 61)
    lit_peft.attach(model, LoRASettings(r=4, trainable_token_indices=[60, 3]))
    assert model.config.vocab_size == 61
    close(logits(model, IDS % 61), wanted)
    with torch.no_grad():
        attachment_of(model).adapted["model.embed_tokens.token_rows"].weight.zero_()
    changed = copy.deepcopy(make("llama"))
    changed.get_input_embeddings().weight.data[[60, 3]] = 0
    close(logits(model, IDS % 61), logits(changed, IDS % 61))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_merging_writes_the_rows(name: str, tmp_path: Path) -> None:
    model = trained(name)
    wanted = logits(model)
    lit_peft.merge(model)
    close(logits(model), wanted)
    model.save_pretrained(tmp_path / "merged")
    close(logits(type(model).from_pretrained(tmp_path / "merged")), wanted)


def test_the_method_can_leave_and_come_back_and_be_copied() -> None:
    model = trained("gpt2")
    wanted = logits(model)
    close(logits(copy.deepcopy(model)), wanted)
    lit_peft.add_adapter(model, "other", LoRASettings(r=2))
    assert model.config.vocab_size == 61
    lit_peft.set_adapter(model, "default")
    close(logits(model), wanted)
    half = trained("gpt2").to(torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "method",
    ["LoRA", "IA3", "AdapterH", "AdapterP", "Parallel", "PrefixTuning", "PTuningV2", "PTuning", "PromptTuning"],
)
def test_every_method_saves_and_loads_them(method: str, tmp_path: Path) -> None:
    more = {"num_virtual_tokens": 3} if method.startswith("P") and method != "Parallel" else {}
    chosen = getattr(lit_peft, f"{method}Settings")(**more, trainable_token_indices=NEW)
    model = lit_peft.attach(make("gpt2"), chosen)
    scramble(model)
    lit_peft.save_adapter(model, tmp_path / "adapter")
    close(logits(lit_peft.load_adapter(make("gpt2"), tmp_path / "adapter")), logits(model))
    if method == "LoRA":
        return
    for format in ("peft", "adapterhub"):
        with pytest.raises(LitPeftError, match=r"leave format out|use format='peft'"):
            lit_peft.save_adapter(model, tmp_path / format, format=format)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"trainable_token_indices": [3, 3]}, "must be a list of different token ids"),
        ({"trainable_token_indices": [-1]}, "must be a list of different token ids"),
        ({"trainable_token_indices": [10**9]}, "names the row 1000000000, but the base has only 61"),
        ({"trainable_token_indices": {"embed": [3]}}, "names 'embed', which is not a module.*'embed_tokens'"),
        ({"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}, "name it in one of them only"),
        ({"trainable_token_indices": [3], "target_modules": ["embed_tokens"]}, "has no plain table of embeddings"),
    ],
)
def test_what_cannot_be_trained_is_refused(given: dict[str, Any], said: str) -> None:
    model = make("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(LitPeftError, match=said):
        lit_peft.attach(model, LoRASettings(**given))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------- modules


@pytest.fixture
def thoughts(tmp_path: Path) -> str:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"<think> {word} </think> good"}) + "\n" for word in WORDS))
    return str(file)


def test_a_module_trains_its_new_tokens_and_a_checkpoint_has_them(decoder: Path, thoughts: str, tmp_path: Path) -> None:
    tokens = ["<think>", "</think>"]
    data = lit_peft.CausalLMData(base=str(decoder), train=thoughts, add_tokens=tokens, max_length=8)
    module = lit_peft.LoRA(base=str(decoder), add_tokens=tokens, learning_rate=0.1)
    pl.seed_everything(0)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = pl.Trainer(max_steps=3, callbacks=[checkpoint], default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, data)
    # The tokenizer has 23 tokens, and the model 40 rows.
    rows = attachment_of(module.model).adapted["model.embed_tokens.token_rows"]
    assert rows.indices.tolist() == [23, 24] and data.tokenizer("<think>")["input_ids"] == [23]
    spare = module.model.get_input_embeddings().weight
    start = torch.cat([spare[:23], spare[25:]]).mean(0)
    assert 0 < (rows.weight - start).abs().max() < 0.5
    loaded = lit_peft.LoRA.load_from_checkpoint(checkpoint.last_model_path)
    batch = {"input_ids": torch.tensor([[23, 7, 24]])}
    close(loaded.eval()(**batch).logits, module.eval()(**batch).logits)
    lit_peft.save_adapter(module.model, tmp_path / "adapter")
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert saved("<think> good")["input_ids"] == data.tokenizer("<think> good")["input_ids"]
    bare = AutoModelForCausalLM.from_pretrained(decoder)
    close(logits(lit_peft.load_adapter(bare, tmp_path / "adapter"), batch["input_ids"]), module(**batch).logits)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decoder), tmp_path / "adapter")
    close(logits(theirs, batch["input_ids"]), module(**batch).logits)


def test_module_and_data_have_the_same_tokens(decoder: Path, thoughts: str) -> None:
    data = lit_peft.CausalLMData(base=str(decoder), train=thoughts)
    module = lit_peft.LoRA(base=str(decoder), add_tokens=["<think>"])
    with pytest.raises(LitPeftError, match=r"model.add_tokens is \['<think>'\], and data.add_tokens is None"):
        module.check_data(data)
    with pytest.raises(LitPeftError, match=r"does not have the row of '<think>'"):
        lit_peft.LoRA(base=str(decoder), add_tokens=["<think>"], trainable_token_indices=[3]).configure_model()
    with pytest.raises(LitPeftError, match=r"an empty token, or one twice"):
        lit_peft.LoRA(base=str(decoder), add_tokens=["<a>", "<a>"]).configure_model()


def test_the_command_line_gives_the_data_the_models_tokens(
    decoder: Path, thoughts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    model = ["--model", "AdapterP", "--model.base", str(decoder), "--model.add_tokens", "[<think>, </think>]"]
    data = ["--data", "CausalLMData", "--data.train", thoughts]
    trainer = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *model, *data, *trainer]) == 0
    (adapter,) = tmp_path.glob("lit_peft_runs/*/adapter")
    options = ["--base", str(decoder), "--adapter", str(adapter), "--prompt", "<think> good", "--max_new_tokens", "3"]
    assert main(["generate", *options]) == 0
    assert len(AutoTokenizer.from_pretrained(adapter)) == 25
