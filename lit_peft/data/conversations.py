"""The forms in which files write conversations, and their one form here: messages as OpenAI's API takes them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lit_peft.data.prompt_templates import parse_history
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief

FORMATS = ("messages", "sharegpt", "prompt_completion", "alpaca")
# Columns of a list of messages, and of a prompt and its answer, in the order in which they are looked for.
_CHAT_COLUMNS = ("messages", "conversations", "conversation")
_PAIR_COLUMNS = (("prompt", "completion"), ("prompt", "response"), ("query", "response"), ("input", "output"))
# Who speaks in ShareGPT's `from`, and in messages that use its names.
_SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function", "tool_response", "function_response"), "tool"),
    "system": "system",
    "developer": "developer",
}
_CALLS = ("function_call", "tool_call")


@dataclass(frozen=True)
class Form:
    """How the rows of a table write a conversation.

    Attributes:
        kind: one of `FORMATS`.
        first: the column of the messages, of the prompt, or of the instruction.
        second: the column of the answer; None: the messages contain it.
        input: the column of an instruction's input.
        system: the column of the system prompt.
        history: the column of earlier questions and answers.
        has_messages: the cells of `first` are messages, so only a chat template can render them.
        others: the forms of rows that have nothing in this form's columns.
    """

    kind: str
    first: str
    second: str | None = None
    input: str | None = None
    system: str | None = None
    history: str | None = None
    has_messages: bool = False
    others: tuple[Form, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the rows must have."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def optional(self) -> tuple[str, ...]:
        """The columns that are read if a table has them."""
        return tuple(name for name in (self.input, self.system, self.history) if name is not None)

    @property
    def all_columns(self) -> tuple[str, ...]:
        """The columns of this form and of the others, optional ones too."""
        return tuple(dict.fromkeys(name for form in (self, *self.others) for name in (*form.columns, *form.optional)))

    def of_row(self, cells: Mapping[str, Any]) -> Form:
        """Return the form of a row: the first that has a value in its first column."""
        return next((form for form in (self, *self.others) if cells.get(form.first) is not None), self)

    def describe(self) -> str:
        """Return the form in words, for the banner."""
        if self.others:
            return " and ".join(replace(form, others=()).describe() for form in (self, *self.others))
        names = " and ".join(map(repr, self.columns))
        what = {
            "messages": "chats",
            "sharegpt": "ShareGPT conversations",
            "alpaca": "Alpaca instructions",
        }.get(self.kind, "prompts and completions")
        if self.kind == "prompt_completion" and self.has_messages:
            what = "prompts and completions of messages"
        return f"{what} (column{'s' if self.second else ''} {names})"


def find_form(columns: Mapping[str, Any], alpaca: Form, wanted: str | None, messages_column: str | None) -> Form:
    """Return the form of a table's rows.

    Args:
        columns: a value of each column, None if it has none.
        alpaca: the form of instructions, with the columns that the settings name.
        wanted: the form that a setting names; None: find it from the columns.
        messages_column: the column of the messages that a setting names.

    Returns:
        The form; `alpaca` if the columns fit no other one.
    """
    if messages_column is not None:
        return _chat_form(messages_column, columns.get(messages_column), wanted, alpaca)
    if wanted in ("messages", "sharegpt"):
        chat_columns = _CHAT_COLUMNS if wanted == "messages" else ("conversations", "conversation", "messages")
        name = next((name for name in chat_columns if name in columns), chat_columns[0])
        return _chat_form(name, columns.get(name), wanted, alpaca)
    if wanted == "prompt_completion":
        pair = next((pair for pair in _PAIR_COLUMNS if pair[0] in columns and pair[1] in columns), None)
        pair = pair or next((pair for pair in _PAIR_COLUMNS if pair[0] in columns), _PAIR_COLUMNS[0])
        return _pair_form(pair, columns, alpaca)
    if wanted == "alpaca" or alpaca.first in columns:
        return alpaca
    for name in _CHAT_COLUMNS:
        if looks_like_messages(columns.get(name)):
            return _chat_form(name, columns[name], None, alpaca)
    for pair in _PAIR_COLUMNS:
        if pair[0] in columns and (pair[1] in columns or looks_like_messages(columns[pair[0]])):
            return _pair_form(pair, columns, alpaca)
    # A column of another name is still a chat if its cells can be nothing else.
    found = [name for name, value in columns.items() if isinstance(value, list) and looks_like_messages(value)]
    if len(found) == 1:
        return _chat_form(found[0], columns[found[0]], None, alpaca)
    # Prompts to continue have no answers.
    pair = next((pair for pair in _PAIR_COLUMNS if pair[0] in columns), None)
    return alpaca if pair is None else _pair_form(pair, columns, alpaca)


def _chat_form(name: str, value: Any, wanted: str | None, alpaca: Form) -> Form:
    messages = value if isinstance(value, list) else [value]
    is_sharegpt = any(isinstance(message, dict) and "from" in message for message in messages)
    kind = wanted or ("sharegpt" if is_sharegpt else "messages")
    return Form(kind, name, system=alpaca.system, has_messages=True)


def _pair_form(pair: tuple[str, str], columns: Mapping[str, Any], alpaca: Form) -> Form:
    has_messages = looks_like_messages(columns.get(pair[0]))
    return Form("prompt_completion", *pair, None, alpaca.system, alpaca.history, has_messages)


def looks_like_messages(value: Any) -> bool:
    """Tell whether a cell is a message or a list of messages, as objects or as JSON text."""
    try:
        value = _parsed(value)
    except ValueError:
        return False
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and any(keys <= first.keys() for keys in ({"role"}, {"from", "value"}))


def read_messages(cell: Any) -> list[Any]:
    """Return a cell's messages with OpenAI's names: a role and a content, or tool calls.

    Text that is JSON is read as such, and a single message counts as a list of one. What is not a message stays as it
    is, for `chat_problem` to name.

    Raises:
        ValueError: the cell cannot be read; the text says why.
    """
    cell = _parsed(cell)
    messages = [cell] if isinstance(cell, dict) else cell
    return [_read_message(*item) for item in enumerate(messages, start=1)] if isinstance(messages, list) else messages


def read_conversation(cells: Mapping[str, Any], form: Form, with_answer: bool = True) -> list[Any]:
    """Return the messages of a row.

    Args:
        cells: the row.
        form: how its conversation is written.
        with_answer: read the answer too; prompts to continue need none.

    Raises:
        ValueError: the row cannot be read; the text says why, with the column's name.
    """
    form = form.of_row(cells)
    if form.second is None:
        messages = _of_column(form.first, cells.get(form.first), read_messages)
    else:
        history = cells.get(form.history) if form.history else None
        messages = [
            {"role": role, "content": text}
            for pair in _of_column(form.history, history, parse_history)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        messages += _of_column(form.first, _joined_prompt(cells, form), _prompt_messages)
        if with_answer and cells.get(form.second) is not None:
            answer = cells[form.second]
            if looks_like_messages(answer):
                messages += _of_column(form.second, answer, read_messages)
            else:
                messages.append({"role": "assistant", "content": str(answer)})
    return with_system(messages, cells.get(form.system) if form.system else None)


def _joined_prompt(cells: Mapping[str, Any], form: Form) -> Any:
    prompt, more = cells.get(form.first), cells.get(form.input) if form.input else None
    return prompt if more is None or not str(more).strip() else f"{prompt}\n{more}"


def _prompt_messages(prompt: Any) -> list[Any]:
    """Return a prompt's messages; those of the assistant are not learned, because they are part of the prompt."""
    if not looks_like_messages(prompt):
        return [{"role": "user", "content": str(prompt)}]
    messages = read_messages(prompt)
    return [
        {**message, "weight": 0} if isinstance(message, dict) and message.get("role") == "assistant" else message
        for message in messages
    ]


def _of_column(column: str | None, cell: Any, read: Callable[[Any], list[Any]]) -> list[Any]:
    try:
        return read(cell)
    except ValueError as problem:
        raise ValueError(f"column {column!r}: {problem}") from problem


def with_system(messages: list[Any], system: Any) -> list[Any]:
    """Put a system prompt before the messages, if there is one.

    Raises:
        ValueError: the messages start with another system prompt.
    """
    if system is None or not str(system).strip() or not messages:
        return messages
    first = messages[0]
    if not isinstance(first, dict) or first.get("role") != "system":
        return [{"role": "system", "content": str(system)}, *messages]
    if first.get("content") != system:
        raise ValueError(f"the messages start with another system prompt than {brief(system)}; remove one of them")
    return messages


def _parsed(cell: Any) -> Any:
    """Return a cell, from JSON if it is text that begins like JSON.

    Raises:
        ValueError: the text is not valid JSON.
    """
    if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{brief(cell)} is not valid JSON ({problem})") from problem
    return cell


def _read_message(number: int, message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    out = dict(message)
    if out.get("from") is not None and out.get("role") is None:
        speaker = str(out["from"])
        if speaker not in (*_SPEAKERS, *_CALLS):
            known = closest(speaker, (*_SPEAKERS, *_CALLS))
            raise ValueError(f"message {number} is from {speaker!r}, which is unknown; use {known}")
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        out = {**rest, "role": speaker, "content": message.get("value")}
    role = out.get("role")
    if role in _CALLS and "content" in out:
        calls = _parsed(out["content"])
        calls = calls if isinstance(calls, list) else [calls]
        if not all(isinstance(call, dict) and call.get("name") for call in calls):
            raise ValueError(
                f"message {number} is a {role} with {brief(out['content'])}; give "
                '{"name": ..., "arguments": {...}} as JSON'
            )
        return {**out, "role": "assistant", "content": "", "tool_calls": [_read_call(call) for call in calls]}
    if role in _SPEAKERS:
        out["role"] = _SPEAKERS[role]
    if isinstance(out.get("function_call"), dict):  # OpenAI's older name for a single call
        out["tool_calls"] = [out.pop("function_call")]
    if isinstance(out.get("tool_calls"), list):
        out["tool_calls"] = [_read_call(call) for call in out["tool_calls"]]
    return out


def _read_call(call: Any) -> Any:
    """Return a tool call in the form of templates: with a function, whose arguments are an object."""
    if not isinstance(call, dict):
        return call
    if not isinstance(call.get("function"), dict):
        if "name" not in call:
            return call
        call = {"type": "function", "function": call}
    function = dict(call["function"])
    if "arguments" not in function:
        function["arguments"] = function.pop("parameters", {})
    with contextlib.suppress(ValueError):  # what a model wrote may be learned even if it is not valid JSON
        function["arguments"] = _parsed(function["arguments"])
    return {**call, "function": function}


def read_tools(tools: list[Any]) -> list[Any]:
    """Return tools in the form of templates; a bare function, as in ShareGPT's files, gets its wrapper."""
    return [
        {"type": "function", "function": tool}
        if isinstance(tool, dict) and "name" in tool and not {"type", "function"} & tool.keys()
        else tool
        for tool in tools
    ]


def check_format(value: str | None) -> None:
    """Check the setting that names a form.

    Raises:
        LitPeftError: it is unknown.
    """
    if value is not None and value not in FORMATS:
        raise LitPeftError(f"data.format {value!r} is not known: use {closest(value, FORMATS)}.")
