"""Different adapters for the rows of one batch, in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_peft.nn.ia3 import IA3Linear
from lit_peft.nn.invocation import InvokedLoRALinear
from lit_peft.nn.lora import LoRALinear
from lit_peft.util.errors import LitPeftError


def repeats(x: Tensor, rows: int) -> int:
    """Return how many times each row is repeated in a batch: for beams, returned sequences, or a flattened sequence.

    Args:
        x: the batch; repeats of a row follow each other.
        rows: the number of rows before they were repeated.

    Raises:
        LitPeftError: the batch's size is no multiple of the number of rows.
    """
    count, rest = divmod(x.shape[0], rows)
    if rest or not count:
        raise LitPeftError(
            f"The batch has {x.shape[0]} rows, but adapters were named for {rows}: name one for each row."
        )
    return count


class _Rows(nn.Module):
    """What stands in the place of a base layer, `base_layer`, whose attributes the model may read."""

    def __getattr__(self, name: str) -> Any:
        # Models read the dtype and device of their layers' weights.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class IA3Rows(_Rows):
    """`h_i = l_n ⊙ (W x_i + b)` or `W (l_n ⊙ x_i) + b`, where n is the adapter of row i: one product with W.

    Args:
        base_layer: the frozen layer.
        layers: each adapter's (IA)³ layer; None for an adapter that does not change this layer.
        index: the index of each row's adapter, `len(layers)` for none. Shape (rows,).

    Shapes:
        input (rows · k, ..., in_features) → output (rows · k, ..., out_features)

    Raises:
        LitPeftError: in the forward pass, the batch's size is no multiple of the number of rows.
    """

    def __init__(self, base_layer: nn.Module, layers: Sequence[IA3Linear | None], index: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        first = next(layer for layer in layers if layer is not None)
        index = index.to(first.ia3_l.device)
        # One vector for each row: of its adapter, or ones. Some adapters may scale the input, and others the output.
        self.scales = [
            None if all(vector is None for vector in vectors) else _stack(first.ia3_l, vectors)[index]
            for vectors in (
                [layer.ia3_l if layer is not None and layer.is_feedforward is inside else None for layer in layers]
                for inside in (True, False)
            )
        ]

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        inside, outside = self.scales
        out: Tensor = self.base_layer(x if inside is None else _scaled(x, inside), *args, **kwargs)
        return out if outside is None else _scaled(out, outside)


def _stack(like: Tensor, vectors: Sequence[Tensor | None]) -> Tensor:
    """Return vectors as the rows of a matrix, ones in the place of None and as the last row."""
    size = next(len(vector) for vector in vectors if vector is not None)
    rows = like.new_ones(len(vectors) + 1, size)
    for number, vector in enumerate(vectors):
        if vector is not None:
            rows[number] = vector.detach()
    return rows


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    scale = scale.repeat_interleave(repeats(x, len(scale)), 0)
    return (x * scale.view(len(scale), *(1 for _ in x.shape[2:]), -1)).to(x.dtype)


class LoRARows(_Rows):
    """`h_i = W x_i + s_n · B_n A_n x_i`, where n is the adapter of row i: one product with W, two small batched ones.

    Ranks may differ: A and B are padded with zeros to the largest rank.

    Args:
        base_layer: the frozen layer.
        layers: each adapter's LoRA layer; None for an adapter that does not change this layer.
        index: the index of each row's adapter, `len(layers)` for none. Shape (rows,).

    Shapes:
        input (rows · k, ..., in_features) → output (rows · k, ..., out_features)

    Raises:
        LitPeftError: in the forward pass, the batch's size is no multiple of the number of rows.
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
        # Adapters with invocation tokens act on some tokens of their rows alone.
        self.invocations = {
            number: layer.invocation for number, layer in enumerate(layers) if isinstance(layer, InvokedLoRALinear)
        }
        # One A and B for each row, so that the forward pass need not gather them.
        self.index = index = index.to(a.device)
        self.a, self.b = a[index].transpose(1, 2), b[index].transpose(1, 2)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        out: Tensor = self.base_layer(x, *args, **kwargs)
        count = repeats(x, len(self.a))
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        if count > 1:
            a, b = a.repeat_interleave(count, 0), b.repeat_interleave(count, 0)
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        update = torch.bmm(torch.bmm(rows, a), b).view(out.shape)
        for number, invocation in self.invocations.items():
            others = (self.index != number).repeat_interleave(count)[:, None, None]
            update = torch.where(others | invocation.current(x), update, 0)
        return out + update.to(out.dtype)


class ModuleRows(_Rows):
    """A module that has another form for each adapter. The rows of one adapter are computed together.

    Args:
        base_layer: the module for rows without an adapter.
        forms: each adapter's module, and the tensors that replace its own, by name.
        index: the index of each row's adapter, `len(forms)` for none. Shape (rows,).

    Shapes:
        input (rows · k, ...) → output (rows · k, ...)

    Raises:
        LitPeftError: in the forward pass, the batch's size is no multiple of the number of rows.
    """

    def __init__(
        self, base_layer: nn.Module, forms: Sequence[tuple[nn.Module, Mapping[str, Tensor]]], index: Tensor
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        # Not registered as submodules, because they contain the base's own layers.
        self._forms = [*forms, (base_layer, {})]

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        index = self.index.to(x.device).repeat_interleave(repeats(x, len(self.index)))
        out: Tensor | None = None
        for number in self.index.unique().tolist():
            positions = (index == number).nonzero().flatten()
            module, tensors = self._forms[number]
            part = functional_call(module, dict(tensors), (x[positions], *args), kwargs)
            if not isinstance(part, Tensor):
                raise LitPeftError(
                    f"A {type(module).__name__} returns more than one tensor, so adapters that train it in full cannot "
                    "share a batch: run their rows in batches of their own with set_adapter."
                )
            out = part.new_empty(x.shape[0], *part.shape[1:]) if out is None else out
            out = out.index_copy(0, positions, part.to(out.dtype))
        assert out is not None
        return out
