"""A LoRA that is folded into the base while something is computed, for the speed of the base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lit_peft.methods.attachment import attachment_or_none
from lit_peft.methods.merging import merge_adapter, unmerge_adapter
from lit_peft.nn.weight_update import WeightUpdate


@contextmanager
def merged_adapter(model: nn.Module) -> Iterator[None]:
    """Fold the active LoRA into the base weights in the block, e.g. to generate as fast as the base does.

    The base weights are given back bit for bit. In the block, a copy of the adapted ones is kept. An adapter that is
    merged already stays merged.

    Args:
        model: a model whose active adapter is a LoRA.

    Raises:
        LitPeftError: as `merge_adapter`.
    """
    attachment = attachment_or_none(model)
    adapted = () if attachment is None else attachment.adapted.values()
    if any(isinstance(layer, WeightUpdate) and layer.merged for layer in adapted):
        yield
        return
    merge_adapter(model)
    try:
        yield
    finally:
        # An adapter that the block took off the model has left the base as it was.
        if attachment_or_none(model) is attachment:
            unmerge_adapter(model)
