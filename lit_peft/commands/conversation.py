"""A conversation with a model on a terminal, in which it knows what was said before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lit_peft.util.errors import LitPeftError, first_line

# Generates an answer to tokenized messages, shows it while it is generated, and returns it.
Answer = Callable[[Mapping[str, Any]], str]


class Conversation:
    """The turns of a conversation, as many as the model has positions for.

    Args:
        tokenizer: a tokenizer with a chat template.
        answer: generates an answer.
        most_tokens: returns the maximum number of tokens of the messages; None if there is no limit.
    """

    def __init__(self, tokenizer: Any, answer: Answer, most_tokens: Callable[[], int | None]) -> None:
        self.tokenizer, self.answer, self.most_tokens = tokenizer, answer, most_tokens
        self.messages: list[dict[str, str]] = []

    def say(self, text: str) -> str | None:
        """Add a message, and the model's answer to it.

        Args:
            text: the message.

        Returns:
            One sentence on what was forgotten to make room, or None.

        Raises:
            LitPeftError: the message alone is too long, or the chat template refuses it. It is not kept.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        most, forgotten = self.most_tokens(), 0
        inputs = encode_messages(self.tokenizer, messages)
        while most is not None and (count := inputs["input_ids"].shape[1]) > most:
            if len(messages) == 1:
                raise LitPeftError(
                    f"The message has {count} tokens, and the model's positions allow at most {most}: give a shorter "
                    "one, or a smaller --max_new_tokens."
                )
            # A turn is a message and its answer.
            messages, forgotten = messages[2:], forgotten + 1
            inputs = encode_messages(self.tokenizer, messages)
        said = self.answer(inputs)
        self.messages = [*messages, {"role": "assistant", "content": said}]
        if not forgotten:
            return None
        turns = "turn was" if forgotten == 1 else f"{forgotten} turns were"
        return f"(The conversation is longer than the model's positions: the oldest {turns} forgotten.)"


def encode_messages(tokenizer: Any, messages: list[dict[str, str]]) -> Mapping[str, Any]:
    """Render messages by the chat template, up to where the model's answer begins.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: their `role` and `content`.

    Returns:
        Tensors of shape [1, length].

    Raises:
        LitPeftError: the template cannot be applied.
    """
    try:
        found: Mapping[str, Any] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as problem:  # jinja's errors, also of its sandbox, and those of what the template computes
        raise LitPeftError(
            f"--chat: the chat template of the tokenizer cannot be applied ({first_line(problem)}): leave --chat "
            "out, or correct the template in the base's folder."
        ) from problem
    return {name: value for name, value in found.items() if name != "token_type_ids"}
