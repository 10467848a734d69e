"""Virtual tokens: embeddings that are trained directly, or computed by a small network from trained anchors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

Reparameterization = Literal["LSTM", "MLP"]


class SoftPrompt(nn.Module):
    """The virtual tokens' embeddings, trained as they are (Lester et al. 2021, arXiv:2104.08691, section 2).

    Args:
        start: [rows, d], where they start.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(start.detach().clone(), freeze=False)

    def forward(self) -> Tensor:
        """The virtual tokens' embeddings, [rows, d]."""
        return self.embedding.weight

    def folded(self) -> Tensor:
        """The same, as plain numbers to store."""
        return self.embedding.weight.detach()

    def fold(self) -> None:
        """Nothing is to be folded here."""


class PromptEncoder(nn.Module):
    """Virtual tokens `MLP(biLSTM(anchors))`, or `MLP(anchors)` (Liu et al. 2021, arXiv:2103.10385, section 3.2).

    With the LSTM, the MLP is Linear(2h, 2h), ReLU, Linear(2h, d); without it, Linear(d, h), ReLU, Linear(h, h), ReLU,
    Linear(h, d). The anchors start from N(0, 1).

    In evaluation without gradients the result is computed once and kept until a parameter changes.

    Args:
        rows: the number of virtual tokens.
        dim: d, the size of the model's input embeddings.
        hidden_size: h, of the LSTM in each direction, and of the MLP.
        num_layers: of the LSTM.
        dropout: between the LSTM's layers.
        kind: `LSTM` or `MLP`.
        device: where the parameters live.
        dtype: the parameters' type.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        hidden_size: int,
        num_layers: int = 2,
        dropout: float = 0.0,
        kind: Reparameterization = "LSTM",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        h = hidden_size
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(rows, dim, **at)
        self.lstm_head: nn.LSTM | None = None
        self.mlp_head: nn.Sequential | None
        if kind == "LSTM":
            self.lstm_head = nn.LSTM(dim, h, num_layers, dropout=dropout, bidirectional=True, batch_first=True, **at)
            sizes = [2 * h, 2 * h, dim]
        else:
            sizes = [dim, h, h, dim]
        layers: list[nn.Module] = []
        for size, following in pairwise(sizes):
            layers += [nn.Linear(size, following, **at), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])
        self._kept: tuple[list[tuple[int, int]], Tensor] | None = None

    def forward(self) -> Tensor:
        """The virtual tokens' embeddings, [rows, d]."""
        if self.training or torch.is_grad_enabled():
            return self._compute()
        # A parameter that was stepped, filled or moved has another version or address.
        state = [(0 if p.is_inference() else p._version, p.data_ptr()) for p in self.parameters()]
        if self._kept is None or self._kept[0] != state:
            self._kept = state, self._compute()
        return self._kept[1]

    def folded(self) -> Tensor:
        """The same without dropout, as plain numbers to store."""
        training = self.training
        with torch.no_grad():
            result = self.eval()().clone()
        self.train(training)
        return result

    def fold(self) -> None:
        """Keep the result alone: it becomes the trained embedding, the network goes."""
        self.embedding = nn.Embedding.from_pretrained(self.folded(), freeze=False)
        self.lstm_head = self.mlp_head = None

    def train(self, mode: bool = True) -> PromptEncoder:
        self._kept = None
        return super().train(mode)

    def _compute(self) -> Tensor:
        x = self.embedding.weight
        if self.lstm_head is not None:
            x = self.lstm_head(x[None])[0][0]
        return x if self.mlp_head is None else self.mlp_head(x)
