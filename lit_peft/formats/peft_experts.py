"""LoRA on parameters (`target_parameters`) in peft's format.

peft wraps the module of a parameter once for each adapted parameter, one wrapper in the other in the module's own order
of parameters. Which wrapper is meant follows from the number of `base_layer` in a name: the first parameter is the
innermost. A of all experts is one matrix, expert after expert, and in B the expert is the index that changes fastest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from lit_peft.formats.untrusted import check_names
from lit_peft.methods.attachment import Attachment
from lit_peft.methods.expert_targets import find_parameters, is_expert_lora, target_name
from lit_peft.models.experts import adaptable_weights, weight_named
from lit_peft.nn.expert_lora import ExpertLoRA
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

_FILE = "adapter_config.json"


def expert_layers(attachment: Attachment) -> dict[str, ExpertLoRA]:
    """Return the LoRA layers of parameters by peft's name of their wrapper, without the prefix."""
    layers = {path: layer for path, layer in attachment.adapted.items() if is_expert_lora(layer)}
    return {wrapper: layers[path] for wrapper, path in _wrappers(layers).items()}


def as_peft(layer: ExpertLoRA) -> tuple[Tensor, Tensor]:
    """Return A, shape (experts · r, in_features), and B, shape (out_features, r · experts), as peft stores them."""
    if not layer.stack:
        return layer.lora_A, layer.lora_B
    return layer.lora_A.flatten(0, 1), layer.lora_B.permute(1, 2, 0).flatten(1)


def parameter_names(attachment: Attachment) -> list[str]:
    """Return the full names of the adapted parameters in the bare model."""
    return [target_name(path, layer) for path, layer in attachment.adapted.items() if is_expert_lora(layer)]


def parameters_in_file(model: nn.Module, names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return what a folder's `target_parameters` selects.

    Args:
        model: the bare model.
        names: the setting.

    Returns:
        The full names of the parameters, and those of the linear layers whose weights are among them: a LoRA of a
        linear layer is the same.

    Raises:
        LitPeftError: a parameter cannot be adapted, or none has such a name.
    """
    check_names(names, f"{_FILE}: target_parameters")
    linear: list[str] = []
    others: list[str] = []
    for name in adaptable_weights(model):
        if any(f".{name}".endswith(f".{target}") for target in names):
            path, _, last = name.rpartition(".")
            is_layer = last == "weight" and isinstance(model.get_submodule(path), nn.Linear)
            (linear if is_layer else others).append(path if is_layer else name)
    if names and not linear and not others:
        raise LitPeftError(
            f"{_FILE}: target_parameters={brief(list(names))} names no parameter of {type(model).__name__}: the folder "
            "belongs to another model."
        )
    return find_parameters(model, others, False, source=f"{_FILE}: "), linear


def check_rows(model: nn.Module, ranks: Mapping[str, int], stored: Mapping[str, Tensor], prefix: str) -> None:
    """Check the rank of parameters against their stored A, before memory is allocated for it.

    Args:
        model: the bare model.
        ranks: the rank of each parameter by its full name, in the model's order.
        stored: the tensors of the folder.
        prefix: what peft begins their names with.

    Raises:
        LitPeftError: an A has more or fewer rows than the experts need.
    """
    for wrapper, name in _wrappers(ranks).items():
        key = f"{wrapper}.lora_A.weight"
        tensor, count = stored.get(f"{prefix}{key}"), math.prod(weight_named(model, name).shape[:-2])
        if tensor is not None and tensor.dim() and len(tensor) != count * ranks[name]:
            raise LitPeftError(
                f"{_FILE}: {key} has {len(tensor)} rows, and r={ranks[name]} needs {count * ranks[name]} for the "
                f"{count} experts in {name} of this model: the folder is incomplete, or belongs to another model."
            )


def _wrappers(paths: Iterable[str]) -> dict[str, str]:
    """Return paths of parameters, or of their layers, by peft's name of their wrapper."""
    by_module: dict[str, list[str]] = {}
    for path in paths:
        by_module.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        module + ".base_layer" * (len(own) - 1 - index): path
        for module, own in by_module.items()
        for index, path in enumerate(own)
    }


def from_peft(attachment: Attachment, stored: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return the stored A and B of parameters in the shapes of our layers, by their names in the file.

    Args:
        attachment: the attached LoRA.
        stored: the tensors of the folder, by their names without peft's prefix.
        folder: the folder, for messages.

    Raises:
        LitPeftError: a tensor does not have the shape that its layer needs.
    """
    found: dict[str, Tensor] = {}
    for name, layer in expert_layers(attachment).items():
        for factor, needed in zip("AB", as_peft(layer), strict=True):
            key = f"{name}.lora_{factor}.weight"
            tensor = stored.get(key)
            if tensor is None:
                continue
            if tensor.shape != needed.shape:
                raise LitPeftError(
                    f"{folder}: {key} has shape {tuple(tensor.shape)}, and the {layer.parameter_name} of this model "
                    f"needs {tuple(needed.shape)}."
                )
            if layer.stack and factor == "A":
                tensor = tensor.unflatten(0, (layer.stack[0], -1))
            elif layer.stack:
                tensor = tensor.unflatten(1, (-1, layer.stack[0])).permute(2, 0, 1)
            found[key] = tensor
    return found
