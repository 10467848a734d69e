"""Reading and writing AdapterHub's folders: `adapter_config.json` and `adapter.safetensors` or `pytorch_adapter.bin`.

AdapterHub names a tensor by the module it stands at, `….adapters.NAME.` and its place in the bottleneck. What its
configuration cannot say (LLM-Adapters' placement, no biases, trained norms) stands under a key of ours, `lit_peft`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lit_peft.formats import adapterhub_lora, adapterhub_prefix, peft_prefix
from lit_peft.formats.base_record import base_name_or_path
from lit_peft.formats.files import copy_tensors, write_json
from lit_peft.formats.untrusted import check_sizes, read_tensors
from lit_peft.methods.adapter_h import AdapterHSettings
from lit_peft.methods.adapter_p import AdapterPSettings
from lit_peft.methods.attachment import Attachment, MethodSettings, Model, attach, attachment_of, detach
from lit_peft.methods.bottleneck import BottleneckSettings, roles
from lit_peft.methods.lora import LoRASettings
from lit_peft.methods.p_tuning_v2 import PTuningV2Settings
from lit_peft.methods.parallel import ParallelSettings
from lit_peft.methods.prefix import PrefixSettings
from lit_peft.methods.prefix_tuning import PrefixTuningSettings
from lit_peft.models.architectures import layer_stacks
from lit_peft.nn.bottleneck import Bottleneck
from lit_peft.nn.lora import LoRALayer
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

_METHODS: dict[str, type[BottleneckSettings] | type[PrefixSettings]] = {
    kind.method: kind
    for kind in (AdapterHSettings, AdapterPSettings, ParallelSettings, PrefixTuningSettings, PTuningV2Settings)
}
# Where AdapterHub keeps the adapters of a layer that the table of architectures has no other place for.
_MODULES = {
    "attention_adapter": "attention_adapters",
    "cross_adapter": "cross_attention_adapters",
    "ffn_adapter": "output_adapters",
}
# AdapterHub's values for the keys that its configuration may leave out.
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
# These say nothing about an adapter without PHM layers, or only how it started.
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
# The names by which a folder may give one of AdapterHub's own configurations, the old ones included.
_NAMED: dict[str, dict[str, Any]] = {
    "double_seq_bn": {"mh_adapter": True, "non_linearity": "swish", "reduction_factor": 16},
    "seq_bn": {"original_ln_before": True, "non_linearity": "relu", "reduction_factor": 16},
    "par_bn": {"is_parallel": True, "non_linearity": "relu", "reduction_factor": 2, "scaling": 4.0},
}
_NAMED.update(houlsby=_NAMED["double_seq_bn"], pfeiffer=_NAMED["seq_bn"], parallel=_NAMED["par_bn"])


def holds(attachment: Attachment) -> bool:
    """Whether this is the format for what is attached: bottlenecks, and prefixes that peft's cannot hold."""
    if isinstance(attachment.settings, PrefixSettings):
        return peft_prefix.problem(attachment) is not None
    return isinstance(attachment.settings, BottleneckSettings)


def read(model: Model, folder: Path, config: dict[str, Any]) -> Model:
    """Attach the adapter in an AdapterHub folder, whose `adapter_config.json` is `config`, to a bare model.

    A head beside it (`pytorch_model_head.bin`, `model_head.safetensors`) is loaded into the model's own.

    Raises:
        LitPeftError: a file is missing, a setting is not one that can be read, or the tensors do not fit the model.
            The model is as it was.
    """
    stored = read_tensors(folder, "adapter.safetensors", "pytorch_adapter.bin")
    if stored is None:
        raise LitPeftError(
            f"{folder} has neither adapter.safetensors nor pytorch_adapter.bin: give the folder AdapterHub saved."
        )
    head = read_tensors(folder, "model_head.safetensors", "pytorch_model_head.bin") or {}
    settings: MethodSettings
    if "lit_peft" in config:
        settings = _own_settings(config, folder)
    elif _architecture(config) == "lora":
        settings, stored = adapterhub_lora.settings(config, stored, model, folder)
    elif _architecture(config) == "prefix_tuning":
        settings = adapterhub_prefix.settings(config["config"], folder)
    else:
        settings = _settings(config["config"], folder)
        if any("crossattention.output.adapters." in key for key in stored):
            # In decoders of BERT's kind AdapterHub's mh_adapter means both attentions.
            settings = dataclasses.replace(settings, cross_adapter=True)
    if isinstance(settings, BottleneckSettings) and isinstance(settings.reduction_factor, dict):
        # AdapterHub passes over layers that are not there; settings of ours may not name them.
        known = {"default", *map(str, range(sum(map(len, layer_stacks(model)))))}
        factors = {name: factor for name, factor in settings.reduction_factor.items() if name in known}
        settings = dataclasses.replace(settings, reduction_factor=factors)
    _check_sizes(settings, stored, model, folder)
    attach(model, settings)
    foreign = "lit_peft" not in config
    if foreign and isinstance(settings, PrefixSettings) and not adapterhub_prefix.fits(attachment_of(model), stored):
        detach(model)
        attach(model, dataclasses.replace(settings, per_query_head=True))
    try:
        attachment = attachment_of(model)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name in head:
            if name not in parameters:
                raise LitPeftError(
                    f"{folder} holds a head with a tensor {name!r}, which this {type(model).__name__} does not have: "
                    "load it into the model class it was saved from, or take the head's files out of the folder."
                )
            if name not in attachment.saved:
                attachment.train(name)
        places = _places(attachment, str(config.get("name") or ""))
        copy_tensors(_plain(places, model), _plain(adapterhub_prefix.plain(stored), model), folder)
        copy_tensors(dict(attachment.saved), head, folder)
    except BaseException:
        detach(model)
        raise
    return model


def _architecture(config: dict[str, Any]) -> Any:
    return config["config"].get("architecture") if isinstance(config["config"], dict) else None


def _check_sizes(settings: MethodSettings, stored: dict[str, Tensor], model: nn.Module, folder: Path) -> None:
    sizes: dict[str, float | None]
    if isinstance(settings, PrefixSettings):
        names = ("num_virtual_tokens", "prefix_projection_size")
        sizes = {name: getattr(settings, name) for name in names}
    elif isinstance(settings, BottleneckSettings):
        factor, width = settings.reduction_factor, getattr(getattr(model, "config", None), "hidden_size", None) or 1
        factors = [number for number in (factor.values() if isinstance(factor, dict) else [factor]) if number]
        sizes = {
            "bottleneck_size": settings.bottleneck_size,
            "the size by reduction_factor": width / min(factors) if factors else None,
        }
    else:
        sizes = {}
    check_sizes(stored, sizes, f"{folder}/adapter_config.json")


def write(model: nn.Module, folder: Path, name: str = "default", own: bool = True) -> None:
    """Write the attached bottleneck adapters, prefixes or LoRA into an existing folder.

    Args:
        model: a model with AdapterH, AdapterP, Parallel, Prefix Tuning, P-Tuning v2 or LoRA attached.
        folder: an existing folder.
        name: the adapter's name.
        own: also write what AdapterHub's configuration cannot say.

    Raises:
        LitPeftError: the method is another one, or without `own`, AdapterHub could not read the result.
    """
    attachment = attachment_of(model)
    settings = attachment.settings
    if not isinstance(settings, BottleneckSettings | PrefixSettings | LoRASettings):
        raise LitPeftError(f"{settings.method!r} cannot be written in AdapterHub's format: use format='peft'.")
    if not re.fullmatch(r"[\w-]+", name):
        raise LitPeftError(f"name={name!r}: AdapterHub's names are letters, digits, '_' and '-'.")
    base: Any = getattr(model, "config", None)
    width = getattr(base, "hidden_size", None)
    beyond: list[str] = []
    if isinstance(settings, LoRASettings):
        written, places = adapterhub_lora.written(attachment, name)
    elif isinstance(settings, PrefixSettings):
        beyond = adapterhub_prefix.beyond(settings, attachment)
        written = adapterhub_prefix.config(settings, attachment)
        places = adapterhub_prefix.tensors(model, attachment, name)
    else:
        beyond, written = _beyond(settings), _written(settings, width)
        places = _places(attachment, name)
    if beyond and not own:
        raise LitPeftError(
            f"AdapterHub's format cannot hold {', '.join(beyond)}: leave format out to write a folder for load_adapter."
        )
    config: dict[str, Any] = {
        # AdapterHub refuses an architecture it does not know, rather than load half of it.
        "config": {"architecture": "lit_peft"} if beyond else written,
        "hidden_size": width,
        "model_class": type(model).__name__,
        "model_name": base_name_or_path(model),
        "model_type": getattr(base, "model_type", None),
        "name": name,
    }
    if own:
        config["lit_peft"] = {"method": settings.method, **dataclasses.asdict(settings)}
    write_json(folder / "adapter_config.json", config)
    # AdapterHub keeps one LayerNorm under two names; a safetensors file wants two tensors.
    tensors = {key: place.detach().clone() for key, place in places.items()}
    save_file(tensors, folder / "adapter.safetensors", metadata={"format": "pt"})
    if attachment.saved:
        write_json(folder / "head_config.json", {**config, "config": None, "name": None})
        head = {key: place.detach().clone() for key, place in attachment.saved.items()}
        save_file(head, folder / "model_head.safetensors", metadata={"format": "pt"})


def _beyond(settings: BottleneckSettings) -> list[str]:
    """The settings that AdapterHub's configuration cannot say."""
    return [
        f"{field}={value!r}"
        for field, value, plain in (
            ("placement", settings.placement, "paper"),
            ("bias", settings.value("bias"), True),
            ("train_layer_norms", getattr(settings, "train_layer_norms", False), False),
        )
        if value != plain
    ]


def _written(settings: BottleneckSettings, width: int | None) -> dict[str, Any]:
    """AdapterHub's configuration of a bottleneck."""
    factor = settings.value("reduction_factor")
    if settings.bottleneck_size is not None:
        # Rounded up in the last digit, so that dividing and cutting gives the size back.
        factor = (width or 0) / (settings.bottleneck_size + 1e-6)
    return {
        **{key: getattr(settings, key) for key in _DEFAULTS},
        "is_parallel": settings.is_parallel,
        "leave_out": list(settings.leave_out),
        "non_linearity": settings.value("non_linearity"),
        "reduction_factor": factor,
        "scaling": settings.value("scaling"),
    }


def _own_settings(config: dict[str, Any], folder: Path) -> BottleneckSettings | PrefixSettings:
    values = dict(config["lit_peft"]) if isinstance(config["lit_peft"], dict) else {}
    method = values.pop("method", None)
    kind = _METHODS.get(method) if isinstance(method, str) else None
    known = set() if kind is None else {field.name for field in dataclasses.fields(kind)}
    if kind is None or not known.issuperset(values):
        raise LitPeftError(
            f"{folder}/adapter_config.json has the method {brief(method)} with settings "
            f"{brief(sorted(set(values) - known))} that "
            "this version of lit_peft does not know: update lit_peft."
        )
    return kind(**values)


def _settings(config: Any, folder: Path) -> BottleneckSettings:
    """The settings that say what AdapterHub's configuration says."""
    where = f"{folder}/adapter_config.json"
    if isinstance(config, str):
        if config not in _NAMED:
            raise LitPeftError(f"{where} names the configuration {brief(config)}, which cannot be read.")
        config = _NAMED[config]
    if not isinstance(config, dict):
        raise LitPeftError(f"{where} has the configuration {brief(config)}: give the folder that AdapterHub saved.")
    if config.get("architecture") is not None:
        raise LitPeftError(
            f"{where} is of the architecture {brief(config['architecture'])}: only bottleneck adapters, LoRA and "
            "prefixes can be read."
        )
    active = sorted(key for key, value in config.items() if key not in _READ | _NEUTRAL and value)
    if active:
        raise LitPeftError(f"{where} sets {', '.join(active)}, which would change the result and cannot be read.")
    missing = sorted({"reduction_factor", "non_linearity"} - set(config))
    if missing:
        raise LitPeftError(f"{where} does not give {', '.join(missing)}: give the folder that AdapterHub saved.")
    values = {**_DEFAULTS, **{key: config[key] for key in _READ if config.get(key) is not None}}
    if config.get("is_parallel"):
        return ParallelSettings(**values)
    return (AdapterHSettings if values["mh_adapter"] and values["output_adapter"] else AdapterPSettings)(**values)


def _places(attachment: Attachment, name: str) -> dict[str, Tensor]:
    """Each of the adapters' tensors under AdapterHub's name for it."""
    modules = {}
    if isinstance(attachment.settings, BottleneckSettings) and attachment.settings.placement == "paper":
        for layer in (layer for stack in layer_stacks(attachment.model) for layer in stack):
            for role, _, place in roles(layer, attachment.settings):
                if place is not None:
                    modules[f"{layer.path}.{role}"] = f"{layer.path}.{place.adapterhub or _MODULES[role]}"
    places = adapterhub_prefix.places(attachment)
    for path, adapter in attachment.adapted.items():
        if isinstance(adapter, Bottleneck):
            for inner, tensor in adapter.named_parameters():
                for spelling in _spellings(inner, adapter):
                    places[f"{modules.get(path, path)}.adapters.{name}.{spelling}"] = tensor
        elif isinstance(adapter, LoRALayer):
            places[f"{path}.loras.{name}.lora_A"] = adapter.lora_A
            places[f"{path}.loras.{name}.lora_B"] = adapter.lora_B
    return places


def _spellings(inner: str, adapter: Bottleneck) -> list[str]:
    """AdapterHub's names of a bottleneck's tensor: `adapter_down` is a sequence that a LayerNorm may open."""
    part, _, kind = inner.partition(".")
    if part == "down":
        return [f"adapter_down.{0 if adapter.norm_before is None else 1}.{kind}"]
    if part == "norm_before":
        return [f"adapter_norm_before.{kind}", f"adapter_down.0.{kind}"]
    return [f"adapter_{inner}" if part in ("up", "norm_after") else inner]


def _plain(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The names without what differs between a model with a head and one without, and in AdapterHub's old names."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    old = re.compile(r"(attention|layer)_text_(task|lang)_adapters\.")
    return {old.sub("adapters.", name.removeprefix(prefix)): tensor for name, tensor in tensors.items()}
