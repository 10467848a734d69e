"""The last layer's FFN computed on the supervised positions alone.

    attention ── all rows ──┬──────────────────────── + ──> norm, head
                            └─ supervised rows ─ FFN ─┘

Behind the last attention no position sees another, so that what the FFN gives for a position without a label reaches no
loss: it is zero there instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_peft.models.architectures import ARCHITECTURES, Layer, layer_stacks
from lit_peft.nn.torch_internals import torch_handles_saved_tensors
from lit_peft.util.errors import LitPeftError

# Whether the last layer's FFN sees the supervised rows alone; False: all rows.
SUPERVISED_FFN = True

_LAST: WeakKeyDictionary[nn.Module, Layer | None] = WeakKeyDictionary()


def last_ffn(model: nn.Module) -> nn.Module | None:
    """The FFN of a causal LM's last layer, where it is a module that is known to treat each position by itself.

    None where the layer's kind is not in the table of architectures, or where the FFN holds more than the linear layers
    that are named there: experts, whose router has a loss of its own, or an adapter's modules.
    """
    if model not in _LAST:
        try:
            _LAST[model] = layer_stacks(model)[-1][-1]
        except LitPeftError:
            _LAST[model] = None
    layer = _LAST[model]
    if layer is None or getattr(layer.config, "model_type", None) not in ARCHITECTURES:
        return None
    names = layer.architecture.ffn_linears
    place = names[0].rpartition(".")[0]
    if not place or any(name.rpartition(".")[0] != place for name in names):
        return None
    ffn = layer.module.get_submodule(place)
    known = {name.rpartition(".")[2] for name in names}
    return ffn if all(name.partition(".")[0] in known for name, _ in ffn.named_parameters()) else None


class SupervisedRows:
    """Hooks that give an FFN some of its rows, and its output zeros for the others.

    Args:
        rows_of: gives the numbers of the rows for an input of shape (batch, length, d), counted through the batch; None
            for all of them.
    """

    def __init__(self, rows_of: Callable[[Tensor], Tensor | None]) -> None:
        self.rows_of = rows_of
        self._rows: Tensor | None = None
        self._shape: torch.Size | None = None

    def attach(self, ffn: nn.Module) -> list[RemovableHandle]:
        """Hook the FFN: closest to it, so that other hooks see all rows."""
        return [ffn.register_forward_pre_hook(self._before), ffn.register_forward_hook(self._after, prepend=True)]

    def _before(self, ffn: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._rows = None
        # Where a layer is run again in the backward pass, it must do then what it does now.
        if (
            len(args) != 1
            or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch_handles_saved_tensors()
        ):
            return None
        hidden: Tensor = args[0]
        rows = self.rows_of(hidden) if hidden.dim() == 3 else None
        if rows is None or not len(rows):
            return None
        self._rows, self._shape = rows, hidden.shape
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)[None],)

    def _after(self, ffn: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        rows, self._rows = self._rows, None
        if rows is None:
            return None
        assert self._shape is not None
        whole = output.new_zeros(self._shape[0] * self._shape[1], output.shape[-1])
        return whole.index_copy(0, rows, output[0]).view(*self._shape[:2], -1)
