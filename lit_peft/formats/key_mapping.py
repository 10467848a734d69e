"""Renaming the tensors of a folder while it is loaded, for a model whose modules have other names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_peft.util.errors import LitPeftError

_PREFIX = "base_model.model."
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")


def rename(
    stored: Mapping[str, Tensor], config: Mapping[str, Any], key_mapping: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a peft folder's tensors and configuration with the names that the model has.

    Args:
        stored: the tensors by peft's names.
        config: the configuration. In its lists of names, each is renamed as a tensor is.
        key_mapping: regular expressions, and what replaces their matches in a name without peft's `base_model.model.`.
            Of several that match a name, the first counts.

    Raises:
        LitPeftError: an expression is not valid or matches no tensor, or two tensors get the same name.
    """
    unused = set(key_mapping)

    def renamed(name: str) -> str:
        for pattern, replacement in key_mapping.items():
            try:
                new, count = re.subn(pattern, replacement, name)
            except (re.error, IndexError) as problem:
                raise LitPeftError(
                    f"key_mapping has {pattern!r}: {replacement!r}, which is no regular expression with its "
                    f"replacement ({problem}): correct it."
                ) from problem
            if count:
                unused.discard(pattern)
                return new
        return name

    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        new = _PREFIX + renamed(name.removeprefix(_PREFIX))
        if new in tensors:
            raise LitPeftError(f"key_mapping gives two tensors the same name, {new}: make its expressions narrower.")
        tensors[new] = tensor
    if unused:
        first = next(iter(stored), "").removeprefix(_PREFIX)
        raise LitPeftError(
            f"key_mapping has {sorted(unused)[0]!r}, which matches no tensor of the folder, whose names are like "
            f"{first!r}: correct it, or leave it out."
        )
    lists = {name: config[name] for name in _NAMES if isinstance(config.get(name), list)}
    return tensors, {**config, **{name: [renamed(each) for each in value] for name, value in lists.items()}}
