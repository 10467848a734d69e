"""Which columns of a table are anchors, positives, negatives and scores, and how rows become texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lit_peft.data.datasets_internals import get_fingerprint
from lit_peft.data.files import fingerprint, require_columns
from lit_peft.data.labels import parse_number
from lit_peft.data.rows import ROW_NUMBER, RowError
from lit_peft.data.text_encoding import encode_texts
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset

ANCHORS = ("anchor", "query", "question", "sentence1", "text1", "title")
POSITIVES = (
    *("positive", "positives", "pos", "document", "passage", "answer", "response", "sentence2", "text2"),
    *("context", "body", "abstract"),
)
SCORES = ("score", "scores", "similarity", "similarity_score")
TEXTS = ("text", "sentence", *ANCHORS, *POSITIVES)
_NEGATIVE = re.compile(r"(hard_)?(neg|negs|negative|negatives)(_?\d+)?", re.IGNORECASE)
# Names that the columns get: negatives are `negative_1`, `negative_2`, ….
ANCHOR, POSITIVE, SCORE, TEXT = "anchor", "positive", "score", "text"
NEGATIVE = re.compile(r"negative_(\d+)")


def find_column(table: Dataset, setting: str, given: str | None, known: Sequence[str], field: str, source: str) -> str:
    """Return the column that a setting names or, without one, the first of the known ones that the table has.

    Args:
        table: the table.
        setting: the setting's name ("data.anchor_column").
        given: its value.
        known: the usual names.
        field: the setting that the table was read from ("data.train").
        source: that setting's value.

    Raises:
        LitPeftError: the table has no such column.
    """
    if given is not None:
        require_columns(table, {setting: given}, field, source)
        return given
    found = next((name for name in known if name in table.column_names), None)
    if found is None:
        columns = ", ".join(map(repr, table.column_names[:20]))
        raise LitPeftError(
            f"{field} {source!r} has none of the columns {', '.join(known)}; it has {columns}: name the column with "
            f"{setting}."
        )
    return found


def find_negatives(table: Dataset, given: Sequence[str] | None, field: str, source: str) -> list[str]:
    """Return the columns of the negatives, in order: those given, or those whose names say so.

    Raises:
        LitPeftError: a given column is missing.
    """
    if given is None:
        return [name for name in table.column_names if _NEGATIVE.fullmatch(name)]
    require_columns(table, {f"data.negative_columns[{index}]": name for index, name in enumerate(given)}, field, source)
    return list(given)


def rename(table: Dataset, names: dict[str, str]) -> Dataset:
    """Rename columns, old name -> new name; a renamed column takes the place of another one that has its new name."""
    names = {old: new for old, new in names.items() if old != new}
    table = table.remove_columns([new for new in names.values() if new in table.column_names and new not in names])
    return table.rename_columns(names) if names else table


def one_positive_per_row(table: Dataset) -> Dataset:
    """Make a row of each positive, if the column holds lists, with the number of the row that it was in."""
    import datasets

    kind = table.features[POSITIVE]
    if not isinstance(kind, (datasets.List, datasets.LargeList, datasets.Sequence)):
        return table
    features = {**table.features, POSITIVE: kind.feature, ROW_NUMBER: datasets.Value("int64")}
    return table.map(
        _split_positives,
        batched=True,
        with_indices=True,
        features=datasets.Features(features),
        remove_columns=table.column_names,
        new_fingerprint=fingerprint(get_fingerprint(table), "one numbered row per positive"),
        desc="One row per positive",
    )


def _split_positives(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
    batch = {**batch, ROW_NUMBER: [index + 1 for index in indices]}
    counts = [len(texts or ()) for texts in batch[POSITIVE]]
    out = {
        name: [cell for cell, count in zip(cells, counts, strict=True) for _ in range(count)]
        for name, cells in batch.items()
    }
    return {**out, POSITIVE: [text for texts in batch[POSITIVE] for text in texts or ()]}


def negative_columns(names: Sequence[str]) -> list[str]:
    """Return the columns of the negatives of a prepared table, in order."""
    return sorted(filter(NEGATIVE.fullmatch, names), key=lambda name: int(name.rpartition("_")[2]))


def negative_texts(cells: Sequence[Any]) -> list[str]:
    """Return a row's negatives, which are texts and lists of texts, without empty ones."""
    texts = [text for cell in cells for text in (cell if isinstance(cell, list) else [cell])]
    return [str(text) for text in texts if text is not None and str(text).strip()]


def halves(text: str) -> tuple[str, str]:
    """Return the first and the second half of a text's words."""
    words = text.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


def encode_rows(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    pairs: str | None,
    prefixes: dict[str, str],
    has_scores: bool,
    max_length: int,
) -> dict[str, list[Any]]:
    """Tokenize the texts of each row: the anchor, the positive and the negatives; or the only text.

    Returns:
        `input_ids` and, if the tokenizer has them, `token_type_ids`, a list for each text of a row; `scores`, if there
        are any; and `cut`, the number of tokens that were cut from all texts of a row.

    Raises:
        RowError: a text has no tokens, or a score is not a number.
    """
    rows: list[list[str]] = []
    names = negative_columns(list(batch))
    for index in range(len(next(iter(batch.values())))):
        if pairs is not None:
            text = str(batch[TEXT][index])
            anchor, positive = halves(text) if pairs == "halves" else (text, text)
            rows.append([prefixes.get(ANCHOR, "") + anchor, prefixes.get(POSITIVE, "") + positive])
        elif ANCHOR not in batch:
            rows.append([prefixes.get(TEXT, "") + str(batch[TEXT][index])])
        else:
            negatives = negative_texts([batch[name][index] for name in names])
            before = prefixes.get("negative", prefixes.get(POSITIVE, ""))
            rows.append(
                [
                    prefixes.get(ANCHOR, "") + str(batch[ANCHOR][index]),
                    prefixes.get(POSITIVE, "") + str(batch[POSITIVE][index]),
                    *(before + text for text in negatives),
                ]
            )
    encoded = encode_texts(
        {TEXT: [text for texts in rows for text in texts]},
        tokenizer=tokenizer,
        text_column=TEXT,
        text_pair_column=None,
        label_column=None,
        declared=None,
        label_ids=None,
        max_length=max_length,
    )
    out: dict[str, list[Any]] = {name: [] for name in encoded}
    start = 0
    for index, texts in enumerate(rows):
        end = start + len(texts)
        for name, values in encoded.items():
            part = values[start:end]
            out[name].append(sum(part) if name == "cut" else part)
        empty = next((text for text, ids in zip(texts, out["input_ids"][-1], strict=True) if not ids), None)
        if empty is not None:
            raise RowError(
                index, f"the text {brief(empty)} has no tokens: the tokenizer knows none of its characters; remove it."
            )
        start = end
    if has_scores:
        out["scores"] = [parse_number(score) for score in batch[SCORE]]
        if None in out["scores"]:
            wrong = out["scores"].index(None)
            raise RowError(wrong, f"the score is {brief(batch[SCORE][wrong])}; give a number (data.score_column).")
    return out
