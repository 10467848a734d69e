"""Spans of a tag sequence, read as the CoNLL evaluation script and seqeval do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from lit_peft.tasks.base import FiniteMetric

Span = tuple[str, int, int]

# L(ast) and U(nit) of BILOU are E(nd) and S(ingle) of IOBES.
_SAME = {"L": "E", "U": "S"}


def split_tag(tag: str) -> tuple[str, str]:
    """Return a tag's prefix (B, I, O, E or S) and its type; a tag without a prefix is a span of one token."""
    prefix, dash, type_ = tag.partition("-")
    prefix = _SAME.get(prefix, prefix)
    if prefix in ("B", "I", "E", "S") and (dash or not type_):
        return prefix, type_
    return ("O", "") if tag == "O" else ("S", tag)


def tag_spans(tags: Sequence[str]) -> list[Span]:
    """Return the spans (type, first, last) of a sequence of tags in IOB1, IOB2, IOE, IOBES or BILOU.

    A span that starts with I, or ends without E, counts as it does in the CoNLL script.
    """
    spans: list[Span] = []
    start, last_prefix, last_type = 0, "O", ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, type_ = split_tag(tag)
        changed = type_ != last_type
        if last_prefix != "O" and (last_prefix in "ES" or prefix in "BSO" or changed):
            spans.append((last_type, start, index - 1))
        if prefix != "O" and (prefix in "BS" or last_prefix in "ESO" or changed):
            start = index
        last_prefix, last_type = prefix, type_
    return spans


def count_spans(gold: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> tuple[int, int, int]:
    """Return the numbers of right, predicted and gold spans over pairs of tag sequences."""
    num_right = num_predicted = num_gold = 0
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        gold_spans, predicted_spans = set(tag_spans(gold_tags)), set(tag_spans(predicted_tags))
        num_right += len(gold_spans & predicted_spans)
        num_predicted += len(predicted_spans)
        num_gold += len(gold_spans)
    return num_right, num_predicted, num_gold


class SpanScore(FiniteMetric):
    """Precision, recall or F1 over all spans of all batches and processes (micro average); 0 if undefined.

    Args:
        kind: "precision", "recall" or "f1".
    """

    full_state_update = False
    right: Tensor
    predicted: Tensor
    gold: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        import torch

        self.kind = kind
        for name in ("right", "predicted", "gold"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, right: int, predicted: int, gold: int) -> None:
        """Add the numbers of right, predicted and gold spans."""
        self.right += right
        self.predicted += predicted
        self.gold += gold

    def compute(self) -> Tensor:
        total = {"precision": self.predicted, "recall": self.gold, "f1": (self.predicted + self.gold) / 2}[self.kind]
        return self.or_nan(self.right.float() / total.float().clamp(min=1e-9))
