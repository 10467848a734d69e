"""GLUE's and SuperGLUE's own files, converted to the columns of the hub datasets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lit_peft.data.datasets_internals import get_fingerprint
from lit_peft.data.files import fingerprint
from lit_peft.data.rows import Split
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset

# Configuration -> names of columns in GLUE's tsv files, and the hub's names for them.
_RENAMED: dict[str, dict[str, str]] = {
    "mrpc": {"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"},
    "stsb": {"score": "label"},
    "qqp": {"is_duplicate": "label"},
    "mnli": {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
}
# The columns of files without a header line.
_WITHOUT_HEADER: dict[str, tuple[str, ...]] = {"cola": ("source", "label", "mark", "sentence")}


def tsv_columns(config: str) -> tuple[str, ...]:
    """Return the columns of a configuration's tsv files, if they have no header line; else ()."""
    return _WITHOUT_HEADER.get(config, ())


def to_hub_columns(table: Dataset, config: str, answer: str, split: Split, where: str) -> Dataset:
    """Convert a table of a benchmark's own file to the hub's columns; a table that has them stays as it is.

    Args:
        table: the table.
        config: the benchmark's configuration on the hub.
        answer: column of the labels or answers.
        split: the split it is read for.
        where: start of error messages.

    Raises:
        LitPeftError: a part of the file is missing, or it has no labels although the split needs them.
    """
    names = {own: name for own, name in _RENAMED.get(config, {}).items() if own in table.column_names}
    # MNLI's hub columns have no "sentence1", so a table with both names is not renamed.
    if names and not set(names.values()) & set(table.column_names):
        table = table.rename_columns(names)
    converter = _CONVERTERS.get(config)
    if converter is not None and (nested := converter[0]) in table.column_names and isinstance(table[0][nested], dict):
        table = table.map(
            converter[1],
            batched=True,
            batch_size=100,
            fn_kwargs={"where": where},
            remove_columns=table.column_names,
            new_fingerprint=fingerprint(get_fingerprint(table), config),
        )
    if split != "predict" and answer not in table.column_names:
        raise LitPeftError(
            f"{where} has no column {answer!r}; it has {', '.join(map(repr, table.column_names))}. The benchmark's "
            "test files come without labels: give its validation file, and use this one for `predict`."
        )
    return table


def _convert_wsc(batch: dict[str, list[Any]], where: str) -> dict[str, list[Any]]:
    """Make columns of the two spans."""
    spans = {name: [_member(target, name, str, where) for target in batch["target"]] for name in _SPANS}
    return {**{name: values for name, values in batch.items() if name != "target"}, **spans}


def _convert_multirc(batch: dict[str, list[Any]], where: str) -> dict[str, list[Any]]:
    """Make a row of each answer to a question about a passage."""
    out: dict[str, list[Any]] = {name: [] for name in ("paragraph", "question", "answer", "label", "idx")}
    for passage, passage_id in zip(batch["passage"], batch.get("idx") or [0] * len(batch["passage"]), strict=True):
        for question_index, question in enumerate(_member(passage, "questions", list, where)):
            for answer_index, answer in enumerate(_member(question, "answers", list, where)):
                out["paragraph"].append(_member(passage, "text", str, where))
                out["question"].append(_member(question, "question", str, where))
                out["answer"].append(_member(answer, "text", str, where))
                out["label"].append(answer.get("label"))
                ids = (passage_id, question.get("idx", question_index), answer.get("idx", answer_index))
                out["idx"].append(dict(zip(("paragraph", "question", "answer"), ids, strict=True)))
    return out if any(label is not None for label in out["label"]) else _without(out, "label")


def _convert_record(batch: dict[str, list[Any]], where: str) -> dict[str, list[Any]]:
    """Make a row of each query about a passage, with the text of the passage's entities, which are given as spans."""
    out: dict[str, list[Any]] = {name: [] for name in ("passage", "query", "entities", "answers")}
    for passage, queries in zip(batch["passage"], batch["qas"], strict=True):
        text = _member(passage, "text", str, where)
        # The end of a span is its last character.
        spans = [
            (_member(entity, "start", int, where), _member(entity, "end", int, where) + 1)
            for entity in _member(passage, "entities", list, where)
        ]
        entities = sorted({text[start:end] for start, end in spans})
        for query in queries or ():
            answers = query.get("answers")
            out["passage"].append(text)
            out["query"].append(_member(query, "query", str, where))
            out["entities"].append(entities)
            out["answers"].append(answers and sorted({_member(answer, "text", str, where) for answer in answers}))
    return out if any(answers is not None for answers in out["answers"]) else _without(out, "answers")


_SPANS = ("span1_text", "span2_text")
# Configuration -> the column that is an object in its own files, and the function that converts a batch of them.
_CONVERTERS: dict[str, tuple[str, Callable[..., dict[str, list[Any]]]]] = {
    "wsc.fixed": ("target", _convert_wsc),
    "multirc": ("passage", _convert_multirc),
    "record": ("passage", _convert_record),
}


def _without(columns: dict[str, list[Any]], name: str) -> dict[str, list[Any]]:
    return {other: values for other, values in columns.items() if other != name}


def _member(item: Any, key: str, expected: type, where: str) -> Any:
    """Return a member of an object.

    Raises:
        LitPeftError: it is missing or has another type.
    """
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, expected):
        raise LitPeftError(
            f"{where} does not have the form of the benchmark's own files: {key!r} is {brief(value)} in {brief(item)}; "
            "correct it, or give a file with the hub's columns."
        )
    return value


def join_columns(batch: dict[str, list[Any]], column: str, template: str, names: list[str]) -> dict[str, list[Any]]:
    """Fill a template from the columns it names, and return the texts as one column."""
    rows = zip(*(batch[name] for name in names), strict=True)
    return {column: [template.format(**dict(zip(names, row, strict=True))) for row in rows]}
