"""The bodies of OpenAI's answers: whole completions and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from lit_peft.serving.completions import Part, Usage
from lit_peft.serving.decoding import TokenLogprob


class Form:
    """How parts of answers are written.

    Args:
        model: the name of the model, as in the request.
    """

    prefix = kind = chunk_kind = ""

    def __init__(self, model: str) -> None:
        self.id, self.model, self.created = f"{self.prefix}-{uuid.uuid4().hex}", model, int(time.time())

    @staticmethod
    def is_last(message: Any) -> bool:
        """Return whether no other message follows."""
        return isinstance(message, Usage)

    def whole(self, parts: Sequence[Part], usage: Usage) -> dict[str, Any]:
        """Return the body for whole answers."""
        choices = [self.choice(part) for part in sorted(parts, key=lambda part: part.index)]
        return {**self._body(self.kind, choices), "usage": usage_of(usage)}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the body of an event of a stream."""
        return self._body(self.chunk_kind, choices)

    def opening(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Return the events at the beginning of a stream."""
        return []

    def choice(self, part: Part) -> dict[str, Any]:
        """Return a whole answer."""
        raise NotImplementedError

    def delta(self, part: Part) -> dict[str, Any]:
        """Return a part of an answer in a stream."""
        raise NotImplementedError

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


class ChatForm(Form):
    """The form of chat completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        deltas = [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for index in indices
        ]
        return [self.chunk([delta]) for delta in deltas]

    def choice(self, part: Part) -> dict[str, Any]:
        return {**self._rest(part), "message": {"role": "assistant", "content": part.text}}

    def delta(self, part: Part) -> dict[str, Any]:
        return {**self._rest(part), "delta": {"content": part.text} if part.text else {}}

    def _rest(self, part: Part) -> dict[str, Any]:
        logprobs = None
        if part.logprobs is not None:
            logprobs = {"content": [_chat_logprob(each) for each in part.logprobs]}
        return {"index": part.index, "logprobs": logprobs, "finish_reason": part.finish}


class CompletionForm(Form):
    """The form of text completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, part: Part) -> dict[str, Any]:
        logprobs = None
        if part.logprobs is not None:
            logprobs = {
                "tokens": [each.token for each in part.logprobs],
                "token_logprobs": [each.logprob for each in part.logprobs],
                "top_logprobs": [_alternatives(each) for each in part.logprobs],
                "text_offset": [each.offset for each in part.logprobs],
            }
        return {"index": part.index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish}

    def delta(self, part: Part) -> dict[str, Any]:
        return self.choice(part)


def usage_of(usage: Usage) -> dict[str, int]:
    """Return the numbers of tokens in OpenAI's form."""
    total = usage.prompt_tokens + usage.completion_tokens
    counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    return {**counts, "total_tokens": total}


def _chat_logprob(found: TokenLogprob) -> dict[str, Any]:
    return {
        **_named(found.token, found.logprob),
        "top_logprobs": [_named(token, logprob) for token, logprob in found.top],
    }


def _named(token: str, logprob: float | None) -> dict[str, Any]:
    # The bytes of a token that is not whole characters are not known from its text.
    known = None if "\ufffd" in token else list(token.encode())
    return {"token": token, "logprob": logprob, "bytes": known}


def _alternatives(found: TokenLogprob) -> dict[str, float] | None:
    """The most likely tokens in a place, and the one that was taken, by their text."""
    if found.logprob is None:
        return None
    best: dict[str, float] = {}
    for token, logprob in (*found.top, (found.token, found.logprob)):
        best.setdefault(token, logprob)
    return best
