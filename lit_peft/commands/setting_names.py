"""Refuse settings that do not exist. jsonargparse drops those whose value is an empty mapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_peft.util.errors import LitPeftError, closest

# Keys of a class's settings that are not arguments of the class.
_OWN_KEYS = ("class_path", "init_args", "dict_kwargs", "help")


def check_names(arguments: Sequence[str], parsed: Any) -> None:
    """Refuse names that are not settings of the class that they are given to.

    Args:
        arguments: the command line.
        parsed: the settings that jsonargparse made of it, in which every class has all of its settings.

    Raises:
        LitPeftError: names the first unknown setting.
    """
    for part in ("model", "data"):
        if parsed.get(part) is not None:
            for name in _on_command_line(part, arguments):
                _check_name(name, part, parsed[part])
    for file in _files(arguments):
        _check_tree(yaml.safe_load(file.read_text(encoding="utf-8")), parsed, "")


def _check_name(name: str, where: str, parsed: Any) -> None:
    known = vars(parsed.get("init_args", parsed))
    if name not in known:
        raise LitPeftError(
            f"{where}.{name} is not a setting of {_class_name(parsed.class_path)}: the closest are "
            f"{closest(name, known)}."
        )


def _check_tree(given: Any, parsed: Any, where: str) -> None:
    """Check the settings of every class in a file, wherever it stands."""
    if isinstance(given, list) and isinstance(parsed, list):
        for inner, its in zip(given, parsed, strict=False):
            _check_tree(inner, its, where)
    if not isinstance(given, Mapping) or not hasattr(parsed, "get"):
        return
    if "class_path" in given:
        # A later file or argument may have chosen another class.
        if _class_name(given["class_path"]) != _class_name(parsed.get("class_path")):
            return
        values = given.get("init_args")
        for name in values if isinstance(values, Mapping) and parsed.get("init_args") is not None else ():
            _check_name(str(name), where, parsed)
    for key, value in given.items():
        inside = where if key == "init_args" else f"{where}.{key}".removeprefix(".")
        _check_tree(value, parsed.get(str(key)), inside)


def _on_command_line(part: str, arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        key = argument.partition("=")[0].removesuffix("+")
        if key.startswith(f"--{part}."):
            first, _, rest = key.removeprefix(f"--{part}.").partition(".")
            name = rest.partition(".")[0] if first == "init_args" else first
            if name and name not in _OWN_KEYS:
                yield name


def _files(arguments: Sequence[str]) -> Iterator[Path]:
    for position, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key in ("--config", "-c"):
            file = Path(value or (arguments[position + 1] if position + 1 < len(arguments) else ""))
            if file.is_file():
                yield file


def _class_name(class_path: Any) -> str:
    return str(class_path).rpartition(".")[2]
