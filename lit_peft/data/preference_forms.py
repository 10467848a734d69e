"""The forms in which files write preferences: a prompt, and answers that are better or worse."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_peft.data.conversations import Form, looks_like_messages, read_conversation, read_messages
from lit_peft.util.type_checks import brief

# Columns of a prompt, of a conversation up to the answer, of a single answer, and of its label.
PROMPTS = ("prompt", "question", "query", "instruction")
CHATS = ("messages", "conversations", "conversation")
COMPLETIONS = ("completion", "response", "output")
LABELS = ("label", "kto_tag")
_TURN = re.compile(r"\n\n(Human|Assistant):[ \t]*")
_YES, _NO = ("true", "1", "yes", "desirable", "chosen"), ("false", "0", "no", "undesirable", "rejected")


class SkippedRowError(ValueError):
    """A row whose answers cannot be compared; it is left out and counted. The text says why, in the plural."""


@dataclass(frozen=True)
class PreferenceForm:
    """How the rows of a table write preferences.

    Attributes:
        prompt: how the prompt is written; None: it is the common start of the answers.
        answers: the columns of the answers: the chosen and the rejected one, or a single one; none: the last turn of
            the prompt's messages is the answer.
        label: the column that says whether a single answer is good.
        kind: `text` and `messages` say what the cells are; `dialogue`: text as in Anthropic's hh-rlhf, `"\\n\\nHuman: …
            \\n\\nAssistant: …"`.
        is_alpaca: the prompt is an instruction.
    """

    prompt: Form | None
    answers: tuple[str, ...]
    label: str | None
    kind: str
    is_alpaca: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the rows must have."""
        prompt = () if self.prompt is None else (self.prompt.first,)
        return (*prompt, *self.answers, *(() if self.label is None else (self.label,)))

    @property
    def optional(self) -> tuple[str, ...]:
        """The columns that are read if a table has them."""
        return () if self.prompt is None else self.prompt.optional

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
    if label is None and looks_like_messages(value) and not _starts_with_assistant(value):
        return PreferenceForm(None, answers, None, "messages")
    if label is None and named.prompt is None and _is_dialogue(value):
        return PreferenceForm(None, answers, None, "dialogue")
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
    return PreferenceForm(form, answers, label, "messages" if has_messages else "text", is_alpaca)


def _starts_with_assistant(cell: Any) -> bool:
    messages = read_messages(cell)
    first = messages[0] if messages else None
    return isinstance(first, dict) and first.get("role") == "assistant"


def _is_dialogue(cell: Any) -> bool:
    return isinstance(cell, str) and cell.startswith("\n\nHuman:") and "\n\nAssistant:" in cell


def read_preference(cells: Mapping[str, Any], form: PreferenceForm) -> tuple[list[Any], list[list[Any]]]:
    """Return the messages of a row's prompt, and those of each of its answers.

    Args:
        cells: the row.
        form: how it is written.

    Raises:
        SkippedRowError: the answers cannot be compared.
        ValueError: the row cannot be read; the text says why.
    """
    if form.prompt is None:
        chosen, rejected = (_turns(cells.get(column), column, form.kind) for column in form.answers)
        return _split(chosen, rejected)
    prompt = read_conversation(cells, form.prompt, with_answer=False)
    if not form.answers:
        if not prompt or not isinstance(prompt[-1], dict) or prompt[-1].get("role") != "assistant":
            raise ValueError(
                f"column {form.prompt.first!r}: the last message is not the assistant's; put the answer last"
            )
        answer = {key: value for key, value in prompt[-1].items() if key != "weight"}
        return prompt[:-1], [[answer]]
    return prompt, [_answer(cells.get(column), column) for column in form.answers]


def _answer(cell: Any, column: str) -> list[Any]:
    if not looks_like_messages(cell):
        return [{"role": "assistant", "content": str(cell)}]
    messages = read_messages(cell)
    first = messages[0] if messages else None
    if not isinstance(first, dict) or first.get("role") != "assistant":
        raise ValueError(
            f"column {column!r}: the answer does not start with the assistant's turn; it has {brief(cell)}"
        )
    return messages


def _turns(cell: Any, column: str, kind: str) -> list[Any]:
    if kind == "messages":
        if not looks_like_messages(cell):
            raise ValueError(f"column {column!r} has {brief(cell)}, which is no list of messages, as in other rows")
        return read_messages(cell)
    text = str(cell)
    starts = list(_TURN.finditer(text))
    if not starts or text[: starts[0].start()].strip():
        raise ValueError(f"column {column!r} does not start with a turn of Human or Assistant; it has {brief(text)}")
    ends = [start.start() for start in starts[1:]] + [len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[start[1]], "content": text[start.end() : end].strip()}
        for start, end in zip(starts, ends, strict=True)
    ]


def _split(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[list[Any]]]:
    """Return the common start of two conversations as the prompt, and what follows as the answers."""
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    answers = [chosen[common:], rejected[common:]]
    if not any(answers):
        raise SkippedRowError("whose answers are the same")
    for answer in answers:
        first = answer[0] if answer else None
        if not isinstance(first, dict) or first.get("role") != "assistant":
            raise SkippedRowError("whose answers do not differ in a turn of the assistant")
    return chosen[:common], answers


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
