"""Examples of different lengths to one rectangular batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100
"""The label that loss functions ignore."""


@dataclass(frozen=True)
class PadCollator:
    """Pads each example to the longest of its batch.

    Attributes:
        pad_token_id: fills `input_ids`.
        padding_side: "right" or "left".
        pad_to_multiple_of: round the length up to a multiple of this (8 suits tensor cores); None: no rounding.
        extra_keys: keys that are passed on unchanged, as a list with one entry per example.
    """

    pad_token_id: int
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None
    extra_keys: tuple[str, ...] = ()

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate a batch.

        Args:
            examples: each with `input_ids` (list of int) and optionally `token_type_ids` (same length) and `labels`
                (a number; a list as long as `input_ids`; or a list of floats, as many for each example). Keys other
                than these and `extra_keys` are dropped.

        Returns:
            int64 tensors `input_ids`, `attention_mask` and, if given, `token_type_ids`, [batch, length]; `labels`
            [batch] or [batch, length], -100 on padding, or of lists of floats [batch, floats], float32; a list for each
            of `extra_keys`.
        """
        import torch

        lengths = [len(example["input_ids"]) for example in examples]
        longest = max(lengths)
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of
        batch: dict[str, Any] = {
            "input_ids": self._pad([example["input_ids"] for example in examples], longest, self.pad_token_id),
            # From the lengths, not from the ids: the padding token may be a real one (end of text).
            "attention_mask": self._pad([[1] * length for length in lengths], longest, 0),
        }
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = self._pad([example["token_type_ids"] for example in examples], longest, 0)
        if "labels" in examples[0]:
            labels = [example["labels"] for example in examples]
            if isinstance(labels[0], (int, float)):
                batch["labels"] = torch.tensor(labels)
            elif len(labels[0]) and isinstance(labels[0][0], float):
                batch["labels"] = torch.tensor(labels, dtype=torch.float32)
            else:
                batch["labels"] = self._pad(labels, longest, IGNORE)
        batch.update({name: [example[name] for example in examples] for name in self.extra_keys})
        return batch

    def _pad(self, rows: list[Any], length: int, value: int) -> Tensor:
        import torch

        out = torch.full((len(rows), length), value, dtype=torch.long)
        for index, row in enumerate(rows):
            tensor = torch.as_tensor(row, dtype=torch.long)
            if self.padding_side == "left":
                out[index, length - len(tensor) :] = tensor
            else:
                out[index, : len(tensor)] = tensor
        return out
