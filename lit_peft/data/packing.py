"""Several examples in one row, so that a batch has almost no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_peft.data.collate import IGNORE
from lit_peft.util.errors import LitPeftError

_PACKED = {"input_ids", "labels", "token_type_ids"}


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put examples into few rows by best-fit decreasing: longest first, each into the row with the least space left.

    Args:
        lengths: tokens of each example, at most `capacity`.
        capacity: tokens of a row.

    Returns:
        The example indices of each row.
    """
    packs: list[list[int]] = []
    # The rows by the space they have left, and a bit for each space that some row has left.
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        fitting = spaces >> lengths[index] << lengths[index]
        if fitting:
            space = (fitting & -fitting).bit_length() - 1
            row = rows_with[space].pop()
            if not rows_with[space]:
                spaces ^= 1 << space
            packs[row].append(index)
        else:
            space, row = capacity, len(packs)
            packs.append([index])
        rows_with[space - lengths[index]].append(row)
        spaces |= 1 << (space - lengths[index])
    return packs


def swap_equal_lengths(lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random permutation of the examples that keeps every length: packed rows stay equally full.

    Args:
        lengths: (n,), tokens of each example.
        generator: draws the permutation.

    Returns:
        (n,), the index of the example that takes each example's place.
    """
    order = torch.randperm(len(lengths), generator=generator)
    swapped = torch.empty_like(order)
    swapped[lengths.argsort(stable=True)] = order[lengths[order].argsort(stable=True)]
    return swapped


@dataclass(frozen=True)
class PackCollator:
    """Joins the examples of each row end to end, and pads the rows on the right to the longest of the batch.

    There is no attention mask: transformers takes positions that restart as the start of another example, and lets no
    token attend to another example, as long as the model keeps no cache. Attention functions that compute each example
    by itself take the examples' boundaries, which are found here, because finding them on a GPU would make it wait.

    Attributes:
        pad_token_id: fills `input_ids`.
        pad_to_multiple_of: round the length up to a multiple of this; None: no rounding.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, packs: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Collate a batch.

        Args:
            packs: the examples of each row, with `input_ids`, `labels` and optionally `token_type_ids`, lists of int of
                the same length.

        Returns:
            int64 `input_ids`, `labels`, `position_ids` and, if given, `token_type_ids`, [batch, length]. Labels are
            -100 on padding and on the first token of each example, which the example before it must not predict.
            `cu_seq_lens_q` and `cu_seq_lens_k`, int32 [examples + 1], are where the examples begin and end in all rows
            joined, with the padding of a row as one more example; `max_length_q` and `max_length_k` are the tokens of
            the longest.

        Raises:
            LitPeftError: an example has something else for each token, which packed rows would lose.
        """
        longest = max(sum(len(example["input_ids"]) for example in examples) for examples in packs)
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of
        shape = (len(packs), longest)
        ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORE)
        positions = torch.zeros(shape, dtype=torch.long)
        types = torch.zeros(shape, dtype=torch.long)
        ends = [0]
        for row, examples in enumerate(packs):
            start = 0
            for example in examples:
                length = len(example["input_ids"])
                if unknown := set(example) - _PACKED:
                    raise LitPeftError(
                        f"data.packing: the examples have {', '.join(map(repr, sorted(unknown)))}, which packed rows "
                        "cannot hold; leave packing out."
                    )
                if "token_type_ids" in example:
                    types[row, start : start + length] = torch.as_tensor(example["token_type_ids"])
                ids[row, start : start + length] = torch.as_tensor(example["input_ids"])
                labels[row, start + 1 : start + length] = torch.as_tensor(example["labels"])[1:]
                positions[row, start : start + length] = torch.arange(length)
                start += length
                ends.append(row * longest + start)
            # Padding counts as one more example.
            positions[row, start:] = torch.arange(longest - start)
            if start < longest:
                ends.append((row + 1) * longest)
        batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "position_ids": positions}
        for name in ("q", "k"):
            batch[f"cu_seq_lens_{name}"] = torch.tensor(ends, dtype=torch.int32)
            batch[f"max_length_{name}"] = int(positions.max()) + 1
        return {**batch, "token_type_ids": types} if "token_type_ids" in packs[0][0] else batch


def packed_layout(mask: Tensor, capacity: int, multiple: int | None = None) -> dict[str, Tensor]:
    """Return where the tokens of padded rows go if the rows are joined to few longer ones.

    Args:
        mask: 1 on tokens, 0 on padding, [rows, length].
        capacity: tokens of a joined row.
        multiple: round the length of the joined rows up to a multiple of this; None: no rounding.

    Returns:
        int64 `packed_index`, the place in the flattened mask of each token of the joined rows, -1 on padding; and
        `packed_positions`, which restart with each row of the mask. Both [joined rows, joined length].
    """
    lengths = mask.sum(1).tolist()
    packs = pack(lengths, max(capacity, *lengths))
    longest = max(sum(lengths[row] for row in rows) for rows in packs)
    longest += -longest % (multiple or 1)
    index, positions = torch.full((len(packs), longest), -1), torch.zeros((len(packs), longest), dtype=torch.long)
    for joined, rows in enumerate(packs):
        places = torch.cat([mask[row].nonzero().squeeze(1) + row * mask.shape[1] for row in rows])
        index[joined, : len(places)] = places
        # Padding counts as one more row.
        parts = [*(lengths[row] for row in rows), longest - len(places)]
        positions[joined] = torch.cat([torch.arange(part) for part in parts])
    return {"packed_index": index, "packed_positions": positions}


def train_collator(data: Any) -> Any:
    """Return the function that joins a data module's training examples, or lists of examples to pack, into a batch."""
    if data.packing:
        return PackCollator(data.tokenizer.pad_token_id, data.pad_to_multiple_of)
    return data.collator("train")
