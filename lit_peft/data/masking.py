"""Which tokens of a text are masked, and what stands in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_peft.data.collate import IGNORE
from lit_peft.util.errors import LitPeftError, closest

Unit = Literal["token", "whole_word", "span"]

# Lengths of spans, in words: geometric with p = 0.2, at most 10 (SpanBERT, section 3.1).
_SPAN_P, _LONGEST_SPAN = 0.2, 10


@dataclass(frozen=True)
class Masking:
    """Chooses the tokens to predict, and replaces most of them.

    BERT (arXiv:1810.04805), section 3.1: of the chosen tokens 80 % become the mask token, 10 % a random token, and 10 %
    stay. Whole words are chosen as in BERT's later releases, spans of words as in SpanBERT (arXiv:1907.10529), section
    3.1, where all tokens of a span have the same kind of replacement.

    Args:
        unit: `token`, `whole_word` or `span`: what is chosen.
        probability: the share of the tokens to choose.
        mask_share: the share of these that become the mask token.
        random_share: the share that become a random token; the rest stays.
        mask_token_id: the mask token.
        vocabulary: number of tokens from which random ones are drawn.
        special_ids: tokens that are never chosen.

    Raises:
        LitPeftError: a value is out of range.
    """

    unit: Unit
    probability: float
    mask_share: float
    random_share: float
    mask_token_id: int
    vocabulary: int
    special_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise LitPeftError(
                f"data.masking {self.unit!r} is not known: use {closest(self.unit, get_args(Unit), n=3)}."
            )
        if not 0 < self.probability < 1:
            raise LitPeftError(
                f"data.mlm_probability is {self.probability}; it must be above 0 and below 1, e.g. 0.15."
            )
        for name, share in (("mask_replace_prob", self.mask_share), ("random_replace_prob", self.random_share)):
            if not 0 <= share <= 1:
                raise LitPeftError(f"data.{name} is {share}; it must be at least 0 and at most 1.")
        if self.mask_share + self.random_share > 1:
            raise LitPeftError(
                f"data.mask_replace_prob {self.mask_share} and data.random_replace_prob {self.random_share} are more "
                "than 1 together; lower one of them."
            )

    def __call__(self, ids: Sequence[int], words: Sequence[int] | None, key: str) -> tuple[Tensor, Tensor]:
        """Mask a text.

        Args:
            ids: its tokens.
            words: the number of each token's word, -1 for special tokens; None with `unit="token"`.
            key: seeds the random choice: the same text and key give the same masks.

        Returns:
            int64 (length,), the masked tokens, and the labels: the original token where it was chosen, else -100.
        """
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
        generator = torch.Generator().manual_seed(seed)
        masked = torch.tensor(ids, dtype=torch.long)
        allowed = ~torch.isin(masked, torch.tensor(self.special_ids, dtype=torch.long))
        if words is None:
            chosen = (torch.rand(len(masked), generator=generator) < self.probability) & allowed
            units = torch.arange(len(masked))
        else:
            numbers = torch.tensor(words, dtype=torch.long).masked_fill(~allowed, -1)
            chosen, units = (self._spans if self.unit == "span" else self._words)(numbers, generator)
        labels = masked.masked_fill(~chosen, IGNORE)
        # One draw for each unit that is replaced in one way.
        draw = torch.rand(len(masked), generator=generator)[units]
        masked[chosen & (draw < self.mask_share)] = self.mask_token_id
        is_random = chosen & (draw >= self.mask_share) & (draw < self.mask_share + self.random_share)
        replacement = torch.randint(self.vocabulary, (len(masked),), generator=generator)
        return torch.where(is_random, replacement, masked), labels

    def _words(self, words: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Choose each word with the probability; its tokens are replaced one by one."""
        draw = torch.rand(int(words.max().clamp(min=0)) + 1, generator=generator)
        return (draw[words.clamp(min=0)] < self.probability) & (words >= 0), torch.arange(len(words))

    def _spans(self, words: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Choose spans of words until the share of the tokens is reached; each is replaced as a whole."""
        chosen, units = torch.zeros(len(words), dtype=torch.bool), torch.arange(len(words))
        runs = _runs(words.tolist())
        share = self.probability * sum(end - start for start, end in runs)
        # Rounded up or down at random, so that short texts have the right share on average.
        budget = int(share + torch.rand((), generator=generator).item())
        log_rest = torch.log(torch.tensor(1 - _SPAN_P))
        count = 0
        for first in torch.randperm(len(runs), generator=generator).tolist():
            draw = torch.rand((), generator=generator).clamp(min=1e-12)
            length = min(int(draw.log() / log_rest) + 1, _LONGEST_SPAN)
            for at in range(first, min(first + length, len(runs))):
                start, end = runs[at]
                # A span ends at a special token, at a span chosen before, and when there are enough.
                if count >= budget or chosen[start] or (at > first and start != runs[at - 1][1]):
                    break
                chosen[start:end] = True
                units[start:end] = runs[first][0]
                count += end - start
            if count >= budget:
                break
        return chosen, units


def _runs(words: list[int]) -> list[tuple[int, int]]:
    """Return the start and end of each word; words have numbers of at least 0."""
    runs: list[tuple[int, int]] = []
    for at, word in enumerate(words):
        if word < 0:
            continue
        if runs and runs[-1][1] == at and words[at - 1] == word:
            runs[-1] = (runs[-1][0], at + 1)
        else:
            runs.append((at, at + 1))
    return runs


def word_numbers(text: str, offsets: Sequence[tuple[int, int]], word_ids: Sequence[int | None]) -> list[int]:
    """Number the words of a text by its tokens.

    A word is what the tokenizer's pre-tokenizer takes for one, and never goes over white space: some tokenizers take
    the whole text for one word.

    Args:
        text: the text.
        offsets: start and end of each token in the text.
        word_ids: the pre-tokenizer's number of each token's word.

    Returns:
        The number of each token's word, from 0.
    """
    numbers: list[int] = []
    number, before, last = -1, None, 0
    for (start, end), word in zip(offsets, word_ids, strict=True):
        # The white space is a part of the token, or of none.
        spaced = end > start and any(letter.isspace() for letter in (*text[last:start], text[start]))
        if number < 0 or word != before or spaced:
            number += 1
        numbers.append(number)
        before, last = word, end
    return numbers
