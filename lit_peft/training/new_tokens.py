"""`add_tokens`: new tokens of a module, whose rows its method trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lit_peft.methods.attachment import attachment_of
from lit_peft.methods.tokens import new_token_settings, start_from_mean
from lit_peft.models.tokenization import add_tokens, load_tokenizer
from lit_peft.training.lightning_internals import datamodule_of
from lit_peft.util.errors import LitPeftError


def choose_rows(module: Any, model: nn.Module) -> None:
    """Set the module's `trainable_token_indices` to the rows of its new tokens; before the method is attached.

    Raises:
        LitPeftError: both settings are given, and the rows do not include those of the tokens.
    """
    tokens = module.hparams.add_tokens
    if not tokens:
        return
    ids = add_tokens(module.tokenizer, tokens)
    given = module.settings.trainable_token_indices
    for rows in given.values() if isinstance(given, Mapping) else [given] if given else []:
        if lacking := [token for token, index in zip(tokens, ids, strict=True) if index not in rows]:
            raise LitPeftError(
                f"model.trainable_token_indices does not have the row of {lacking[0]!r}, which model.add_tokens names: "
                "leave trainable_token_indices out, or add the row."
            )
    if not given:
        # Recorded, because a checkpoint may be loaded without the data and its tokenizer.
        module.hparams["trainable_token_indices"] = new_token_settings(model, ids)
        module.settings = replace(module.settings, trainable_token_indices=module.hparams.trainable_token_indices)


def start_rows(module: Any, model: nn.Module) -> None:
    """Let the rows of new tokens start from the mean, and keep the tokenizer for the adapter's folder."""
    tokens = module.hparams.add_tokens
    if not tokens:
        return
    data, attachment = datamodule_of(module), attachment_of(model)
    name = getattr(data, "tokenizer_name", None) or module.hparams.base
    before = load_tokenizer(name, "model.base", module.hparams.revision).get_vocab()
    ids = add_tokens(module.tokenizer, tokens)
    start_from_mean(model, attachment, [index for token, index in zip(tokens, ids, strict=True) if token not in before])
    attachment.tokenizer = module.tokenizer


def check_tokens(module: Any, data: Any) -> None:
    """Refuse a data module that splits the new tokens, or adds others.

    Raises:
        LitPeftError: its `add_tokens` differs.
    """
    own, theirs = module.hparams.add_tokens or [], getattr(data, "add_tokens", None)
    if hasattr(data, "add_tokens") and list(theirs or []) != list(own):
        raise LitPeftError(
            f"model.add_tokens is {own or None}, and data.add_tokens is {theirs}: give both the same tokens (on the "
            "command line, model.add_tokens is enough)."
        )
