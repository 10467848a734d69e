"""`model.stack`: adapters that lie, frozen, under the one that a run trains."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lit_peft.formats.folder import load_adapter
from lit_peft.methods.adapters import DEFAULT, adapters_of, set_adapter
from lit_peft.methods.attachment import trainable_parameters
from lit_peft.methods.stack import Stack
from lit_peft.training.run_record import say
from lit_peft.util.errors import LitPeftError

# The weights of an adapter's folder, in the formats that bottleneck adapters have.
_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")


def load_below(module: Any, model: nn.Module) -> tuple[str, ...]:
    """Load the adapters that `model.stack` names, without their heads, and leave the model bare.

    Args:
        module: the module.
        model: its model, without a method; on the meta device only the settings are checked.

    Returns:
        The adapters' names, the one that comes first in each layer first.

    Raises:
        LitPeftError: the module's method cannot be stacked, or a folder's adapter cannot be loaded into the model.
    """
    folders = stack_folders(module)
    if folders and not module.settings.stacks:
        raise LitPeftError(
            f"model.stack is set, but an adapter of {type(module).__name__} cannot be stacked on another one: use "
            "AdapterP, AdapterH or Parallel."
        )
    empty = any(parameter.is_meta for parameter in model.parameters())
    names: list[str] = []
    for folder in folders:
        name = _name(folder)
        name = name if name not in (*names, DEFAULT) else f"{name}_{len(names)}"
        load_adapter(model, folder, check_base=not empty, name=name, with_head=False)
        names.append(name)
        if not empty:
            say(f"on {folder}, frozen ({trainable_parameters(model):,} parameters; without its head)", "stack:")
    if names:
        set_adapter(model, None)
    return tuple(names)


def put_on_top(model: nn.Module, below: tuple[str, ...]) -> None:
    """Stack the method that is attached to a model on the adapters of `load_below`.

    Raises:
        LitPeftError: an adapter cannot be in this place of a stack.
    """
    if below:
        adapters = adapters_of(model)
        # They have frozen the base before, and so know what required gradients.
        adapters.attachments[DEFAULT].unfrozen = adapters.attachments[below[0]].unfrozen
        set_adapter(model, Stack(*below, DEFAULT))


def stack_folders(module: Any) -> list[Path]:
    """Return the folders that `model.stack` names."""
    value = module.hparams.get("stack")
    return [Path(folder) for folder in ([value] if isinstance(value, str) else value or [])]


def stack_record(module: Any) -> list[dict[str, str]]:
    """Return the name of each folder of `model.stack` and a hash of its weights, as plain data for a checkpoint."""
    return [{"name": _name(folder), "hash": _digest(folder)} for folder in stack_folders(module)]


def _name(folder: Path) -> str:
    """Return a name for a folder's adapter; a run's folder `adapter` is named after the run."""
    parts = folder.resolve().parts
    return "/".join(parts[-3:]) if parts[-1] == "adapter" else parts[-1]


def _digest(folder: Path) -> str:
    files = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files[:1])).hexdigest()[:16]


def check_stack_record(module: Any, record: Mapping[str, Any], path: Any, stage: str) -> None:
    """Check that a module's stack is that of the run which wrote a checkpoint.

    After training an adapter may be replaced by another one, e.g. that of another language, which is said.

    Args:
        module: the module.
        record: what the checkpoint says of its run.
        path: the checkpoint, for the message.
        stage: `fit`, or another stage.

    Raises:
        LitPeftError: the numbers of adapters differ, or, in training, the adapters.
    """
    before, now = record.get("stack") or [], stack_record(module)
    names = [", ".join(entry["name"] for entry in entries) or "nothing" for entries in (before, now)]
    differs = [entry["hash"] for entry in before] != [entry["hash"] for entry in now]
    if len(before) != len(now) or (differs and stage == "fit"):
        raise LitPeftError(
            f"{path} was trained on a stack of other adapters: on {names[0]}, and model.stack gives {names[1]} now"
            f"{' with other weights' if names[0] == names[1] else ''}. Give the stack of that run."
        )
    if differs:
        say(f"trained on {names[0]}, and used on {names[1]} now", "stack:")
