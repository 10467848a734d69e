"""What all formats share: copying tensors from a folder into a model, and writing settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_peft.formats.untrusted import check_weights, read_json
from lit_peft.nn.deferred import fill
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

EXTRA_FILE = "lit_peft.json"


@torch.no_grad()
def copy_tensors(
    targets: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path, ignored: Collection[str] = ()
) -> None:
    """Copy each stored tensor into the tensor of the same name in the model.

    Args:
        targets: the model's tensors by name.
        stored: the folder's tensors by name.
        folder: the folder, for error messages.
        ignored: names that the folder may have and the model does not need.

    Raises:
        LitPeftError: a tensor is missing, is not expected, has the wrong shape, or has NaN or infinite values.
    """
    missing, unexpected = sorted(set(targets) - set(stored)), sorted(set(stored) - set(targets) - set(ignored))
    if missing or unexpected:
        raise LitPeftError(
            f"{folder} does not fit this model: missing {brief(missing[:3], 300)}, "
            f"unexpected {brief(unexpected[:3], 300)}."
        )
    for name, target in targets.items():
        if stored[name].shape != target.shape:
            raise LitPeftError(
                f"{folder}: {name} has shape {tuple(stored[name].shape)}, and this model needs {tuple(target.shape)}."
            )
        check_weights(name, stored[name], folder)
        fill(target, stored[name])


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write values as indented JSON with sorted keys."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_extra(folder: Path, values: Mapping[str, Any]) -> None:
    """Add settings that the format has no field for to the folder's `lit_peft.json`."""
    if values:
        write_json(folder / EXTRA_FILE, {**read_extra(folder), **values})


def read_extra(folder: Path) -> dict[str, Any]:
    """Return the settings in a folder's `lit_peft.json`, or an empty dict if another library wrote the folder.

    Raises:
        LitPeftError: the file is not valid JSON.
    """
    return read_json(folder, EXTRA_FILE) or {}
