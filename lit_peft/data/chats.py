"""Chats: lists of messages, rendered by the tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from lit_peft.data.collate import IGNORE
from lit_peft.data.rows import RowError
from lit_peft.data.supervised import add_supervised
from lit_peft.util.errors import first_line
from lit_peft.util.type_checks import brief

# Columns that the chat template gets together with the messages.
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
# Fields of a message that say whether to learn it; the template does not get them.
_LEARN_FIELDS = ("weight", "train")
# Fields of a message that change the result if the template reads them.
_TEMPLATE_FIELDS = ("name", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def chat_problem(messages: Any, needs_answer: bool) -> str:
    """Return what is wrong with a chat; "" if nothing is."""
    if not isinstance(messages, list) or not messages:
        return "no list of messages; each message needs a role and a content"
    for number, message in enumerate(messages, start=1):
        if problem := _message_problem(message):
            return f"message {number} {problem}"
    roles = [message["role"] for message in messages]
    if set(roles) == {"assistant"}:
        return "only the assistant's turns; put a user's turn first"
    if needs_answer and "assistant" not in roles:
        return f"no assistant's turn to learn; the roles are {', '.join(map(repr, dict.fromkeys(roles)))}"
    return ""


def _message_problem(message: Any) -> str:
    if not isinstance(message, dict):
        return f"is {brief(message)}; give a role and a content"
    content = message.get("content")
    has_content = content is not None or message.get("tool_calls") or message.get("function_call")
    if not message.get("role") or not has_content:
        return f"lacks its role or content; it has {', '.join(map(repr, message)) or 'nothing'}"
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            return f'has the content part {brief(part)}; only text parts are read: {{"type": "text", "text": ...}}'
    if content is not None and not isinstance(content, (str, list)):
        return f"has the content {brief(content)}; give text"
    for field in _LEARN_FIELDS:
        if message.get(field) not in (None, 0, 1):
            return f"has {field} {brief(message[field])}; a turn is learned (1) or not (0)"
    if message.get("train") and message["role"] != "assistant":
        return (
            f"has train {brief(message['train'])} and the role {message['role']!r}; only the assistant's turns are "
            "learned, or all with data.train_on_inputs"
        )
    return ""


def is_learned(message: dict[str, Any]) -> bool:
    """Tell whether a message may be learned: its `weight` and `train` are not 0."""
    return all(message.get(field) in (None, 1) for field in _LEARN_FIELDS)


def has_learned_turn(messages: list[dict[str, Any]]) -> bool:
    """Tell whether a chat has a turn of the assistant that is learned."""
    return any(message["role"] == "assistant" and is_learned(message) for message in messages)


class RewrittenTurnError(Exception):
    """A chat template renders a turn differently once later turns follow."""


class ChatRenderer:
    """Renders chats with a tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        try:
            found = self.render([{"role": "user", "content": [{"type": "text", "text": "PROBE"}]}])
        except Exception:  # a template may raise anything
            found = ""
        # A template without support for parts fails, or renders the Python list.
        self.reads_parts = "PROBE" in found and "'text'" not in found

    def clean(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages as the template gets them: text instead of parts, without empty fields and `weight`."""
        out = []
        for message in messages:
            kept = {key: value for key, value in message.items() if value is not None}
            content = kept.setdefault("content", "")
            if isinstance(content, list) and not self.reads_parts:
                kept["content"] = "".join(part["text"] for part in content)
            out.append({key: value for key, value in kept.items() if key not in _LEARN_FIELDS})
        return out

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False, **extra: Any) -> str:
        """Render cleaned messages; see `apply_chat_template` of transformers."""
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **extra
        )
        return text

    def span(self, messages: list[dict[str, Any]], index: int, text: str, **extra: Any) -> tuple[int, int]:
        """Return the start and end of a message in the text of the whole chat.

        The assistant's turn starts after the generation prompt. A turn ends where the template ends it, without
        trailing white space.

        Raises:
            RewrittenTurnError: the template renders the message differently once later ones follow.
        """
        is_answer = messages[index]["role"] == "assistant"
        before = self.render(messages[:index], is_answer, **extra) if index or is_answer else ""
        until = self.render(messages[: index + 1], **extra).rstrip()
        if not until.startswith(before) or not text.startswith(until):
            raise RewrittenTurnError(
                "the tokenizer's chat template renders a turn differently when later turns follow (for example without "
                "its reasoning), so the assistant's text cannot be found; set data.chat_template to one that only "
                f"appends. The turn: {brief(messages[index]['content'])}"
            )
        return len(before), len(until)

    def unused_fields(self, names: Iterable[str]) -> list[str]:
        """Return the names that the template's source does not contain."""
        template = self.tokenizer.chat_template
        source = "".join(template.values()) if isinstance(template, dict) else str(template)
        return [name for name in names if name not in source]

    def end_of_turn(self) -> str | None:
        """Return what the template puts after the assistant's text; None if this cannot be found out."""
        chat = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            _, answer, tail = self.render(chat).rpartition("ANSWER")
        except Exception:  # a template may raise anything
            return None
        return tail.strip() if answer else None


def template_fields(chats: Iterable[Sequence[dict[str, Any]]]) -> list[str]:
    """Return the message fields other than role and content that the chats use and that change the result."""
    used = {key for chat in chats for message in chat for key, value in message.items() if value}
    return [field for field in _TEMPLATE_FIELDS if field in used]


def encode_chats(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    messages_column: str,
    template_columns: Sequence[str],
    filled_columns: Sequence[str],
    system_column: str | None,
    max_length: int,
    train_on_inputs: bool,
    prompts_only: bool,
) -> dict[str, list[Any]]:
    """Render chats with the template, and put the loss on the tokens of the assistant's turns.

    Args:
        batch: the columns of the rows.
        tokenizer: a tokenizer with a chat template.
        messages_column: column of the messages.
        template_columns: those of `TEMPLATE_COLUMNS` that the table has.
        filled_columns: the columns whose objects were given the members of all rows, filled with nulls.
        system_column: column of a system prompt, which becomes the first message; None: there is none.
        max_length: maximum number of tokens.
        train_on_inputs: put the loss on all turns but those with `weight` or `train` 0.
        prompts_only: return prompts, without the assistant's last turn.

    Returns:
        See `encode_answers`.

    Raises:
        RowError: the template raises an error, or renders earlier turns differently once later ones follow.
    """
    renderer = ChatRenderer(tokenizer)
    names = ("input_ids", "length") if prompts_only else ("input_ids", "length", "labels", "supervised", "lost", "kept")
    out: dict[str, list[Any]] = {name: [] for name in names}
    for row, given in enumerate(batch[messages_column]):
        cells = {name: batch[name][row] for name in template_columns}
        cells = {name: _without_nulls(cell) if name in filled_columns else cell for name, cell in cells.items()}
        extra = _template_arguments(cells, row)
        given = _without_nulls(given) if messages_column in filled_columns else given
        given = _add_system(given, batch[system_column][row] if system_column else None, row)
        messages = renderer.clean(given)
        try:
            if prompts_only:
                while messages[-1]["role"] == "assistant":
                    messages.pop()
                text = renderer.render(messages, add_generation_prompt=True, **extra)
            else:
                text = renderer.render(messages, **extra)
                learned = [
                    renderer.span(messages, index, text, **extra)
                    for index, message in enumerate(given)
                    if message["role"] == "assistant" and is_learned(message)
                ]
                if train_on_inputs:
                    muted = [
                        renderer.span(messages, index, text, **extra)
                        for index, message in enumerate(given)
                        if not is_learned(message)
                    ]
        except Exception as problem:  # jinja's errors, and those of what the template computes
            raise RowError(row, _template_problem(problem)) from problem
        if prompts_only:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            out["input_ids"].append(ids[-max_length:])
            out["length"].append(len(ids))
            continue
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if train_on_inputs:
            flags = [not _overlaps(offset, muted) for offset in offsets]
        else:
            flags = [_overlaps(offset, learned) for offset in offsets]
        labels = [token if flag else IGNORE for token, flag in zip(ids, flags, strict=True)]
        add_supervised(out, ids, labels, max_length)
    return out


def _overlaps(offset: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    return any(offset[0] < end and offset[1] > start for start, end in spans)


def _template_problem(problem: Exception) -> str:
    if isinstance(problem, RewrittenTurnError):
        return str(problem)
    return (
        f"the chat template cannot render this chat ({type(problem).__name__}: {first_line(problem)}); correct the "
        "row, or set data.chat_template."
    )


def _template_arguments(cells: dict[str, Any], row: int) -> dict[str, Any]:
    """Return the row's tools, documents and other arguments of the template; cells may be JSON text.

    Raises:
        RowError: a cell has another form.
    """
    arguments: dict[str, Any] = {}
    for name, cell in cells.items():
        if isinstance(cell, str) and cell.strip():
            try:
                cell = json.loads(cell)
            except json.JSONDecodeError as problem:
                raise RowError(row, f"column {name!r} is not valid JSON ({problem}); correct it.") from problem
        if not cell:
            continue
        is_mapping = name == "chat_template_kwargs"
        if not isinstance(cell, dict if is_mapping else list):
            form = "an object" if is_mapping else "a list of objects"
            raise RowError(row, f"column {name!r} has {brief(cell)}; give {form}.")
        arguments.update(cell if is_mapping else {name: cell})
    return arguments


def _add_system(messages: list[dict[str, Any]], system: Any, row: int) -> list[dict[str, Any]]:
    """Put a system prompt before the messages, if there is one.

    Raises:
        RowError: the messages start with another system prompt.
    """
    if system is None or not str(system).strip():
        return messages
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": str(system)}, *messages]
    if first.get("content") != system:
        raise RowError(row, f"the messages start with another system prompt than {brief(system)}; remove one of them.")
    return messages


def _without_nulls(value: Any) -> Any:
    """Drop the empty members of objects."""
    if isinstance(value, dict):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, list):
        return [_without_nulls(member) for member in value]
    return value
