"""The reference of preference tuning: the base without its adapter, or its log-probabilities, computed before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lit_peft.methods.adapters import disable_adapter
from lit_peft.methods.attachment import attachment_or_none
from lit_peft.nn.evaluating import evaluating
from lit_peft.util.errors import LitPeftError


@contextmanager
def reference_model(model: Any) -> Iterator[None]:
    """Make a model the base without its adapter in the block, in evaluation mode and without gradients.

    Raises:
        LitPeftError: a base parameter is trained, and the strategy shards it: the original cannot take its place then.
    """
    check_reference(model)
    with disable_adapter(model), evaluating(model):
        yield


def check_reference(model: Any) -> None:
    """Refuse a model whose base cannot be had without its adapter.

    Raises:
        LitPeftError: a base parameter is trained, and the strategy shards it: the original cannot take its place then.
    """
    attachment = attachment_or_none(model)
    trained = {} if attachment is None else attachment.saved
    sharded = next((name for name, parameter in trained.items() if hasattr(parameter, "full_tensor")), None)
    if sharded is not None:
        raise LitPeftError(
            f"The reference needs {sharded} as it was before training, and this strategy shards it: leave it out of "
            "modules_to_save, use another strategy, e.g. ddp, or a loss without a reference (simpo, orpo)."
        )


class ReferenceTable:
    """The reference's log-probabilities of the supervised tokens of many rows, found by the keys of the rows.

    Attributes:
        keys: a number for each row, in ascending order, int64 [rows].
        starts: where the row's values begin, int64 [rows].
        values: one number for each supervised token, float32 [tokens].
    """

    def __init__(self) -> None:
        self.keys = self.starts = torch.zeros(0, dtype=torch.long)
        self.values = torch.zeros(0)

    def add(self, keys: Tensor, counts: Tensor, values: Tensor) -> None:
        """Add rows; those that are there already are left out.

        Args:
            keys: the key of each row, int64 [rows].
            counts: how many tokens of each row are supervised, int64 [rows].
            values: their log-probabilities, one row after the other, [sum of counts].
        """
        starts = torch.cat([self.starts.cpu(), len(self.values) + counts.cumsum(0) - counts])
        keys, order = torch.cat([self.keys.cpu(), keys]).sort(stable=True)
        is_first = torch.cat([keys.new_ones(1), keys.diff()]) != 0
        self.keys, self.starts = keys[is_first], starts[order][is_first]
        self.values = torch.cat([self.values.cpu(), values])

    def look_up(self, keys: Tensor | None, labels: Tensor) -> Tensor:
        """Return the log-probability of each label, 0 where there is none, [rows, length].

        Args:
            keys: the keys of the rows, [rows].
            labels: their labels, -100 where a token is not supervised, [rows, length].

        Raises:
            LitPeftError: a row has no key, or was not computed.
        """
        if keys is None:
            raise LitPeftError(
                "precompute_reference is set, but the batch has no keys, by which the reference's values are found: "
                "use PreferenceData, or leave precompute_reference out."
            )
        if self.keys.device != labels.device:
            self.keys, self.starts, self.values = (
                tensor.to(labels.device) for tensor in (self.keys, self.starts, self.values)
            )
        places = torch.searchsorted(self.keys, keys).clamp(max=max(len(self.keys) - 1, 0))
        if not len(self.keys) or not bool((self.keys[places] == keys).all()):
            raise LitPeftError(
                "precompute_reference is set, but the reference was not computed for a row of this batch: it is when a "
                "Trainer starts with a PreferenceData, for the rows of its splits. Leave precompute_reference out to "
                "run the reference in each step."
            )
        supervised = labels != -100
        index = self.starts[places, None] + supervised.cumsum(1) - 1
        return torch.where(supervised, self.values[index.clamp(min=0)], 0.0)
