"""Prefix Tuning and P-Tuning v2 in AdapterHub's format.

AdapterHub keeps a prefix in a pool, `….prefix_tunings.NAME.ROLE_prefix.`, which every attention layer shares and stores
again under its own name. A flat prefix is one vector, `control_trans`, in the order of our table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment
from lit_peft.methods.p_tuning_v2 import PTuningV2Settings
from lit_peft.methods.prefix import PrefixSettings
from lit_peft.methods.prefix_tuning import PrefixTuningSettings
from lit_peft.models.architectures import has_module, layer_stacks
from lit_peft.nn.prefix import Prefix
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

_KEY = re.compile(r"(?:(.*)\.)?prefix_tunings\.[^.]+\.(self|encoder|cross)(?:_prefix)?\.(.+)")
# Models whose self-attention's prefix is called `self`, not `self_prefix`.
_SELF = {"distilbert"}
_READ = {"cross_prefix", "dropout", "encoder_prefix", "leave_out", "non_linearity"}
_NEUTRAL = {"architecture", "bottleneck_size", "flat", "init_weights_seed", "prefix_length", "shared_gating"}
_PARTS = {"wte.weight": "embedding", "control_trans.0": "down", "control_trans.2": "up"}


def settings(values: dict[str, Any], folder: Path) -> PrefixSettings:
    """The settings that say what AdapterHub's configuration says.

    Raises:
        LitPeftError: it sets something that cannot be read.
    """
    where = f"{folder}/adapter_config.json"
    active = sorted(key for key, value in values.items() if key not in _READ | _NEUTRAL and value)
    if active:
        raise LitPeftError(f"{where} sets {', '.join(active)}, which would change the result and cannot be read.")
    length, size = values.get("prefix_length"), values.get("bottleneck_size", 512)
    if not isinstance(length, int) or not isinstance(size, int):
        raise LitPeftError(
            f"{where} has prefix_length={brief(length)} and bottleneck_size={brief(size)}, which are no sizes: give "
            "the folder that AdapterHub saved."
        )
    flat = bool(values.get("flat", False))
    return (PTuningV2Settings if flat else PrefixTuningSettings)(
        num_virtual_tokens=length,
        prefix_projection=not flat,
        prefix_projection_size=None if flat else size,
        positions="adapterhub",
        # A flat prefix has no MLP for the activation to be in.
        **{key: values[key] for key in _READ - ({"non_linearity"} if flat else set()) if values.get(key) is not None},
    )


def beyond(settings: PrefixSettings, attachment: Attachment) -> list[str]:
    """The settings that AdapterHub's configuration cannot say."""
    found = [] if settings.positions == "adapterhub" else [f"positions={settings.positions!r}"]
    shared = any(getattr(module, "num_key_value_groups", 1) > 1 for module in attachment.model.modules())
    return found + (["per_query_head=True"] if shared and settings.per_query_head else [])


def fits(attachment: Attachment, stored: dict[str, Tensor]) -> bool:
    """Whether a folder's prefixes are as large as the attached ones: early versions have one for each query head."""
    sizes = {name: tensor.numel() for name, tensor in plain(stored).items()}
    return all(sizes.get(name, tensor.numel()) == tensor.numel() for name, tensor in places(attachment).items())


def config(settings: PrefixSettings, attachment: Attachment) -> dict[str, Any]:
    """AdapterHub's configuration of an attached prefix."""
    (prefix, *_) = places_of(attachment).values()
    return {
        **{key: getattr(settings, key) for key in _READ},
        "architecture": "prefix_tuning",
        "bottleneck_size": 512 if prefix.down is None else prefix.down.out_features,
        "flat": prefix.down is None,
        "leave_out": list(settings.leave_out),
        "prefix_length": settings.num_virtual_tokens,
        "shared_gating": True,
        "use_gating": False,
    }


def places_of(attachment: Attachment) -> dict[str, Prefix]:
    """The attached prefixes by role: `self_prefix`, `encoder_prefix`, `cross_prefix`.

    A model of two towers (CLIP, LLaVA) has several of one role. AdapterHub has no such models; the prefixes are named
    by their whole path then.
    """
    prefixes = {path: module for path, module in attachment.adapted.items() if isinstance(module, Prefix)}
    roles = [path.rpartition(".")[2] for path in prefixes]
    return {
        role if roles.count(role) == 1 else path: module
        for role, (path, module) in zip(roles, prefixes.items(), strict=True)
    }


def places(attachment: Attachment) -> dict[str, Tensor]:
    """Each tensor of the attached prefixes by the end of AdapterHub's name, `ROLE_prefix.…`."""
    found: dict[str, Tensor] = {}
    for role, prefix in places_of(attachment).items():
        if prefix.down is None:
            found[f"{role}.control_trans"] = prefix.embedding.detach().view(-1)
            continue
        for part, own in _PARTS.items():
            module = getattr(prefix, own)
            if isinstance(module, nn.Linear):
                found[f"{role}.{part}.weight"], found[f"{role}.{part}.bias"] = module.weight, module.bias
            else:
                found[f"{role}.{part}"] = module
    return found


def plain(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A folder's tensors by the ends of their names; what the layers store again is there once."""
    return {_plain_name(name): tensor for name, tensor in stored.items()}


def _plain_name(name: str) -> str:
    match = _KEY.fullmatch(name)
    if match is None:
        return name
    pool, end = match[1] or "", f"{match[2]}_prefix.{match[3]}"
    return end if not pool or pool.endswith(("prefix_tuning", "prefix_tuning.pool")) else f"{pool}.{end}"


def tensors(model: nn.Module, attachment: Attachment, name: str) -> dict[str, Tensor]:
    """Each tensor of the attached prefixes under all of AdapterHub's names for it."""
    prefix = getattr(model, "base_model_prefix", "")
    pools = {f"{prefix}.prefix_tuning".lstrip(".")}
    for layer in (layer for stack in layer_stacks(model) for layer in stack):
        for attention in (layer.architecture.self_attention, layer.architecture.cross_attention):
            path = f"{layer.path}.{attention}"
            if attention is not None and has_module(model, path):
                pools.add(f"{path}.prefix_tuning.pool")
    plainly = getattr(getattr(model, "config", None), "model_type", None) in _SELF
    found: dict[str, Tensor] = {}
    for end, place in places(attachment).items():
        owner, role, part = re.fullmatch(r"(?:(.+)\.)?(\w+_prefix)\.(.+)", end).groups()  # type: ignore[union-attr]
        role = role.replace("self_prefix", "self") if plainly else role
        for pool in sorted(pools) if owner is None else [owner]:
            found[f"{pool}.prefix_tunings.{name}.{role}.{part}"] = place
    return found
