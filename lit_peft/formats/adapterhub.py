"""Reading and writing AdapterHub's folders: `adapter_config.json` and `adapter.safetensors` or `pytorch_adapter.bin`.

Each method has a module that maps AdapterHub's settings and tensors to ours. Settings that AdapterHub's configuration
has no key for (LLM-Adapters' placement, no biases, trained norms) are stored under a key of our own, `lit_peft`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lit_peft.formats import adapterhub_bottleneck, adapterhub_lora, adapterhub_prefix, peft_prefix
from lit_peft.formats.base_record import base_name_or_path
from lit_peft.formats.files import copy_tensors, write_json
from lit_peft.formats.untrusted import ElementLimit, check_sizes, read_tensors
from lit_peft.methods.adapter_h import AdapterHSettings
from lit_peft.methods.adapter_p import AdapterPSettings
from lit_peft.methods.attach import attach, detach
from lit_peft.methods.attachment import Attachment, MethodSettings, Model, attachment_of
from lit_peft.methods.bottleneck import BottleneckSettings
from lit_peft.methods.lora import LoRASettings
from lit_peft.methods.p_tuning_v2 import PTuningV2Settings
from lit_peft.methods.parallel import ParallelSettings
from lit_peft.methods.prefix import PrefixSettings
from lit_peft.methods.prefix_tuning import PrefixTuningSettings
from lit_peft.models.architectures import layer_stacks
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

_SETTINGS: dict[str, type[BottleneckSettings] | type[PrefixSettings]] = {
    settings.method: settings
    for settings in (AdapterHSettings, AdapterPSettings, ParallelSettings, PrefixTuningSettings, PTuningV2Settings)
}


def supports(attachment: Attachment) -> bool:
    """Return whether this is the default format: for bottlenecks, and prefixes that peft's does not support."""
    if attachment.settings.trainable_token_indices:
        return False
    if isinstance(attachment.settings, PrefixSettings):
        return peft_prefix.unsupported(attachment) is not None
    return isinstance(attachment.settings, BottleneckSettings)


def read(model: Model, folder: Path, config: dict[str, Any], with_head: bool = True) -> Model:
    """Attach the adapter in an AdapterHub folder to a bare model, and load the head that is saved beside it, if any.

    Args:
        model: the base model.
        folder: the adapter's folder; the head is `model_head.safetensors` or `pytorch_model_head.bin`.
        config: the content of its `adapter_config.json`.
        with_head: load the head; without, also leave out other modules of `modules_to_save`.

    Returns:
        The same model, with the adapter attached.

    Raises:
        LitPeftError: a file is missing, a setting is not supported, or the tensors do not fit the model. The model is
            left as it was.
    """
    stored = read_tensors(folder, "adapter.safetensors", "pytorch_adapter.bin")
    if stored is None:
        raise LitPeftError(
            f"{folder} has neither adapter.safetensors nor pytorch_adapter.bin: give a folder that AdapterHub saved."
        )
    head = read_tensors(folder, "model_head.safetensors", "pytorch_model_head.bin") or {}
    settings, stored = _read_settings(config, stored, model, folder)
    if not with_head:
        settings = dataclasses.replace(settings, modules_to_save=None)
    _check_sizes(settings, stored, model, folder)
    limit = ElementLimit(stored, f"{folder}/adapter_config.json")
    with limit:
        attach(model, settings)
    is_foreign = "lit_peft" not in config
    if (
        is_foreign
        and isinstance(settings, PrefixSettings)
        and not adapterhub_prefix.sizes_match(attachment_of(model), stored)
    ):
        # Early versions of AdapterHub have a prefix for each query head, and their configuration does not say so.
        detach(model)
        with ElementLimit(stored, limit.where):
            attach(model, dataclasses.replace(settings, per_query_head=True))
    try:
        attachment = attachment_of(model)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        if not with_head:
            head = {name: tensor for name, tensor in head.items() if name in attachment.saved}
        for name in head:
            if name not in parameters:
                raise LitPeftError(
                    f"{folder} has a head with a tensor {name!r}, which this {type(model).__name__} does not have: "
                    "load the adapter into the model class it was trained in, or delete the head's files."
                )
            if name not in attachment.saved:
                attachment.train(name)
        targets = _adapter_tensors(attachment, str(config.get("name") or ""))
        found = adapterhub_prefix.by_role(stored)
        copy_tensors(_normalize_names(targets, model), _normalize_names(found, model), folder)
        copy_tensors(dict(attachment.saved), head, folder)
    except BaseException:
        detach(model)
        raise
    return model


def write(model: nn.Module, folder: Path, name: str = "default", extended: bool = True) -> None:
    """Write the attached bottleneck adapters, prefixes or LoRA into an existing folder.

    Args:
        model: a model with AdapterH, AdapterP, Parallel, Prefix Tuning, P-Tuning v2 or LoRA attached.
        folder: an existing folder.
        name: the adapter's name.
        extended: add our settings, so that `load_adapter` reads what AdapterHub does not support.

    Raises:
        LitPeftError: AdapterHub's format does not support the method or, without `extended`, one of its settings.
    """
    attachment = attachment_of(model)
    settings = attachment.settings
    if not isinstance(settings, BottleneckSettings | PrefixSettings | LoRASettings):
        raise LitPeftError(f"{settings.method!r} cannot be written in AdapterHub's format: use format='peft'.")
    if settings.trainable_token_indices:
        raise LitPeftError("AdapterHub's format has no place for trainable_token_indices: leave format out.")
    if not re.fullmatch(r"[\w-]+", name):
        raise LitPeftError(f"name={name!r}: AdapterHub's names have only letters, digits, '_' and '-'.")
    base: Any = getattr(model, "config", None)
    width = getattr(base, "hidden_size", None)
    unsupported: list[str] = []
    if isinstance(settings, LoRASettings):
        written, tensors = adapterhub_lora.config_and_tensors(attachment, name)
    elif isinstance(settings, PrefixSettings):
        unsupported = adapterhub_prefix.unsupported_settings(settings, attachment)
        written = adapterhub_prefix.config(settings, attachment)
        tensors = adapterhub_prefix.tensors(model, attachment, name)
    else:
        unsupported = adapterhub_bottleneck.unsupported_settings(settings)
        written = adapterhub_bottleneck.config(settings, width)
        tensors = adapterhub_bottleneck.tensors(attachment, name)
    if unsupported and not extended:
        raise LitPeftError(
            f"AdapterHub's format cannot hold {', '.join(unsupported)}: leave format out to write a folder for "
            "load_adapter."
        )
    config: dict[str, Any] = {
        # AdapterHub refuses an unknown architecture; otherwise it would load half of the adapter.
        "config": {"architecture": "lit_peft"} if unsupported else written,
        "hidden_size": width,
        "model_class": type(model).__name__,
        "model_name": base_name_or_path(model),
        "model_type": getattr(base, "model_type", None),
        "name": name,
    }
    if extended:
        config["lit_peft"] = {"method": settings.method, **dataclasses.asdict(settings)}
    write_json(folder / "adapter_config.json", config)
    # Copies, because AdapterHub has two names for some tensors and safetensors does not save shared memory.
    tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    save_file(tensors, folder / "adapter.safetensors", metadata={"format": "pt"})
    if attachment.saved:
        write_json(folder / "head_config.json", {**config, "config": None, "name": None})
        head = {key: parameter.detach().clone() for key, parameter in attachment.saved.items()}
        save_file(head, folder / "model_head.safetensors", metadata={"format": "pt"})


def _read_settings(
    config: dict[str, Any], stored: dict[str, Tensor], model: nn.Module, folder: Path
) -> tuple[MethodSettings, dict[str, Tensor]]:
    """Return the settings in a folder's configuration, and its tensors in the shapes that our layers have."""
    architecture = config["config"].get("architecture") if isinstance(config["config"], dict) else None
    settings: MethodSettings
    if "lit_peft" in config:
        settings = _own_settings(config["lit_peft"], folder)
    elif architecture == "lora":
        return adapterhub_lora.settings(config, stored, model, folder)
    elif architecture == "prefix_tuning":
        settings = adapterhub_prefix.settings(config["config"], folder)
    else:
        settings = adapterhub_bottleneck.settings(config["config"], folder)
        if any("crossattention.output.adapters." in key for key in stored):
            # In BERT-like decoders, mh_adapter in AdapterHub means self-attention and cross-attention.
            settings = dataclasses.replace(settings, cross_adapter=True)
    if isinstance(settings, BottleneckSettings) and isinstance(settings.reduction_factor, dict):
        # AdapterHub ignores layers that the model does not have; our settings must not name them.
        known = {"default", *map(str, range(sum(map(len, layer_stacks(model)))))}
        factors = {name: factor for name, factor in settings.reduction_factor.items() if name in known}
        settings = dataclasses.replace(settings, reduction_factor=factors)
    return settings, stored


def _own_settings(values: Any, folder: Path) -> BottleneckSettings | PrefixSettings:
    """Return the settings that `write` stored under `lit_peft`."""
    values = dict(values) if isinstance(values, dict) else {}
    method = values.pop("method", None)
    settings_class = _SETTINGS.get(method) if isinstance(method, str) else None
    known = set() if settings_class is None else {field.name for field in dataclasses.fields(settings_class)}
    if settings_class is None or not known.issuperset(values):
        raise LitPeftError(
            f"{folder}/adapter_config.json has the method {brief(method)} with settings "
            f"{brief(sorted(set(values) - known))}, which this version of lit_peft does not know: update lit_peft."
        )
    return settings_class(**values)


def _check_sizes(settings: MethodSettings, stored: dict[str, Tensor], model: nn.Module, folder: Path) -> None:
    """Check that no setting asks for more memory than the folder's tensors take."""
    sizes: dict[str, float | None] = {}
    if isinstance(settings, PrefixSettings):
        sizes = {name: getattr(settings, name) for name in ("num_virtual_tokens", "prefix_projection_size")}
    elif isinstance(settings, BottleneckSettings):
        factor, width = settings.reduction_factor, getattr(getattr(model, "config", None), "hidden_size", None) or 1
        factors = [number for number in (factor.values() if isinstance(factor, dict) else [factor]) if number]
        sizes = {
            "bottleneck_size": settings.bottleneck_size,
            "the bottleneck size from reduction_factor": width / min(factors) if factors else None,
        }
    check_sizes(stored, sizes, f"{folder}/adapter_config.json")


def _adapter_tensors(attachment: Attachment, name: str) -> dict[str, Tensor]:
    """Return the attached method's tensors by AdapterHub's names, those of a prefix by its role."""
    if isinstance(attachment.settings, PrefixSettings):
        return adapterhub_prefix.tensors_by_role(attachment)
    if isinstance(attachment.settings, LoRASettings):
        return adapterhub_lora.attached_tensors(attachment, name)
    return adapterhub_bottleneck.tensors(attachment, name)


def _normalize_names(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Make names the same with and without a head, and in all versions of AdapterHub."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    former = re.compile(r"(attention|layer)_text_(task|lang)_adapters\.")
    return {former.sub("adapters.", name.removeprefix(prefix)): tensor for name, tensor in tensors.items()}
