"""The folders that `AdapterCheckpoint` writes: their files, their note, and replacing or removing them safely."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from lit_peft.formats.files import write_json
from lit_peft.formats.folder import write_adapter
from lit_peft.methods.attachment import attached_model
from lit_peft.util.disk import sync
from lit_peft.util.errors import LitPeftError
from lit_peft.util.locks import process_mark

NOTE = "adapter_checkpoint.json"


def write_adapter_folder(
    module: nn.Module, folder: Path, format: Literal["peft", "adapterhub"] | None, note: dict[str, Any]
) -> None:
    """Write an adapter's files and the note; for a module without a method, its trained tensors by name.

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        _write_weights(module, folder, format)
    except SafetensorError as error:  # it has only this error for all failures of the disk
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error
    write_json(folder / NOTE, note)


def _write_weights(module: nn.Module, folder: Path, format: Literal["peft", "adapterhub"] | None) -> None:
    model = attached_model(module)
    if model is not None:
        with contextlib.suppress(LitPeftError):  # no format supports the method: write its tensors by name
            write_adapter(model, folder, format)
            return
    tensors = {
        name: parameter.detach().cpu().clone().contiguous()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_json(folder / "adapter_config.json", {"module": type(module).__name__, "tensors": shapes})


def read_note(folder: Path) -> dict[str, Any]:
    """Return the note in a folder; empty if there is none."""
    try:
        note: dict[str, Any] = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note


def set_link(link: Path, name: str) -> None:
    """Make `link` point to the folder `name` next to it, in one step."""
    new = link.with_name(f".{link.name}.tmp-{process_mark()}")
    new.unlink(missing_ok=True)
    new.symlink_to(name, target_is_directory=True)
    new.replace(link)
    sync(link.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that readers see it whole or not at all."""
    if folder.is_dir():
        hidden = folder.with_name(f".{folder.name}.tmp-{process_mark()}-gone")
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
