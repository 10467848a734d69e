"""The tokenizer of a data module."""

from __future__ import annotations

from typing import Any

from lit_peft.data.prompt_templates import read_template
from lit_peft.data.transcripts import set_language
from lit_peft.models.tokenization import add_tokens, load_tokenizer
from lit_peft.util.errors import LitPeftError


def tokenizer_of(data: Any) -> Any:
    """Load the tokenizer that a data module's settings name.

    Raises:
        LitPeftError: no setting names one, or it cannot be loaded.
    """
    name = data.tokenizer_name or data.base
    if name is None:
        raise LitPeftError("Neither data.tokenizer nor data.base is set; name the base model.")
    field = "data.tokenizer" if data.tokenizer_name else "data.base"
    tokenizer = load_tokenizer(name, field, data.revision)
    # A tokenizer without a known limit has a huge one.
    limit = getattr(tokenizer, "model_max_length", None)
    if limit is not None and data.known_length is not None and data.known_length > limit:
        data.notes.add(
            f"data.max_length {data.known_length} exceeds the {limit} tokens that {name!r} was made for.", once=True
        )
    return adapted(tokenizer, data)


def adapted(tokenizer: Any, data: Any) -> Any:
    """Return a tokenizer with the settings of a data module."""
    if (template := getattr(data, "chat_template", None)) is not None:
        tokenizer.chat_template = read_template(template)
    if hasattr(data, "speech_task"):
        set_language(tokenizer, data.language, data.speech_task)
    if data.add_tokens:
        add_tokens(tokenizer, data.add_tokens)
    if data.truncation_side == "left":
        tokenizer.truncation_side = "left"
    return tokenizer
