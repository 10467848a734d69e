"""The modules of the base that an adapter trains in full, in peft's format."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment, base_name

PREFIX = "base_model.model."


def modules_with_weights(model: nn.Module, names: Collection[str], stored: Collection[str]) -> list[str]:
    """Return the full names of the modules that a folder has weights for, given its `modules_to_save`.

    peft also saves modules whose names only end in the same letters, such as `pre_classifier` for `classifier`. Our own
    folders do not, so such a module counts if its weights are stored.
    """
    whole = tuple(f".{name}" for name in names)
    return [
        path
        for path in outermost_modules(model, names)
        if f".{path}".endswith(whole) or any(name.startswith(f"{PREFIX}{path}.") for name in stored)
    ]


def outermost_modules(model: nn.Module, names: Collection[str], start: str = "") -> list[str]:
    """Return the modules whose paths, after `start`, end in one of `names`, as peft finds them; none inside another."""
    found: list[str] = []
    for path, _ in model.named_modules():
        matches = path and f"{start}{path}".endswith(tuple(names))
        if matches and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found


def parameter_paths(model: nn.Module) -> dict[str, str]:
    """Return the names of a model's parameters by their names in the bare base."""
    return {base_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)}


def train_what_differs(
    attachment: Attachment, parameters: Mapping[str, str], stored: Mapping[str, Tensor], known: Collection[str]
) -> None:
    """Train each parameter of the base that differs from the stored one.

    peft also saves some of the base's tensors: embeddings, and with bias="all" whatever has "bias" in its name.

    Args:
        attachment: the attached method.
        parameters: see `parameter_paths`.
        stored: the tensors of the folder, by their names without peft's prefix.
        known: the names of the tensors that the method trains already.
    """
    for name in set(stored) - set(known):
        if name in parameters and not _is_equal(attachment.model.get_parameter(parameters[name]), stored[name]):
            attachment.train(parameters[name])


def _is_equal(parameter: Tensor, stored: Tensor) -> bool:
    return parameter.shape == stored.shape and torch.equal(parameter.detach().cpu(), stored.to(parameter.dtype))
