"""What people look at before they train: examples as text, and the figures of each split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lit_peft.data.collate import IGNORE
from lit_peft.data.encoding import token_counts
from lit_peft.data.packing import pack
from lit_peft.data.rows import Rows

# Of a stream, the figures are those of this many examples.
STREAM_EXAMPLES = 1_000
_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Piece:
    """A stretch of an example's text.

    Attributes:
        text: the text.
        learned: whether the loss is computed on it, or it is the label.
        note: the label of a stretch that has one of its own.
    """

    text: str
    learned: bool = False
    note: str = ""


@dataclass(frozen=True)
class SplitFacts:
    """The figures of a split.

    Attributes:
        rows: number of rows; None for a stream.
        examples: number of examples.
        duplicates: number of rows that equal an earlier one; None for a stream.
        tokens: number of tokens, and learned: number of those on which a causal model's loss is computed, if it is one.
        lengths: percentile -> number of tokens of an example, with 100 for the longest.
        longest: the maximum number of tokens that the settings allow.
        labels: label -> its number, most frequent first.
        batch_size: examples of a batch, and padding: share of padding in batches of examples in their order.
        packed: number of rows, and the share of them that is filled, if the examples were packed.
    """

    rows: int | None
    examples: int
    duplicates: int | None
    tokens: int
    learned: int | None
    lengths: dict[int, int]
    longest: int
    labels: dict[str, int] = field(default_factory=dict)
    batch_size: int = 1
    padding: float = 0.0
    packed: tuple[int, float] | None = None


def examples_of(data: Any, split: str) -> Any:
    """Return the examples of a split; of a stream, the first ones, in the order of training."""
    if not (data.streaming and split == "train"):
        return data.examples(split)
    examples = (example for batch in data.train_dataloader() for example in _unbatched(data, batch))
    return list(islice(examples, STREAM_EXAMPLES))


def _unbatched(data: Any, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the examples of a padded batch, without its padding."""
    # A target has a length of its own, and so have the labels of a text.
    apart = hasattr(data, "max_target_length") or getattr(data, "is_encoder_decoder", False)
    aligned = not apart and not _has_several(data)
    if "choices" in batch:
        yield from _unbatched_choices(batch)
        return
    total = len(batch["input_ids"])
    count = total // data.rows_per_example
    for first in range(count):
        rows = [_unbatched_row(batch, row, aligned) for row in range(first, total, count)]
        yield rows[0] if len(rows) == 1 else {name: [row[name] for row in rows] for name in rows[0]}


def _unbatched_row(batch: dict[str, Any], row: int, aligned: bool) -> dict[str, Any]:
    mask = batch["attention_mask"][row].bool()
    example: dict[str, Any] = {"input_ids": batch["input_ids"][row][mask].tolist()}
    if "labels" in batch:
        labels = batch["labels"][row]
        example["labels"] = (labels[mask] if labels.ndim and aligned else labels).tolist()
    for key in ("start_positions", "end_positions"):
        if key in batch:
            example[key] = int(batch[key][row]) - int(mask.int().argmax())
    return example


def _has_several(data: Any) -> bool:
    """Tell whether each row has several labels or several numbers to predict."""
    return getattr(data, "problem_type", None) in ("multi_label", "regression")


def _unbatched_choices(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """As `_unbatched`, for questions whose choices are rows of their own."""
    start = 0
    for question, count in enumerate(batch["choices"].tolist()):
        rows = range(start, start + count)
        texts = [batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() for row in rows]
        yield {"input_ids": texts, "labels": batch["labels"][question].tolist()}
        start += count


def pieces(data: Any, example: dict[str, Any]) -> list[Piece]:
    """Return an example as text, with what is learned told apart.

    Args:
        data: the data module that made the example.
        example: one of `examples_of`.
    """
    example = data.to_show(example)
    tokenizer, ids, labels = data.tokenizer, example["input_ids"], example.get("labels")
    if ids and isinstance(ids[0], (list, tuple)):
        if isinstance(labels, list) and isinstance(labels[0], (list, tuple)):  # answers with their prompts
            answers = [pieces(data, {"input_ids": text, "labels": own}) for text, own in zip(ids, labels, strict=True)]
            return [piece for at, answer in enumerate(answers) for piece in (Piece(f"{chr(10)[:at]}({at}) "), *answer)]
        return _of_several(tokenizer, ids, labels)
    if labels is not None and _has_several(data):
        return [Piece(_text(tokenizer, ids)), Piece("\n→ "), Piece(_several(data, labels), True)]
    if isinstance(labels, (list, tuple)) and len(labels) == len(ids):
        if data.learns_tokens:
            # Of a token that was masked, the note is what it was.
            notes = [
                "" if new in (IGNORE, old) else _text(tokenizer, [new]).strip()
                for old, new in zip(ids, labels, strict=True)
            ]
            return _runs(tokenizer, ids, [(label != IGNORE, note) for label, note in zip(labels, notes, strict=True)])
        if (names := getattr(data, "label_names", None)) is not None:
            notes = ["" if label == IGNORE else str(names[label]) for label in labels]
            return _runs(tokenizer, ids, [(bool(note), note) for note in notes])
    if "start_positions" in example:
        start, end = example["start_positions"], example["end_positions"]
        return _runs(tokenizer, ids, [(start <= index <= end, "") for index in range(len(ids))])
    text = Piece(_text(tokenizer, ids))
    if labels is None:
        return [text]
    if isinstance(labels, (list, tuple)):
        return [text, Piece("\n→ "), Piece(_text(tokenizer, [label for label in labels if label != IGNORE]), True)]
    return [text, Piece("\n→ "), Piece(_label(data, labels), True)]


def _of_several(tokenizer: Any, texts: Sequence[Sequence[int]], labels: Any) -> list[Piece]:
    """Return the choices of a question, or the windows of a context; `labels` are the choices that are right."""
    right = [] if labels is None else [labels] if isinstance(labels, int) else list(labels)
    if right and all(isinstance(label, bool) for label in right):
        right = [index for index, label in enumerate(right) if label]
    out = []
    for index, ids in enumerate(texts):
        out += [Piece(f"{'' if index == 0 else chr(10)}({index}) "), Piece(_text(tokenizer, ids), index in right)]
    return out


def _several(data: Any, values: Sequence[float]) -> str:
    """Return the labels of a row, or its numbers with their names, as text."""
    if data.problem_type == "regression":
        return ", ".join(f"{name}: {value:g}" for name, value in zip(data.label_names, values, strict=True))
    return ", ".join(name for name, value in zip(data.label_names, values, strict=True) if value) or "no label"


def _label(data: Any, label: Any) -> str:
    names = getattr(data, "label_names", None)
    return str(names[label]) if names and isinstance(label, int) and label < len(names) else str(label)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _runs(tokenizer: Any, ids: Sequence[int], kinds: Sequence[tuple[bool, str]]) -> list[Piece]:
    """Return the text of each run of tokens of one kind, with the spaces that it has within the whole text."""
    out: list[Piece] = []
    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        # Each token with a label of its own is a run.
        if end < len(ids) and kinds[end] == kinds[start] and not kinds[end][1]:
            continue
        whole = _text(tokenizer, ids[:end])
        text = whole[len(before) :] if whole.startswith(before) else _text(tokenizer, ids[start:end])
        out.append(Piece(text, *kinds[start]))
        start, before = end, whole
    return out


def facts_of(data: Any, split: str, examples: Any) -> SplitFacts:
    """Return the figures of a split.

    Args:
        data: the data module.
        split: the split.
        examples: the result of `examples_of`.
    """
    counts = token_counts(examples)
    is_stream = data.streaming and split == "train"
    rows: Rows | None = None if is_stream else data.rows[split]
    duplicates = None
    if rows is not None:
        key = data.duplicate_key(rows.table)
        duplicates = len(rows) - len({key(index) for index in rows.indices})
    learned = None
    if data.packing is not None:
        # The first token of an example is not predicted.
        learned = sum(sum(label != IGNORE for label in labels[1:]) for labels in _column(examples, "labels"))
    packed = None
    if getattr(data, "packs", False) and counts and max(counts) <= data.max_length:
        bins = pack(counts, data.max_length)
        packed = (len(bins), sum(counts) / (len(bins) * data.max_length))
    ordered = sorted(counts)
    return SplitFacts(
        rows=None if rows is None else len(rows),
        examples=len(counts),
        duplicates=duplicates,
        tokens=sum(counts),
        learned=learned,
        lengths={part: ordered[min(len(ordered) * part // 100, len(ordered) - 1)] for part in (*_PERCENTILES, 100)}
        if ordered
        else {},
        longest=data.max_length,
        labels=_label_counts(data, examples),
        batch_size=data.batch_size,
        padding=_padding(counts, data.batch_size),
        packed=packed,
    )


def _column(examples: Any, name: str) -> Iterable[Any]:
    return (example[name] for example in examples if name in example)


def _label_counts(data: Any, examples: Any) -> dict[str, int]:
    names = getattr(data, "label_names", None)
    if not names or getattr(data, "problem_type", None) == "regression":
        return {}
    found: Counter[str] = Counter()
    for labels in _column(examples, "labels"):
        if _has_several(data):
            labels = [index for index, value in enumerate(labels) if value]
        several = labels if isinstance(labels, (list, tuple)) else [labels]
        found.update(_label(data, label) for label in several if label != IGNORE)
    # A class without an example is worth knowing about.
    return {**dict(found.most_common()), **{str(name): 0 for name in names if str(name) not in found}}


def _padding(counts: Sequence[int], batch_size: int) -> float:
    """Return the share of padding in batches of examples in their order."""
    batches = [counts[start : start + batch_size] for start in range(0, len(counts), batch_size)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    return 1 - sum(counts) / padded if padded else 0.0
