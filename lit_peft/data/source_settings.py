"""What `data.train`, `validation`, `test` and `predict` may say: one source, several, a mixture, or named sets."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_peft.data.rows import Split
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief

Setting = str | list[str | dict[str, Any]] | dict[str, Any] | None
"""The type of these settings, for constructors: jsonargparse reads it from YAML and from the command line."""

_KEYS = ("path", "weight", "columns")


@dataclass(frozen=True)
class Source:
    """One entry of the setting.

    Attributes:
        path: a file, a glob, a folder, a URL, `hub:NAME`, or a split of `data.dataset`.
        weight: its share of the training examples, before the weights are divided by their sum; None: no mixture.
        columns: new name -> name in the file, for columns to rename.
    """

    path: str
    weight: float | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceSet:
    """Sources that are evaluated together.

    Attributes:
        name: the set's name in the log; "" if the setting names no sets.
        sources: at least one; all have a weight, or none has one.
    """

    name: str
    sources: tuple[Source, ...]

    def __str__(self) -> str:
        return ", ".join(source.path for source in self.sources)


def parse_setting(value: Any, split: Split) -> list[SourceSet]:
    """Return what a setting names: nothing, one set, or several sets with names.

    Raises:
        LitPeftError: the setting has another form; the message shows the forms.
    """
    where = f"data.{split}"
    if value is None:
        return []
    if isinstance(value, Mapping) and value and "path" not in value and not any(map(_is_number, value.values())):
        if split not in ("validation", "test"):
            raise LitPeftError(
                f"{where} {brief(dict(value))}: only data.validation and data.test may have several sets with names; "
                + (
                    "give each source a weight ({a.jsonl: 0.7, b.jsonl: 0.3}), or a list."
                    if split == "train"
                    else "give one source, or a list."
                )
            )
        return [SourceSet(_set_name(name, where), _sources(part, split)) for name, part in value.items()]
    return [SourceSet("", _sources(value, split))]


def _sources(value: Any, split: Split) -> tuple[Source, ...]:
    where = f"data.{split}"
    if isinstance(value, (str, os.PathLike)):
        found = [Source(os.fspath(value))]
    elif isinstance(value, Mapping) and "path" in value:
        found = [_source(value, where)]
    elif isinstance(value, Mapping):
        found = [_source({"path": path, "weight": weight}, where) for path, weight in value.items()]
    elif isinstance(value, (list, tuple)):
        found = [_source(part if isinstance(part, Mapping) else {"path": part}, where) for part in value]
    else:
        raise LitPeftError(
            f"{where} is {brief(value)}; give a file, a list of files, or weights ({{a.jsonl: 0.7, b.jsonl: 0.3}})."
        )
    if not found:
        raise LitPeftError(f"{where} is empty; name at least one file.")
    weighted = [source for source in found if source.weight is not None]
    if weighted and split != "train":
        raise LitPeftError(
            f"{where} gives {weighted[0].path!r} a weight, but every row of {where} is evaluated once; leave weights "
            "out."
        )
    if weighted and len(weighted) < len(found):
        plain = next(source for source in found if source.weight is None)
        raise LitPeftError(f"{where} gives {weighted[0].path!r} a weight and {plain.path!r} none; give it one.")
    return tuple(found)


def _source(given: Mapping[str, Any], where: str) -> Source:
    unknown = next((name for name in given if name not in _KEYS), None)
    if unknown is not None:
        raise LitPeftError(
            f"{where} has a source with {unknown!r}, which is not one of {', '.join(_KEYS)}; the closest are "
            f"{closest(str(unknown), _KEYS)}."
        )
    path, weight, columns = (given.get(name) for name in _KEYS)
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise LitPeftError(f"{where} has a source whose path is {brief(path)}; give a file, a glob, a folder or a URL.")
    if weight is not None and not (_is_number(weight) and math.isfinite(weight) and weight > 0):
        raise LitPeftError(f"{where}: the weight of {str(path)!r} is {brief(weight)}; give a number above 0.")
    if columns is not None and not (
        isinstance(columns, Mapping) and all(isinstance(name, str) for pair in columns.items() for name in pair)
    ):
        raise LitPeftError(
            f"{where}: columns of {str(path)!r} is {brief(columns)}; give new names and the file's names, such as "
            "{instruction: question}."
        )
    return Source(os.fspath(path), None if weight is None else float(weight), dict(columns or {}))


def _set_name(name: Any, where: str) -> str:
    text = str(name)
    if not text or "/" in text or text == "mean":
        raise LitPeftError(
            f"{where}: {name!r} cannot be the name of a set: names appear in the log (val_loss/NAME), and may be "
            "neither empty nor 'mean', and have no slash. Weights are numbers: {a.jsonl: 0.7, b.jsonl: 0.3}."
        )
    return text


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
