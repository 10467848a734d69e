"""SQuAD's scores of an answer, and the best answer of a question's windows."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and surplus white space, as SQuAD's script does it."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(answer: str, gold: str) -> float:
    """1 where the normalized answers are equal, else 0."""
    return float(normalize_answer(answer) == normalize_answer(gold))


def token_f1(answer: str, gold: str) -> float:
    """F1 of the bags of normalized words; where one is empty, whether both are."""
    got, wanted = normalize_answer(answer).split(), normalize_answer(gold).split()
    if not got or not wanted:
        return float(got == wanted)
    same = sum((Counter(got) & Counter(wanted)).values())
    return 2 * same / (len(got) + len(wanted))


def best_over(score: Callable[[str, str], float], answer: str, golds: Sequence[str]) -> float:
    """The best score over all right answers; no answer at all stands for the empty one.

    Answers that normalize to nothing are passed over, as SQuAD's script does.
    """
    return max(score(answer, gold) for gold in [gold for gold in golds if normalize_answer(gold)] or [""])


class Answer(NamedTuple):
    """An answer found in a context: characters [start, end), and its score; start = end = 0 for no answer."""

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
        offsets: first and last + 1 character of each token in the context [windows, length, 2]; -1: not context.
        nulls: the token of each window that stands for "no answer" [windows].
        n_best: how many of the best starts and ends of a window to combine.
        max_answer_length: longest answer, in tokens.
        null_answers: whether there may be no answer.
        null_threshold: no answer where its score exceeds the best answer's by more than this.
    """
    best = Answer(0, 0, float("-inf"))
    null = float("inf")
    for start, end, places, at in zip(starts.float(), ends.float(), offsets, nulls.tolist(), strict=True):
        # The window least sure that there is no answer decides.
        null = min(null, float(start[at] + end[at]))
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
