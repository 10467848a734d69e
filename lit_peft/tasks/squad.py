"""SQuAD's scores of an answer, and the best answer over the windows of a question."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Return the text in lower case without punctuation, articles and extra white space, as in SQuAD's script."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(answer: str, gold: str) -> float:
    """Return 1 if the normalized answers are equal, else 0."""
    return float(normalize_answer(answer) == normalize_answer(gold))


def token_f1(answer: str, gold: str) -> float:
    """Return the F1 of the bags of normalized words; if one is empty, whether both are."""
    answer_words, gold_words = normalize_answer(answer).split(), normalize_answer(gold).split()
    if not answer_words or not gold_words:
        return float(answer_words == gold_words)
    common = sum((Counter(answer_words) & Counter(gold_words)).values())
    return 2 * common / (len(answer_words) + len(gold_words))


def best_over(score: Callable[[str, str], float], answer: str, golds: Sequence[str]) -> float:
    """Return the best score over all right answers; an empty list counts as one empty answer.

    Answers that normalize to nothing are skipped, as in SQuAD's script.
    """
    return max(score(answer, gold) for gold in [gold for gold in golds if normalize_answer(gold)] or [""])


class Answer(NamedTuple):
    """An answer found in a context: characters [start, end), and its score; start = end = 0 means no answer."""

    start: int
    end: int
    score: float


def find_answer(
    starts: Tensor,
    ends: Tensor,
    offsets: Tensor,
    nulls: Tensor,
    n_best: int = 20,
    max_answer_length: int = 30,
    null_answers: bool = False,
    null_threshold: float = 0.0,
) -> Answer:
    """Return the best answer over the windows of one question.

    Args:
        starts: logits of each token being the answer's first [windows, length].
        ends: logits of each token being its last [windows, length].
        offsets: first and last + 1 character of each token in the context [windows, length, 2]; -1: not in the context.
        nulls: index of the token of each window that means "no answer" [windows].
        n_best: number of the best starts and ends of a window to combine.
        max_answer_length: longest answer, in tokens.
        null_answers: whether questions without an answer exist.
        null_threshold: return no answer if its score exceeds that of the best answer by more than this.
    """
    best = Answer(0, 0, float("-inf"))
    null = float("inf")
    for start, end, places, null_index in zip(starts.float(), ends.float(), offsets, nulls.tolist(), strict=True):
        # The window with the lowest score for "no answer" decides.
        null = min(null, float(start[null_index] + end[null_index]))
        context = places[:, 0] >= 0
        count = min(n_best, int(context.sum()))
        firsts = start.masked_fill(~context, float("-inf")).topk(count).indices
        lasts = end.masked_fill(~context, float("-inf")).topk(count).indices
        span = lasts[None, :] - firsts[:, None]
        scores = start[firsts][:, None] + end[lasts][None, :]
        scores = scores.masked_fill((span < 0) | (span >= max_answer_length), float("-inf"))
        if not count or float(scores.max()) <= best.score:
            continue
        first, last = divmod(int(scores.argmax()), count)
        best = Answer(int(places[firsts[first], 0]), int(places[lasts[last], 1]), float(scores.max()))
    nothing = best.score == float("-inf")
    if nothing or (null_answers and null - best.score > null_threshold):
        return Answer(0, 0, null)
    return best
