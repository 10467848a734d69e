"""Bottleneck adapters (AdapterH, AdapterP, Parallel) in AdapterHub's format.

AdapterHub names a tensor by the module that the adapter belongs to, `….adapters.NAME.`, and its part of the bottleneck.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lit_peft.methods.adapter_h import AdapterHSettings
from lit_peft.methods.adapter_p import AdapterPSettings
from lit_peft.methods.attachment import Attachment
from lit_peft.methods.bottleneck import BottleneckSettings, roles
from lit_peft.methods.parallel import ParallelSettings
from lit_peft.models.architectures import layer_stacks
from lit_peft.nn.bottleneck import Bottleneck
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

# Where AdapterHub keeps a layer's adapters if the table of architectures names no other module.
_MODULES = {
    "attention_adapter": "attention_adapters",
    "cross_adapter": "cross_attention_adapters",
    "ffn_adapter": "output_adapters",
}
# AdapterHub's defaults for the keys that its configuration may leave out.
_DEFAULTS: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "init_weights": "bert",
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "residual_before_ln": True,
    "scaling": 1.0,
    "use_gating": False,
}
_READ = {*_DEFAULTS, "reduction_factor", "non_linearity"}
# These have no effect without PHM layers, or only matter during training.
_NEUTRAL = {
    "architecture",
    "factorized_phm_W",
    "factorized_phm_rule",
    "hypercomplex_nonlinearity",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "is_parallel",
    "learn_phm",
    "phm_bias",
    "phm_c_init",
    "phm_dim",
    "phm_init_range",
    "phm_rank",
    "shared_W_phm",
    "shared_phm_rule",
}
# A folder may give the name of one of AdapterHub's configurations, present or former, in place of its values.
_NAMED: dict[str, dict[str, Any]] = {
    "double_seq_bn": {"mh_adapter": True, "non_linearity": "swish", "reduction_factor": 16},
    "seq_bn": {"original_ln_before": True, "non_linearity": "relu", "reduction_factor": 16},
    "par_bn": {"is_parallel": True, "non_linearity": "relu", "reduction_factor": 2, "scaling": 4.0},
}
_NAMED.update(houlsby=_NAMED["double_seq_bn"], pfeiffer=_NAMED["seq_bn"], parallel=_NAMED["par_bn"])


def settings(config: Any, folder: Path) -> BottleneckSettings:
    """Return our settings for AdapterHub's configuration.

    Args:
        config: the configuration: its values, or the name of one of AdapterHub's own.
        folder: the adapter's folder, for error messages.

    Raises:
        LitPeftError: a value is missing, or one is set that is not supported.
    """
    file = f"{folder}/adapter_config.json"
    if isinstance(config, str):
        if config not in _NAMED:
            raise LitPeftError(f"{file} names the configuration {brief(config)}, which is not supported.")
        config = _NAMED[config]
    if not isinstance(config, dict):
        raise LitPeftError(f"{file} has the configuration {brief(config)}: give a folder that AdapterHub saved.")
    if config.get("architecture") is not None:
        raise LitPeftError(
            f"{file} has architecture={brief(config['architecture'])}: only bottleneck adapters, LoRA and prefixes are "
            "supported."
        )
    unsupported = sorted(key for key, value in config.items() if key not in _READ | _NEUTRAL and value)
    if unsupported:
        raise LitPeftError(
            f"{file} sets {', '.join(unsupported)}, which changes the model's output and is not supported."
        )
    missing = sorted({"reduction_factor", "non_linearity"} - set(config))
    if missing:
        raise LitPeftError(f"{file} does not set {', '.join(missing)}: give a folder that AdapterHub saved.")
    values = {**_DEFAULTS, **{key: config[key] for key in _READ if config.get(key) is not None}}
    if config.get("is_parallel"):
        return ParallelSettings(**values)
    return (AdapterHSettings if values["mh_adapter"] and values["output_adapter"] else AdapterPSettings)(**values)


def unsupported_settings(settings: BottleneckSettings) -> list[str]:
    """Return the settings that AdapterHub's configuration has no key for, each as `name=value`."""
    return [
        f"{name}={value!r}"
        for name, value, supported in (
            ("placement", settings.placement, "paper"),
            ("bias", settings.value("bias"), True),
            ("train_layer_norms", getattr(settings, "train_layer_norms", False), False),
        )
        if value != supported
    ]


def config(settings: BottleneckSettings, width: int | None) -> dict[str, Any]:
    """Return AdapterHub's configuration for our settings and a model of hidden size `width`."""
    factor = settings.value("reduction_factor")
    if settings.bottleneck_size is not None:
        # Slightly too large, so that the width divided by it, rounded down, is the bottleneck's size again.
        factor = (width or 0) / (settings.bottleneck_size + 1e-6)
    return {
        **{key: getattr(settings, key) for key in _DEFAULTS},
        "is_parallel": settings.is_parallel,
        "leave_out": list(settings.leave_out),
        "non_linearity": settings.value("non_linearity"),
        "reduction_factor": factor,
        "scaling": settings.value("scaling"),
    }


def tensors(attachment: Attachment, name: str) -> dict[str, Tensor]:
    """Return the tensors of the attached adapters by AdapterHub's names for them.

    Args:
        attachment: a model with bottleneck adapters attached.
        name: the adapter's name.
    """
    settings = attachment.settings
    assert isinstance(settings, BottleneckSettings)
    modules: dict[str, str] = {}
    if settings.placement == "paper":
        for layer in (layer for stack in layer_stacks(attachment.model) for layer in stack):
            for role, _, sublayer in roles(layer, settings):
                if sublayer is not None:
                    modules[f"{layer.path}.{role}"] = f"{layer.path}.{sublayer.adapterhub or _MODULES[role]}"
    return {
        f"{modules.get(path, path)}.adapters.{name}.{adapterhub_name}": tensor
        for path, adapter in attachment.adapted.items()
        if isinstance(adapter, Bottleneck)
        for own_name, tensor in adapter.named_parameters()
        for adapterhub_name in _adapterhub_names(own_name, adapter)
    }


def _adapterhub_names(name: str, adapter: Bottleneck) -> list[str]:
    """Return AdapterHub's names for a bottleneck's tensor: `adapter_down` is a sequence that may start with a norm."""
    part, _, parameter = name.partition(".")
    if part == "down":
        return [f"adapter_down.{0 if adapter.norm_before is None else 1}.{parameter}"]
    if part == "norm_before":
        return [f"adapter_norm_before.{parameter}", f"adapter_down.0.{parameter}"]
    return [f"adapter_{name}" if part in ("up", "norm_after") else name]
