"""Texts of any length to token ids, in a bounded amount of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

# Characters that are tokenized at a time. The tokenizers keep about 600 bytes for each token until they return.
_PIECE = 500_000


def token_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each text, with the special tokens that the tokenizer adds.

    A text of more than 500,000 characters is tokenized in pieces that begin with white space, and only the tokens at
    their borders may differ from those of the whole.

    Args:
        texts: the texts.
        tokenizer: the tokenizer.
    """
    short = [text if len(text) <= _PIECE else "" for text in texts]
    found: list[list[int]] = [list(ids) for ids in tokenizer(short, verbose=False)["input_ids"]]
    for index, text in enumerate(texts):
        if len(text) > _PIECE:
            found[index] = _long_text_ids(text, tokenizer)
    return found


def _long_text_ids(text: str, tokenizer: Any) -> list[int]:
    first, last = special_ends(tokenizer)
    ids = first
    for piece in text_pieces(text):
        ids = ids + tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return ids + last


def text_pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of at most 500,000 characters, which begin with white space where there is any."""
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            # From its last white space on, the text belongs to the next piece; the tokens of a word have its space.
            end = max((text.rfind(space, start + 1, end) for space in " \n"), default=-1)
            end = end if end > start else start + _PIECE
        yield text[start:end]
        start = end


def special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before a text and after it."""
    whole = list(tokenizer("a")["input_ids"])
    inner = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(whole)):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    return [], []
