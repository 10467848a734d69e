"""Trained rows of a frozen table of embeddings, and of the head that turns hidden states into scores of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenRows(nn.Module):
    """New values for some rows of a weight of shape (vocabulary, d), which itself is never changed.

    Forward hooks put the values in place: `embed` in what an embedding returns, `project` in what a head returns.

    Args:
        values: (n, d), the values to start from.
        indices: the row of each value in the weight.
    """

    indices: Tensor
    order: Tensor
    ordered: Tensor

    def __init__(self, values: Tensor, indices: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.detach().clone())
        rows = torch.tensor(list(indices), device=values.device)
        self.register_buffer("indices", rows, persistent=False)
        # For finding the place of a token's row by binary search.
        self.register_buffer("order", rows.argsort(), persistent=False)
        self.register_buffer("ordered", rows.sort().values, persistent=False)

    def embed(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of an embedding: (..., length) token ids → (..., length, d)."""
        ids: Tensor = args[0]
        place = torch.searchsorted(self.ordered, ids).clamp(max=len(self.ordered) - 1)
        found = (self.ordered[place] == ids).unsqueeze(-1)
        rows = F.embedding(self.order[place], self.weight)
        # Some models scale their embeddings.
        rows = rows.to(output.dtype) * getattr(module, "embed_scale", 1.0)
        return torch.where(found, rows.to(output.dtype), output)

    def project(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of a head: (..., d) hidden states → (..., vocabulary) scores."""
        hidden: Tensor = args[0]
        bias = getattr(module, "bias", None)
        rows = self.weight.to(hidden.dtype)
        scores = F.linear(hidden, rows, None if bias is None else bias[self.indices].to(hidden.dtype))
        return output.index_copy(-1, self.indices, scores.to(output.dtype))
