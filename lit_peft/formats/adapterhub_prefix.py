"""Prefix Tuning and P-Tuning v2 in AdapterHub's format.

AdapterHub keeps the prefixes in a pool, `….prefix_tunings.NAME.ROLE_prefix.`, which all attention layers share, and
saves it again under the name of each layer. A prefix without an MLP ("flat") is one vector, `control_trans`, with the
values of our table in the same order.
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
# Models in which the role of the self-attention's prefix is called `self` rather than `self_prefix`.
_SELF = {"distilbert"}
_READ = {"cross_prefix", "dropout", "encoder_prefix", "leave_out", "non_linearity"}
_NEUTRAL = {"architecture", "bottleneck_size", "flat", "init_weights_seed", "prefix_length", "shared_gating"}
_PARTS = {"wte.weight": "embedding", "control_trans.0": "down", "control_trans.2": "up"}


def settings(values: dict[str, Any], folder: Path) -> PrefixSettings:
    """Return our settings for AdapterHub's configuration.

    Args:
        values: the configuration.
        folder: the adapter's folder, for error messages.

    Raises:
        LitPeftError: a value is set that is not supported, or a size is not a number.
    """
    file = f"{folder}/adapter_config.json"
    unsupported = sorted(key for key, value in values.items() if key not in _READ | _NEUTRAL and value)
    if unsupported:
        raise LitPeftError(
            f"{file} sets {', '.join(unsupported)}, which changes the model's output and is not supported."
        )
    num_tokens, size = values.get("prefix_length"), values.get("bottleneck_size", 512)
    if not isinstance(num_tokens, int) or not isinstance(size, int):
        raise LitPeftError(
            f"{file} has prefix_length={brief(num_tokens)} and bottleneck_size={brief(size)}, which must be whole "
            "numbers: give a folder that AdapterHub saved."
        )
    flat = bool(values.get("flat", False))
    # Without an MLP there is no activation.
    keys = _READ - {"non_linearity"} if flat else _READ
    return (PTuningV2Settings if flat else PrefixTuningSettings)(
        num_virtual_tokens=num_tokens,
        prefix_projection=not flat,
        prefix_projection_size=None if flat else size,
        positions="adapterhub",
        **{key: values[key] for key in keys if values.get(key) is not None},
    )


def unsupported_settings(settings: PrefixSettings, attachment: Attachment) -> list[str]:
    """Return the settings that AdapterHub's configuration has no key for, each as `name=value`."""
    found = [] if settings.positions == "adapterhub" else [f"positions={settings.positions!r}"]
    has_shared_keys = any(getattr(module, "num_key_value_groups", 1) > 1 for module in attachment.model.modules())
    return found + (["per_query_head=True"] if has_shared_keys and settings.per_query_head else [])


def sizes_match(attachment: Attachment, stored: dict[str, Tensor]) -> bool:
    """Return whether a folder's prefixes have as many values as the attached ones."""
    sizes = {name: tensor.numel() for name, tensor in by_role(stored).items()}
    attached = tensors_by_role(attachment)
    return all(sizes.get(name, tensor.numel()) == tensor.numel() for name, tensor in attached.items())


def config(settings: PrefixSettings, attachment: Attachment) -> dict[str, Any]:
    """Return AdapterHub's configuration of an attached prefix."""
    prefix = next(iter(_prefixes_by_role(attachment).values()))
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


def tensors(model: nn.Module, attachment: Attachment, name: str) -> dict[str, Tensor]:
    """Return the tensors of the attached prefixes by all names that AdapterHub has for them.

    Args:
        model: the model.
        attachment: its attachment.
        name: the adapter's name.
    """
    base_prefix = getattr(model, "base_model_prefix", "")
    pools = {f"{base_prefix}.prefix_tuning".lstrip(".")}
    for layer in (layer for stack in layer_stacks(model) for layer in stack):
        for attention in (layer.architecture.self_attention, layer.architecture.cross_attention):
            path = f"{layer.path}.{attention}"
            if attention is not None and has_module(model, path):
                pools.add(f"{path}.prefix_tuning.pool")
    has_short_role = getattr(getattr(model, "config", None), "model_type", None) in _SELF
    found: dict[str, Tensor] = {}
    for end, tensor in tensors_by_role(attachment).items():
        owner, role, part = re.fullmatch(r"(?:(.+)\.)?(\w+_prefix)\.(.+)", end).groups()  # type: ignore[union-attr]
        role = role.replace("self_prefix", "self") if has_short_role else role
        for pool in sorted(pools) if owner is None else [owner]:
            found[f"{pool}.prefix_tunings.{name}.{role}.{part}"] = tensor
    return found


def tensors_by_role(attachment: Attachment) -> dict[str, Tensor]:
    """Return the tensors of the attached prefixes by role and part, e.g. `self_prefix.control_trans`."""
    found: dict[str, Tensor] = {}
    for role, prefix in _prefixes_by_role(attachment).items():
        if prefix.down is None:
            found[f"{role}.control_trans"] = prefix.embedding.detach().view(-1)
            continue
        for part, attribute in _PARTS.items():
            module = getattr(prefix, attribute)
            if isinstance(module, nn.Linear):
                found[f"{role}.{part}.weight"], found[f"{role}.{part}.bias"] = module.weight, module.bias
            else:
                found[f"{role}.{part}"] = module
    return found


def by_role(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a folder's tensors by role and part; those saved for each layer are in the result once."""
    return {_role_and_part(name): tensor for name, tensor in stored.items()}


def _role_and_part(name: str) -> str:
    match = _KEY.fullmatch(name)
    if match is None:
        return name
    pool, end = match[1] or "", f"{match[2]}_prefix.{match[3]}"
    return end if not pool or pool.endswith(("prefix_tuning", "prefix_tuning.pool")) else f"{pool}.{end}"


def _prefixes_by_role(attachment: Attachment) -> dict[str, Prefix]:
    """Return the attached prefixes by role: `self_prefix`, `encoder_prefix`, `cross_prefix`.

    A model with two towers (CLIP, LLaVA) has several prefixes of one role. AdapterHub does not support such models; the
    role is then the prefix's path in the model.
    """
    prefixes = {path: module for path, module in attachment.adapted.items() if isinstance(module, Prefix)}
    roles = [path.rpartition(".")[2] for path in prefixes]
    return {
        role if roles.count(role) == 1 else path: module
        for role, (path, module) in zip(roles, prefixes.items(), strict=True)
    }
