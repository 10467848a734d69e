"""The parser of `fit`, `validate`, `test` and `predict`, with errors that name the setting and the fix."""

from __future__ import annotations

import inspect
import re
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lit_peft.data.base import LitDataModule
from lit_peft.training.module import BaseLM
from lit_peft.util.errors import LitPeftError, closest


class Parser(LightningArgumentParser):
    """Raises `LitPeftError` instead of printing the usage and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise LitPeftError(_readable(message)) from ex


# Lines in which jsonargparse lists the types that it tried: they do not help a user.
_NOISE = re.compile(r"Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|.*Does not validate against")


def _readable(message: str) -> str:
    """Turn a message of jsonargparse into one paragraph that names the closest settings or classes."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    text = " ".join(line for line in lines if line and not _NOISE.match(line))
    classes = [*_subclasses(BaseLM), *_subclasses(LitDataModule)]
    missing = re.search(r"arguments are required: (.+)", text)
    if missing:
        options = ", ".join("--" + name.rpartition(".")[2] for name in missing[1].split(", "))
        return (
            f"{options} must be given on the command line or in a --config file, e.g. "
            "`lit-peft fit --config configs/quickstart.yaml`."
        )
    optimization = re.search(r"(?:unrecognized arguments: --|does not accept option ')(optimizer|lr_scheduler)\b", text)
    if optimization:
        return (
            f"{optimization[1]!r} is a setting of the model here: give --model.optimizer AdamW with "
            "--model.learning_rate and --model.optimizer_args, and --model.lr_scheduler linear, cosine or constant "
            "with --model.warmup_steps."
        )
    text = re.sub(r'Parser key "[^"]+": (?=Parser key )', "", text)
    unknown = re.search(r"Option '([^']+)' is not accepted", text)
    if unknown:
        names = [name for cls in classes for name in inspect.signature(cls).parameters]
        near = closest(unknown[1], names)
        return f"{unknown[1]!r} is not a setting of this class: the closest are {near}."
    unknown = re.search(r"Expected a dot import path string: (\S+)", text)
    if unknown:
        near = closest(unknown[1], [cls.__name__ for cls in classes])
        return f"{unknown[1]!r} is not a known class: the closest are {near}."
    unknown = re.search(r"does not accept option '([^'.]+)", text)
    if unknown:
        keys = ("model", "data", "trainer", "seed_everything", "ckpt_path")
        return f"{unknown[1]!r} is not a key of the configuration: the closest are {closest(unknown[1], keys)}."
    return text or message


def _subclasses(cls: type[Any]) -> list[type[Any]]:
    children: list[type[Any]] = cls.__subclasses__()
    return [found for child in children for found in (child, *_subclasses(child))]
