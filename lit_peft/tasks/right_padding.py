"""Leaving out the attention mask of rows that are padded on the right.

In a causal model no token attends to later ones, so padding on the right changes nothing before it. Without a mask,
attention runs in its fastest kernels, and the [length × length] mask is never built.
"""

from __future__ import annotations

from typing import Any

import torch

from lit_peft.models.call_arguments import arguments
from lit_peft.models.transformers_internals import warns_without_mask
from lit_peft.nn.evaluating import evaluating


def ignores_right_padding(model: Any) -> bool:
    """Test whether a causal LM computes the same for a row with and without a mask of padding on its right.

    Without a mask, other tokens in place of the padding must not change the logits before them by a single bit; and the
    logits must be those with a mask, up to rounding. Mixtures of experts may fail the first test, since they compute
    the tokens of an expert together; they keep the mask, and so do models that warn without one.

    Args:
        model: a transformers model, with or without a method attached.
    """
    if "attention_mask" not in arguments(model) or warns_without_mask(model):
        return False
    num_ids = len(model.get_input_embeddings().weight)
    ids = (torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8]]) % num_ids).to(model.device)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]], device=ids.device)
    with evaluating(model):
        first, second = (model(input_ids=row).logits[0, :4] for row in ids.split(1))
        masked = model(input_ids=ids[:1], attention_mask=mask).logits[0, :4]
    tolerance = 1e-4 if masked.dtype == torch.float32 else 5e-2
    return torch.equal(first, second) and bool((first - masked).abs().max() <= tolerance * masked.abs().max())
