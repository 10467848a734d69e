"""Images in conversations: which message has which image of its row."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from lit_peft.data.images import KEYS, ImageSource

# How text marks the place of an image of the row's own column: LLaVA's and LLaMA-Factory's files.
MARK = "<image>"
_IMAGE_TYPES = ("image", "image_url", "input_image")
# The types of parts with text; the second is that of OpenAI's newer interface.
_TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_PART = {"type": "image"}


def place_images(
    messages: Sequence[Any], cell: Any, locate: Callable[[Any], ImageSource]
) -> tuple[list[dict[str, Any]], list[ImageSource]]:
    """Return a row's messages with a part `{"type": "image"}` in the place of each image, and the images in that order.

    A part of a message may name its image; if it names none, it stands for the next image of the row's own column. So
    does `<image>` in a text, if the row has that column. Without any such place, the images of the column come first in
    the first message of the user.

    Args:
        messages: the messages, with a text or parts as content.
        cell: the row's own images: None, one, or a list.
        locate: returns where an image is, given what names it; see `image_source`.

    Raises:
        ValueError: an image is wrong, or places and images differ in number; the text says why.
    """
    cells = [] if cell is None else list(cell) if isinstance(cell, (list, tuple)) else [cell]
    waiting = [value for value in cells if not is_empty(value)]
    count, used = len(waiting), 0
    out: list[dict[str, Any]] = []
    found: list[ImageSource] = []
    for message in messages:
        parts = message.get("content") if isinstance(message, dict) else None
        if isinstance(parts, str) and count and MARK in parts:
            parts = _split(parts)
        if not isinstance(parts, list):
            out.append(message)
            continue
        kept: list[Any] = []
        for part in _pieces(parts, bool(count)):
            if not (isinstance(part, dict) and part.get("type") in _IMAGE_TYPES):
                kept.append(part)
                continue
            if any(part.get(key) is not None for key in KEYS):
                found.append(locate(part))
            elif used < count:
                found.append(locate(waiting[used]))
                used += 1
            else:
                raise ValueError(f"its messages have more places for images than its column has images, {count}")
            kept.append(IMAGE_PART)
        out.append({**message, "content": kept})
    if used == 0 and count:
        out, found = _in_front(out, [locate(value) for value in waiting], found)
    elif used < count:
        raise ValueError(f"it has {count} images, and its messages have places for {used}")
    return out, found


def is_empty(value: Any) -> bool:
    """Tell whether a cell has no image: null, an empty text, or datasets' object without bytes and path."""
    if isinstance(value, dict):
        return all(value.get(key) is None for key in KEYS)
    return value is None or (isinstance(value, str) and not value.strip())


def _pieces(parts: list[Any], has_column: bool) -> list[Any]:
    """Return the parts of a message, those of text with the type `text` and split at the marks."""
    out: list[Any] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in _TEXT_TYPES else None
        if not isinstance(text, str):
            out.append(part)
        else:
            out += _split(text) if has_column and MARK in text else [{**part, "type": "text"}]
    return out


def _split(text: str) -> list[Any]:
    pieces = re.split(f"({MARK})", text)
    return [IMAGE_PART if piece == MARK else {"type": "text", "text": piece} for piece in pieces if piece]


def _in_front(
    messages: list[dict[str, Any]], images: list[ImageSource], others: list[ImageSource]
) -> tuple[list[dict[str, Any]], list[ImageSource]]:
    """Put images before what the user says first."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if others or "user" not in roles:
        raise ValueError(f"its messages have no place for the {len(images)} images of its column")
    at = roles.index("user")
    content = messages[at].get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": str(content or "")}]
    message = {**messages[at], "content": [*[IMAGE_PART] * len(images), *parts]}
    return [*messages[:at], message, *messages[at + 1 :]], images


def without_images(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages of `place_images` with their text only."""
    return [
        {**message, "content": [part for part in message["content"] if part != IMAGE_PART]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def count_images(messages: Sequence[dict[str, Any]]) -> int:
    """Return the number of images in messages."""
    return sum(
        part == IMAGE_PART
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )
