"""Settings that cannot be are refused early: each refusal names the field, its value and the fix."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import QUIET, batch, make, scramble

import lit_peft
from lit_peft import LitPeftError, LoRASettings
from lit_peft.cli import main
from lit_peft.methods.baselines import FullFineTuningSettings, HeadOnlySettings
from lit_peft.methods.rows import can_share
from lit_peft.models.tokenization import require_fast, with_padding
from lit_peft.nn.lora import LoRALinear
from lit_peft.training.optimizer import make_optimizer
from lit_peft.training.schedules import make_schedule


@pytest.mark.parametrize(
    "values",
    [
        {"lr_scheduler": "lineer"},
        {"learning_rate": -1.0},
        {"warmup_steps": -0.5},
        {"dtype": "float31"},
        {"adapter_dtype": "Linear"},
        {"task": "causal"},
        {"weight_decay": -0.1},
        {"num_labels": 0},
        {"labels": []},
        {"labels": ["a", "b", "a"]},
    ],
    ids=str,
)
def test_of_a_module(values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(LitPeftError, match=name) as caught:
        lit_peft.LoRA(base="x", **values)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"max_new_token": 3}, "'max_new_tokens'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many'"),
        ({"num_beams": 1.5}, "num_beams=1.5"),
        ({"do_sample": True, "temperature": -1.0}, "temperature=-1.0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p=1.5"),
        ({"do_sample": True, "top_k": -1}, "top_k=-1"),
        ({"temperature": 0.7}, "do_sample: true"),
        ({"max_new_tokens": 8, "num_beams": 4, "do_sample": True, "temperature": 0.7, "top_p": 1, "top_k": 0}, None),
    ],
    ids=str,
)
def test_of_generation(generation: dict[str, Any], words: str | None) -> None:
    with nullcontext() if words is None else pytest.raises(LitPeftError, match=words):
        lit_peft.LoRA(base="x", generation=generation)
    with pytest.raises(LitPeftError, match="generation"):
        lit_peft.LoRA(base="x", task="sequence_classification", generation=generation)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        *(("CausalLMData", {name: 0}) for name in ("batch_size", "max_length", "num_proc", "limit_train")),
        ("CausalLMData", {"num_workers": -1}),
        ("CausalLMData", {"test_fraction": 1.0}),
        ("CausalLMData", {"validation_fraction": 0.5, "test_fraction": 0.5}),
        ("CausalLMData", {"padding_side": "middle"}),
        ("CausalLMData", {"streaming": True, "group_by_length": True}),
        ("CausalLMData", {"prompt_template": "{"}),
        *(("CausalLMData", {"prompt_template": text}) for text in ("no column", "{a} {}", "")),
        ("InstructionData", {"template": "alpacca"}),
        ("InstructionData", {"format": "chatml"}),
        ("InstructionData", {"learn": "answer"}),
        ("InstructionData", {"learn": []}),
        ("ReasoningData", {"format": "messages"}),
        ("ReasoningData", {"max_new_tokens": 0}),
        ("ReasoningData", {"messages_column": "messages"}),
        ("ReasoningData", {"benchmark": "gsm9k"}),
    ],
    ids=str,
)
def test_of_data(kind: str, values: dict[str, Any]) -> None:
    with pytest.raises(LitPeftError) as caught:
        getattr(lit_peft, kind)(**values)
    assert all(name in str(caught.value) for name in values)


@pytest.mark.parametrize(
    ("kind", "values", "name", "other"),
    [
        ("CausalLMData", {"prompt_template": "{a}"}, "prompt_template", "completion_column"),
        ("CausalLMData", {"prompt_column": "a"}, "prompt_column", "completion_column"),
        (
            "CausalLMData",
            {"prompt_template": "{a}", "prompt_column": "b", "completion_column": "c"},
            "prompt_column",
            "prompt_template",
        ),
        ("CausalLMData", {"text_column": "a", "completion_column": "c"}, "text_column", "completion_column"),
        ("CausalLMData", {"packing": True, "padding_side": "left"}, "padding_side", "packing"),
        ("CausalLMData", {"dataset_config": "en"}, "dataset_config", "dataset"),
        ("InstructionData", {"chat_template": "x", "template": "alpaca"}, "chat_template", "alpaca"),
        ("InstructionData", {"template": "llm_adapters", "messages_column": "a"}, "template", "messages_column"),
        ("InstructionData", {"learn": "last_answer", "template": "plain"}, "learn", "plain"),
        ("InstructionData", {"learn": "last_answer", "train_on_inputs": True}, "learn", "train_on_inputs"),
        ("InstructionData", {"format": "sharegpt", "output_column": "a"}, "output_column", "sharegpt"),
        ("InstructionData", {"format": "alpaca", "messages_column": "a"}, "messages_column", "alpaca"),
        ("ReasoningData", {"chat_template": "x"}, "chat_template", "alpaca"),
        ("TextClassificationData", {"regression": True, "labels": ["0", "1"]}, "labels", "regression"),
        ("TextClassificationData", {"benchmark": "glue/stsb", "labels": ["0", "1"]}, "labels", "regression"),
        ("TextClassificationData", {"benchmark": "glue/cola", "text_column": "a"}, "text_column", "glue/cola"),
        ("TextClassificationData", {"benchmark": "glue/cola", "regression": True}, "regression", "glue/cola"),
        ("MultipleChoiceData", {"benchmark": "super_glue/copa", "answer_column": "a"}, "answer_column", "copa"),
        (
            "MultipleChoiceData",
            {"choices_column": "a", "choice_columns": ["b", "c"]},
            "choices_column",
            "choice_columns",
        ),
    ],
    ids=str,
)
def test_of_data_that_would_not_read_a_setting(kind: str, values: dict[str, Any], name: str, other: str) -> None:
    with pytest.raises(LitPeftError, match=rf"data\.{name}\b") as caught:
        getattr(lit_peft, kind)(**values)
    assert other in str(caught.value) and "leave" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"labels": ["pos", "neg"]}, "'pos' is class 0 of the model's labels, but class 1 of the data's"),
        ({"labels": ["other", "neg", "pos"]}, "'neg' is class 1 of the model's labels, but class 0 of the data's"),
        ({"labels": ["neg"]}, "2 labels, but the model has 1 output"),
        ({"num_labels": 1}, "2 labels, but the model has 1 output"),
        ({"labels": ["bad", "good"]}, None),
        ({"labels": ["neg", "pos", "other"]}, None),
        ({"num_labels": 3}, None),
    ],
    ids=str,
)
def test_of_labels_that_the_data_numbers_otherwise(
    values: dict[str, Any], words: str | None, encoder: Path, reviews: Path
) -> None:
    module = lit_peft.LoRA(base=str(encoder), task="sequence_classification", **values)
    data = lit_peft.TextClassificationData(base=str(encoder), train=str(reviews))
    trainer = pl.Trainer(**QUIET, max_steps=1, enable_checkpointing=False)
    with nullcontext() if words is None else pytest.raises(LitPeftError, match=words):
        trainer.fit(module, data)
    assert trainer.global_step == (words is None)


def test_of_an_optimizer_and_its_schedule() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    with pytest.raises(LitPeftError, match=r"optimizer='AdmW'.*AdamW"):
        make_optimizer(groups, "AdmW", 0.1, {})
    with pytest.raises(LitPeftError, match=r"optimizer='no\.such\.Module'"):
        make_optimizer(groups, "no.such.Module", 0.1, {})
    with pytest.raises(LitPeftError, match="does not accept optimizer_args"):
        make_optimizer(groups, "SGD", 0.1, {"betas": (0, 1)})
    optimizer = make_optimizer(groups, "torch.optim.SGD", 0.1, {"momentum": 0.5})
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults["momentum"] == 0.5
    with pytest.raises(LitPeftError, match="lr_scheduler='step'"):
        make_schedule(optimizer, "step", 0, 10)
    with pytest.raises(LitPeftError, match="max_steps"):
        make_schedule(optimizer, "linear", 0, math.inf)


def test_of_a_tokenizer_that_does_not_know_where_its_tokens_are() -> None:
    with pytest.raises(LitPeftError, match=r"data\.tokenizer 'x'"):
        require_fast(SimpleNamespace(is_fast=False, name_or_path="x"))


def test_of_a_tokenizer_without_tokens_to_pad_with(tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.pad_token = tokenizer.eos_token = None
    assert with_padding(tokenizer, "x").pad_token == "[UNK]"
    tokenizer.pad_token = tokenizer.unk_token = None
    with pytest.raises(LitPeftError, match="pad_token"):
        with_padding(tokenizer, "x")


@pytest.mark.parametrize("names", [["lm_haed"], ["lm_head", "down"], ["act_fn"], ["weight"], [""]], ids=str)
def test_of_modules_to_save_that_are_not_there(names: list[str]) -> None:
    model = make("llama")
    with pytest.raises(LitPeftError, match=f"modules_to_save names '{names[-1]}'.*closest"):
        lit_peft.attach(model, LoRASettings(modules_to_save=names))
    assert all(p.requires_grad for p in model.parameters()) and "q_proj.lora_A" not in str(list(model.state_dict()))


def two_loras(**second: Any) -> Any:
    model = make("llama")
    lit_peft.add_adapter(model, "a", LoRASettings(r=2))
    lit_peft.add_adapter(model, "b", LoRASettings(**{"r": 2, **second}))
    return model


@pytest.mark.parametrize(
    ("second", "arguments", "words"),
    [
        ({}, {"combination": "mean"}, "combination='mean'"),
        ({}, {"weights": {}}, "weights is empty"),
        ({}, {"combination": "ties", "density": 0.0}, "density=0.0"),
        *(({}, {"combination": "svd", "r": r}, f"r={r}") for r in (0, -1)),
        ({}, {"combination": "cat", "r": 3}, "r=3 .*'cat'"),
        ({}, {"combination": "linear", "r": 2}, "r=2 .*'linear'"),
        ({}, {"weights": {"a": float("nan"), "b": 1.0}}, "'a': nan"),
        ({}, {"weights": {"a": 1.0, "b": "1"}}, "'b': '1'"),
        ({}, {"weights": {"a": 1.0, "c": 1.0}}, "'c'"),
        ({"r": 3}, {"combination": "linear"}, "equal rank"),
        ({"use_dora": True}, {}, "'b' cannot be combined"),
        ({"modules_to_save": ["lm_head"]}, {}, "'b' cannot be combined"),
        ({"target_modules": ["k_proj"]}, {}, "'b' does not adapt the same modules"),
    ],
    ids=str,
)
def test_of_a_combination(second: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    model = two_loras(**second)
    with pytest.raises(LitPeftError, match=words):
        lit_peft.combine_adapters(model, "mix", **{"weights": {"a": 0.5, "b": 0.5}, **arguments})
    assert lit_peft.adapter_names(model) == ["a", "b"]


@pytest.mark.parametrize("format", [None, "peft", "adapterhub"])
@pytest.mark.parametrize("kind", ["HeadOnly", "FullFineTuning"])
def test_of_a_folder_for_what_is_no_adapter(kind: str, format: Any, decoder: Path, tmp_path: Path) -> None:
    module = getattr(lit_peft, kind)(base=str(decoder))
    module.configure_model()
    with pytest.raises(LitPeftError, match=r"no adapter to save.*save_pretrained"):
        module.save_adapter(tmp_path / "adapter", format)
    assert not any(tmp_path.iterdir())


def test_of_adapters_by_name() -> None:
    model = two_loras()
    with pytest.raises(LitPeftError, match="delete_adapter"):
        lit_peft.add_adapter(model, "a", LoRASettings(r=2))
    with pytest.raises(LitPeftError, match="'c'"):
        can_share(model, "c")
    assert can_share(model, "a")
    lit_peft.add_adapter(model, "p", lit_peft.PrefixTuningSettings(num_virtual_tokens=2))
    assert not can_share(model, "p")
    with pytest.raises(LitPeftError, match=r"No LoRA or \(IA\)³ is active"):
        lit_peft.merge_adapter(model)
    base = make("llama")(**batch("llama")).logits
    assert lit_peft.active_adapter(model) == "p"
    lit_peft.delete_adapter(model, "p")
    # The deleted adapter was the active one: what is left answers as the base.
    assert lit_peft.active_adapter(model) is None and lit_peft.adapter_names(model) == ["a", "b"]
    assert torch.equal(model.eval()(**batch("llama")).logits, base)


def test_an_adapter_that_cannot_be_built_leaves_the_active_one() -> None:
    model = two_loras()
    scramble(model)
    before = model.eval()(**batch("llama")).logits
    with pytest.raises(LitPeftError, match="no_such"):
        lit_peft.add_adapter(model, "c", LoRASettings(target_modules=["no_such"]))
    assert lit_peft.active_adapter(model) == "b" and torch.equal(model(**batch("llama")).logits, before)


def test_a_merge_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_loras()
    scramble(model)
    before, merge, calls = {k: v.clone() for k, v in model.state_dict().items()}, LoRALinear.merge, []

    def third_fails(layer: LoRALinear, check: bool = True) -> None:
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        merge(layer, check)

    monkeypatch.setattr(LoRALinear, "merge", third_fails)
    with pytest.raises(MemoryError):
        lit_peft.merge_adapter(model)
    assert not any(layer.merged for layer in calls)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_PEFT_DEBUG", raising=False)
    assert main([]) == main(["--help"]) == 0 and "fit" in capsys.readouterr().out
    assert main(["--version"]) == 0 and lit_peft.__version__ in capsys.readouterr().out
    assert main(["fitt"]) == 2 and "closest are" in capsys.readouterr().err
    monkeypatch.setenv("LIT_PEFT_DEBUG", "")
    with pytest.raises(LitPeftError):
        main(["fitt", "--debug"])
    monkeypatch.setattr("lit_peft.cli._usage", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([]) == 130


@pytest.mark.parametrize("text", ['model: "a\\0b"', 'trainer: {callbacks: "a\\0b"}'])
def test_of_a_name_that_no_file_can_have(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert main(["fit", "--config", str(tmp_path / "config.yaml")]) == 2
    assert "\\0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("AdapterP", {"bottleneck_size": 0}),
        ("AdapterP", {"non_linearity": "rely"}),
        ("AdapterP", {"scaling": "learnt"}),
        ("AdapterP", {"dropout": 1.0}),
        ("AdapterP", {"init_weights": "zero"}),
        ("AdapterP", {"reduction_factor": 0}),
        ("AdapterP", {"placement": "here"}),
        ("AdapterH", {"leave_out": "one"}),
        ("PTuningV2", {"num_virtual_tokens": 0}),
        ("PTuningV2", {"dropout": -0.1}),
        ("PTuningV2", {"positions": "none"}),
        ("PrefixTuning", {"prefix_projection_size": 0}),
        ("PrefixTuning", {"non_linearity": "sine"}),
        ("PrefixTuning", {"init_std": -0.1}),
    ],
    ids=str,
)
def test_of_a_method_before_there_is_a_model(method: str, values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(LitPeftError, match=f"{name}={value!r}"):
        getattr(lit_peft, f"{method}Settings")(**values)


def test_of_a_head_alone_where_none_is_named() -> None:
    model = make("bert")
    with pytest.raises(LitPeftError, match=r"BertForSequenceClassification .*modules_to_save=\['classifier'\]"):
        lit_peft.attach(model, HeadOnlySettings())
    with pytest.raises(LitPeftError, match="Linear is not a language model"):
        lit_peft.attach(torch.nn.Linear(2, 2), HeadOnlySettings())
    assert all(p.requires_grad for p in model.parameters())
    lit_peft.attach(model, HeadOnlySettings(modules_to_save=["classifier"]))
    assert lit_peft.trainable_parameters(model) == 2 * 33


def test_of_taking_off_full_fine_tuning() -> None:
    model = lit_peft.attach(make("bert"), FullFineTuningSettings())
    with pytest.raises(LitPeftError, match="changes the base itself: load the base again"):
        lit_peft.detach(model)


def test_of_task_settings_that_the_task_does_not_have() -> None:
    with pytest.raises(LitPeftError, match="task_args has 'beta', which task='causal_lm' does not have: leave task_ar"):
        lit_peft.LoRA(base="nowhere", task_args={"beta": 0.1})
