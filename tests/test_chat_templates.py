"""The chat templates that trl ships: which text is learned of each, and that it is what trl's own masks learn."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_peft.data.chat_rendering import ChatRenderer
from lit_peft.data.chats import encode_chats
from lit_peft.data.conversations import Form
from lit_peft.data.rows import RowError

trl = pytest.importorskip("trl", reason="trl ships the templates")
FOLDER = Path(trl.__path__[0]) / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
ORIGINALS = [name for name in NAMES if not name.endswith("_training")]
PATCHED = [name for name in ORIGINALS if f"{name}_training" in NAMES]
MARKED = [name for name in NAMES if re.search(r"\{%-? *generation", (FOLDER / f"{name}.jinja").read_text())]

# What the templates cannot render or do not read.
NO_SYSTEM = {"gemma"}
REFUSE_TOOLS = {"cohere", "cohere2", "gemma", "gemma3", "llava_next"}
IGNORE_TOOLS = {"deepseek_r1_distill", "idefics3", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"}
READ_REASONING = {
    *("diffusion_gemma", "gemma4_v5", "glm4moe", "gptoss", "muse_glimmer", "nemotron_3_5_lightning"),
    *("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3", "qwen3_5_nothink", "qwen3_5_think"),
    *("qwen3_6", "qwen3_8"),
}
# They mark the answers themselves, and mark none of the reasoning before the last question.
REASON_IN_THE_LAST_TURN = {"lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"}

SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where."}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"type": "function", "id": "call12345", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def ask(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"Question {number}?"}


def answer(number: int, thinks: bool = False) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": f"Answer {number}.",
        **({"reasoning_content": f"Thought {number}."} if thinks else {}),
    }


def turns(count: int, thinks: bool = False, system: bool = False) -> list[dict[str, Any]]:
    pairs = [message for number in range(1, count + 1) for message in (ask(number), answer(number, thinks))]
    return [SYSTEM, *pairs] if system else pairs


def with_tool(system: bool) -> list[dict[str, Any]]:
    called = {"role": "assistant", "content": "", "reasoning_content": "Thought 0.", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": "sunny"}
    chat = [ask(1), called, result, answer(1, True), ask(2), answer(2, True)]
    return [SYSTEM, *chat] if system else chat


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Bytes, and the template's special tokens."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    found = re.findall(r"<[|｜][^<>{}'\"\s]*[|｜]?>|<\w+\|>|<(?:start|end)_of_\w+>|</?think>|</s>", template)
    vocabulary = {byte: at for at, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<pad>", bos_token="<bos>"
    )
    made.add_special_tokens({"additional_special_tokens": sorted(set(found))})
    made.chat_template = template
    return made


def encode(name: str, chat: list[dict[str, Any]], tools: Any = None, **settings: Any) -> dict[str, list[Any]]:
    return encode_chats(
        {"messages": [chat], "tools": [tools]},
        tokenizer=tokenizer(name),
        form=Form("messages", "messages", has_messages=True),
        template_columns=["tools"],
        filled_columns=[],
        **{"learn": "answers", "max_length": 100_000, "train_on_inputs": False, "prompts_only": False, **settings},
    )


def learned(name: str, out: dict[str, list[Any]]) -> list[str]:
    """The stretches of text that are learned, of all examples."""
    found = []
    for ids, labels in zip(out["input_ids"], out["labels"], strict=True):
        run: list[int] = []
        for token, label in [*zip(ids, labels, strict=True), (0, -100)]:
            if label != -100:
                run.append(token)
            elif run:
                found.append(tokenizer(name).decode(run))
                run = []
    return found


def masked(name: str, chat: list[dict[str, Any]], tools: Any = None) -> tuple[list[int], list[int]]:
    """The tokens and the mask that trl's trainer makes of a chat."""
    chat = ChatRenderer(tokenizer(name)).clean(chat)
    out = tokenizer(name).apply_chat_template(
        chat, tools=tools, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    return out["input_ids"], out["assistant_masks"]


def test_all_templates_are_here() -> None:
    assert len(ORIGINALS) >= 41 and len(PATCHED) >= 30 and len(MARKED) >= len(PATCHED) + 3


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("thinks", [False, True])
def test_of_each_template_the_answers_are_learned(name: str, count: int, thinks: bool) -> None:
    """Each with its end and its reasoning, and nothing of what the user or the system says."""
    chat = turns(count, thinks, system=name not in NO_SYSTEM)
    found = learned(name, encode(name, chat))
    assert len(found) == count
    for number, text in enumerate(found, start=1):
        before, content, end = text.partition(f"Answer {number}.")
        assert content and end.strip()
        assert "Question" not in text and "brief" not in text and "assistant\n" not in text
        if thinks and (name in READ_REASONING or (name in REASON_IN_THE_LAST_TURN and number == count)):
            assert f"Thought {number}." in before
        else:
            assert "Thought" not in text


@pytest.mark.parametrize("name", ORIGINALS)
def test_of_each_template_tool_calls_are_learned_and_results_are_not(name: str) -> None:
    chat = with_tool(system=name not in NO_SYSTEM)
    if name in REFUSE_TOOLS:
        with pytest.raises(RowError, match="cannot render this chat"):
            encode(name, chat, TOOLS)
        return
    out = encode(name, chat, TOOLS)
    call, first, second = learned(name, out)
    assert "sunny" not in call + first + second
    assert "Answer 1." in first and "Answer 2." in second
    if name in IGNORE_TOOLS:
        assert "weather" not in call and any("tool calls" in parts for parts in out["left_out"])
    else:
        assert "weather" in call and "Rome" in call
        assert not any("tool calls" in parts for parts in out["left_out"])
    if name in READ_REASONING:
        assert all(f"Thought {at}." in text for at, text in enumerate((call, first, second)))


@pytest.mark.parametrize("name", ORIGINALS)
def test_each_turn_is_learned_after_its_generation_prompt(name: str) -> None:
    """The text before a learned turn is what generation starts from, but for reasoning that the answer lacks."""
    if not (name in READ_REASONING or "reasoning" not in (FOLDER / f"{name}.jinja").read_text()):
        pytest.skip("marks its answers, or reads reasoning in tool calls only")
    chat = turns(3, thinks=name in READ_REASONING, system=name not in NO_SYSTEM)
    renderer = ChatRenderer(tokenizer(name))
    messages = renderer.clean(chat)
    answers = [at for at, message in enumerate(chat) if message["role"] == "assistant"]
    starts = {
        turn: part.text[: span[0]]
        for part in renderer.examples(messages, answers)
        for turn, span in zip(part.turns, part.spans, strict=True)
    }
    for turn, start in starts.items():
        prompt = renderer.render(messages[:turn], add_generation_prompt=True)
        assert prompt.startswith(start) and prompt.removeprefix(start).strip() in ("", "<think>", "</think>")


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("kind", ["one", "three", "reasoning", "tools"])
def test_marked_templates_learn_what_trl_learns(name: str, kind: str) -> None:
    original = name.removesuffix("_training")
    system = original not in NO_SYSTEM
    chat = {
        "one": turns(1, system=system),
        "three": turns(3, system=system),
        "reasoning": turns(3, True, system),
        "tools": with_tool(system),
    }[kind]
    tools = TOOLS if kind == "tools" else None
    if tools and original in REFUSE_TOOLS:
        pytest.skip("has no tools")
    out = encode(name, chat, tools)
    ids, mask = masked(name, chat, tools)
    assert out["input_ids"] == [ids]
    assert out["labels"] == [[token if flag else -100 for token, flag in zip(ids, mask, strict=True)]]
    assert sum(mask)


@pytest.mark.parametrize("name", PATCHED)
@pytest.mark.parametrize("thinks", [False, True])
def test_unmarked_templates_learn_what_trl_learns_of_its_marked_ones(name: str, thinks: bool) -> None:
    """But for the white space after the end, and for the beginning that the generation prompt has written."""
    chat = turns(1, thinks, system=name not in NO_SYSTEM)
    ids, mask = masked(f"{name}_training", chat)
    theirs = tokenizer(f"{name}_training").decode([token for token, flag in zip(ids, mask, strict=True) if flag])
    (ours,) = learned(name, encode(name, chat))
    assert theirs.rstrip().endswith(ours)
    begun = theirs.rstrip().removesuffix(ours)
    renderer = ChatRenderer(tokenizer(name))
    prompt = renderer.render(renderer.clean(chat[:-1]), add_generation_prompt=True)
    assert begun.strip() in prompt[-40:]


@pytest.mark.parametrize("name", ["llama3", "qwen3", "qwen3_training", "gptoss", "phi3_training", "lfm2_2_5"])
def test_one_of_several_answers_is_learned(name: str) -> None:
    chat = turns(3)
    every = learned(name, encode(name, chat))
    chat[1]["weight"] = 0
    assert learned(name, encode(name, chat)) == every[1:]
    assert learned(name, encode(name, chat, learn="last_answer")) == every[2:]
    chat[1]["weight"], chat[5]["train"] = 1, False
    found = learned(name, encode(name, chat))
    assert [text.partition("Answer ")[2][0] for text in found] == ["1", "2"]


@pytest.mark.parametrize("name", ["llama3", "qwen3_instruct_2507", "phi3", "gemma"])
def test_other_roles_are_learned_on_demand(name: str) -> None:
    chat = turns(2)
    found = " ".join(learned(name, encode(name, chat, learn=["user"])))
    assert "Question 1?" in found and "Question 2?" in found and "Answer" not in found
    both = " ".join(learned(name, encode(name, chat, learn=["user", "assistant"])))
    assert all(text in both for text in ("Question 1?", "Question 2?", "Answer 1.", "Answer 2."))
