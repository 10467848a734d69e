"""Embeddings of virtual tokens: trained directly, or computed by a small network from trained vectors."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_peft.nn.autocast import without_autocast
from lit_peft.nn.weights_state import weights_state

Reparameterization = Literal["LSTM", "MLP"]


class SoftPrompt(nn.Module):
    """Embeddings of virtual tokens that are trained directly (Lester et al. 2021, arXiv:2104.08691, section 2).

    Args:
        start: the initial embeddings, shape (rows, d).

    Shapes:
        `forward()` → (rows, d)
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(start.detach().clone(), freeze=False)

    def forward(self) -> Tensor:
        """Return the embeddings of the virtual tokens."""
        return self.embedding.weight

    def folded(self) -> Tensor:
        """Return the embeddings as a plain tensor to save, without a graph."""
        return self.embedding.weight.detach()

    def fold(self) -> None:
        """Do nothing: there is no network to remove."""


class PromptEncoder(nn.Module):
    """Embeddings of virtual tokens, computed as `MLP(biLSTM(E))` or `MLP(E)` from trained vectors E.

    Liu et al. 2021 (arXiv:2103.10385), section 3.2. With the LSTM, the MLP is Linear(2h, 2h), ReLU, Linear(2h, d);
    without it, Linear(d, h), ReLU, Linear(h, h), ReLU, Linear(h, d). E starts from N(0, 1). The network is small and
    is always computed in its parameters' dtype, also under autocast.

    In evaluation without gradients, the result is computed once and kept until a parameter changes.

    Args:
        rows: the number of virtual tokens.
        dim: d, the size of the model's input embeddings.
        hidden_size: h, of the MLP and of the LSTM in each direction.
        num_layers: number of the LSTM's layers.
        dropout: dropout probability between the LSTM's layers.
        kind: `LSTM` or `MLP`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shapes:
        `forward()` → (rows, d)
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
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(rows, dim, **factory)
        self.lstm_head: nn.LSTM | None = None
        self.mlp_head: nn.Sequential | None
        if kind == "LSTM":
            self.lstm_head = nn.LSTM(
                dim, h, num_layers, dropout=dropout, bidirectional=True, batch_first=True, **factory
            )
            sizes = [2 * h, 2 * h, dim]
        else:
            sizes = [dim, h, h, dim]
        layers: list[nn.Module] = []
        for size, following in pairwise(sizes):
            layers += [nn.Linear(size, following, **factory), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def forward(self) -> Tensor:
        """Return the embeddings of the virtual tokens."""
        state = None if self.training else weights_state(self)
        if state is None:
            return self._compute()
        kept = self._kept  # read once: another thread may replace it
        if kept is None or kept[0] != state:
            self._kept = kept = state, self._compute()
        return kept[1]

    def folded(self) -> Tensor:
        """Return the embeddings as a plain tensor to save, without dropout and without a graph."""
        training = self.training
        with torch.no_grad():
            result = self.eval()().clone()
        self.train(training)
        return result

    def fold(self) -> None:
        """Replace the trained vectors by the result and remove the network."""
        self.embedding = nn.Embedding.from_pretrained(self.folded(), freeze=False)
        self.lstm_head = self.mlp_head = None

    def train(self, mode: bool = True) -> PromptEncoder:
        self._kept = None
        return super().train(mode)

    def _compute(self) -> Tensor:
        x = self.embedding.weight
        # On CPUs, the LSTM has no kernel for autocast's fp16.
        with without_autocast(x.device):
            if self.lstm_head is not None:
                # cuDNN's LSTM has no backward pass in evaluation mode; torch's own has.
                needs_torch = torch.is_grad_enabled() and not self.training
                with torch.backends.cudnn.flags(enabled=False) if needs_torch else nullcontext():
                    x = self.lstm_head(x[None])[0][0]
            return x if self.mlp_head is None else self.mlp_head(x)
