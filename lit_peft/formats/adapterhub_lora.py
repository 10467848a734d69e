"""LoRA in AdapterHub's format.

Its configuration names kinds of matrices (`q`, `k`, `v`, the FFN's first and last), one rank and one scale for all; the
tensors stand at `….loras.NAME.lora_A` and `.lora_B`. A fused q, k, v projection has an update of its own for each.
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
from lit_peft.nn.lora import LoRALinear
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief, check_types

# What a configuration may say; the stored tensors tell which modules it adapts.
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


class _Values:
    """The kinds of the values that are read."""

    alpha: float
    attn_matrices: list[str]
    dropout: float
    r: int


# The kind of a matrix by the end of its name.
_KINDS = {
    **dict.fromkeys(("q_proj", "query", "query_proj", "q_lin", "q"), "q"),
    **dict.fromkeys(("k_proj", "key", "key_proj", "k_lin", "k"), "k"),
    **dict.fromkeys(("v_proj", "value", "value_proj", "v_lin", "v"), "v"),
    **dict.fromkeys(("c_attn", "Wqkv"), "qkv"),
    **dict.fromkeys(("up_proj", "wi", "wi_1", "c_fc", "fc_in", "fc1", "lin1", "intermediate.dense", "Wi"), "first"),
    **dict.fromkeys(("down_proj", "wo", "c_proj", "fc_out", "fc2", "lin2", "output.dense", "Wo"), "last"),
}
# AdapterHub takes the FFN's last matrix for its first here, and the other way round.
_SWAPPED = {"llama", "mistral"}


def settings(
    config: dict[str, Any], stored: dict[str, Tensor], model: nn.Module, folder: Path
) -> tuple[LoRASettings, dict[str, Tensor]]:
    """The settings in an AdapterHub folder, and its tensors as our layers have them.

    An update of rank r for each of n fused matrices becomes one of rank n · r, its B zero outside the blocks.

    Raises:
        LitPeftError: it sets something that cannot be read, or a tensor has no place in the model.
    """
    values, where = config["config"], f"{folder}/adapter_config.json"
    check_types(_Values, values, f"{where}: ")
    active = sorted(key for key, value in values.items() if key not in _READ and value)
    if active or values.get("composition_mode", "add") != "add":
        named = ", ".join(active) or f"composition_mode={brief(values['composition_mode'])}"
        raise LitPeftError(f"{where} sets {named}, which would change the result and cannot be read.")
    r, alpha = values.get("r", 8), float(values.get("alpha", 8))
    version = re.match(r"adapters\.(\d{1,9})\.(\d{1,9})", str(config.get("version", "")))
    if version and (int(version[1]), int(version[2])) < (1, 1):
        # AdapterHub before 1.1 did not scale its updates.
        alpha = r
    matrices = values.get("attn_matrices", ["q", "v"])
    fused = [place for place, name in enumerate("qkv") if name in matrices]
    prefix, end = getattr(model, "base_model_prefix", "") + ".", f".loras.{config.get('name') or ''}.lora_A"
    ranks: dict[str, int] = {}
    tensors = dict(stored)
    for key in [key for key in stored if key.endswith(end)]:
        found = key.removesuffix(end)
        path = next((p for p in (found, prefix + found, found.removeprefix(prefix)) if has_module(model, p)), None)
        a, b = stored[key], stored.get(key.removesuffix("A") + "B")
        whole = a.dim() == 2 and a.numel() and b is not None and b.dim() == 2
        if path is None or not is_linear(model.get_submodule(path)) or b is None or not whole:
            raise LitPeftError(
                f"{folder} does not fit this model: {brief(key)} has no place in it, or no lora_B beside it."
            )
        ranks[path], d_out = len(a), linear_features(model.get_submodule(path))[1]
        if b.shape[0] != d_out or ranks[path] != r:
            spread = _spread(b, ranks[path], r, fused)
            if spread is None:
                raise LitPeftError(
                    f"{folder} does not fit this model: {brief(key)} has rank {ranks[path]}, and r={r} for "
                    f"attn_matrices={brief(matrices)}."
                )
            tensors[key.removesuffix("A") + "B"] = spread
    patterns = {re.escape(path): rank for path, rank in ranks.items() if rank != r}
    return LoRASettings(
        r=r,
        lora_alpha=alpha,
        lora_dropout=values.get("dropout", 0.0),
        target_modules=sorted(ranks),
        rank_pattern=patterns,
        alpha_pattern={path: alpha * rank / r for path, rank in patterns.items()},
    ), tensors


def _spread(b: Tensor, rank: int, r: int, fused: list[int]) -> Tensor | None:
    """B of a whole fused projection, [3 · d, rank], out of the blocks [d, r] of those of its matrices it adapts.

    Args:
        b: the blocks, one below the other.
        rank: of A, which is that of all blocks together.
        r: rank of one block.
        fused: which of q, k and v (0, 1, 2) are adapted.

    Returns:
        None if the sizes do not go together.
    """
    if not fused or rank != len(fused) * r or len(b) % len(fused) or b.shape[1] != r:
        return None
    blocks = b.unflatten(0, (len(fused), -1))
    whole = b.new_zeros(3, blocks.shape[1], rank)
    for number, (matrix, block) in enumerate(zip(fused, blocks, strict=True)):
        whole[matrix, :, number * r : (number + 1) * r] = block
    return whole.flatten(0, 1)


def written(attachment: Attachment, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """AdapterHub's configuration of an attached LoRA, and its tensors by AdapterHub's names.

    Smaller ranks are filled up with zeros, and scales that differ go into B: the updates are the same.

    Raises:
        LitPeftError: AdapterHub has no place for it.
    """
    model, settings = attachment.model, attachment.settings
    assert isinstance(settings, LoRASettings)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    layers = {path: layer for path, layer in attachment.adapted.items() if isinstance(layer, LoRALinear)}
    places = _places(model)
    beyond = [
        *(path for path in attachment.adapted if path not in places or path not in layers),
        *(path for path in attachment.trained if path.startswith(prefix)),
        *("use_dora=True" for _ in range(settings.use_dora)),
    ]
    used = {places[path][1] for path in layers if path in places}
    kinds = {places[path][0] for path in layers if path in places}
    beyond += [
        f"a layer with no LoRA at {path}"
        for path, (kind, number) in places.items()
        if kind in kinds and number in used and path not in layers
    ]
    if beyond:
        raise LitPeftError(
            f"AdapterHub's format has no place for {beyond[0]}: it adapts q, k, v and the FFN's first and last matrix, "
            "the same ones in every layer. Use format='peft'."
        )
    if any(layer.original_weight is not None for layer in layers.values()):
        raise LitPeftError(
            f"init_lora_weights={settings.init_lora_weights!r} changed the base weights: use format='peft', which "
            "writes the update of the original ones."
        )
    rank, scales = max(layer.r for layer in layers.values()), {layer.scaling for layer in layers.values()}
    alpha = rank * ((scales.pop() if len(scales) == 1 else 0.0) or 1.0)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        a, b = layer.lora_A.detach(), layer.lora_B.detach() * (layer.scaling * rank / alpha)
        a = torch.cat([a, a.new_zeros(rank - layer.r, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - layer.r)], 1)
        # One A serves all three matrices of a fused projection.
        tensors[f"{path}.loras.{name}.lora_A"] = a.repeat(3, 1) if places[path][0] == "qkv" else a
        tensors[f"{path}.loras.{name}.lora_B"] = b
    return {
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "architecture": "lora",
        "attn_matrices": [letter for letter in "qkv" if any(letter in kind for kind in kinds)],
        "composition_mode": "add",
        "dropout": settings.lora_dropout,
        "init_weights": "lora",
        "intermediate_lora": "first" in kinds,
        "leave_out": sorted({number for _, number in places.values()} - used),
        "output_lora": "last" in kinds,
        "r": rank,
        "selfattn_lora": bool(kinds - {"first", "last"}),
        "use_gating": False,
    }, tensors


def _places(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Kind and layer number of each module that AdapterHub can adapt."""
    swapped = getattr(getattr(model, "config", None), "model_type", None) in _SWAPPED
    other = {"first": "last", "last": "first"} if swapped else {}
    places: dict[str, tuple[str, int]] = {}
    for number, layer in enumerate(layer for stack in layer_stacks(model) for layer in stack):
        kind = layer.architecture
        names = [*kind.qkv_linears, *kind.ffn_linears]
        if kind.cross_attention is not None:
            names += [f"{kind.cross_attention}.{name.rpartition('.')[2]}" for name in kind.qkv_linears]
        for name in names:
            found = next((k for end, k in _KINDS.items() if f".{name}".endswith(f".{end}")), None)
            if found is not None and has_module(layer.module, name):
                places[f"{layer.path}.{name}"] = (other.get(found, found), number)
    return places
