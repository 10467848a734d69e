"""Reading and writing peft's adapter folders: `adapter_config.json` and `adapter_model.safetensors`.

Each `peft_type` has a module that maps its settings and tensors to ours. A new type is one file and one line in
`PEFT_FORMATS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor, nn

from lit_peft.formats import peft_ia3, peft_lora, peft_prefix, peft_prompt
from lit_peft.formats.base_record import base_name_or_path
from lit_peft.formats.files import read_extra, write_extra, write_json
from lit_peft.formats.key_mapping import rename
from lit_peft.formats.peft_layers import holds_tying
from lit_peft.formats.untrusted import SPARE_ELEMENTS, ElementLimit, read_tensors
from lit_peft.methods.attach import attach, detach
from lit_peft.methods.attachment import Attachment, MethodSettings, Model, attachment_of
from lit_peft.nn.deferred import deferred_parameters
from lit_peft.nn.weight_update import WeightUpdate
from lit_peft.util.errors import LitPeftError

# Settings that have no effect on the model's output, whatever the method.
_NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}


class PeftFormat(Protocol):
    """What the module for one `peft_type` offers.

    Attributes:
        READ: the settings it reads.
        NEUTRAL: further settings that have no effect on the output of a trained adapter.
    """

    READ: set[str]
    NEUTRAL: set[str]

    def writes(self, settings: MethodSettings) -> bool:
        """Return whether this format is the one for a method with these settings."""

    def settings(self, model: nn.Module, config: dict[str, Any], stored: dict[str, Tensor]) -> MethodSettings:
        """Return the settings to attach, from a folder's configuration and tensors.

        `config["lit_peft"]` is what the folder's `lit_peft.json` adds; it is empty if peft wrote the folder.
        """

    def load_tensors(self, model: nn.Module, stored: dict[str, Tensor], folder: Path) -> None:
        """Copy the folder's tensors into the attached method."""

    def config(self, model: nn.Module, attachment: Attachment) -> dict[str, Any]:
        """Return the configuration to write, with `peft_type`, and under `lit_peft` what peft has no field for."""

    def tensors(self, attachment: Attachment) -> dict[str, Tensor]:
        """Return the tensors to write, by the names that peft gives them."""


PEFT_FORMATS: dict[str, PeftFormat] = {
    "LORA": peft_lora,
    "IA3": peft_ia3,
    "PROMPT_TUNING": peft_prompt.PROMPT_TUNING,
    "PREFIX_TUNING": peft_prefix,
    "P_TUNING": peft_prompt.P_TUNING,
}


def read(
    model: Model,
    folder: Path,
    config: dict[str, Any],
    key_mapping: Mapping[str, str] | None = None,
    low_cpu_mem_usage: bool = False,
) -> Model:
    """Attach the adapter in a peft folder to a bare model.

    Args:
        model: the base model.
        folder: the adapter's folder.
        config: the content of its `adapter_config.json`.
        key_mapping: see `load_adapter`.
        low_cpu_mem_usage: see `load_adapter`.

    Returns:
        The same model, with the adapter attached.

    Raises:
        LitPeftError: a file is missing, the method or a setting is not supported, or the tensors do not fit the model.
            The model is left as it was.
    """
    peft_format = PEFT_FORMATS.get(str(config["peft_type"]))
    if peft_format is None:
        raise LitPeftError(
            f"{folder}: adapters of type {config['peft_type']!r} are not supported, only {', '.join(PEFT_FORMATS)}."
        )
    known = peft_format.READ | peft_format.NEUTRAL | _NEUTRAL
    unsupported = sorted(name for name, value in config.items() if name not in known and value)
    if unsupported:
        raise LitPeftError(
            f"{folder}/adapter_config.json sets {', '.join(unsupported)}, which changes the model's output and is not "
            "supported."
        )
    stored = read_tensors(folder, "adapter_model.safetensors", "adapter_model.bin")
    if stored is None:
        raise LitPeftError(f"{folder} has no adapter_model.safetensors: give a folder that peft saved.")
    if key_mapping:
        stored, config = rename(stored, config, key_mapping)
    settings = peft_format.settings(model, {**config, "lit_peft": read_extra(folder)}, stored)
    # The network of P-Tuning, which peft does not store, has a few times the hidden size squared.
    spare = SPARE_ELEMENTS if settings.method != "p_tuning" else sum(p.numel() for p in model.parameters())
    limit = ElementLimit(stored, f"{folder}/adapter_config.json", max(spare, SPARE_ELEMENTS))
    with limit, deferred_parameters() if low_cpu_mem_usage else nullcontext():
        attach(model, settings)
    try:
        peft_format.load_tensors(model, stored, folder)
        for layer in attachment_of(model).adapted.values():
            if isinstance(layer, WeightUpdate) and not layer.weight.is_meta:
                layer.follow_weight()
    except BaseException:
        detach(model)
        raise
    return model


def holds(attachment: Attachment) -> bool:
    """Whether peft has the method of what is attached."""
    settings = attachment.settings
    tokens = settings.trainable_token_indices and not peft_lora.writes(settings)
    return not tokens and holds_tying(attachment) and any(kind.writes(settings) for kind in PEFT_FORMATS.values())


def write(model: nn.Module, folder: Path) -> None:
    """Write the attached method's files into an existing folder, as peft reads them.

    Raises:
        LitPeftError: nothing is attached, or peft's format does not support the method or one of its settings.
    """
    attachment = attachment_of(model)
    peft_format = next((known for known in PEFT_FORMATS.values() if known.writes(attachment.settings)), None)
    if peft_format is None or not holds(attachment):
        part = "ensure_weight_tying" if attachment.ties else "trainable_token_indices"
        given = f" with {part}" if peft_format is not None else ""
        raise LitPeftError(
            f"{attachment.settings.method!r}{given} cannot be written in peft's format: leave format out."
        )
    config = {
        "base_model_name_or_path": base_name_or_path(model) or None,
        "inference_mode": True,
        **peft_format.config(model, attachment),
    }
    write_extra(folder, config.pop("lit_peft", {}))
    tensors = {name: tensor.detach().contiguous() for name, tensor in peft_format.tensors(attachment).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)
