"""LoRA on convolutions and on `nn.MultiheadAttention` in peft's format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_peft.methods.attachment import Attachment, base_name
from lit_peft.nn.lora_attention import ProjectionLoRA
from lit_peft.nn.lora_conv import LoRAConv
from lit_peft.nn.lora_tied import TiedLoRALinear
from lit_peft.util.errors import LitPeftError
from lit_peft.util.expressions import Expressions

# How often peft (0.21) adds the update of an attention's output projection to the weight.
_TIMES_ADDED = 2
# The names of embeddings and heads that peft ties.
_TIED_IN_PEFT = ("embed_tokens", "lm_head")


def attentions(attachment: Attachment) -> list[str]:
    """Return the paths of the adapted `nn.MultiheadAttention`."""
    layers = attachment.adapted.items()
    return sorted({path.rpartition(".")[0] for path, layer in layers if isinstance(layer, ProjectionLoRA)})


def projection_tensors(attachment: Attachment, as_peft: bool = True) -> dict[str, Tensor]:
    """Return A and B of the projections of attentions by peft's names, with peft's values or our own.

    peft's wrapper of the attention has those of the input, and a wrapper inside of it those of the output.
    """
    # peft adds the update of the output projection twice, so its B is half of ours.
    found: dict[str, Tensor] = {}
    for path, layer in attachment.adapted.items():
        if isinstance(layer, ProjectionLoRA):
            attention = path.rpartition(".")[0]
            wrapper = f"{attention}.base_layer.{layer.owner}" if layer.owner else attention
            found[f"{wrapper}.lora_A.weight"] = layer.lora_A
            found[f"{wrapper}.lora_B.weight"] = layer.lora_B / _TIMES_ADDED if layer.owner and as_peft else layer.lora_B
    return found


def conv_as_peft(path: str, layer: LoRAConv, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a convolution's LoRA in the shapes that peft stores.

    Args:
        path: the path of the layer.
        layer: the layer.
        tensors: the tensors of the adapter by peft's names, those of this layer as matrices and vectors.
    """
    found: dict[str, Tensor] = {}
    width = (1,) * (layer.weight.dim() - 2)
    for name, tensor in tensors.items():
        if name == f"{path}.lora_A.weight":
            found[name] = tensor.view(len(tensor), -1, *layer.weight.shape[2:])
        elif name == f"{path}.lora_B.weight":
            found[name] = tensor.reshape(*tensor.shape, *width)
        elif name == f"{path}.lora_magnitude_vector":
            found[name] = tensor.view(1, -1, *width)
    return found


def layers_from_peft(attachment: Attachment, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a folder's tensors as our layers of these kinds have them: matrices and vectors for convolutions.

    Args:
        attachment: the attached LoRA.
        stored: the tensors by their names without peft's prefix and the names of its wrappers.
    """
    found = dict(stored)
    for path, layer in attachment.adapted.items():
        if isinstance(layer, ProjectionLoRA) and layer.owner:
            name = f"{path.rpartition('.')[0]}.{layer.owner}.lora_B.weight"
            if name in stored:
                found[name] = stored[name] * _TIMES_ADDED
        if not isinstance(layer, LoRAConv):
            continue
        for factor, like in (("lora_A.weight", layer.lora_A), ("lora_B.weight", layer.lora_B)):
            tensor = stored.get(f"{path}.{factor}")
            # A tensor of another shape stays as it is, and is refused with its name.
            if tensor is not None and tensor.dim() == layer.weight.dim() and tensor.numel() == like.numel():
                found[f"{path}.{factor}"] = tensor.flatten(1)
        magnitude = stored.get(f"{path}.lora_magnitude_vector")
        if magnitude is not None:
            found[f"{path}.lora_magnitude_vector"] = magnitude.flatten()
    return found


def tied_tensors(attachment: Attachment) -> dict[str, Tensor]:
    """Return A and B of heads that share those of an embedding, by peft's names: peft stores both."""
    found: dict[str, Tensor] = {}
    for path, layer in attachment.adapted.items():
        if isinstance(layer, TiedLoRALinear):
            found[f"{path}.lora_A.weight"], found[f"{path}.lora_B.weight"] = layer.lora_A, layer.lora_B
    return found


def check_tied(attachment: Attachment, stored: Mapping[str, Tensor], folder: Path) -> None:
    """Check that what a folder has for a head is what it has for the embedding.

    Raises:
        LitPeftError: it differs.
    """
    for name, own in tied_tensors(attachment).items():
        other, mine = stored.get(name), own.detach().cpu()
        if other is not None and (other.shape != mine.shape or not torch.allclose(mine, other.to(mine.dtype))):
            raise LitPeftError(
                f"{folder}: {name} differs from the tensor of the embedding, and ensure_weight_tying=True says that "
                "they are one: set it to false in adapter_config.json."
            )


def tied_heads_of(attachment: Attachment) -> dict[str, str]:
    """Return the paths of heads that share the update of an embedding, with that of the embedding."""
    layers = attachment.adapted.items()
    return {
        path: next(other for other, each in layers if each is layer.source)
        for path, layer in layers
        if isinstance(layer, TiedLoRALinear)
    }


def tied_modules(attachment: Attachment) -> list[str]:
    """Return the paths of the modules that share a trained copy of a weight."""
    uses = Counter(id(parameter) for parameter in attachment.saved.values())
    shared = (path for path, parameter in attachment.saved.items() if uses[id(parameter)] > 1)
    return [base_name(path).rpartition(".")[0] for path in shared]


def ties_in_peft(config: Mapping[str, Any]) -> bool:
    """Return whether peft ties an embedding and its head with `ensure_weight_tying`: it knows them by two names."""
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        expressions = Expressions("target_modules")
        if any(expressions.fullmatch(targets, name) for name in _TIED_IN_PEFT):
            return True
        targets = []
    names = [*targets, *(config.get("modules_to_save") or ())]
    return any(str(name).rpartition(".")[2] in _TIED_IN_PEFT for name in names)


def holds_tying(attachment: Attachment) -> bool:
    """Return whether peft would tie what an attachment ties, given the folder that we write."""
    if not attachment.ties:
        return True
    heads = tied_heads_of(attachment)
    names = [*heads, *heads.values(), *tied_modules(attachment)]
    return not names or ties_in_peft({"target_modules": names})
