"""The recipes of other libraries run for a few steps on their own data, and learn what those libraries learn."""

from __future__ import annotations

import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from lit_peft.cli import main

ROOT = Path(__file__).parents[1]
NAMES = ("axolotl_instruct_lora", "trl_conversational_sft", "nemo_input_output", "tool_calling_sft")
CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def small(decoder: Path, tmp_path: Path) -> Path:
    """The tiny decoder with a tokenizer of the recipes' words, and room for their lengths."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(["</s>", "[PAD]", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path / "base"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="[PAD]")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=300, num_key_value_heads=2, eos_token_id=0, pad_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(
    name: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    config = ROOT / "configs" / "recipes" / f"{name}.yaml"
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(tmp_path / "runs")]
    given = ["--config", str(config), "--model.base", str(small), "--data.max_length", "1024"]
    assert main(["fit", *given, *quiet, "--trainer.max_steps", "2"]) == 0
    assert "train_loss" in capsys.readouterr().out
    assert (tmp_path / "runs" / "version_0" / "adapter" / "adapter_config.json").is_file()


def test_the_recipe_that_goes_on_from_an_adapter(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    recipes = ROOT / "configs" / "recipes"
    small_run = ["--model.base", str(small), "--data.max_length", "1024", "--trainer.enable_progress_bar", "false"]
    short = [*small_run, "--trainer.max_steps", "2", "--trainer.default_root_dir"]
    assert main(["fit", "--config", str(recipes / "axolotl_instruct_lora.yaml"), *short, str(tmp_path / "first")]) == 0
    adapter = tmp_path / "first" / "version_0" / "adapter"
    capsys.readouterr()
    config = ["--config", str(recipes / "continue_from_adapter.yaml"), "--model.adapter", str(adapter)]
    assert main(["fit", *config, *short, str(tmp_path / "second")]) == 0
    assert f"training starts from the weights in {adapter}" in capsys.readouterr().out
    first, second = (
        load_file(tmp_path / run / "version_0" / "adapter" / "adapter_model.safetensors") for run in ("first", "second")
    )
    changes = [(second[name] - tensor).abs().max() for name, tensor in first.items()]
    assert first.keys() == second.keys() and 0 < max(changes) < 0.01


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("axolotl_instruct_lora", "### Response:\n[[The capital of {country} is {city}.</s>]]"),
        ("trl_conversational_sft", "assistant [[It is {city}. </s>]] user And"),
        ("nemo_input_output", "Where is {city}? [[{city} is in {country}.</s>]]"),
        (
            "tool_calling_sft",
            'assistant\n[[<tool_call>{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}</tool_call>'
            "<|im_end|>]]",
        ),
    ],
)
def test_a_recipe_learns_the_answers(
    name: str, learned: str, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    config = ROOT / "configs" / "recipes" / f"{name}.yaml"
    more = ["--base", str(small), "--data.max_length", "1024", "--data.validation_fraction", "0", "--examples", "1"]
    assert main(["data", "--config", str(config), *more]) == 0
    out = capsys.readouterr().out
    assert learned.format(country="France", city="Paris") in out
    assert "left out" not in out and "24 rows, 24 examples, 0 duplicates" in out


@pytest.mark.parametrize("name", NAMES)
def test_the_data_of_a_recipe_is_json(name: str) -> None:
    config = yaml.safe_load((ROOT / "configs" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (ROOT / config["data"]["init_args"]["train"]).read_text().splitlines()]
    assert len(rows) == 24 and len({json.dumps(row) for row in rows}) == 24


@pytest.mark.parametrize("number", range(6))
def test_our_side_of_the_page_is_a_configuration(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    ours = re.findall(r'=== "lit_peft"\n\n    ```(\w+)\n(.*?)^    ```', page, flags=re.DOTALL | re.MULTILINE)
    assert len(ours) == 6
    kind, text = ours[number][0], textwrap.dedent(ours[number][1])
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    if kind == "yaml":
        (tmp_path / "page.yaml").write_text(text, encoding="utf-8")
        arguments = ["fit", "--config", str(tmp_path / "page.yaml")]
    else:
        arguments = shlex.split(text.replace("\\\n", " "))[1:]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--print_config"])
    assert done.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["base"] == "BASE" and printed["data"]["init_args"]["train"].startswith("rows.")
