"""A model with a method attached is like any other: copied, pickled, moved and saved with what is attached to it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import batch, close, make, scramble, trained_of
from torch import nn

import lit_peft
from lit_peft import LitPeftError, LoRASettings
from lit_peft.methods.attachment import MethodSettings, attachment_of

SETTINGS: dict[str, MethodSettings] = {
    "LoRA": LoRASettings(r=4, target_modules="all-linear", bias="all"),
    "DoRA": LoRASettings(r=4, use_dora=True),
    "PiSSA": LoRASettings(r=4, init_lora_weights="pissa"),
    "IA3": lit_peft.IA3Settings(),
    "AdapterH": lit_peft.AdapterHSettings(train_layer_norms=True),
    "AdapterP": lit_peft.AdapterPSettings(),
    "Parallel": lit_peft.ParallelSettings(),
    "PromptTuning": lit_peft.PromptTuningSettings(num_virtual_tokens=4),
    "PTuning": lit_peft.PTuningSettings(num_virtual_tokens=4),
    "PrefixTuning": lit_peft.PrefixTuningSettings(num_virtual_tokens=4),
    "PTuningV2": lit_peft.PTuningV2Settings(num_virtual_tokens=4),
}
ARCHITECTURES = ("llama", "bloom", "deberta-v2", "t5")


def answer(model: Any, architecture: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch(architecture)).logits


def attached(method: str, architecture: str) -> Any:
    torch.manual_seed(0)
    model = lit_peft.attach(make(architecture), SETTINGS[method])
    scramble(model)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", SETTINGS)
def test_a_copy_and_a_pickle_stand_on_their_own(method: str, architecture: str) -> None:
    base = answer(make(architecture), architecture)
    model = attached(method, architecture)
    adapted = answer(model, architecture)
    assert not torch.allclose(adapted, base, atol=1e-4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(twin, architecture), adapted)
        assert trained_of(twin).keys() == trained_of(model).keys()
        with lit_peft.disable_adapter(twin):
            assert torch.equal(answer(twin, architecture), base)
        lit_peft.detach(twin)
        assert torch.equal(answer(twin, architecture), base)
        assert {name for name, _ in twin.named_modules()} == {name for name, _ in make(architecture).named_modules()}
    assert torch.equal(answer(model, architecture), adapted)


def test_a_merged_copy_leaves_training_as_it_was() -> None:
    model, inputs = attached("LoRA", "llama"), batch("llama")
    expected = answer(model, "llama")
    close(answer(lit_peft.merge(copy.deepcopy(model)), "llama"), expected)
    model(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in trained_of(model).values())
    assert torch.equal(answer(model, "llama"), expected)


def test_named_adapters_are_copied_with_their_model() -> None:
    model = make("llama").eval()
    for name, method in {"a": "LoRA", "b": "PTuningV2"}.items():
        torch.manual_seed(0)
        lit_peft.add_adapter(model, name, SETTINGS[method])
        scramble(model)
    expected = {}
    for name in ("a", "b"):
        lit_peft.set_adapter(model, name)
        expected[name] = answer(model, "llama")
    twin = copy.deepcopy(model)
    lit_peft.delete_adapter(model, "a")
    for name in ("a", "b"):
        assert torch.equal(answer(lit_peft.set_adapter(twin, name), "llama"), expected[name])


def test_another_process_reads_a_saved_model(tmp_path: Path) -> None:
    model = attached("PrefixTuning", "llama")
    torch.save({"model": model, "batch": batch("llama")}, tmp_path / "model.pt")
    code = (
        "import sys, torch; given = torch.load(sys.argv[1], weights_only=False); "
        "torch.save(given['model'](**given['batch']).logits, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt", tmp_path / "out.pt"], check=True)
    model.eval()
    close(torch.load(tmp_path / "out.pt"), answer(model, "llama"), 1e-6)


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.score = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.score(self.lin0(x).relu())
        return out


SCORED = LoRASettings(target_modules=["lin0"], modules_to_save=["score"])


def test_what_is_off_the_model_follows_it_to_another_type() -> None:
    x = torch.randn(3, 10, dtype=torch.bfloat16)
    model = Scored()
    lit_peft.add_adapter(model, "a", SCORED)
    lit_peft.add_adapter(model, "b", LoRASettings(target_modules=["lin0"]))
    model.to(torch.bfloat16)
    for name in ("a", None, "b"):
        lit_peft.set_adapter(model, name)
        assert model(x).dtype == torch.bfloat16
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    lit_peft.set_adapter(model, "a")
    assert {parameter.dtype for parameter in lit_peft.merge(model).parameters()} == {torch.bfloat16}


def test_what_is_off_the_model_follows_it_to_another_device() -> None:
    model = lit_peft.attach(Scored(), SCORED).to("meta")
    with lit_peft.disable_adapter(model):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in lit_peft.detach(model).parameters()} == {"meta"}


def test_an_adapter_in_fp32_stays_so_beside_a_base_of_another_type() -> None:
    model = lit_peft.attach(make("llama").to(torch.bfloat16), LoRASettings(r=4))
    lit_peft.set_adapter(model, None)
    model.to(torch.float16)
    lit_peft.set_adapter(model, "default")
    assert {parameter.dtype for parameter in trained_of(model).values()} == {torch.float32}


def test_the_base_stays_frozen_while_an_adapter_is_off() -> None:
    model, inputs = attached("LoRA", "llama"), batch("llama")
    before = set(trained_of(model))
    with lit_peft.disable_adapter(model):
        assert not trained_of(model)
        assert not model(**inputs).logits.requires_grad
    assert set(trained_of(model)) == before
    lit_peft.add_adapter(model, "other", LoRASettings(r=2))
    lit_peft.delete_adapter(model, "default")
    lit_peft.delete_adapter(model, "other")
    assert set(trained_of(model)) == set(trained_of(make("llama")))


def test_a_tied_weight_that_is_trained_alone_is_said() -> None:
    with pytest.warns(UserWarning, match=r"lm_head.weight shares its weight with transformer.wte.weight in the base"):
        lit_peft.attach(make("gpt2"), LoRASettings(modules_to_save=["lm_head"]))


def test_rows_of_several_adapters_are_for_inference() -> None:
    model = make("llama")
    lit_peft.add_adapter(model, "a", LoRASettings(r=2))
    model.train()
    with pytest.raises(LitPeftError, match=r"training mode.*model\.eval\(\)"), lit_peft.row_adapters(model, ["a"]):
        pass


def test_each_row_needs_a_name_and_generate_may_repeat_rows() -> None:
    model, ids = make("llama").eval(), batch("llama")["input_ids"]
    lit_peft.add_adapter(model, "a", SETTINGS["LoRA"])
    scramble(model)
    settings: dict[str, Any] = {"max_new_tokens": 3, "num_beams": 2, "pad_token_id": 0, "do_sample": False}
    alone = model.generate(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), **settings)
    with lit_peft.row_adapters(model, ["a", None]):
        mixed = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        with pytest.raises(LitPeftError, match="given 2 names, but the batch has 4 rows"):
            model(ids.repeat(2, 1))
        with pytest.raises(LitPeftError, match="given 2 names, but the batch has 1 rows"):
            model.generate(input_ids=ids[:1], max_new_tokens=1)
    assert torch.equal(mixed[:1], alone)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("method", ["LoRA", "AdapterH", "PTuningV2"])
def test_save_pretrained_writes_a_folder_that_loads(method: str, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = lit_peft.attach(base, SETTINGS[method])
    scramble(model)
    model.save_pretrained(tmp_path / "saved")
    expected = answer(model, "llama")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    close(answer(lit_peft.load_adapter(plain, tmp_path / "saved"), "llama"), expected)
    if method == "LoRA":  # through peft, which transformers asks for adapters
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        close(answer(loaded, "llama"), expected)
    with pytest.raises(LitPeftError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    lit_peft.detach(model).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "adapter_config.json").exists()


def test_transformers_trainer_resumes_with_a_method_attached(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 61, (16, 7))]

    def trained(resume: Path | None) -> Any:
        model = lit_peft.attach(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoRASettings(r=4))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return model

    through = trained(None)
    resumed = trained(tmp_path / "run" / "checkpoint-2")
    for name, parameter in trained_of(through).items():
        close(trained_of(resumed)[name], parameter, 1e-6)


@pytest.mark.parametrize("method", ["LoRA", "AdapterH", "PTuningV2", "PrefixTuning"])
def test_a_folder_holds_what_was_trained_in_both_towers(method: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.CLIPConfig(
        vision_config={**shape, "image_size": 16, "patch_size": 8},
        text_config={**shape, "vocab_size": 61, "max_position_embeddings": 32},
        projection_dim=16,
    )
    torch.manual_seed(0)
    base = transformers.CLIPModel(config).eval()
    inputs = {"input_ids": torch.randint(3, 60, (2, 7)), "pixel_values": torch.randn(2, 3, 16, 16)}
    model = lit_peft.attach(copy.deepcopy(base), SETTINGS[method] if method != "LoRA" else LoRASettings(r=4))
    scramble(model)
    lit_peft.save_adapter(model.eval(), tmp_path / "adapter")
    loaded = lit_peft.load_adapter(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        close(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


@pytest.mark.parametrize("method", ["LoRA", "AdapterH", "PromptTuning", "PTuningV2"])
def test_torch_export_takes_the_method_along(method: str) -> None:
    model, ids = attached(method, "llama").eval(), batch("llama")["input_ids"]
    program = torch.export.export(model, (ids,), kwargs={"use_cache": False}, strict=False)
    close(program.module()(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_a_bias_of_two_names_is_trained_where_the_model_uses_it() -> None:
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = transformers.BertForMaskedLM(config)
    with pytest.warns(UserWarning, match="shares its weight"):
        lit_peft.attach(model, LoRASettings(r=2, modules_to_save=["cls"]))
    ids = torch.randint(3, 61, (2, 7))
    model(input_ids=ids, labels=ids).loss.backward()
    trained = trained_of(model)
    assert trained["cls.predictions.decoder.bias"].grad is not None
    assert trained["cls.predictions.decoder.bias"].grad.abs().max() > 0


def test_modules_to_save_leaves_the_methods_own_parameters_alone() -> None:
    model = lit_peft.attach(make("llama"), lit_peft.AdapterPSettings(modules_to_save=["mlp"]))
    own = [name for name in trained_of(model) if ".ffn_adapter." in name or "_adapter." in name]
    assert own and not any("_adapter" in path for path in attachment_of(model).trained)
    assert sum(".mlp." in name for name in attachment_of(model).trained) == 6


def test_a_recurrent_layer_trained_in_full_cannot_share_a_batch() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0, self.rnn = nn.Linear(10, 10), nn.GRU(10, 10, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.rnn(self.lin0(x))[0]
            return out

    model = Recurrent().eval()
    lit_peft.add_adapter(model, "a", LoRASettings(target_modules=["lin0"], modules_to_save=["rnn"]))
    with lit_peft.row_adapters(model, ["a", None]), pytest.raises(LitPeftError, match="GRU returns more than one"):
        model(torch.randn(2, 5, 10))


def test_the_card_of_a_model_that_was_not_loaded_names_no_hub_repository(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.lin0 = nn.Linear(4, 4)
    lit_peft.save_adapter(lit_peft.attach(model, LoRASettings(target_modules=["lin0"])), tmp_path / "adapter")
    assert "base_model:" not in (tmp_path / "adapter" / "README.md").read_text()
