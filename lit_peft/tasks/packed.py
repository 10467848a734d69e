"""Rows that hold several examples: their positions restart with each example, and they have no attention mask.

transformers then keeps tokens from attending to other examples (`masking_utils.find_packed_sequence_indices`), but only
in models that pass their positions to the mask, and only without a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_peft.methods.attachment import MethodSettings, attachment_or_none
from lit_peft.models.transformers_internals import attention_implementation
from lit_peft.nn.evaluating import evaluating
from lit_peft.util.errors import LitPeftError


def is_packed(batch: dict[str, Any]) -> bool:
    """Return whether the rows of a batch are packed: it has positions and no mask."""
    return batch.get("position_ids") is not None and batch.get("attention_mask") is None


def packed_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which a model takes a packed batch: no cache, and a single row for flash attention.

    Raises:
        LitPeftError: the attached method has virtual tokens.
    """
    attachment = attachment_or_none(model)
    if attachment is not None:
        check_method(attachment.settings)
    if "flash" in (attention_implementation(model.config) or ""):
        batch = {name: value.reshape(1, -1) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return {**batch, "use_cache": False}


def check_method(settings: MethodSettings, setting: str = "data.packing") -> None:
    """Refuse a method that does not work on a row of several examples.

    Raises:
        LitPeftError: it has virtual tokens.
    """
    if not settings.packs:
        raise LitPeftError(
            f"{setting} is set, but the virtual tokens of {settings.method} come once in a row, not before each of "
            "its examples: leave it out, or use a method without virtual tokens, such as LoRA."
        )


def check_packing(model: Any) -> None:
    """Test whether a model keeps packed examples apart: other tokens in the first must not change the second.

    Raises:
        LitPeftError: they do.
    """
    embeddings = model.get_input_embeddings().weight
    ids = (torch.tensor([[1, 2, 3, 9, 10, 11], [6, 7, 8, 9, 10, 11]]) % len(embeddings)).to(embeddings.device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]]).to(ids)
    with evaluating(model):
        rows = [model(input_ids=row, position_ids=positions, use_cache=False).logits for row in ids.split(1)]
    one, other = (row[:, 3:].float() for row in rows)
    # Masked tokens have no weight at all; what differs comes from the way experts are batched.
    tolerance = 1e-4 if rows[0].dtype == torch.float32 else 1e-2
    if not (one - other).abs().max() <= tolerance * one.abs().max():
        raise LitPeftError(
            f"data.packing is set, but {type(model).__name__} lets the tokens of one example see those of other "
            "examples in the row: leave packing out (group_by_length also saves padding), or use another base model."
        )
