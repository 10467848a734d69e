"""Rows that hold several examples: told to the model by positions that begin again, without an attention mask.

transformers then lets no token see another example's (`masking_utils.find_packed_sequence_indices`), but only in models
that hand their positions on to the mask, and only where there is no cache.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lit_peft.methods.attachment import MethodSettings, attachment_or_none
from lit_peft.util.errors import LitPeftError

_CHECKED: WeakSet[nn.Module] = WeakSet()


def is_packed(batch: dict[str, Any]) -> bool:
    """Whether the rows of a batch are packed: positions without a mask."""
    return batch.get("position_ids") is not None and batch.get("attention_mask") is None


def packed_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return a packed batch as this model takes it: without a cache, and for flash attention as a single row.

    Raises:
        LitPeftError: the model's tokens would see those of other examples.
    """
    check_packing(model)
    if "flash" in str(getattr(model.config, "_attn_implementation", "")):
        batch = {name: value.reshape(1, -1) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return {**batch, "use_cache": False}


def check_method(settings: MethodSettings) -> None:
    """Refuse a method that a row of several examples is not for.

    Raises:
        LitPeftError: it has virtual tokens.
    """
    if not settings.packs:
        raise LitPeftError(
            f"data.packing is set, and the virtual tokens of {settings.method} stand once in a row, not before each of "
            "its examples: leave packing out, or take a method without them, such as LoRA."
        )


def check_packing(model: Any) -> None:
    """Try once whether a model keeps packed examples apart: other tokens in the first must not change the second.

    Raises:
        LitPeftError: they do, or the method attached has virtual tokens.
    """
    attachment = attachment_or_none(model)
    if attachment is not None:
        check_method(attachment.settings)
    if model in _CHECKED:
        return
    embeddings = model.get_input_embeddings().weight
    ids = (torch.tensor([[1, 2, 3, 9, 10, 11], [6, 7, 8, 9, 10, 11]]) % len(embeddings)).to(embeddings.device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]]).to(ids)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            rows = [model(input_ids=row, position_ids=positions, use_cache=False).logits for row in ids.split(1)]
    finally:
        for module in training:
            module.training = True
    one, other = (row[:, 3:].float() for row in rows)
    # Masked tokens weigh nothing at all; what is left is a matter of how experts are batched.
    tolerance = 1e-4 if rows[0].dtype == torch.float32 else 1e-2
    if not (one - other).abs().max() <= tolerance * one.abs().max():
        raise LitPeftError(
            f"data.packing is set, and {type(model).__name__} lets the tokens of one example see those of others in "
            "its row: leave packing out (group_by_length saves padding, too), or take another base model."
        )
    _CHECKED.add(model)
