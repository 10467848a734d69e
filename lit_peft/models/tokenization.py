"""Loading tokenizers, and preparing them for batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lit_peft.models.sources import BaseSource, hub_error, resolve_base
from lit_peft.util.errors import LitPeftError


def load_tokenizer(base: str, field: str = "data.tokenizer", revision: str | None = None) -> Any:
    """Load the tokenizer of a base model.

    Args:
        base: a model, in any form that `lit_peft.models.sources.resolve_base` accepts, or a folder with a tokenizer.
        field: the setting's name, for error messages.
        revision: branch, tag or commit of a hub model.

    Returns:
        The tokenizer. Without a padding token of its own, it pads with its end-of-text token: no token is added, so the
        model's embeddings keep their size.

    Raises:
        LitPeftError: there is no tokenizer, or it has no token to pad with.
    """
    from transformers import AutoTokenizer

    # `resolve_base` would refuse a folder without a model.
    tokenizer_only = (Path(base) / "tokenizer_config.json").is_file()
    source = BaseSource(base, base, True) if tokenizer_only else resolve_base(base)
    try:
        version = {} if revision is None else {"revision": revision}
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False, **version)
    except Exception as exc:  # OSError, ValueError, ImportError or KeyError, depending on what is missing
        raise hub_error(base, exc, field=field) from exc
    return with_padding(tokenizer, base, field)


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add special tokens that a tokenizer does not have yet; return the ids of all of them.

    Raises:
        LitPeftError: a token is empty, or occurs twice.
    """
    from tokenizers import AddedToken

    if not all(tokens) or len(set(tokens)) < len(tokens):
        raise LitPeftError(f"add_tokens={list(tokens)!r} has an empty token, or one twice: give different texts.")
    known = tokenizer.get_vocab()
    new = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    return ids


def adapter_tokenizer(adapters: Iterable[str], base: str, field: str, revision: str | None = None) -> Any:
    """Load the tokenizer that was saved with adapters, because it has more tokens, or else that of the base.

    Raises:
        LitPeftError: there is no tokenizer, or the adapters have different ones.
    """
    own = [folder for folder in adapters if (Path(folder) / "tokenizer_config.json").is_file()]
    found = [load_tokenizer(folder, "--adapter") for folder in own] or [load_tokenizer(base, field, revision)]
    for folder, tokenizer in zip(own, found, strict=False):
        if tokenizer.get_vocab() != found[0].get_vocab():
            raise LitPeftError(
                f"--adapter: {own[0]!r} and {folder!r} have different new tokens, so one tokenizer does not fit both; "
                "use them one at a time."
            )
    return found[0]


def require_fast(tokenizer: Any) -> None:
    """Check that a tokenizer returns the character offsets of its tokens.

    Raises:
        LitPeftError: it does not, because it is a slow one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise LitPeftError(
            f"data.tokenizer {tokenizer.name_or_path!r} does not return the character offsets of its tokens; use a "
            "fast tokenizer (one with a tokenizer.json)."
        )


def with_padding(tokenizer: Any, name: str, field: str = "data.tokenizer") -> Any:
    """Return the tokenizer, padding with its end-of-text or unknown token if it has no padding token.

    Raises:
        LitPeftError: it has none of these tokens.
    """
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise LitPeftError(
                f"{field} {name!r} has neither a padding nor an end-of-text token; set pad_token in its "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = substitute
    return tokenizer


def stop_tokens(tokenizer: Any, base: str | None, revision: str | None = None) -> set[int]:
    """Return the tokens at which generation stops: the tokenizer's end token and those of the generation settings.

    Args:
        tokenizer: the tokenizer.
        base: the base model; None: it is unknown.
        revision: branch, tag or commit of a hub model.
    """
    from transformers import GenerationConfig

    found = {tokenizer.eos_token_id} - {None}
    if base is not None:
        try:
            version = revision or "main"
            ends = GenerationConfig.from_pretrained(resolve_base(base).path, revision=version).eos_token_id
        except (OSError, ValueError):  # there are no settings
            return found
        found.update(ends if isinstance(ends, list) else {ends} - {None})
    return found


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash what a tokenizer's output depends on, for cache keys.

    The object itself is no key: it changes with every call that truncates or pads.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        body = f"{type(tokenizer).__name__} {tokenizer.name_or_path} {len(tokenizer)}"
    else:
        backend.no_truncation()
        backend.no_padding()
        body = backend.to_str()
    template = getattr(tokenizer, "chat_template", None)
    side = getattr(tokenizer, "truncation_side", "right")
    rest = (type(tokenizer).__name__, template, side, sorted(tokenizer.special_tokens_map.items(), key=str))
    return hashlib.sha256(f"{body}\0{rest}".encode()).hexdigest()
