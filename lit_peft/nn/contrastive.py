"""Embeddings of texts, and the losses that compare them: pooling, in-batch negatives, triplets, CoSENT.

Rows of several processes are gathered with their gradients, so that the loss is that of the whole batch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["mean", "last", "cls"]
Distance = Literal["cosine", "euclidean", "manhattan"]


def pool(hidden: Tensor, mask: Tensor, mode: Pooling) -> Tensor:
    """Return one vector for each text, in float32 at least.

    Args:
        hidden: the last hidden states, shape (texts, length, d).
        mask: 1 or true for the tokens that count, shape (texts, length); padding may be on either side.
        mode: `mean` of the tokens, the `last` token, or the first one (`cls`).

    Returns:
        Shape (texts, d).
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    mask = mask.to(torch.int)
    if mode == "mean":
        weights = mask.to(hidden.dtype)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    index = mask.argmax(1) if mode == "cls" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


def cosine_similarity(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosine of the angle between each row of one and the same row of the other: (rows, d) → (rows,)."""
    return (F.normalize(one, dim=-1) * F.normalize(other, dim=-1)).sum(-1)


def gather(rows: Tensor, group: Any = None) -> Tensor:
    """Join the rows of all processes, in the order of their ranks; each process may have another number of them.

    In the backward pass, each process gets the sum over all processes of the gradients of its rows. Without gradients,
    as in evaluation, each process keeps to its own rows.

    Args:
        rows: shape (rows, ...).
        group: the processes; None: all.

    Returns:
        Shape (rows of all processes, ...); `rows` itself if there is one process.
    """
    if not torch.is_grad_enabled() or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    if torch.distributed.get_world_size(group) == 1:
        return rows
    joined: Tensor = _Gather.apply(rows, group)
    return joined


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        processes = torch.distributed.get_world_size(group)
        size = torch.tensor([len(rows)], device=rows.device)
        sizes = [torch.empty_like(size) for _ in range(processes)]
        torch.distributed.all_gather(sizes, size, group=group)
        counts = [int(each) for each in sizes]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded, group=group)
        ctx.group, ctx.start, ctx.count = group, first_row(counts, group), len(rows)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gradient = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.start : ctx.start + ctx.count], None


def first_row(counts: list[int], group: Any = None) -> int:
    """Return where the rows of this process start among those of all."""
    return sum(counts[: torch.distributed.get_rank(group)])


def in_batch_negatives(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    keys: tuple[Tensor, Tensor, Tensor] | None = None,
    temperature: float = 0.05,
    symmetric: bool = False,
    group: Any = None,
) -> Tensor:
    """Return the mean loss of choosing each anchor's positive among all positives and negatives of the batch.

    This is InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, section 2.3), which sentence-transformers calls
    `MultipleNegativesRankingLoss`. Scores are dot products. With several processes, the candidates are those of all of
    them, and the mean is over this process's anchors.

    Args:
        anchors: shape (anchors, d).
        positives: the positive of each anchor, shape (anchors, d).
        negatives: further candidates for all anchors, shape (any number, d).
        keys: numbers that are equal for equal texts, of the three; a candidate is left out if it has the text of the
            anchor or of its positive, or if it is the positive of an anchor with the same text.
        temperature: what scores are divided by.
        symmetric: the mean of this loss and of that of choosing each positive's anchor among all anchors.
        group: the processes; None: all.
    """
    all_anchors, all_positives = gather(anchors, group), gather(positives, group)
    documents = torch.cat([all_positives, gather(negatives, group)])
    start = 0
    if len(all_anchors) > len(anchors):
        counts = gather(torch.tensor([len(anchors)], device=anchors.device), group).tolist()
        start = first_row(counts, group)
    target = torch.arange(start, start + len(anchors), device=anchors.device)
    scores, backward = anchors @ documents.T, positives @ all_anchors.T
    if keys is not None:
        anchor_keys, positive_keys, negative_keys = keys
        known, own, ours = gather(anchor_keys, group), anchor_keys[:, None], positive_keys[:, None]
        of_positives = gather(positive_keys, group)
        texts = torch.cat([of_positives, gather(negative_keys, group)])
        same = (texts == own) | (texts == ours)
        same[:, : len(known)] |= known == own
        scores = scores.masked_fill(same & ~_at(target, same), float("-inf"))
        same = (known == own) | (known == ours) | (of_positives == ours)
        backward = backward.masked_fill(same & ~_at(target, same), float("-inf"))
    loss = F.cross_entropy(scores / temperature, target)
    return (loss + F.cross_entropy(backward / temperature, target)) / 2 if symmetric else loss


def _at(target: Tensor, like: Tensor) -> Tensor:
    """Return true in the column that `target` names in each row: (rows,) → the shape of `like`."""
    return torch.arange(like.shape[1], device=like.device) == target[:, None]


def triplet_loss(anchors: Tensor, positives: Tensor, negatives: Tensor, margin: float, distance: Distance) -> Tensor:
    """Return the mean of max(d(anchor, positive) - d(anchor, negative) + margin, 0), zero if there is no triplet.

    Schroff et al. 2015 (arXiv:1503.03832, section 3.1), with the distance itself in place of its square.

    Args:
        anchors: shape (triplets, d).
        positives: the same.
        negatives: the same.
        margin: how much further away a negative should be.
        distance: `cosine` (1 minus the cosine), `euclidean` or `manhattan`.
    """
    near, far = _distance(anchors, positives, distance), _distance(anchors, negatives, distance)
    return F.relu(near - far + margin).sum() / max(len(anchors), 1)


def _distance(one: Tensor, other: Tensor, distance: Distance) -> Tensor:
    if distance == "cosine":
        return 1 - cosine_similarity(one, other)
    return (one - other).norm(p=2 if distance == "euclidean" else 1, dim=-1)


def cosent_loss(cosines: Tensor, scores: Tensor, temperature: float, group: Any = None) -> Tensor:
    """Return log(1 + Σ exp((cos_i - cos_j) / temperature)) over all pairs i, j of rows with score_i < score_j.

    Huang et al. 2024 (CoSENT, doi:10.1109/TASLP.2024.3402087). The rows are those of all processes.

    Args:
        cosines: the cosine of each row's two texts, shape (rows,).
        scores: how similar they are said to be, shape (rows,).
        temperature: what differences are divided by.
        group: the processes; None: all.
    """
    cosines, scores = gather(cosines, group) / temperature, gather(scores, group)
    differences = (cosines[:, None] - cosines[None])[scores[:, None] < scores[None]]
    return torch.cat([cosines.new_zeros(1), differences]).logsumexp(0)
