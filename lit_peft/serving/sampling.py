"""Choosing the next token of each row of a batch, each with its own settings and random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def choose_tokens(
    scores: Tensor, temperatures: Sequence[float], top_ps: Sequence[float], numbers: Sequence[float]
) -> Tensor:
    """Return the next token of each row.

    A row's token depends on its own scores and number alone, so a request with a seed gets the same answer in any
    batch.

    Args:
        scores: logits or log probabilities, of shape [rows, vocabulary].
        temperatures: divides the scores of a row; 0 takes its most likely token.
        top_ps: the tokens of a row are taken from the most likely ones whose probabilities add up to this.
        numbers: a random number of each row, at least 0 and less than 1.

    Returns:
        Token ids of shape [rows].
    """
    best = scores.argmax(-1)
    if not any(temperatures):
        return best
    device = scores.device
    divisor = torch.tensor([value or 1.0 for value in temperatures], device=device)[:, None]
    limit = torch.tensor(top_ps, device=device)[:, None]
    probabilities, order = (scores.float() / divisor).softmax(-1).sort(dim=-1, descending=True, stable=True)
    sums = probabilities.cumsum(-1)
    # The first token is always kept; another one if those before it do not reach the limit.
    sums = (probabilities * (sums - probabilities < limit)).cumsum(-1)
    drawn = torch.tensor(numbers, device=device, dtype=sums.dtype)[:, None] * sums[:, -1:]
    places = torch.searchsorted(sums, drawn, right=True).clamp(max=sums.shape[1] - 1)
    # Rounding may reach a place behind the last token that is kept.
    last = (sums < sums[:, -1:]).sum(-1, keepdim=True)
    sampled = order.gather(1, torch.minimum(places, last)).squeeze(1)
    is_greedy = torch.tensor([not value for value in temperatures], device=device)
    return torch.where(is_greedy, best, sampled)
