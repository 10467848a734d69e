"""The forms of conversations: all give the same tokens, are found from the columns, and wrong rows are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_peft import CausalLMData, InstructionData, LitPeftError
from lit_peft.data.conversations import Form, find_form, read_conversation

pytestmark = pytest.mark.usefixtures("new_cache")

CHATML = (
    "{% if tools %}tools {{ tools | tojson }} {% endif %}{% for m in messages %}<{{ m.role }}> {{ m.content }}"
    "{% for c in m.tool_calls or [] %} call {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %} </s> "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
ALPACA = Form("alpaca", "instruction", "output", "input", "system", "history")
TOOL = {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}

words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Z")), min_size=1, max_size=12).filter(
    lambda text: text[0] not in "[{"
)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def lines(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def chats(decoder: Path, file: str, **more: Any) -> InstructionData:
    common: dict[str, Any] = {"chat_template": CHATML, "validation_fraction": 0, "max_length": 512}
    return InstructionData(base=str(decoder), train=file, **{**common, **more})


def as_sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
    out = []
    for message in messages:
        if message.get("tool_calls"):
            call = message["tool_calls"][0]["function"]
            out.append({"from": "function_call", "value": json.dumps(call)})
        else:
            out.append({"from": names[message["role"]], "value": message["content"]})
    return out


def forms_of(system: str, pairs: list[tuple[str, str]], call: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """One conversation as people write it."""
    messages = [turn("system", system)] if system else []
    for asked, answered in pairs:
        messages += [turn("user", asked), turn("assistant", answered)]
    rows: dict[str, dict[str, Any]] = {}
    if call is not None:
        function = {"name": "weather", "arguments": call}
        written = {"name": "weather", "arguments": json.dumps(call)}
        at = len(messages) - 1
        tail = [turn("tool", "sunny"), messages[at]]
        called = turn("assistant", "", tool_calls=[{"type": "function", "function": function}])
        older = {"role": "assistant", "content": None, "function_call": written}
        text = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": written}]}
        openai, functions = [*messages[:at], text, *tail], [*messages[:at], older, turn("function", "sunny"), tail[1]]
        messages = [*messages[:at], called, *tail]
        rows["openai"] = {"messages": openai}
        rows["function_call"] = {"messages": functions}
    rows["messages"] = {"messages": messages}
    rows["json"] = {"messages": json.dumps(messages)}
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    rows["parts"] = {"messages": parts}
    rows["sharegpt"] = {"conversations": as_sharegpt(messages)}
    rest = messages[1:] if system else messages
    rows["sharegpt, system column"] = {"conversations": as_sharegpt(rest), "system": system or None}
    if call is None:
        rows["prompt"] = {"prompt": messages[:-1], "completion": messages[-1:]}
        rows["prompt, one message"] = {"prompt": messages[:-1], "completion": messages[-1]}
        rows["alpaca"] = {
            "instruction": pairs[-1][0],
            "output": pairs[-1][1],
            "system": system,
            "history": [list(pair) for pair in pairs[:-1]],
        }
        if len(pairs) == 1:
            rows["text"] = {"prompt": pairs[0][0], "completion": pairs[0][1], "system": system}
            rows["nemo"] = {"input": pairs[0][0], "output": pairs[0][1], "system": system}
            rows["query"] = {"query": pairs[0][0], "response": pairs[0][1], "system": system}
    return rows


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.just(""), words),
    st.lists(st.tuples(words, words), min_size=1, max_size=3),
    st.one_of(st.none(), st.dictionaries(words, st.one_of(words, st.integers(0, 9)), max_size=2)),
)
def test_a_conversation_is_the_same_in_every_form(
    system: str, pairs: list[tuple[str, str]], call: dict[str, Any] | None
) -> None:
    rows = forms_of(system, pairs, call)
    expected = rows["messages"]["messages"]
    for name, row in rows.items():
        messages = read_conversation(row, find_form(row, ALPACA, None, None))
        plain = [
            {
                **{key: value for key, value in message.items() if value is not None and key != "weight"},
                "content": "".join(part["text"] for part in message["content"])
                if isinstance(message.get("content"), list)
                else message.get("content") or "",
            }
            for message in messages
        ]
        for message in plain:
            for one in message.get("tool_calls", ()):
                one.setdefault("type", "function")
        assert plain == expected, name


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("call", [None, {"city": "good", "days": 3}])
@pytest.mark.parametrize("count", [1, 2])
def test_every_form_gives_the_same_tokens(
    count: int, call: dict[str, Any] | None, streaming: bool, decoder: Path, tmp_path: Path
) -> None:
    pairs = [("the film", "is good"), ("this story", "was bad")][:count]
    found = {}
    for name, row in forms_of("it was", pairs, call).items():
        for tools in [{"tools": [{"type": "function", "function": TOOL}]}, {"tools": json.dumps([TOOL])}]:
            data = chats(decoder, lines(tmp_path / "a.jsonl", {**row, **tools}), streaming=streaming, batch_size=1)
            if streaming:
                data.setup("fit")
                batch = next(iter(data.train_dataloader()))
                example = {key: batch[key][0].tolist() for key in ("input_ids", "labels")}
            else:
                (example,) = ({key: e[key] for key in ("input_ids", "labels")} for e in data.examples("train"))
            if "prompt" in row:  # what is in the prompt is not learned
                example = {"input_ids": example["input_ids"]}
            found[f"{name}, {type(tools['tools']).__name__}"] = example
    first = found["messages, list"]
    assert all(example["input_ids"] == first["input_ids"] for example in found.values())
    assert all(example.get("labels", first["labels"]) == first["labels"] for example in found.values())


def test_the_banner_says_which_form_was_found(decoder: Path, tmp_path: Path) -> None:
    expected = {
        "messages": "chats (column 'messages')",
        "sharegpt": "ShareGPT conversations (column 'conversations')",
        "prompt": "prompts and completions of messages (columns 'prompt' and 'completion')",
        "nemo": "prompts and completions (columns 'input' and 'output')",
    }
    rows = forms_of("", [("the film", "is good")], None)
    for name, words_of_it in expected.items():
        data = chats(decoder, lines(tmp_path / "a.jsonl", rows[name]))
        data.setup("fit")
        more = "; data.template 'plain' keeps the plain text" if name == "nemo" else ""
        assert f"data.train: {words_of_it}, rendered by the tokenizer's chat template{more}." in data.report()
    data = chats(decoder, lines(tmp_path / "a.jsonl", rows["alpaca"]))
    data.setup("fit")
    line = "rendered by the tokenizer's chat template; data.template 'alpaca' keeps Alpaca's form."
    assert any(found.endswith(line) for found in data.report())


def test_alpaca_and_prompts_are_plain_without_a_chat_template_or_on_demand(decoder: Path, tmp_path: Path) -> None:
    row = {"instruction": "this", "input": "film", "output": "is good"}
    file = lines(tmp_path / "a.jsonl", row)
    plain = chats(decoder, file, chat_template=None).examples("train")[0]
    kept = InstructionData(base=str(decoder), train=file, validation_fraction=0, template="alpaca", max_length=512)
    kept.tokenizer.chat_template = CHATML
    assert kept.examples("train")[0] == plain
    as_chat = chats(decoder, file)
    text = as_chat.tokenizer.decode(as_chat.examples("train")[0]["input_ids"])
    assert "this film" in text and "[UNK] [UNK] [UNK] this film </s>" in text  # "<user>", not "### Instruction:"
    pair = lines(tmp_path / "b.jsonl", {"prompt": "the film", "completion": "is good"})
    data = chats(decoder, pair, chat_template=None)
    assert data.tokenizer.decode(data.examples("train")[0]["input_ids"]) in (
        "the film is good</s>",
        "the film is good </s>",
    )


def test_prompts_and_completions_of_causal_lm_data_are_a_chat(decoder: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"prompt": "the film", "completion": "is good"})
    same = chats(decoder, file, predict=file)
    settings_of_it: dict[str, Any] = {"completion_column": "completion", "validation_fraction": 0}
    data = CausalLMData(base=str(decoder), train=file, predict=file, **settings_of_it)
    plain = data.examples("train")[0]["input_ids"]
    data = CausalLMData(base=str(decoder), train=file, predict=file, **settings_of_it)
    data.tokenizer.chat_template = CHATML
    assert data.examples("train")[0] == same.examples("train")[0]
    assert data.examples("predict")[0] == same.examples("predict")[0]
    assert any("data.template 'plain' keeps the plain text" in line for line in data.report())
    for more in ({"template": "plain"}, {"prompt_template": "{prompt}"}):
        data = CausalLMData(base=str(decoder), train=file, **settings_of_it, **more)  # type: ignore[arg-type]
        data.tokenizer.chat_template = CHATML
        assert data.examples("train")[0]["input_ids"] == plain
    with pytest.raises(LitPeftError, match=r"data.template is 'chat', but the tokenizer of .* has no chat template"):
        CausalLMData(base=str(decoder), train=file, template="chat", **settings_of_it).examples("train")


def test_a_format_is_named_where_the_columns_fit_several(decoder: Path, tmp_path: Path) -> None:
    chat = [turn("user", "it"), turn("assistant", "was bad")]
    row = {"instruction": "the film", "output": "is good", "messages": chat, "prompt": "a", "completion": "of"}
    ends = {None: "is good", "alpaca": "is good", "messages": "was bad", "prompt_completion": "of"}
    for name, end in ends.items():
        data = chats(decoder, lines(tmp_path / "a.jsonl", row), format=name)
        labels = [label for label in data.examples("train")[0]["labels"] if label != -100]
        assert data.tokenizer.decode(labels) == f"{end} </s>"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            r"column 'conversations': message 1 is from 'narrator'",
        ),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f()"}]},
            r"column 'conversations': message 2 is a function_call with 'f\(\)'; give",
        ),
        ({"conversations": '[{"from": "human", "value"'}, r"column 'conversations': .*is not valid JSON"),
        ({"conversations": [{"from": "human", "value": "x"}]}, r"no assistant's turn to learn; the roles are 'user'"),
        ({"conversations": [{"from": "human"}]}, r"message 1 lacks its role or content; it has 'role'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_conversation_is_named_by_file_and_row(
    row: dict[str, Any], problem: str, streaming: bool, decoder: Path, tmp_path: Path
) -> None:
    good = {"conversations": [{"from": "human", "value": "the film"}, {"from": "gpt", "value": "is good"}]}
    data = chats(decoder, lines(tmp_path / "a.jsonl", good, row), streaming=streaming)
    with pytest.raises(LitPeftError, match=rf"data.train '.*a.jsonl', row 2.*{problem}") as error:
        data.setup("fit")
    assert len(str(error.value).splitlines()) == 1


def test_predictions_need_no_answer(decoder: Path, tmp_path: Path) -> None:
    rows = forms_of("", [("the film", "is good")], None)
    for row in rows.values():
        for key in ("completion", "output", "response"):
            row.pop(key, None)
        if isinstance(row.get("messages"), list):
            row["messages"] = row["messages"][:-1]
        data = InstructionData(base=str(decoder), predict=lines(tmp_path / "p.jsonl", row), chat_template=CHATML)
        text = data.tokenizer.decode(data.examples("predict")[0]["input_ids"])
        assert "the film" in text and "good" not in text


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_several_forms_are_read_together(streaming: bool, decoder: Path, tmp_path: Path) -> None:
    rows = forms_of("it was", [("the film", "is good")], None)
    names = ("alpaca", "sharegpt, system column", "messages", "text")
    files = [lines(tmp_path / f"{at}.jsonl", rows[name]) for at, name in enumerate(names)]
    data = chats(decoder, files, streaming=streaming, batch_size=4, shuffle_buffer=1)  # type: ignore[arg-type]
    data.setup("fit")
    batches = list(data.train_dataloader())
    found = {
        tuple(ids[mask.bool()].tolist())
        for b in batches
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    }
    assert sum(len(batch["input_ids"]) for batch in batches) == 4 and len(found) == 1
    assert "film" in data.tokenizer.decode(found.pop())
