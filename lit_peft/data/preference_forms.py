"""The forms in which files write preferences: a prompt, and answers that are better or worse."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_peft.data.conversations import Form, looks_like_messages, read_conversation, read_messages, with_system
from lit_peft.util.type_checks import brief

# Columns of a prompt, of a conversation up to the answer, of a single answer, and of its label.
PROMPTS = ("prompt", "question", "query", "instruction")
CHATS = ("messages", "conversations", "conversation")
COMPLETIONS = ("completion", "response", "output")
LABELS = ("label", "kto_tag")
# Whose turn it is in Anthropic's dialogues.
_SPEAKERS = {"Human": "user", "Assistant": "assistant", "System": "system"}
_TURN = re.compile(rf"(?:^|\n\n)({'|'.join(_SPEAKERS)}):[ \t]*")
_YES, _NO = ("true", "1", "yes", "desirable", "chosen"), ("false", "0", "no", "undesirable", "rejected")


class SkippedRowError(ValueError):
    """A row whose answers cannot be compared; it is left out and counted. The text says why, in the plural."""


@dataclass(frozen=True)
class PreferenceForm:
    """How the rows of a table write preferences.

    Attributes:
        prompt: how the prompt is written; None: it is the common start of the answers, or there is none.
        answers: the columns of the answers: the chosen and the rejected one, or a single one; none: the last turn of
            the prompt's messages is the answer.
        label: the column that says whether a single answer is good.
        kind: `text` and `messages` say what the cells are; `dialogue`: text as in Anthropic's hh-rlhf, `"\\n\\nHuman: …
            \\n\\nAssistant: …"`.
        is_alpaca: the prompt is an instruction.
        system: the column of the system prompt, if `prompt` is None.
    """

    prompt: Form | None
    answers: tuple[str, ...]
    label: str | None
    kind: str
    is_alpaca: bool = False
    system: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the rows must have."""
        prompt = () if self.prompt is None else (self.prompt.first,)
        return (*prompt, *self.answers, *(() if self.label is None else (self.label,)))

    @property
    def optional(self) -> tuple[str, ...]:
        """The columns that are read if a table has them."""
        if self.prompt is not None:
            return self.prompt.optional
        return () if self.system is None else (self.system,)

    def describe(self) -> str:
        """Return the form in words, for the banner."""
        what = "labelled answers" if self.label is not None else "pairs of answers"
        how = {"text": "as text", "messages": "as messages", "dialogue": "in Anthropic's form"}[self.kind]
        names = ", ".join(map(repr, self.columns))
        start = "" if self.prompt is not None else ", whose common start is the prompt"
        return f"{what} {how}{start} (columns {names})"


@dataclass(frozen=True)
class Columns:
    """The columns that the settings name; None for one that is found."""

    prompt: str | None
    chosen: str
    rejected: str
    completion: str | None
    label: str | None
    input: str
    system: str
    history: str


def find_form(values: Mapping[str, Any], named: Columns) -> PreferenceForm:
    """Return the form of a table's rows.

    Args:
        values: a value of each column, None if it has none.
        named: the columns that the settings name.
    """
    chat = next((name for name in CHATS if looks_like_messages(values.get(name))), None)
    prompt = named.prompt or next((name for name in PROMPTS if name in values), chat)
    if named.chosen in values or named.rejected in values:
        answers: tuple[str, ...] = (named.chosen, named.rejected)
        label, value = None, values.get(named.chosen)
    else:
        completion = named.completion or next((name for name in COMPLETIONS if name in values), None)
        label = named.label or next((name for name in LABELS if name in values), None)
        if label is None and completion is None:  # neither form: ask for pairs
            return PreferenceForm(None, (named.chosen, named.rejected), None, "text")
        label = label or LABELS[0]
        alone = completion is None or (prompt is not None and prompt == chat and named.completion is None)
        answers = () if alone else (str(completion),)
        value = values.get(answers[0]) if answers else None
    if label is None and looks_like_messages(value) and not _starts_with_assistant(read_messages(value)):
        return PreferenceForm(None, answers, None, "messages", system=named.system)
    if label is None and is_dialogue(value):
        return PreferenceForm(None, answers, None, "dialogue", system=named.system)
    first = prompt or PROMPTS[0]
    has_messages = looks_like_messages(values.get(first)) or looks_like_messages(value)
    is_alpaca = first == "instruction"
    form = Form(
        "alpaca" if is_alpaca else "prompt_completion",
        first,
        # The answer is read by itself; any other column makes `read_conversation` read a prompt.
        second=(*answers, named.chosen)[0],
        input=named.input if is_alpaca else None,
        system=named.system,
        history=named.history,
        has_messages=has_messages,
    )
    kind = "messages" if has_messages else "dialogue" if is_dialogue(values.get(first)) else "text"
    return PreferenceForm(form, answers, label, kind, is_alpaca)


def _starts_with_assistant(messages: Sequence[Any]) -> bool:
    first = messages[0] if messages else None
    return isinstance(first, dict) and first.get("role") == "assistant"


def is_dialogue(cell: Any) -> bool:
    """Tell whether a cell is a dialogue as in Anthropic's hh-rlhf."""
    return isinstance(cell, str) and _TURN.match(cell) is not None and "\n\nAssistant:" in cell


def read_preference(cells: Mapping[str, Any], form: PreferenceForm) -> tuple[list[Any], list[list[Any]]]:
    """Return the messages of a row's prompt, and those of each of its answers.

    Text without a prompt is a turn of the assistant. Answers that contain their prompt are split where they differ: see
    `check_answers`.

    Args:
        cells: the row.
        form: how it is written.

    Raises:
        ValueError: the row cannot be read; the text says why.
    """
    if form.prompt is None or cells.get(form.prompt.first) is None:
        is_chat = all(looks_like_messages(cells.get(column)) for column in form.answers)
        kind = "messages" if is_chat else form.kind
        answers = [_turns(cells.get(column), column, kind) for column in form.answers]
        if kind == "text":
            return [], answers
        prompt, answers = _split(answers)
        return with_system(prompt, cells.get(form.system) if form.system else None), answers
    first = form.prompt.first
    if form.kind == "dialogue":
        turns = _turns(cells[first], first, form.kind)
        # It may end with the name of the one who is to answer.
        cells = {**cells, first: turns if turns[-1]["content"] else turns[:-1]}
    prompt = read_conversation(cells, form.prompt, with_answer=False)
    if form.answers:
        return prompt, [_answer(cells.get(column), column, prompt) for column in form.answers]
    if not prompt or not isinstance(prompt[-1], dict) or prompt[-1].get("role") != "assistant":
        raise ValueError(f"column {first!r}: the last message is not the assistant's; put the answer last")
    return prompt[:-1], [[{key: value for key, value in prompt[-1].items() if key != "weight"}]]


def _answer(cell: Any, column: str, prompt: Sequence[Any]) -> list[Any]:
    """Return the messages of an answer, without those of the prompt if it repeats them."""
    if not looks_like_messages(cell):
        return [{"role": "assistant", "content": _text(cell, column)}]
    messages = read_messages(cell)
    if prompt and [_said(message) for message in messages[: len(prompt)]] == [_said(message) for message in prompt]:
        messages = messages[len(prompt) :]
        if not messages:
            raise ValueError(f"column {column!r} has nothing after the prompt")
    if not _starts_with_assistant(messages):
        raise ValueError(
            f"column {column!r}: the answer does not start with the assistant's turn; it has {brief(cell)}"
        )
    return messages


def _said(message: Any) -> Any:
    return (message.get("role"), message.get("content")) if isinstance(message, dict) else message


def _text(cell: Any, column: str) -> str:
    if isinstance(cell, (list, dict)):
        raise ValueError(f"column {column!r} has {brief(cell)}; give text, or messages with a role and a content")
    if cell is None or not str(cell).strip():
        raise ValueError(f"column {column!r} is empty")
    return str(cell)


def _turns(cell: Any, column: str, kind: str) -> list[Any]:
    if kind == "messages":
        if not looks_like_messages(cell):
            raise ValueError(f"column {column!r} has {brief(cell)}, which is no list of messages, as in other rows")
        return read_messages(cell)
    text = _text(cell, column)
    if kind == "text":
        return [{"role": "assistant", "content": text}]
    starts = list(_TURN.finditer(text))
    if not starts or text[: starts[0].start()].strip():
        raise ValueError(f"column {column!r} does not start with a turn of Human or Assistant; it has {brief(text)}")
    ends = [start.start() for start in starts[1:]] + [len(text)]
    return [
        {"role": _SPEAKERS[start[1]], "content": text[start.end() : end].strip()}
        for start, end in zip(starts, ends, strict=True)
    ]


def write_dialogue(messages: Sequence[Any]) -> str:
    """Return messages as text in the form of Anthropic's hh-rlhf.

    Raises:
        ValueError: a message's role has no name in that form.
    """
    names, text = {role: name for name, role in _SPEAKERS.items()}, ""
    for message in messages:
        if message["role"] not in names:
            raise ValueError(f"a message has the role {brief(message['role'])}, which only a chat template can write")
        content = message.get("content") or ""
        content = "".join(part["text"] for part in content) if isinstance(content, list) else content
        text += f"\n\n{names[message['role']]}: {content.strip()}"
    return text


def _split(answers: list[list[Any]]) -> tuple[list[Any], list[list[Any]]]:
    """Return the common start of conversations as the prompt, and what follows as the answers."""
    common = 0
    if len(answers) > 1:
        while common < min(map(len, answers)) and answers[0][common] == answers[1][common]:
            common += 1
    return answers[0][:common], [answer[common:] for answer in answers]


def check_answers(answers: Sequence[Sequence[Any]]) -> None:
    """Check that the answers of a row differ, and in a turn of the assistant.

    Raises:
        SkippedRowError: they cannot be compared.
    """
    if not any(answers):
        raise SkippedRowError("whose answers are the same")
    if not all(map(_starts_with_assistant, answers)):
        raise SkippedRowError("whose answers do not differ in a turn of the assistant")


def read_label(cell: Any, column: str) -> bool:
    """Return a label as a truth value.

    Raises:
        ValueError: it is neither true nor false.
    """
    text = str(int(cell) if isinstance(cell, float) and cell in (0, 1) else cell).strip().lower()
    if text in (*_YES, *_NO):
        return text in _YES
    raise ValueError(f"column {column!r} has {brief(cell)}, which is no label; give true or false")


def plain_prompt(messages: Sequence[Any]) -> tuple[str, str, list[tuple[str, str]]]:
    """Return what a template in plain text needs of a prompt: the last question, the system prompt, and the earlier
    questions with their answers.

    Raises:
        ValueError: the messages are no questions with their answers.
    """
    system = ""
    if messages and messages[0]["role"] == "system":
        system, messages = str(messages[0]["content"]), messages[1:]
    roles = [message["role"] for message in messages]
    expected = ["user", "assistant"] * (len(roles) // 2) + ["user"]
    if roles != expected or not all(isinstance(message.get("content"), str) for message in messages):
        raise ValueError(
            f"the prompt has turns of {', '.join(roles) or 'nobody'}, which only a chat template can render; set "
            "data.chat_template"
        )
    texts = [message["content"] for message in messages]
    return texts[-1], system, list(zip(texts[0:-1:2], texts[1::2], strict=True))
