"""Load a tokenizer and make it fit for batching."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lit_peft.models.sources import BaseSource, hub_error, resolve_base
from lit_peft.util.errors import LitPeftError


def load_tokenizer(base: str, field: str = "data.tokenizer", revision: str | None = None) -> Any:
    """Load the tokenizer of a base model.

    Args:
        base: any form `lit_peft.models.sources.resolve_base` takes.
        field: the setting's name, for error messages.
        revision: branch, tag or commit of a hub model.

    Returns:
        The tokenizer. One without a padding token pads with its end-of-text token: no token is added, so the
        model's embeddings keep their size.

    Raises:
        LitPeftError: there is no tokenizer, or no token to pad with.
    """
    from transformers import AutoTokenizer

    # A folder may hold a tokenizer alone, without the model that `resolve_base` asks for.
    alone = (Path(base) / "tokenizer_config.json").is_file()
    source = BaseSource(base, base, True) if alone else resolve_base(base)
    try:
        at = {} if revision is None else {"revision": revision}
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False, **at)
    except Exception as exc:  # OSError, ValueError, ImportError and KeyError, by what is missing
        raise hub_error(base, exc, field=field) from exc
    return with_padding(tokenizer, base, field)


def require_fast(tokenizer: Any) -> None:
    """Check that a tokenizer tells where in the text its tokens are.

    Raises:
        LitPeftError: it does not.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise LitPeftError(
            f"data.tokenizer {tokenizer.name_or_path!r} does not tell which characters a token stands for; use a fast "
            "tokenizer (one with a tokenizer.json)."
        )


def with_padding(tokenizer: Any, name: str, field: str = "data.tokenizer") -> Any:
    """Give a tokenizer a padding token out of those it has; see `load_tokenizer`."""
    if tokenizer.pad_token_id is None:
        spare = tokenizer.eos_token or tokenizer.unk_token
        if spare is None:
            raise LitPeftError(
                f"{field} {name!r} has neither a padding nor an end-of-text token; set pad_token in its "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = spare
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash what decides a tokenizer's output, for cache keys.

    The object itself cannot serve: it changes with every call that truncates or pads.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        body = f"{type(tokenizer).__name__} {tokenizer.name_or_path} {len(tokenizer)}"
    else:
        backend.no_truncation()
        backend.no_padding()
        body = backend.to_str()
    template = getattr(tokenizer, "chat_template", None)
    rest = (type(tokenizer).__name__, template, sorted(tokenizer.special_tokens_map.items(), key=str))
    return hashlib.sha256(f"{body}\0{rest}".encode()).hexdigest()
