"""A prefix: trained keys and values that every query of an attention layer sees in front of the tokens' own.

tokens ──► K, V projections ──┐
                              ├──► [K_prefix ; K], [V_prefix ; V] ──► attention
table v × 2·Σ(heads·head_dim) ┘
  ▲
  └─ itself trained, or P (v × d) → Linear → tanh → Linear
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.bottleneck import ACTIVATIONS, check
from lit_peft.util.errors import LitPeftError


class Prefix(nn.Module):
    """The keys and values of v virtual tokens for a stack of attention layers.

    Without a projection the table of keys and values is trained itself (P-Tuning v2, Liu et al. 2021,
    arXiv:2110.07602, section 3.2). With one it is `up(act(down(P)))`, P a trained v × d table (Li and Liang 2021,
    arXiv:2101.00190, section 4.3); the network is folded away where no gradient is needed: the table is computed once
    for each state of the weights.

    Args:
        num_virtual_tokens: v.
        shapes: (heads, head_dim) of the keys of each attention layer; its values have the same.
        projection_size: width between `down` and `up`; no projection when None.
        hidden_size: d, the width of P.
        non_linearity: the activation, a name in `lit_peft.nn.bottleneck.ACTIVATIONS`.
        dropout: dropout probability on the keys and values.
        init_std: standard deviation of the table, or of P, at the start.
        device: where the parameters live.
        dtype: the parameters' type; the keys of the model decide what is computed in.

    Shapes:
        `forward()` → (v, 2 · Σ heads · head_dim): the layers' keys and values in turn, K of layer 0, V of layer 0, …

    Raises:
        LitPeftError: a size is not positive, `init_std` is negative, the dropout is not in [0, 1), or the activation
            is not known.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        shapes: Sequence[tuple[int, int]],
        *,
        projection_size: int | None = None,
        hidden_size: int = 0,
        non_linearity: str = "tanh",
        dropout: float = 0.0,
        init_std: float = 0.02,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_virtual_tokens < 1:
            raise LitPeftError(f"num_virtual_tokens={num_virtual_tokens}: give a positive integer, e.g. 20.")
        if init_std < 0:
            raise LitPeftError(f"init_std={init_std}: give a standard deviation, e.g. 0.02, or 0 to start from zeros.")
        check(non_linearity=non_linearity, dropout=dropout)
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_virtual_tokens, self.shapes, self.dropout = num_virtual_tokens, tuple(shapes), dropout
        self.non_linearity = non_linearity
        width = 2 * sum(heads * size for heads, size in self.shapes)
        self.down: nn.Linear | None = None
        self.up: nn.Linear | None = None
        if projection_size is not None:
            if projection_size < 1:
                raise LitPeftError(f"prefix_projection_size={projection_size}: give a positive integer, e.g. 512.")
            self.down = nn.Linear(hidden_size, projection_size, **at)
            self.up = nn.Linear(projection_size, width, **at)
        self.embedding = nn.Parameter(torch.empty(num_virtual_tokens, hidden_size if self.up else width, **at))
        nn.init.normal_(self.embedding, std=init_std)
        self._layers: list[tuple[Tensor, Tensor]] | None = None
        self._state: tuple[Any, ...] | None = None

    def forward(self) -> Tensor:
        """Compute the table of keys and values, (v, 2 · Σ heads · head_dim)."""
        if self.down is None or self.up is None:
            return self.embedding
        out: Tensor = self.up(ACTIVATIONS[self.non_linearity.lower()](self.down(self.embedding)))
        return out

    def start(self) -> None:
        """Make the keys and values ready for one pass of the model, anew only where the weights changed."""
        state = None
        if not torch.is_grad_enabled() and not any(p.is_inference() for p in self.parameters()):
            state = tuple((p.data_ptr(), p._version, p.dtype) for p in self.parameters())
        if state is None or state != self._state:
            self._layers, self._state = self._split(self()), state

    def _split(self, table: Tensor) -> list[tuple[Tensor, Tensor]]:
        widths = [heads * size for heads, size in self.shapes for _ in range(2)]
        parts = iter(table.split(widths, dim=-1))
        return [tuple(next(parts).unflatten(-1, shape).transpose(0, 1) for _ in range(2)) for shape in self.shapes]

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return one layer's prefix keys and values for a batch.

        Args:
            number: the layer.
            like: a tensor of the same batch, (batch, …), in the type that is wanted.

        Returns:
            Keys and values, (batch, heads, v, head_dim), in `like`'s type.
        """
        if self._layers is None:
            self.start()
        assert self._layers is not None
        key, value = (part.to(like.dtype).expand(like.shape[0], -1, -1, -1) for part in self._layers[number])
        if self.training and self.dropout:
            key, value = F.dropout(key, self.dropout), F.dropout(value, self.dropout)
        return key, value

    def extend(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put one layer's prefix in front of its keys and values, (batch, heads, v + keys, head_dim) each."""
        first, second = self.layer(number, key)
        return torch.cat([first, key], dim=2), torch.cat([second, value], dim=2)

    def __getstate__(self) -> dict[str, Any]:
        # What a pass computed hangs on that pass's graph: it is neither copied nor stored.
        return {**self.__dict__, "_layers": None, "_state": None}

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}, layers={len(self.shapes)}, dropout={self.dropout}"
