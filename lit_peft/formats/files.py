"""What the formats share: copying stored tensors into a model, and writing settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_peft.formats.untrusted import check_weights, read_json
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

EXTRA = "lit_peft.json"


@torch.no_grad()
def copy_tensors(
    places: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path, ignored: Collection[str] = ()
) -> None:
    """Copy each stored tensor into its place.

    Args:
        places: the model's tensors by name.
        stored: the folder's tensors by name.
        folder: where they come from, for messages.
        ignored: names that may be stored without having a place.

    Raises:
        LitPeftError: a tensor is missing, has no place, has another shape than its place, or holds no finite weights.
    """
    missing, extra = sorted(set(places) - set(stored)), sorted(set(stored) - set(places) - set(ignored))
    if missing or extra:
        raise LitPeftError(
            f"{folder} does not fit this model: missing {brief(missing[:3], 300)}, unexpected {brief(extra[:3], 300)}."
        )
    for name, place in places.items():
        if stored[name].shape != place.shape:
            raise LitPeftError(
                f"{folder}: {name} has shape {tuple(stored[name].shape)}, and this model needs {tuple(place.shape)}."
            )
        check_weights(name, stored[name], folder)
        place.copy_(stored[name])


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write settings in a fixed order, readable."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_extra(folder: Path, values: Mapping[str, Any]) -> None:
    """Keep settings that the format's own library does not know in `lit_peft.json`, beside what is there already."""
    if values:
        write_json(folder / EXTRA, {**read_extra(folder), **values})


def read_extra(folder: Path) -> dict[str, Any]:
    """The settings in a folder's `lit_peft.json`; none where another library wrote the folder.

    Raises:
        LitPeftError: the file is not valid JSON.
    """
    return read_json(folder, EXTRA) or {}
