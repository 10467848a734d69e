"""The forms in which files write preferences, and their one form here: a prompt, a chosen and a rejected answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_peft.data.conversations import Form, looks_like_messages, read_conversation, read_messages
from lit_peft.data.prompt_templates import fill_template, parse_history
from lit_peft.util.type_checks import brief

Message = dict[str, Any]
# Columns of the prompt, in the order in which they are looked for.
PROMPT_COLUMNS = ("prompt", "instruction", "question", "query", "conversations", "messages", "conversation")
# Whose turn it is in Anthropic's dialogues.
_SPEAKERS = {"Human": "user", "Assistant": "assistant", "System": "system"}
_TURN = re.compile(rf"(?:^|\n\n)({'|'.join(_SPEAKERS)}):")


@dataclass(frozen=True)
class PairForm:
    """How the rows of a table write a prompt and its two answers.

    Attributes:
        chosen: the column of the better answer.
        rejected: the column of the other one.
        prompt: the column of the prompt; None: it is what both answers begin with, if they are chats.
        input: the column of an instruction's input, for rows in Alpaca's form.
        system: the column of the system prompt, which not every table has.
        history: the column of earlier questions and answers, which not every table has.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    prompt: str | None = None
    input: str | None = None
    system: str | None = "system"
    history: str | None = "history"

    @property
    def optional(self) -> tuple[str, ...]:
        """The columns that are read if a table has them."""
        return tuple(filter(None, (self.prompt, self.input, self.system, self.history)))

    @property
    def prompt_form(self) -> Form:
        """How the rows write the prompt."""
        return Form("prompt_completion", self.prompt or "", self.chosen, self.input, self.system, self.history)


@dataclass(frozen=True)
class Pair:
    """A prompt and its two answers; all three are messages, or all three are text.

    Attributes:
        prompt: what both answers follow; empty if there is nothing.
        chosen: the better answer.
        rejected: the other one.
    """

    prompt: list[Message] | str
    chosen: list[Message] | str
    rejected: list[Message] | str


def find_pair_form(columns: Sequence[str], form: PairForm, input_column: str = "input") -> PairForm:
    """Return a form with the columns of the prompt, the input, the system prompt and the history that a table has.

    Args:
        columns: the names of the table's columns.
        form: the form that the settings name; a prompt's column that is None is looked for.
        input_column: the column of an instruction's input.
    """
    prompt = form.prompt or next((name for name in PROMPT_COLUMNS if name in columns), None)
    has_input = prompt == "instruction" and input_column in columns
    system, history = (name if name in columns else None for name in (form.system, form.history))
    return PairForm(form.chosen, form.rejected, prompt, input_column if has_input else None, system, history)


def read_pair(cells: Mapping[str, Any], form: PairForm, as_chat: bool = False) -> Pair:
    """Return the prompt and the answers of a row.

    A row that has messages, or a dialogue as Anthropic's hh-rlhf writes it, gives messages. The answers may contain
    the prompt: what both begin with is the prompt.

    Args:
        cells: the row.
        form: how it is written.
        as_chat: give messages for text as well.

    Raises:
        ValueError: the row cannot be read; the text says why, with the column's name.
    """
    for column in (form.chosen, form.rejected):
        if cells.get(column) is None or not str(cells[column]).strip():
            raise ValueError(f"column {column!r} is empty")
        if isinstance(cells[column], (list, dict)) and not looks_like_messages(cells[column]):
            raise ValueError(
                f"column {column!r} has {brief(cells[column])}; give text, or messages with a role and a content"
            )
    prompt = cells.get(form.prompt) if form.prompt else None
    chat = any(_is_chat(cells[column]) for column in (form.chosen, form.rejected)) or _is_chat(prompt)
    if not chat and (not as_chat or prompt is None):
        # Without a prompt, there is no telling who says a text.
        return Pair(_prompt_text(cells, form), str(cells[form.chosen]), str(cells[form.rejected]))
    chosen, rejected = (_answer(column, cells[column]) for column in (form.chosen, form.rejected))
    before = _prompt_messages(cells, form)
    # Some files give the prompt, and again as the start of both answers.
    if before and _same(before, chosen) == _same(before, rejected) == len(before):
        chosen, rejected = chosen[len(before) :], rejected[len(before) :]
    for column, messages in ((form.chosen, chosen), (form.rejected, rejected)):
        if not messages:
            raise ValueError(f"column {column!r} has nothing after the prompt")
    shared = min(_same(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    return Pair(before + chosen[:shared], chosen[shared:], rejected[shared:])


def write_dialogue(messages: Sequence[Message]) -> str:
    """Return messages as text, in the form of Anthropic's hh-rlhf.

    Raises:
        ValueError: a message's role has no name in that form.
    """
    names = {role: name for name, role in _SPEAKERS.items()}
    unknown = next((message["role"] for message in messages if message.get("role") not in names), None)
    if unknown is not None:
        raise ValueError(f"a message has the role {brief(unknown)}, which only a chat template can write")
    return "".join(f"\n\n{names[message['role']]}: {_content(message)}" for message in messages)


def join_text(prompt: str, answer: str) -> str:
    """Return a prompt and its answer as one text, with an empty line between them unless there is white space."""
    between = "" if not prompt or prompt[-1].isspace() or answer[:1].isspace() else "\n\n"
    return f"{prompt}{between}{answer}"


def read_dialogue(text: str) -> list[Message]:
    """Return the messages of a dialogue in the form of Anthropic's hh-rlhf; an empty list if the text is none."""
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        return []
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": _SPEAKERS[name], "content": content.strip()} for name, content in turns]


def _is_chat(cell: Any) -> bool:
    return looks_like_messages(cell) or (isinstance(cell, str) and bool(read_dialogue(cell)))


def _answer(column: str, cell: Any) -> list[Message]:
    if isinstance(cell, str) and (dialogue := read_dialogue(cell)):
        return dialogue
    if not looks_like_messages(cell):
        return [{"role": "assistant", "content": str(cell)}]
    try:
        messages = read_messages(cell)
    except ValueError as problem:
        raise ValueError(f"column {column!r}: {problem}") from problem
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") is None or not _has_content(message):
            raise ValueError(f"column {column!r}: message {number} is {brief(message)}; give a role and a content")
    # Tables give all objects the members of all others, filled with nulls.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _has_content(message: Message) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    texts = all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts)
    return bool(message.get("tool_calls")) or (isinstance(content, (str, list)) and texts)


def _prompt_messages(cells: Mapping[str, Any], form: PairForm) -> list[Message]:
    cell = cells.get(form.prompt) if form.prompt else None
    if cell is None:
        before: list[Message] = []
    elif isinstance(cell, str) and (dialogue := read_dialogue(cell)):
        # A prompt may end with the name of the one who is to answer.
        before = dialogue[:-1] if dialogue[-1] == {"role": "assistant", "content": ""} else dialogue
    else:
        found = read_conversation(cells, form.prompt_form, with_answer=False)
        before = [{k: v for k, v in message.items() if v is not None and k != "weight"} for message in found]
        return before
    system = cells.get(form.system) if form.system else None
    return [{"role": "system", "content": str(system)}, *before] if system and str(system).strip() else before


def _prompt_text(cells: Mapping[str, Any], form: PairForm) -> str:
    values = [cells.get(name) if name else None for name in (form.prompt, form.input, form.system)]
    prompt, more, system = ("" if value is None else str(value) for value in values)
    try:
        history = parse_history(cells.get(form.history) if form.history else None)
    except ValueError as problem:
        raise ValueError(f"column {form.history!r}: {problem}") from problem
    if not prompt and not system and not history:
        return ""
    return fill_template(prompt, more, "alpaca" if form.prompt == "instruction" else "plain", system, history)


def _same(first: Sequence[Message], second: Sequence[Message]) -> int:
    """Return the number of messages with which both begin."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if (one.get("role"), _content(one)) != (other.get("role"), _content(other)):
            break
        count += 1
    return count


def _content(message: Message) -> str:
    content = message.get("content")
    parts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
    return "".join(parts).strip()
