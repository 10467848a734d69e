"""Several examples in one row, so that no token of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_peft.data.collate import IGNORE


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put examples into as few rows as best fit decreasing finds: the longest first, each where it leaves the least.

    Args:
        lengths: tokens of each example, at most `capacity`.
        capacity: tokens of a row.

    Returns:
        The numbers of the examples of each row.
    """
    packs: list[list[int]] = []
    # The rows by the room they have left, and which rooms there are as the bits of a number.
    rooms: list[list[int]] = [[] for _ in range(capacity + 1)]
    there = 0
    for at in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        fitting = there >> lengths[at] << lengths[at]
        if fitting:
            room = (fitting & -fitting).bit_length() - 1
            row = rooms[room].pop()
            if not rooms[room]:
                there ^= 1 << room
            packs[row].append(at)
        else:
            room, row = capacity, len(packs)
            packs.append([at])
        rooms[room - lengths[at]].append(row)
        there |= 1 << (room - lengths[at])
    return packs


def exchanged(lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each example one of the same length to take its place, at random: the rows stay as full as they are.

    Args:
        lengths: (n,), tokens of each example.
        generator: of the draw.
    """
    order = torch.randperm(len(lengths), generator=generator)
    taken = torch.empty_like(order)
    taken[lengths.argsort(stable=True)] = order[lengths[order].argsort(stable=True)]
    return taken


@dataclass(frozen=True)
class PackCollator:
    """Joins the examples of each row end to end, and pads the rows on the right to the longest of the batch.

    There is no attention mask: positions that begin again tell transformers where the next example begins, and it lets
    no token see another example's, as long as the model keeps no cache.

    Attributes:
        pad_token_id: what fills `input_ids`.
        pad_to_multiple_of: round the length up to a multiple of this; None: as is.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, packs: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
        """Collate a batch.

        Args:
            packs: the examples of each row, with `input_ids` and `labels`, lists of int of the same length.

        Returns:
            int64 `input_ids`, `labels` and `position_ids` [batch, length]. Labels are -100 on padding and on the first
            token of each example, which the example before must not predict.
        """
        longest = max(sum(len(example["input_ids"]) for example in examples) for examples in packs)
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of
        shape = (len(packs), longest)
        ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORE)
        positions = torch.zeros(shape, dtype=torch.long)
        for row, examples in enumerate(packs):
            at = 0
            for example in examples:
                length = len(example["input_ids"])
                ids[row, at : at + length] = torch.as_tensor(example["input_ids"])
                labels[row, at + 1 : at + length] = torch.as_tensor(example["labels"])[1:]
                positions[row, at : at + length] = torch.arange(length)
                at += length
            # Padding is an example of its own.
            positions[row, at:] = torch.arange(longest - at)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
