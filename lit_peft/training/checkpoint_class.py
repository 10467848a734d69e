"""Which class of module a checkpoint belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lit_peft.methods.registry import METHODS
from lit_peft.util.errors import LitPeftError

CLASS_KEY = "module_class"
_MODULES = "lit_peft.modules"


def class_name(cls: type[Any]) -> str:
    """Return the name under which checkpoints refer to a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def class_of_checkpoint(base: type[Any], path: Any) -> type[Any]:
    """Return the subclass of `base` whose module wrote a checkpoint.

    Only classes of lit_peft, and classes that are already imported, are found: a checkpoint must not run code.

    Args:
        base: the common base class.
        path: the checkpoint, a file.

    Raises:
        LitPeftError: the checkpoint does not name its class, or that class is not imported.
    """
    if not Path(path).is_file():
        raise LitPeftError(f"checkpoint_path={str(path)!r} is not a file: give the checkpoint of a run.")
    name = torch.load(path, map_location="cpu", weights_only=True).get(CLASS_KEY)
    if name is None:
        raise LitPeftError(
            f"{path} does not name its class: call load_from_checkpoint on the class that was trained, e.g. "
            "lit_peft.LoRA.load_from_checkpoint(...)."
        )
    module, _, last = name.rpartition(".")
    if module == _MODULES and last in METHODS:
        found: type[Any] = getattr(import_module(_MODULES), last)
        return found
    for known in _subclasses(base):
        if class_name(known) == name:
            return known
    raise LitPeftError(f"{path} was written by {name}, which is not imported: import it first.")


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)
