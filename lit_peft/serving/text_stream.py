"""Text from tokens as they are generated: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A decoder writes it for bytes that are no whole character yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Decodes the tokens of one answer.

    Args:
        tokenizer: a tokenizer of transformers.
        stops: the texts at which the answer ends.

    Attributes:
        text: what has been decoded, without the stop text.
        is_stopped: whether a stop text was found.
        starts: where each token begins in the text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        # The beginning of a stop text is held back until the next tokens show whether it is one.
        self.held = max((len(stop) for stop in stops), default=1) - 1
        self.text, self.is_stopped = "", False
        self.starts: list[int] = []
        self._tokens: list[int] = []
        # Tokens from `_begin` are decoded together, since a token's text depends on the one before it; those before
        # `_end` are in `text`.
        self._begin = self._end = self._sent = 0

    def add(self, token: int) -> str:
        """Add a token; return the text that can be sent now."""
        self.starts.append(len(self.text))
        self._tokens.append(token)
        self._decode(is_last=False)
        return self._take(len(self.text) if self.is_stopped else max(len(self.text) - self.held, self._sent))

    def finish(self) -> str:
        """Return the rest of the text."""
        if not self.is_stopped:
            self._decode(is_last=True)
        return self._take(len(self.text))

    def _take(self, end: int) -> str:
        start, self._sent = self._sent, end
        return self.text[start:end]

    def _decode(self, is_last: bool) -> None:
        known = self._text_of(self._tokens[self._begin : self._end])
        found = self._text_of(self._tokens[self._begin :])
        if len(found) <= len(known) or (found.endswith(_INCOMPLETE) and not is_last):
            return
        before = len(self.text)
        self.text += found[len(known) :]
        self._begin, self._end = self._end, len(self._tokens)
        places = [self.text.find(stop, max(before - self.held, 0)) for stop in self.stops]
        first = min((place for place in places if place >= 0), default=None)
        if first is not None:
            self.text, self.is_stopped = self.text[:first], True

    def _text_of(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text
