"""Refuse settings that do not exist. jsonargparse drops those whose value is an empty mapping."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_peft.util.errors import LitPeftError, closest

# Keys of a class's settings that are not arguments of the class.
_OWN_KEYS = ("class_path", "init_args", "dict_kwargs", "help")


def check_names(part: str, class_path: str, known: Collection[str], arguments: Sequence[str]) -> None:
    """Refuse names that are not settings of a class.

    Args:
        part: `model` or `data`.
        class_path: the class, e.g. `lit_peft.LoRA`.
        known: its settings.
        arguments: the command line.

    Raises:
        LitPeftError: names the first unknown setting.
    """
    for given in (*_on_command_line(part, arguments), *_in_files(part, class_path, arguments)):
        if given not in known:
            near = closest(given, known)
            raise LitPeftError(f"{part}.{given} is not a setting of {_name(class_path)}: the closest are {near}.")


def _on_command_line(part: str, arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        key = argument.partition("=")[0].removesuffix("+")
        if key.startswith(f"--{part}."):
            first, _, rest = key.removeprefix(f"--{part}.").partition(".")
            name = rest.partition(".")[0] if first == "init_args" else first
            if name and name not in _OWN_KEYS:
                yield name


def _in_files(part: str, class_path: str, arguments: Sequence[str]) -> Iterator[str]:
    for position, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key in ("--config", "-c"):
            file = Path(value or (arguments[position + 1] if position + 1 < len(arguments) else ""))
            settings = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
            section: Any = settings.get(part) if isinstance(settings, Mapping) else None
            values: Any = section.get("init_args") if isinstance(section, Mapping) else None
            # A later file or argument may have chosen another class.
            same = isinstance(values, Mapping) and _name(section.get("class_path")) == _name(class_path)
            yield from (str(name) for name in values) if same else ()


def _name(class_path: Any) -> str:
    return str(class_path).rpartition(".")[2]
