"""Spans of a tag sequence, as the CoNLL evaluation script (and seqeval) reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torchmetrics import Metric

Span = tuple[str, int, int]

# L(ast) and U(nit) of BILOU are E(nd) and S(ingle) of IOBES.
_SAME = {"L": "E", "U": "S"}


def split_tag(tag: str) -> tuple[str, str]:
    """Return a tag's prefix (B, I, O, E or S) and its type; a tag without a prefix is a span of one token."""
    prefix, dash, kind = tag.partition("-")
    prefix = _SAME.get(prefix, prefix)
    if prefix in ("B", "I", "E", "S") and (dash or not kind):
        return prefix, kind
    return ("O", "") if tag == "O" else ("S", tag)


def tag_spans(tags: Sequence[str]) -> list[Span]:
    """Return the spans (type, first, last) of a sequence of tags in IOB1, IOB2, IOE, IOBES or BILOU.

    A span that starts with I, or ends without E, counts as it does in the CoNLL script.
    """
    spans: list[Span] = []
    begun, before, before_kind = 0, "O", ""
    for at, tag in enumerate([*tags, "O"]):
        prefix, kind = split_tag(tag)
        changed = kind != before_kind
        if before != "O" and (before in "ES" or prefix in "BSO" or changed):
            spans.append((before_kind, begun, at - 1))
        if prefix != "O" and (prefix in "BS" or before in "ESO" or changed):
            begun = at
        before, before_kind = prefix, kind
    return spans


def count_spans(gold: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> tuple[int, int, int]:
    """Return the numbers of spans (right, predicted, gold) over pairs of tag sequences."""
    right = found = there = 0
    for wanted, got in zip(gold, predicted, strict=True):
        wanted_spans, got_spans = set(tag_spans(wanted)), set(tag_spans(got))
        right += len(wanted_spans & got_spans)
        found += len(got_spans)
        there += len(wanted_spans)
    return right, found, there


class SpanScore(Metric):
    """Precision, recall or F1 over all spans of all batches and processes (micro average); 0 where undefined.

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
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, right: int, predicted: int, gold: int) -> None:
        """Add numbers of spans."""
        self.right += right
        self.predicted += predicted
        self.gold += gold

    def compute(self) -> Tensor:
        whole = {"precision": self.predicted, "recall": self.gold, "f1": (self.predicted + self.gold) / 2}[self.kind]
        return (self.right / whole.clamp(min=1e-9)).float()
