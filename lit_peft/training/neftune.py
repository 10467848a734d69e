"""Noise on the input embeddings during training (NEFTune, https://arxiv.org/abs/2310.05914)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.util.errors import LitPeftError


@contextmanager
def embedding_noise(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """Provide a model whose token embeddings have noise in the block, if it is in training mode.

    To each element, a number drawn uniformly from ±alpha / sqrt(L·d) is added (section 2). L is the length of the batch
    with its padding, as in transformers and in the authors' published function, and d the size of an embedding. Virtual
    tokens count for L, but have no noise. An encoder-decoder has noise on the tokens of both parts.

    Args:
        model: the model.
        alpha: the strength; None: no noise.

    Raises:
        LitPeftError: the model looks up its input elsewhere.
    """
    if alpha is None or not model.training:
        yield
        return
    seen: list[bool] = []

    def add_noise(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        seen.append(True)
        if not model.training:  # a task tries the model out within its first step
            return None
        most = alpha / (output.shape[-2] * output.shape[-1]) ** 0.5
        return output + torch.zeros_like(output).uniform_(-most, most)

    # Before the hooks of a method, which put virtual tokens in their places.
    handles = [table.register_forward_hook(add_noise, prepend=True) for table in _tables(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise LitPeftError(
            f"neftune_noise_alpha={alpha}: {type(model).__name__} does not look up its tokens in one table of "
            "embeddings, so there is nothing to add noise to: leave it out."
        )


def _tables(model: Any) -> list[nn.Module]:
    """Return the tables of token embeddings of a model and, of an encoder-decoder, of its parts."""
    config = getattr(model, "config", None)
    parts = [model.get_encoder(), model.get_decoder()] if getattr(config, "is_encoder_decoder", False) else [model]
    found: dict[int, nn.Module] = {}
    for part in parts:
        try:
            table = part.get_input_embeddings()
        except (AttributeError, NotImplementedError):  # transformers finds none (CANINE)
            continue
        found[id(table)] = table
    return list(found.values())
