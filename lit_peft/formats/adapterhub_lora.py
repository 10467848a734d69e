"""LoRA in AdapterHub's format.

Its configuration names the matrices to adapt (q, k, v, and the first and last of the FFN), and one rank and scale for
all of them. The tensors are named `….loras.NAME.lora_A` and `.lora_B`. A fused q, k, v projection has one update for
each of its matrices.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment
from lit_peft.methods.lora import LoRASettings
from lit_peft.methods.targets import is_linear
from lit_peft.models.architectures import has_module, layer_stacks
from lit_peft.nn.linear import linear_features
from lit_peft.nn.lora import LoRALayer, LoRALinear
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief, check_types

# The keys that are read, or that follow from the stored tensors.
_READ = {
    "alpha",
    "architecture",
    "attn_matrices",
    "composition_mode",
    "dropout",
    "dtype",
    "init_weights",
    "init_weights_seed",
    "intermediate_lora",
    "leave_out",
    "output_lora",
    "r",
    "selfattn_lora",
}


class _ConfigTypes:
    """The types of the values that are read."""

    alpha: float
    attn_matrices: list[str]
    dropout: float
    r: int


# Which matrix a linear layer is, by the end of its name.
_MATRICES = {
    **dict.fromkeys(("q_proj", "query", "query_proj", "q_lin", "q"), "q"),
    **dict.fromkeys(("k_proj", "key", "key_proj", "k_lin", "k"), "k"),
    **dict.fromkeys(("v_proj", "value", "value_proj", "v_lin", "v"), "v"),
    **dict.fromkeys(("c_attn", "Wqkv"), "qkv"),
    **dict.fromkeys(("up_proj", "wi", "wi_1", "c_fc", "fc_in", "fc1", "lin1", "intermediate.dense", "Wi"), "first"),
    **dict.fromkeys(("down_proj", "wo", "c_proj", "fc_out", "fc2", "lin2", "output.dense", "Wo"), "last"),
}
# Models in which AdapterHub takes the FFN's last matrix for its first, and the other way round.
_SWAPPED = {"llama", "mistral"}


def settings(
    config: dict[str, Any], stored: dict[str, Tensor], model: nn.Module, folder: Path
) -> tuple[LoRASettings, dict[str, Tensor]]:
    """Return the settings of an AdapterHub folder, and its tensors in the shapes that our layers have.

    The updates of rank r of n fused matrices become one update of rank n · r, whose B is zero outside their blocks.

    Args:
        config: the content of `adapter_config.json`.
        stored: the folder's tensors.
        model: the bare model.
        folder: the folder, for error messages.

    Raises:
        LitPeftError: a value is not supported, or a tensor does not fit the model.
    """
    values, file = config["config"], f"{folder}/adapter_config.json"
    check_types(_ConfigTypes, values, f"{file}: ")
    unsupported = sorted(key for key, value in values.items() if key not in _READ and value)
    if values.get("composition_mode", "add") != "add":
        unsupported = unsupported or [f"composition_mode={brief(values['composition_mode'])}"]
    if unsupported:
        raise LitPeftError(
            f"{file} sets {', '.join(unsupported)}, which changes the model's output and is not supported."
        )
    r, alpha = values.get("r", 8), float(values.get("alpha", 8))
    version = re.match(r"adapters\.(\d{1,9})\.(\d{1,9})", str(config.get("version", "")))
    if version and (int(version[1]), int(version[2])) < (1, 1):
        # AdapterHub before 1.1 did not scale its updates.
        alpha = r
    matrices = values.get("attn_matrices", ["q", "v"])
    fused = [index for index, letter in enumerate("qkv") if letter in matrices]
    prefix, end = getattr(model, "base_model_prefix", "") + ".", f".loras.{config.get('name') or ''}.lora_A"
    ranks: dict[str, int] = {}
    tensors = dict(stored)
    for key in [key for key in stored if key.endswith(end)]:
        name = key.removesuffix(end)
        path = next((p for p in (name, prefix + name, name.removeprefix(prefix)) if has_module(model, p)), None)
        key_b = key.removesuffix("A") + "B"
        a, b = stored[key], stored.get(key_b)
        has_matrices = a.dim() == 2 and a.numel() and b is not None and b.dim() == 2
        if path is None or not is_linear(model.get_submodule(path)) or b is None or not has_matrices:
            raise LitPeftError(
                f"{folder} does not fit this model: there is no linear layer for {brief(key)}, or no lora_B beside it."
            )
        ranks[path], (d_in, d_out) = len(a), linear_features(model.get_submodule(path))
        if a.shape[1] != d_in:
            raise LitPeftError(
                f"{folder} does not fit this model: {brief(key)} has shape {tuple(a.shape)}, and its layer has {d_in} "
                "inputs."
            )
        if b.shape[0] != d_out or ranks[path] != r:
            fused_b = _fuse_blocks(b, ranks[path], r, fused)
            if fused_b is None:
                raise LitPeftError(
                    f"{folder} does not fit this model: {brief(key)} has rank {ranks[path]}, which does not follow "
                    f"from r={r} and attn_matrices={brief(matrices)}."
                )
            tensors[key_b] = fused_b
    patterns = {re.escape(path): rank for path, rank in ranks.items() if rank != r}
    return LoRASettings(
        r=r,
        lora_alpha=alpha,
        lora_dropout=values.get("dropout", 0.0),
        target_modules=sorted(ranks),
        rank_pattern=patterns,
        alpha_pattern={path: alpha * rank / r for path, rank in patterns.items()},
    ), tensors


def _fuse_blocks(b: Tensor, rank: int, r: int, fused: list[int]) -> Tensor | None:
    """Build B of a whole fused projection, [3 · d, rank], from the blocks [d, r] of its adapted matrices.

    Args:
        b: the blocks, one below the other.
        rank: the rank of A, which has the rows of all blocks.
        r: the rank of one block.
        fused: which of q, k and v (0, 1, 2) are adapted.

    Returns:
        B, or None if the sizes do not match.
    """
    if not fused or rank != len(fused) * r or len(b) % len(fused) or b.shape[1] != r:
        return None
    blocks = b.unflatten(0, (len(fused), -1))
    whole = b.new_zeros(3, blocks.shape[1], rank)
    for index, (matrix, block) in enumerate(zip(fused, blocks, strict=True)):
        whole[matrix, :, index * r : (index + 1) * r] = block
    return whole.flatten(0, 1)


def attached_tensors(attachment: Attachment, name: str) -> dict[str, Tensor]:
    """Return the tensors of the attached layers by AdapterHub's names, in the shapes that our layers have."""
    found: dict[str, Tensor] = {}
    for path, layer in attachment.adapted.items():
        if isinstance(layer, LoRALayer):
            found[f"{path}.loras.{name}.lora_A"] = layer.lora_A
            found[f"{path}.loras.{name}.lora_B"] = layer.lora_B
    return found


def config_and_tensors(attachment: Attachment, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return AdapterHub's configuration of an attached LoRA, and its tensors by AdapterHub's names.

    Smaller ranks are padded with zeros, and different scales are multiplied into B; the updates do not change.

    Raises:
        LitPeftError: AdapterHub's format does not support the LoRA.
    """
    model, settings = attachment.model, attachment.settings
    assert isinstance(settings, LoRASettings)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    layers = {path: layer for path, layer in attachment.adapted.items() if isinstance(layer, LoRALinear)}
    matrices = _matrices(model)
    unsupported = [
        *(path for path in attachment.adapted if path not in matrices or path not in layers),
        *(path for path in attachment.trained if path.startswith(prefix)),
        *("use_dora=True" for _ in range(settings.use_dora)),
        *("lora_bias=True" for _ in range(settings.lora_bias)),
        *("alora_invocation_tokens" for _ in settings.alora_invocation_tokens or ()),
    ]
    used_layers = {matrices[path][1] for path in layers if path in matrices}
    used = {matrices[path][0] for path in layers if path in matrices}
    unsupported += [
        f"a layer with no LoRA at {path}"
        for path, (matrix, layer_index) in matrices.items()
        if matrix in used and layer_index in used_layers and path not in layers
    ]
    if unsupported:
        raise LitPeftError(
            f"AdapterHub's format has no place for {unsupported[0]}: it adapts q, k, v and the FFN's first and last "
            "matrix, the same ones in every layer. Use format='peft'."
        )
    if any(layer.original_weight is not None for layer in layers.values()):
        raise LitPeftError(
            f"init_lora_weights={settings.init_lora_weights!r} changed the base weights: use format='peft', which "
            "saves the update of the original weights."
        )
    rank, scales = max(layer.r for layer in layers.values()), {layer.scaling for layer in layers.values()}
    alpha = rank * ((scales.pop() if len(scales) == 1 else 0.0) or 1.0)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        a, b = layer.lora_A.detach(), layer.lora_B.detach() * (layer.scaling * rank / alpha)
        a = torch.cat([a, a.new_zeros(rank - layer.r, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - layer.r)], 1)
        # The three matrices of a fused projection share one A here; AdapterHub has one for each.
        tensors[f"{path}.loras.{name}.lora_A"] = a.repeat(3, 1) if matrices[path][0] == "qkv" else a
        tensors[f"{path}.loras.{name}.lora_B"] = b
    return {
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "architecture": "lora",
        "attn_matrices": [letter for letter in "qkv" if any(letter in matrix for matrix in used)],
        "composition_mode": "add",
        "dropout": settings.lora_dropout,
        "init_weights": "lora",
        "intermediate_lora": "first" in used,
        "leave_out": sorted({layer_index for _, layer_index in matrices.values()} - used_layers),
        "output_lora": "last" in used,
        "r": rank,
        "selfattn_lora": bool(used - {"first", "last"}),
        "use_gating": False,
    }, tensors


def _matrices(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Return the linear layers that AdapterHub can adapt, by path: which matrix each is, and its layer's number."""
    is_swapped = getattr(getattr(model, "config", None), "model_type", None) in _SWAPPED
    swapped = {"first": "last", "last": "first"} if is_swapped else {}
    found: dict[str, tuple[str, int]] = {}
    for layer_index, layer in enumerate(layer for stack in layer_stacks(model) for layer in stack):
        architecture = layer.architecture
        names = [*architecture.qkv_linears, *architecture.ffn_linears]
        if architecture.cross_attention is not None:
            names += [f"{architecture.cross_attention}.{name.rpartition('.')[2]}" for name in architecture.qkv_linears]
        for name in names:
            matrix = next((m for end, m in _MATRICES.items() if f".{name}".endswith(f".{end}")), None)
            if matrix is not None and has_module(layer.module, name):
                found[f"{layer.path}.{name}"] = (swapped.get(matrix, matrix), layer_index)
    return found
