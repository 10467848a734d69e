"""A prefix: trained keys and values in front of those of the tokens, which every query of an attention layer sees.

tokens ──► K, V projections ──┐
                              ├──► [K_prefix ; K], [V_prefix ; V] ──► attention
table v × 2·Σ(heads·head_dim) ┘
  ▲
  └─ trained directly, or computed: P (v × d) → Linear → tanh → Linear
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.bottleneck import ACTIVATIONS, check
from lit_peft.nn.call_state import CallState
from lit_peft.nn.weights_state import weights_state
from lit_peft.util.errors import LitPeftError

KeysAndValues = tuple[Tensor, Tensor]


class _SlotCall(CallState):
    pair: KeysAndValues | None = None


class PrefixSlot:
    """Where one attention layer finds its keys and values during a pass of the model.

    Layers have a slot each and do not look up their number in a list: `torch.compile` would then compile every layer by
    itself.

    Attributes:
        shape: (heads, head_dim), or (heads, width of a key, width of a value) where these widths differ.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.call = _SlotCall()
        self.latest: KeysAndValues | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The computed keys and values belong to the graph of one pass, so they are neither copied nor saved.
        return {**self.__dict__, "latest": None}


class Prefix(nn.Module):
    """The keys and values of v virtual tokens for a stack of attention layers.

    Without a projection, the table of keys and values is trained directly (P-Tuning v2, Liu et al. 2021,
    arXiv:2110.07602, section 3.2). With a projection, it is `up(act(down(P)))` with a trained v × d table P (Li and
    Liang 2021, arXiv:2101.00190, section 4.3). Without gradients, the table is computed once and kept until a weight
    changes.

    Args:
        num_virtual_tokens: v.
        shapes: (heads, head_dim) of each attention layer, or (heads, width of a key, width of a value) where these
            widths differ (latent attention).
        projection_size: size between `down` and `up`; no projection when None.
        hidden_size: d, the size of P's rows.
        non_linearity: the activation, a name in `lit_peft.nn.bottleneck.ACTIVATIONS`.
        dropout: dropout probability of the keys and values.
        init_std: standard deviation of the initial table, or of P.
        device: device of the parameters.
        dtype: dtype of the parameters. The computation uses the dtype of the model's keys.

    Shapes:
        `forward()` → (v, Σ heads · (key + value)): keys and values of the layers in turn, K of layer 0, V of layer 0, …

    Raises:
        LitPeftError: a size is not positive, `init_std` is negative, the dropout is not in [0, 1), or the activation
            is unknown.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        shapes: Sequence[tuple[int, ...]],
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
            raise LitPeftError(f"init_std={init_std}: give a standard deviation, e.g. 0.02, or 0 for zeros.")
        check(non_linearity=non_linearity, dropout=dropout)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_virtual_tokens, self.dropout = num_virtual_tokens, dropout
        self.slots = tuple(PrefixSlot(shape) for shape in shapes)
        self.non_linearity = non_linearity
        width = sum(shape[0] * (shape[1] + shape[-1]) for shape in self.shapes)
        self.down: nn.Linear | None = None
        self.up: nn.Linear | None = None
        if projection_size is not None:
            if projection_size < 1:
                raise LitPeftError(f"prefix_projection_size={projection_size}: give a positive integer, e.g. 512.")
            self.down = nn.Linear(hidden_size, projection_size, **factory)
            self.up = nn.Linear(projection_size, width, **factory)
        self.embedding = nn.Parameter(torch.empty(num_virtual_tokens, hidden_size if self.up else width, **factory))
        nn.init.normal_(self.embedding, std=init_std)
        # Keys and values that were computed without gradients, and the state of the weights then.
        self._kept: tuple[tuple[Any, ...], list[KeysAndValues]] | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each layer's slot; of this process's part where matrices are split."""
        return tuple(slot.shape for slot in self.slots)

    @shapes.setter
    def shapes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        for slot, shape in zip(self.slots, shapes, strict=True):
            slot.shape = shape

    def forward(self) -> Tensor:
        """Return the table of keys and values, shape (v, Σ heads · (key + value))."""
        if self.down is None or self.up is None:
            return self.embedding
        out: Tensor = self.up(ACTIVATIONS[self.non_linearity.lower()](self.down(self.embedding)))
        return out

    def start(self) -> None:
        """Compute the keys and values for one pass of the model, unless they are kept and no weight has changed."""
        state, kept = weights_state(self), self._kept
        if state is None:
            layers = self._split(self())
        elif kept is not None and kept[0] == state:
            layers = kept[1]
        else:
            layers = self._split(self())
            self._kept = state, layers
        for slot, pair in zip(self.slots, layers, strict=True):
            slot.call.pair = slot.latest = pair

    def _split(self, table: Tensor) -> list[KeysAndValues]:
        sizes = [(shape[0], size) for shape in self.shapes for size in (shape[1], shape[-1])]
        parts = table.split([heads * size for heads, size in sizes], dim=-1)
        heads = [part.unflatten(-1, size).transpose(0, 1) for part, size in zip(parts, sizes, strict=True)]
        return list(zip(heads[::2], heads[1::2], strict=True))

    def layer(self, slot: PrefixSlot, like: Tensor) -> KeysAndValues:
        """Return the prefix's keys and values of one layer for a batch.

        Args:
            slot: the layer's slot, one of `slots`.
            like: a tensor of the batch, shape (batch, …), with the dtype to return.

        Returns:
            Keys and values, of shape (batch, heads, v, width of a key or a value).
        """
        # On a GPU, autograd computes checkpointed layers again in a thread of its own.
        pair = slot.call.pair or slot.latest
        if pair is None:
            self.start()
            pair = slot.latest
        assert pair is not None
        key, value = (part.to(like.dtype).expand(like.shape[0], -1, -1, -1) for part in pair)
        if self.training and self.dropout:
            key, value = F.dropout(key, self.dropout), F.dropout(value, self.dropout)
        return key, value

    def extend(self, slot: PrefixSlot, key: Tensor, value: Tensor) -> KeysAndValues:
        """Return keys and values with the layer's prefix in front, each of shape (batch, heads, v + keys, head_dim)."""
        first, second = self.layer(slot, key)
        return torch.cat([first, key], dim=2), torch.cat([second, value], dim=2)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}, layers={len(self.shapes)}, dropout={self.dropout}"
