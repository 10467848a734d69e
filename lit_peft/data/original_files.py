"""GLUE's and SuperGLUE's own files, brought to the columns that the hub has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lit_peft.data.files import fingerprint
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset

    from lit_peft.data.base import Split

# Configuration -> how GLUE's tsv files call what the hub calls otherwise.
_NAMES: dict[str, dict[str, str]] = {
    "mrpc": {"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"},
    "stsb": {"score": "label"},
    "qqp": {"is_duplicate": "label"},
    "mnli": {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
}
# The columns of files without a line that names them.
_UNNAMED: dict[str, tuple[str, ...]] = {"cola": ("source", "label", "mark", "sentence")}


def tsv_columns(config: str) -> tuple[str, ...]:
    """The columns of a configuration's tsv files, where no line names them; else none."""
    return _UNNAMED.get(config, ())


def hub_form(table: Dataset, config: str, answer: str, split: Split, where: str) -> Dataset:
    """Give a benchmark's own file the hub's columns; one that has them stays as it is.

    Args:
        table: what was read.
        config: the benchmark's configuration on the hub.
        answer: column of the labels or answers.
        split: what it is for.
        where: begins messages.

    Raises:
        LitPeftError: a part of it is missing, or there are no labels to judge by.
    """
    names = {own: name for own, name in _NAMES.get(config, {}).items() if own in table.column_names}
    # Of "sentence1", MNLI's hub columns know nothing.
    if names and not set(names.values()) & set(table.column_names):
        table = table.rename_columns(names)
    unfold = _UNFOLD.get(config)
    if unfold is not None and (nested := unfold[0]) in table.column_names and isinstance(table[0][nested], dict):
        table = table.map(
            unfold[1],
            batched=True,
            batch_size=100,
            fn_kwargs={"where": where},
            remove_columns=table.column_names,
            new_fingerprint=fingerprint(table, config),
        )
    if split != "predict" and answer not in table.column_names:
        raise LitPeftError(
            f"{where} has no column {answer!r}; it has {', '.join(map(repr, table.column_names))}. The benchmark's "
            "test files come without: give its validation file, and this one to `predict`."
        )
    return table


def _wsc(batch: dict[str, list[Any]], where: str) -> dict[str, list[Any]]:
    """The two spans become columns."""
    spans = {name: [_part(target, name, str, where) for target in batch["target"]] for name in _SPANS}
    return {**{name: values for name, values in batch.items() if name != "target"}, **spans}


def _multirc(batch: dict[str, list[Any]], where: str) -> dict[str, list[Any]]:
    """Each answer to a question about a passage becomes a row."""
    out: dict[str, list[Any]] = {name: [] for name in ("paragraph", "question", "answer", "label", "idx")}
    for passage, number in zip(batch["passage"], batch.get("idx") or [0] * len(batch["passage"]), strict=True):
        for at, question in enumerate(_part(passage, "questions", list, where)):
            for place, answer in enumerate(_part(question, "answers", list, where)):
                out["paragraph"].append(_part(passage, "text", str, where))
                out["question"].append(_part(question, "question", str, where))
                out["answer"].append(_part(answer, "text", str, where))
                out["label"].append(answer.get("label"))
                numbers = (number, question.get("idx", at), answer.get("idx", place))
                out["idx"].append(dict(zip(("paragraph", "question", "answer"), numbers, strict=True)))
    return out if any(label is not None for label in out["label"]) else _without(out, "label")


def _record(batch: dict[str, list[Any]], where: str) -> dict[str, list[Any]]:
    """Each query about a passage becomes a row, with the passage's entities, which are given by place, as texts."""
    out: dict[str, list[Any]] = {name: [] for name in ("passage", "query", "entities", "answers")}
    for passage, queries in zip(batch["passage"], batch["qas"], strict=True):
        text = _part(passage, "text", str, where)
        # The last character counts.
        spans = [
            (_part(entity, "start", int, where), _part(entity, "end", int, where) + 1)
            for entity in _part(passage, "entities", list, where)
        ]
        entities = sorted({text[start:end] for start, end in spans})
        for query in queries or ():
            answers = query.get("answers")
            out["passage"].append(text)
            out["query"].append(_part(query, "query", str, where))
            out["entities"].append(entities)
            out["answers"].append(answers and sorted({_part(answer, "text", str, where) for answer in answers}))
    return out if any(answers is not None for answers in out["answers"]) else _without(out, "answers")


_SPANS = ("span1_text", "span2_text")
# Configuration -> the column that is an object in its own files, and what makes rows of a batch of them.
_UNFOLD: dict[str, tuple[str, Callable[..., dict[str, list[Any]]]]] = {
    "wsc.fixed": ("target", _wsc),
    "multirc": ("passage", _multirc),
    "record": ("passage", _record),
}


def _without(columns: dict[str, list[Any]], name: str) -> dict[str, list[Any]]:
    return {other: values for other, values in columns.items() if other != name}


def _part(item: Any, key: str, kind: type, where: str) -> Any:
    """A part of an object.

    Raises:
        LitPeftError: it is missing or of another kind.
    """
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        raise LitPeftError(
            f"{where} is not as the benchmark's own files are: {key!r} is {brief(value)} in {brief(item)}; correct it, "
            "or give a file with the hub's columns."
        )
    return value
