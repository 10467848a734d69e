"""Chats: lists of messages, rendered by the tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from lit_peft.data.chat_rendering import (
    LEARN_FIELDS,
    REASONING_FIELDS,
    ChatRenderer,
    RewrittenTurnError,
    Span,
    left_out,
)
from lit_peft.data.collate import IGNORE
from lit_peft.data.conversations import Form, read_conversation, read_tools
from lit_peft.data.rows import RowError
from lit_peft.data.supervised import add_supervised
from lit_peft.util.errors import LitPeftError, first_line
from lit_peft.util.type_checks import brief

# Columns that the chat template gets together with the messages.
TEMPLATE_COLUMNS = ("tools", "functions", "documents", "chat_template_kwargs")
# Fields of a message that change the result if the template reads them.
_TEMPLATE_FIELDS = ("name", "tool_calls", *REASONING_FIELDS)
# What `data.learn` may be, besides a list of roles.
LEARN = ("answers", "last_answer")


def check_learn(learn: str | Sequence[str]) -> None:
    """Check the setting of what is learned.

    Raises:
        LitPeftError: it is neither `answers`, `last_answer` nor a list of roles.
    """
    if learn in LEARN or (not isinstance(learn, str) and learn and all(isinstance(role, str) for role in learn)):
        return
    raise LitPeftError(
        f"data.learn is {learn!r}; use 'answers' (all of them), 'last_answer', or a list of roles such as "
        "[assistant, tool]."
    )


def learned_turns(messages: Sequence[dict[str, Any]], learn: str | Sequence[str]) -> list[int]:
    """Return the indices of the messages to learn.

    Args:
        messages: the chat; messages whose `weight`, `train` or `training` is 0 are not learned.
        learn: `answers`, `last_answer`, or a list of roles.
    """
    roles = ("assistant",) if isinstance(learn, str) else learn
    found = [index for index, message in enumerate(messages) if message["role"] in roles]
    found = found[-1:] if learn == "last_answer" else found
    return [index for index in found if is_learned(messages[index])]


def chat_problem(messages: Any, needs_answer: bool, learn: str | Sequence[str] = "answers") -> str:
    """Return what is wrong with a chat; "" if nothing is.

    Args:
        messages: the chat.
        needs_answer: there must be a turn to learn.
        learn: see `learned_turns`.
    """
    if not isinstance(messages, list) or not messages:
        return "no list of messages; each message needs a role and a content"
    roles_to_learn = ("assistant",) if isinstance(learn, str) else tuple(learn)
    if problem := first_problem(messages, roles_to_learn):
        return problem
    roles = [message["role"] for message in messages]
    if set(roles) == {"assistant"}:
        return "only the assistant's turns; put a user's turn first"
    if needs_answer and not set(roles_to_learn) & set(roles):
        wanted = "assistant's turn" if roles_to_learn == ("assistant",) else f"turn of {', '.join(roles_to_learn)}"
        return f"no {wanted} to learn; the roles are {', '.join(map(repr, dict.fromkeys(roles)))}"
    return ""


def first_problem(messages: Sequence[Any], roles_to_learn: Sequence[str] = ("assistant",)) -> str:
    """Return what is wrong with the first bad message, with its number; "" if all are fine."""
    for number, message in enumerate(messages, start=1):
        if problem := _message_problem(message, roles_to_learn):
            return f"message {number} {problem}"
    return ""


def _message_problem(message: Any, roles_to_learn: Sequence[str]) -> str:
    if not isinstance(message, dict):
        return f"is {brief(message)}; give a role and a content"
    content = message.get("content")
    reasoning = any(message.get(name) for name in REASONING_FIELDS)
    has_content = content is not None or message.get("tool_calls") or message.get("function_call") or reasoning
    if not message.get("role") or not has_content:
        return f"lacks its role or content; it has {', '.join(map(repr, message)) or 'nothing'}"
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            return f'has the content part {brief(part)}, which is not read; give text, {{"type": "text", "text": ...}}'
    if content is not None and not isinstance(content, (str, list)):
        return f"has the content {brief(content)}; give text"
    for field in LEARN_FIELDS:
        if message.get(field) not in (None, 0, 1):
            return f"has {field} {brief(message[field])}; a turn is learned (1) or not (0)"
    trained = next((field for field in LEARN_FIELDS[1:] if message.get(field)), None)
    if trained and message["role"] not in roles_to_learn:
        return (
            f"has {trained} {brief(message[trained])} and the role {message['role']!r}; only the turns of "
            f"{', '.join(map(repr, roles_to_learn))} are learned, or those that data.learn names"
        )
    return ""


def is_learned(message: dict[str, Any]) -> bool:
    """Tell whether a message may be learned: its `weight`, `train` and `training` are not 0."""
    return all(message.get(field) in (None, 1) for field in LEARN_FIELDS)


def template_fields(chats: Iterable[Sequence[dict[str, Any]]]) -> list[str]:
    """Return the message fields other than role and content that the chats use and that change the result."""
    used = {key for chat in chats for message in chat for key, value in message.items() if value}
    return [field for field in _TEMPLATE_FIELDS if field in used]


def read_row(batch: dict[str, list[Any]], row: int, form: Form, filled: Sequence[str], with_answer: bool) -> list[Any]:
    """Return the messages of a row of a batch.

    Args:
        batch: the columns of the rows.
        row: the row's position in the batch.
        form: how its conversation is written.
        filled: the columns whose objects were given the members of all rows, filled with nulls.
        with_answer: read the answer too.

    Raises:
        ValueError: the row cannot be read.
    """
    names = [name for name in form.all_columns if name in batch]
    cells = {name: without_nulls(batch[name][row]) if name in filled else batch[name][row] for name in names}
    return read_conversation(cells, form, with_answer)


def encode_chats(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    form: Form,
    template_columns: Sequence[str],
    filled_columns: Sequence[str],
    learn: str | Sequence[str],
    max_length: int,
    train_on_inputs: bool,
    prompts_only: bool,
) -> dict[str, list[Any]]:
    """Render chats with the template, and put the loss on the tokens of the turns to learn.

    Args:
        batch: the columns of the rows.
        tokenizer: a tokenizer with a chat template.
        form: how the conversations are written.
        template_columns: those of `TEMPLATE_COLUMNS` that the table has.
        filled_columns: the columns whose objects were given the members of all rows, filled with nulls.
        learn: see `learned_turns`.
        max_length: maximum number of tokens.
        train_on_inputs: put the loss on all turns but those with `weight`, `train` or `training` 0.
        prompts_only: return prompts, without the assistant's last turn.

    Returns:
        See `encode_answers`. A chat whose turns the template rewrites gives several examples. `left_out` says which
        parts of the messages are not in what is learned, separated by commas.

    Raises:
        RowError: the template raises an error, or the text of a turn cannot be found.
    """
    renderer = ChatRenderer(tokenizer)
    learning = () if prompts_only else ("labels", "supervised", "lost", "kept", "left_out")
    out: dict[str, list[Any]] = {name: [] for name in ("input_ids", "length", *learning)}
    for row in range(len(next(iter(batch.values())))):
        cells = {name: batch[name][row] for name in template_columns}
        cells = {name: without_nulls(cell) if name in filled_columns else cell for name, cell in cells.items()}
        extra = template_arguments(cells, row)
        try:
            given = read_row(batch, row, form, filled_columns, with_answer=not prompts_only)
        except ValueError as problem:
            raise RowError(row, f"{problem}.") from problem
        try:
            messages = renderer.clean(given)
            if prompts_only:
                while messages[-1]["role"] == "assistant":
                    messages.pop()
                ids = tokenizer(renderer.render(messages, True, **extra), add_special_tokens=False, verbose=False)
                out["input_ids"].append(ids["input_ids"][-max_length:])
                out["length"].append(len(ids["input_ids"]))
                continue
            if train_on_inputs:
                muted = [index for index, message in enumerate(given) if not is_learned(message)]
                spans = renderer.unlearned_spans(messages, muted, **extra)
                text = renderer.render(messages, **extra)
                add_rendered(out, tokenizer, text, spans, max_length, inverted=True)
                missing = [name for m in messages if m["role"] == "assistant" for name in left_out(m, text)]
                out["left_out"].append(",".join(dict.fromkeys(missing)))
                continue
            for part in renderer.examples(messages, learned_turns(given, learn), **extra):
                add_rendered(out, tokenizer, part.text, part.spans, max_length)
                found = "".join(part.text[start:end] for start, end in part.spans)
                missing = [name for index in part.turns for name in left_out(messages[index], found)]
                missing += [] if part.continues_prompt else ["generation prompt"]
                out["left_out"].append(",".join(dict.fromkeys(missing)))
        except Exception as problem:  # jinja's errors, and those of what the template computes
            raise RowError(row, template_problem(problem)) from problem
    return out


def add_rendered(
    out: dict[str, list[Any]],
    tokenizer: Any,
    text: str,
    spans: Sequence[Span],
    max_length: int,
    inverted: bool = False,
) -> None:
    """Tokenize a text, and append it with the labels of the tokens that overlap the spans.

    Args:
        out: see `add_supervised`.
        tokenizer: the tokenizer.
        text: the text.
        spans: characters to learn.
        max_length: maximum number of tokens.
        inverted: learn all but the spans.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    labels = [token if _overlaps(offset, spans) != inverted else IGNORE for token, offset in pairs]
    add_supervised(out, encoded["input_ids"], labels, max_length)


def _overlaps(offset: Span, spans: Sequence[Span]) -> bool:
    return any(offset[0] < end and offset[1] > start for start, end in spans)


def template_problem(problem: Exception) -> str:
    from jinja2.exceptions import SecurityError

    if isinstance(problem, RewrittenTurnError):
        return f"{problem}."
    if isinstance(problem, SecurityError):
        return (
            f"the chat template does something that is not allowed in a template ({first_line(problem)}); set "
            "data.chat_template to one that you trust."
        )
    return (
        f"the chat template cannot render this chat ({type(problem).__name__}: {first_line(problem)}); correct the "
        "row, or set data.chat_template."
    )


def template_arguments(cells: dict[str, Any], row: int) -> dict[str, Any]:
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
        if is_mapping:
            arguments.update(cell)
        elif name in ("tools", "functions"):  # OpenAI's older name
            arguments["tools"] = read_tools(list(cell))
        else:
            arguments[name] = cell
    return arguments


def without_nulls(value: Any) -> Any:
    """Drop the empty members of objects."""
    if isinstance(value, dict):
        return {key: without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, list):
        return [without_nulls(member) for member in value]
    return value
