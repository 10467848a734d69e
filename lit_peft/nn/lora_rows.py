"""Different LoRA updates for the rows of one batch, in one forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_peft.errors import LitPeftError
from lit_peft.nn.lora import LoRALinear


class LoRARows(nn.Module):
    """`h_i = W x_i + s_n · B_n A_n x_i` with n the adapter of row i: one product with W, two batched small ones.

    Ranks may differ: A and B are padded with zeros to the largest.

    Args:
        base_layer: the layer, frozen.
        layers: the adapters' updates of it, None for one that does not adapt it.
        index: the number of each row's adapter, `len(layers)` for none. Shape (rows,).

    Shapes:
        input (rows · k, ..., in_features) → output (rows · k, ..., out_features)

    Raises:
        LitPeftError: in the forward, the batch is no multiple of the rows.
    """

    def __init__(self, base_layer: nn.Module, layers: Sequence[LoRALinear | None], index: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        first = next(layer for layer in layers if layer is not None)
        rank = max(layer.r for layer in layers if layer is not None)
        a = first.lora_A.new_zeros(len(layers) + 1, rank, first.in_features)
        b = first.lora_B.new_zeros(len(layers) + 1, first.out_features, rank)
        for number, layer in enumerate(layers):
            if layer is not None:
                a[number, : layer.r] = layer.lora_A.detach()
                b[number, :, : layer.r] = layer.lora_B.detach() * layer.scaling
        # One A and B for each row, already in place: the forward gathers nothing.
        index = index.to(a.device)
        self.a, self.b = a[index].transpose(1, 2), b[index].transpose(1, 2)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        out: Tensor = self.base_layer(x, *args, **kwargs)
        repeats, rest = divmod(x.shape[0], len(self.a))
        if rest:
            raise LitPeftError(f"The batch has {x.shape[0]} rows, and adapters were named for {len(self.a)}.")
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        if repeats > 1:
            a, b = a.repeat_interleave(repeats, 0), b.repeat_interleave(repeats, 0)
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        update = torch.bmm(torch.bmm(rows, a), b)
        return out + update.view(out.shape).to(out.dtype)
