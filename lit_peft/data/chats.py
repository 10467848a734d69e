"""Chats: lists of messages, rendered by the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from lit_peft.data.collate import IGNORE
from lit_peft.util.errors import LitPeftError


def encode_chats(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    messages_column: str,
    max_length: int,
    train_on_inputs: bool,
    prompts_only: bool,
) -> dict[str, list[Any]]:
    """Render chats with the template, and put the loss on the tokens of the assistant's turns.

    A turn starts where the template's generation prompt ends, and ends where the template ends it, without trailing
    white space.

    Raises:
        LitPeftError: the template renders earlier turns differently once later ones follow.
    """
    out: dict[str, list[Any]] = {"input_ids": [], "length": []} | ({} if prompts_only else {"labels": []})
    for messages in batch[messages_column]:
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if prompts_only:
            while messages[-1]["role"] == "assistant":
                messages.pop()
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            out["input_ids"].append(ids[-max_length:])
            out["length"].append(len(ids))
            continue
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            until = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False).rstrip()
            if not until.startswith(before) or not text.startswith(until):
                raise LitPeftError(
                    "The tokenizer's chat template renders a turn differently when later turns follow (for example "
                    "without its reasoning), so the assistant's text cannot be found; set data.chat_template to one "
                    f"that only appends. The turn: {message['content'][:80]!r}."
                )
            spans.append((len(before), len(until)))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = encoded["input_ids"]
        labels = [
            token if train_on_inputs or any(start < high and end > low for low, high in spans) else IGNORE
            for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        if all(label == IGNORE for label in labels[:max_length][1:]):
            continue
        out["input_ids"].append(ids[:max_length])
        out["labels"].append(labels[:max_length])
        out["length"].append(len(ids))
    return out


def chat_problem(messages: Any, needs_answer: bool) -> str:
    """Return what is wrong with a chat; "" if nothing is."""
    if not isinstance(messages, list) or not messages:
        return "no list of messages; each message needs a role and a content"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not message.get("role") or message.get("content") is None:
            return f"message {number} lacks its role or content"
    roles = [message["role"] for message in messages]
    if set(roles) == {"assistant"}:
        return "only the assistant's turns; put a user's turn first"
    if needs_answer and "assistant" not in roles:
        return f"no assistant's turn to learn; the roles are {', '.join(map(repr, dict.fromkeys(roles)))}"
    return ""
