"""`lit-peft generate --chat` as a conversation with memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import scramble

import lit_peft
from lit_peft import LoRASettings, PromptTuningSettings
from lit_peft.cli import main

TEMPLATE = "{% for m in messages %}{{ 'the ' if m['role'] == 'user' else 'a ' }}{{ m['content'] }} {% endfor %}"
NEW, POSITIONS = 4, 40


@pytest.fixture(scope="module")
def chat_base(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a chat template and 40 positions."""
    folder = tmp_path_factory.mktemp("chat") / "base"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.5,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name, settings in {
        "lora": LoRASettings(r=4),
        "prompt": PromptTuningSettings(num_virtual_tokens=9, prompt_tuning_init="RANDOM"),
    }.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        scramble(lit_peft.attach(model, settings))
        lit_peft.save_adapter(model, folder.parent / name)
    return folder


def talk(base: Path, lines: list[str], monkeypatch: Any, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["generate", "--base", str(base), "--chat", "--max_new_tokens", str(NEW), *arguments])


def expected_answers(base: Path, lines: list[str], most_turns: int) -> list[str]:
    """What transformers says to each line after the turns before it, of which the last `most_turns` fit."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    messages: list[dict[str, str]] = []
    answers = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        messages = messages[-(2 * most_turns - 1) :]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        answers.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_the_model_knows_what_was_said_before(chat_base: Path, monkeypatch: Any, capsys: Any) -> None:
    lines = ["film was good", "story", "film was good"]
    expected = expected_answers(chat_base, lines, 9)
    assert expected[0] != expected[2]  # the same message, after other turns
    assert talk(chat_base, [lines[0], "", *lines[1:]], monkeypatch) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == expected
    assert "forgotten" not in said.err
    assert talk(chat_base, [*lines[:2], "/new", lines[2]], monkeypatch) == 0
    assert capsys.readouterr().out.splitlines() == [*expected[:2], expected[0]]


def test_the_oldest_turns_make_room_for_new_ones(chat_base: Path, monkeypatch: Any, capsys: Any) -> None:
    """A turn takes 1 + 5 tokens and its answer 1 + 4: three fit with a new message and its answer."""
    line = "film was good and great"
    lines = [line] * 6
    per_turn = 1 + 5 + 1 + NEW
    most_turns = (POSITIONS - NEW - 6) // per_turn + 1
    assert talk(chat_base, lines, monkeypatch) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == expected_answers(chat_base, lines, most_turns)
    assert said.err.count("the oldest turn was forgotten") == len(lines) - most_turns


def test_a_message_that_is_too_long_is_refused_and_the_conversation_goes_on(
    chat_base: Path, monkeypatch: Any, capsys: Any
) -> None:
    lines = ["film was good", "film " * POSITIONS, "story"]
    assert talk(chat_base, lines, monkeypatch) == 0
    first, refused, last = capsys.readouterr().out.splitlines()
    assert [first, last] == expected_answers(chat_base, [lines[0], lines[2]], 9)
    assert refused.startswith(f"The message has {POSITIONS + 1} tokens, and the model's positions allow at most 36")


def test_virtual_tokens_take_room_and_adapters_can_be_switched(chat_base: Path, monkeypatch: Any, capsys: Any) -> None:
    adapters = [f"--adapter={name}={chat_base.parent / name}" for name in ("lora", "prompt")]
    line = " ".join(["film"] * 30)
    assert talk(chat_base, ["/use prompt", line, "/use lora", line, "/use poems", "/base"], monkeypatch, *adapters) == 0
    refused, answer, unknown = capsys.readouterr().out.splitlines()
    assert refused.startswith("The message has 31 tokens, and the model's positions allow at most 27")
    model = lit_peft.load_adapter(
        transformers.AutoModelForCausalLM.from_pretrained(chat_base), chat_base.parent / "lora"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_base)
    ids = tokenizer(f"the {line}", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert "poems" in unknown


def test_one_prompt_is_one_turn(chat_base: Path, monkeypatch: Any, capsys: Any) -> None:
    assert talk(chat_base, ["never read"], monkeypatch, "--prompt", "film was good") == 0
    assert capsys.readouterr().out.splitlines() == expected_answers(chat_base, ["film was good"], 1)
