"""(IA)³ on linear layers (Liu et al. 2022, arXiv:2205.05638): a trained vector scales what a layer reads or writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_peft.nn.deferred import parameter_device
from lit_peft.nn.linear import adapter_dtype, linear_features, stores_transposed
from lit_peft.nn.quantized import dense_weight, is_quantized
from lit_peft.nn.weight_update import WeightUpdate


class IA3Linear(WeightUpdate):
    """`h = l ⊙ (W x + b)`, or in a feed-forward network `h = W (l ⊙ x) + b` (2205.05638, section 3.3).

    l starts at ones, so that the layer starts at the base. The layer may be `nn.Linear`, a quantized form of it, or
    store W transposed (transformers' `Conv1D`).

    Args:
        base_layer: the layer to adapt; it is kept, not copied, and its parameters are frozen.
        is_feedforward: whether l scales the input rather than the output.

    Shapes:
        input (..., in_features) → output (..., out_features)
    """

    def __init__(self, base_layer: nn.Module, is_feedforward: bool = False) -> None:
        super().__init__()
        self.keep_base(base_layer)
        self.in_features, self.out_features = linear_features(base_layer)
        self.is_feedforward = is_feedforward
        size = self.in_features if is_feedforward else self.out_features
        dtype, device = adapter_dtype(self.weight), parameter_device(self.weight)
        self.ia3_l = nn.Parameter(torch.ones(size, dtype=dtype, device=device))

    def dense_weight(self) -> Tensor:
        if is_quantized(self.base_layer):
            return dense_weight(self.base_layer)
        weight = self.weight.detach()
        return weight.T if stores_transposed(self.base_layer) else weight

    def add_to_weight(self, delta: Tensor) -> None:
        # Added in the precision of l: W and the change, each rounded to a half-precision W, would lose small changes.
        delta = delta.T if stores_transposed(self.base_layer) else delta
        self.weight.data.copy_(self.weight.to(delta.dtype) + delta)

    def delta_weight(self) -> Tensor:
        """Return W scaled by l - 1, by columns in a feed-forward network and else by rows."""
        change = self.ia3_l - 1
        return self.dense_weight().to(change.dtype) * (change if self.is_feedforward else change[:, None])

    def delta_bias(self) -> Tensor | None:
        bias = self.bias
        return None if self.is_feedforward or bias is None else bias.to(self.ia3_l.dtype) * (self.ia3_l - 1)

    def split_dims(self, by_rows: bool) -> dict[str, int | None]:
        # Rows of W are outputs, and columns inputs: l is divided if it scales the divided side.
        return {"ia3_l": 0 if by_rows is not self.is_feedforward else None}

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.merged:
            merged: Tensor = self.base_layer(x, *args, **kwargs)
            return merged
        # The product is in the precision of l: in bfloat16 an l near 1 would be rounded to 1.
        if self.is_feedforward:
            out: Tensor = self.base_layer((x * self.ia3_l).to(x.dtype), *args, **kwargs)
            return out
        out = self.base_layer(x, *args, **kwargs)
        return (out * self.ia3_l).to(out.dtype)

    def extra_repr(self) -> str:
        return f"is_feedforward={self.is_feedforward}"
