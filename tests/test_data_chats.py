"""Chats and instructions: no column and no field that changes the result is ignored, and wrong rows are named."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from lit_peft import InstructionData, LitPeftError, ReasoningData
from lit_peft.data.chats import ChatRenderer, chat_problem
from lit_peft.data.prompt_templates import fill_template

pytestmark = pytest.mark.usefixtures("new_cache")

PLAIN = (
    "{% for m in messages %}of {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}of assistant {% endif %}"
)
# Prints all it gets, in order, as the templates of models with tools do.
PRINTING = "{{ tools | tojson }}{{ documents | tojson }}{{ mood }}" + PLAIN.replace(
    "{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}"
)
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"unit": {"default": None}, "city": {"a": 1}}}},
    {"type": "function", "function": {"name": "time", "parameters": {"city": {"b": "x"}, "zone": {}}}},
]


def chat(question: str = "the film", answer: str = "is good", **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


def lines(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def chats(decoder: Path, file: str, template: str = PLAIN, **settings: Any) -> InstructionData:
    common: dict[str, Any] = {"messages_column": "messages", "chat_template": template, "validation_fraction": 0}
    return InstructionData(base=str(decoder), train=file, **{**common, **settings})


def learned(data: InstructionData, row: int = 0) -> str:
    example = data.examples("train")[row]
    ids = [label for label in example["labels"] if label != -100]
    return str(data.tokenizer.decode(ids))


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the chat template rendered, whole chats and prompts among it."""
    found: list[str] = []
    plain = ChatRenderer.render

    def noted(self: ChatRenderer, *args: Any, **more: Any) -> str:
        found.append(plain(self, *args, **more))
        return found[-1]

    monkeypatch.setattr(ChatRenderer, "render", noted)
    return found


@pytest.mark.parametrize("as_text", [False, True])
def test_the_template_gets_the_columns_of_the_row_as_they_are(
    as_text: bool, decoder: Path, tmp_path: Path, texts: list[str]
) -> None:
    """As transformers renders the row itself: in the order of the file, without members of other rows."""
    calls = [[{"function": {"name": "weather", "arguments": {"unit": None, "city": "x"}}}], []]
    rows = []
    for tool, call in zip(TOOLS, calls, strict=True):
        answer = {"tool_calls": call} if call else {}
        extra = {"tools": [tool], "documents": [{"title": "good"}], "chat_template_kwargs": {"mood": "bad"}}
        rows.append({"messages": chat(**answer), **{k: json.dumps(v) if as_text else v for k, v in extra.items()}})
    data = chats(decoder, lines(tmp_path / "a.jsonl", *rows), PRINTING)
    data.setup("fit")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    for row, tool in zip(rows, TOOLS, strict=True):
        documents = [{"title": "good"}]
        text = tokenizer.apply_chat_template(
            row["messages"], tools=[tool], documents=documents, mood="bad", chat_template=PRINTING, tokenize=False
        )
        assert text in texts and json.dumps(tool["function"]) in text
    assert not [line for line in data.report() if "does not read" in line]


def test_what_the_template_does_not_read_is_noted(decoder: Path, tmp_path: Path) -> None:
    row = {"messages": chat(tool_calls=[{"function": {"name": "f"}}]), "tools": TOOLS, "weight": 0.5, "id": 3}
    data = chats(decoder, lines(tmp_path / "a.jsonl", row))
    data.setup("fit")
    assert data.report() == [
        "data.train: column 'weight' not used.",
        "data.max_length is 16: 99 % of the training examples have no more tokens.",
        "data.train: the chat template does not read 'tools', 'tool_calls'.",
        "data.train: 1 of 1 examples (100.0 %) with tool calls that the chat template leaves out, so they are not "
        "learned: set data.chat_template to one for tools.",
    ]


@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
def test_a_turn_without_weight_is_not_learned(field: dict[str, Any], decoder: Path, tmp_path: Path) -> None:
    messages = [*chat(**field), *chat("this story", "was bad", weight=1)]
    file = lines(tmp_path / "a.jsonl", {"messages": messages})
    data = chats(decoder, file)
    assert learned(data) == "was bad </s>"
    assert data.tokenizer.decode(data.examples("train")[0]["input_ids"]).count("good") == 1
    everything = learned(chats(decoder, file, train_on_inputs=True))
    assert "the film" in everything and "this story" in everything and "is good" not in everything


def test_a_users_turn_without_weight_is_not_learned_with_the_inputs(decoder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "the film", "train": False}, *chat("this story", "was bad")[1:]]
    data = chats(decoder, lines(tmp_path / "a.jsonl", {"messages": messages}), train_on_inputs=True)
    assert "film" not in learned(data) and learned(data).endswith("was bad </s>")


def test_chats_without_a_learned_turn_are_skipped_and_counted(decoder: Path, tmp_path: Path) -> None:
    rows = [{"messages": chat(weight=0)}, {"messages": chat("it", "was bad", weight=1)}]
    data = chats(decoder, lines(tmp_path / "a.jsonl", *rows))
    assert len(data.examples("train")) == 1 and learned(data) == "was bad </s>"
    line = "data.train: 1 of 2 chats (50.0 %) skipped, because the weight of all their answers is 0."
    assert line in data.report()
    with pytest.raises(LitPeftError, match="no chat has a turn to learn"):
        chats(decoder, lines(tmp_path / "b.jsonl", rows[0])).examples("train")


@pytest.mark.parametrize("needs_parts", [False, True])
def test_text_parts_are_text(needs_parts: bool, decoder: Path, tmp_path: Path) -> None:
    template = PLAIN
    if needs_parts:
        template = PLAIN.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    parts = [{"type": "text", "text": "the fi"}, {"type": "text", "text": "lm"}]
    file = lines(tmp_path / "a.jsonl", {"messages": chat(parts)}, {"messages": chat("the film")})  # type: ignore[arg-type]
    data = chats(decoder, file, template)
    assert ChatRenderer(data.tokenizer).needs_parts is needs_parts
    first, second = data.examples("train")
    assert first == second and "the film" in data.tokenizer.decode(first["input_ids"])


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"content": [{"type": "image_url", "image_url": "x"}]}, r"message 2 has the content part .*which is not read"),
        ({"content": ["good"]}, "message 2 has the content part 'good', which is not read"),
        ({"content": 5}, "message 2 has the content 5; give text"),
        ({"content": "good", "weight": 0.5}, r"message 2 has weight 0\.5; a turn is learned \(1\) or not \(0\)"),
        ({"content": "good", "train": "no"}, "message 2 has train 'no'"),
        ({"content": None}, "message 2 lacks its role or content; it has 'role'"),
        ({"content": "x", "role": "user", "train": True}, "message 2 has train True and the role 'user'"),
    ],
)
def test_wrong_messages_are_named_by_row(message: dict[str, Any], problem: str, decoder: Path, tmp_path: Path) -> None:
    wrong = [chat()[0], {"role": "assistant", **message}, chat()[1]]
    file = lines(tmp_path / "a.jsonl", {"messages": chat()}, {"messages": wrong})
    with pytest.raises(LitPeftError, match=rf"^data.train '.*a.jsonl', row 2, column 'messages': {problem}") as error:
        chats(decoder, file).examples("train")
    assert len(str(error.value).splitlines()) == 1


def test_a_call_of_a_tool_needs_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert chat_problem([chat()[0], call], needs_answer=True) == ""
    assert chat_problem([chat()[0], {**call, "tool_calls": []}], needs_answer=True) != ""


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("split", ["train", "predict"])
def test_a_row_that_the_template_refuses_is_named(
    split: str, num_proc: int | None, decoder: Path, tmp_path: Path
) -> None:
    template = "{% if messages[0].role == 'tool' %}{{ raise_exception('roles must alternate') }}{% endif %}" + PLAIN
    wrong = [{"role": "tool", "content": "x"}, *chat()]
    file = lines(tmp_path / "a.jsonl", {"messages": chat()}, {"messages": chat("it")}, {"messages": wrong})
    data = chats(decoder, file, template, predict=file, num_proc=num_proc)
    with pytest.raises(
        LitPeftError, match=rf"^data.{split} '.*a.jsonl', row 3: the chat template .*roles must alt"
    ) as e:
        data.examples(split)  # type: ignore[arg-type]
    assert len(str(e.value).splitlines()) == 1


def test_a_wrong_row_ends_all_processes_though_a_handler_ignores_sigterm(decoder: Path, tmp_path: Path) -> None:
    """Lightning's handler, which stays after a fit, ignores the signal by which a pool ends its processes."""
    template = "{{ raise_exception('no') }}" + PLAIN
    data = chats(decoder, lines(tmp_path / "a.jsonl", *[{"messages": chat()}] * 9), template, num_proc=3)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(LitPeftError, match="the chat template cannot render this chat"):
            data.examples("train")
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_template_with_a_mistake_is_reported(decoder: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"messages": chat()})
    with pytest.raises(LitPeftError, match=r"row 1: the chat template cannot render this chat \(TemplateSyntaxError: "):
        chats(decoder, file, "{% for %}").examples("train")
    length = "{{ 'good' if messages | length == 1 else 'bad' }}"
    rewriting = PLAIN.replace("of {{ m.role }}", length)
    with pytest.raises(LitPeftError, match=r"row 1: the tokenizer's chat template renders a turn differently.*is good"):
        chats(decoder, file, rewriting).examples("train")


def test_an_answer_that_does_not_continue_the_generation_prompt_is_noted(decoder: Path, tmp_path: Path) -> None:
    """As templates whose generation prompt begins with the reasoning that an answer lacks."""
    file = lines(tmp_path / "a.jsonl", {"messages": chat()})
    data = chats(decoder, file, PLAIN + "{% if add_generation_prompt %}of it{% endif %}")
    assert learned(data) == "is good </s>"
    line = "data.train: 1 of 1 examples (100.0 %) with an answer that does not continue the chat template's generation"
    assert any(found.startswith(line) for found in data.report())


@pytest.mark.parametrize("inside", ["{{ m.content }}", "{{ m.content }} </s>"])
def test_marked_answers_are_learned_with_their_end(inside: str, decoder: Path, tmp_path: Path) -> None:
    """Also if the marks leave it out."""
    marked = "{% if m.role == 'assistant' %}{% generation %}" + inside + "{% endgeneration %}{% else %}"
    rest = "" if "</s>" in inside else " </s>"
    turn = "of {{ m.role }} " + marked + "{{ m.content }} </s>{% endif %}"
    turn += "{% if m.role == 'assistant' %}" + rest + "{% endif %} "
    template = PLAIN.replace("of {{ m.role }} {{ m.content }} </s> ", turn)
    messages = [*chat(), *chat("this story", "was bad")]
    data = chats(decoder, lines(tmp_path / "a.jsonl", {"messages": messages}), template)
    assert ChatRenderer(data.tokenizer).has_marks({})
    assert learned(data) == "is good </s> was bad </s>"


def test_a_template_that_the_sandbox_refuses_gives_one_sentence(decoder: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"messages": chat()})
    template = "{{ messages.append(1) }}" + PLAIN
    with pytest.raises(LitPeftError, match=r"row 1: the chat template does something that is not allowed") as error:
        chats(decoder, file, template).examples("train")
    assert len(str(error.value).splitlines()) == 1 and "set data.chat_template" in str(error.value)


def test_a_template_is_read_from_its_file(decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(PLAIN)
    file = lines(tmp_path / "a.jsonl", {"messages": chat()})
    assert learned(chats(decoder, file, str(tmp_path / "a.jinja"))) == "is good </s>"
    with pytest.raises(LitPeftError, match=r"data.chat_template '.*b.jinja' is neither a template nor a readable file"):
        chats(decoder, file, str(tmp_path / "b.jinja")).examples("train")


def test_tools_of_another_form_are_named_by_row(decoder: Path, tmp_path: Path) -> None:
    for tools, problem in (("{", "is not valid JSON"), ({"a": 1}, "has {'a': 1}; give a list of objects")):
        file = lines(tmp_path / "a.jsonl", {"messages": chat()}, {"messages": chat("it"), "tools": tools})
        with pytest.raises(LitPeftError, match=f"row 2: column 'tools' {problem}"):
            chats(decoder, file, PRINTING).examples("train")


def test_a_template_without_an_end_of_turn_is_a_warning(decoder: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"messages": chat()})
    endless = chats(decoder, file, PLAIN.replace(" </s> ", "\n"), predict=file)
    with pytest.warns(UserWarning, match="does not end the assistant's turn, so the model does not learn to stop"):
        endless.setup("fit")
    assert learned(endless) == "is good"
    for template in (PLAIN, PLAIN.replace("</s>", "of it")):
        assert not any("learn to stop" in line for line in chats(decoder, file, template).report())


def test_an_end_of_turn_at_which_generation_does_not_stop_is_noted(decoder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(decoder, base)
    file = lines(tmp_path / "a.jsonl", {"messages": chat()})
    template = PLAIN.replace("</s>", "story")
    data = chats(base, file, template)
    data.setup("fit")
    assert any("ends the assistant's turn with 'story', at which generation does not stop" in s for s in data.report())
    GenerationConfig(eos_token_id=[4, data.tokenizer.convert_tokens_to_ids("story")]).save_pretrained(base)
    data = chats(base, file, template)
    data.setup("fit")
    assert not any("stop" in line for line in data.report())


def test_chats_that_differ_in_their_tools_are_no_duplicates(decoder: Path, tmp_path: Path) -> None:
    rows = [{"messages": chat(), "tools": [tool]} for tool in (*TOOLS, TOOLS[0])]
    data = chats(decoder, lines(tmp_path / "a.jsonl", *rows), PRINTING, validation_fraction=0.5)
    assert len(data.rows["train"]) + len(data.rows["validation"]) == 2


def test_a_system_column_becomes_the_first_message(decoder: Path, tmp_path: Path, texts: list[str]) -> None:
    system = {"role": "system", "content": "it was"}
    rows = [
        {"messages": chat(), "system": "it was"},
        {"messages": [system, *chat("this story")], "system": "it was"},
        {"messages": chat("acting"), "system": ""},
    ]
    data = chats(decoder, lines(tmp_path / "a.jsonl", *rows))
    data.setup("fit")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    for messages in ([system, *chat()], [system, *chat("this story")], chat("acting")):
        assert tokenizer.apply_chat_template(messages, chat_template=PLAIN, tokenize=False) in texts
    assert learned(data) == "is good </s>"
    other = {"messages": [system, *chat()], "system": "good"}
    with pytest.raises(LitPeftError, match="row 2: the messages start with another system prompt than 'good'"):
        chats(decoder, lines(tmp_path / "b.jsonl", rows[0], other)).examples("train")


# ------------------------------------------------------------------------------------------- Alpaca's form


def alpaca(decoder: Path, file: str, **settings: Any) -> InstructionData:
    return InstructionData(base=str(decoder), train=file, predict=file, validation_fraction=0, **settings)


def test_system_and_history_are_in_the_prompt() -> None:
    prompt = fill_template("this", "film", "alpaca", "it was", [("a story", "bad"), ("acting", "poor")])
    assert prompt == (
        "it was\n\n### Instruction:\na story\n\n### Response:\nbad\n\n### Instruction:\nacting\n\n### Response:\npoor"
        "\n\n### Instruction:\nthis\n\n### Input:\nfilm\n\n### Response:\n"
    )


@pytest.mark.parametrize("as_text", [False, True])
def test_system_and_history_of_a_row_are_read(as_text: bool, decoder: Path, tmp_path: Path) -> None:
    history: Any = [["a story", "bad"]]
    rows = [
        {"instruction": "this", "output": "film", "system": "it was", "history": history},
        {"instruction": "this", "output": "film", "system": None, "history": []},
        {"instruction": "this", "output": "film", "system": "", "history": None},
    ]
    if as_text:
        rows = [{**row, "history": json.dumps(row["history"])} for row in rows]
    data = alpaca(decoder, lines(tmp_path / "a.jsonl", *rows))
    prompts = [fill_template("this", "", "alpaca", "it was", [("a story", "bad")]), *[fill_template("this")] * 2]
    for split, end in (("predict", ""), ("train", "film</s>")):
        for prompt, example in zip(prompts, data.examples(split), strict=True):  # type: ignore[arg-type]
            assert example["input_ids"] == data.tokenizer(prompt + end)["input_ids"]
    assert all(learned(data, row).replace(" ", "") == "film</s>" for row in range(3))


def test_other_columns_of_system_and_history(decoder: Path, tmp_path: Path) -> None:
    row = {"instruction": "this", "output": "film", "before": [["a", "b"]], "role": "it was"}
    data = alpaca(decoder, lines(tmp_path / "a.jsonl", row), system_column="role", history_column="before")
    expected = fill_template("this", "", "alpaca", "it was", [("a", "b")])
    assert data.examples("predict")[0]["input_ids"] == data.tokenizer(expected)["input_ids"]


def test_a_history_of_another_form_is_named_by_row(decoder: Path, tmp_path: Path) -> None:
    row = {"instruction": "this", "output": "film"}
    for history in (["a", "b"], [["a"]], "x", [{"a": "b"}]):
        file = lines(tmp_path / "a.jsonl", {**row, "history": None}, {**row, "history": history})
        with pytest.raises(LitPeftError, match=r"^data.train '.*a.jsonl', row 2: column 'history' has .*; correct it"):
            alpaca(decoder, file).examples("train")
    file = lines(tmp_path / "a.jsonl", row, {**row, "system": "it"})
    with pytest.raises(LitPeftError, match=r"row 2: data.template 'llm_adapters' has no place for column 'system'"):
        alpaca(decoder, file, template="llm_adapters").examples("train")


def test_a_column_that_looks_like_a_part_of_the_example_is_noted(decoder: Path, tmp_path: Path) -> None:
    row = {"instruction": "this", "output": "4", "answer": "4", "tools": "x", "weight": 1, "system": "it", "id": 1}
    data = ReasoningData(base=str(decoder), train=lines(tmp_path / "a.jsonl", row), validation_fraction=0)
    data.setup("fit")
    assert data.report()[0] == "data.train: columns 'tools', 'weight' not used."


def test_an_end_that_only_the_last_answer_has_is_learned_with_every_answer(decoder: Path, tmp_path: Path) -> None:
    template = PLAIN.replace("{{ m.content }} </s> ", "{{ m.content }} ") + (
        "{% if not add_generation_prompt %}</s>{% endif %}"
    )
    messages = [*chat(), *chat("this story", "was bad")]
    data = chats(decoder, lines(tmp_path / "a.jsonl", {"messages": messages}), template)
    assert [learned(data, row) for row in range(len(data.examples("train")))] == ["is good </s>", "was bad </s>"]
    assert any(line.startswith("data.train: 1 chat(s) give 2 examples, because the chat") for line in data.report())
