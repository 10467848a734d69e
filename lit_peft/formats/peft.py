"""Reading and writing peft's adapter folders (`adapter_config.json` and `adapter_model.safetensors`).

Each `peft_type` has a module of its own that says what its settings and tensors are called; a new one is one file, and
one line in `PEFT_FORMATS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor, nn

from lit_peft.formats import peft_lora, peft_prefix, peft_prompt
from lit_peft.formats.base_record import base_name_or_path
from lit_peft.formats.files import read_extra, write_extra, write_json
from lit_peft.formats.untrusted import read_tensors
from lit_peft.methods.attachment import Attachment, MethodSettings, Model, attach, attachment_of, detach
from lit_peft.util.errors import LitPeftError

# These change nothing in how the stored weights act, whatever the method.
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
    """What a module for one `peft_type` offers.

    Attributes:
        READ: the settings it reads.
        NEUTRAL: further settings that change nothing in how the stored weights act.
    """

    READ: set[str]
    NEUTRAL: set[str]

    def writes(self, settings: MethodSettings) -> bool:
        """Whether it is the one to write a method with these settings."""

    def settings(self, model: nn.Module, config: dict[str, Any], stored: dict[str, Tensor]) -> MethodSettings:
        """The settings to attach with, from a folder's configuration and tensors.

        `config["lit_peft"]` holds what `lit_peft.json` says beside peft's own settings; nothing in peft's own folders.
        """

    def load_tensors(self, model: nn.Module, stored: dict[str, Tensor], folder: Path) -> None:
        """Copy the folder's tensors into what was attached."""

    def config(self, model: nn.Module, attachment: Attachment) -> dict[str, Any]:
        """The configuration to write, `peft_type` included; what peft does not know under `lit_peft`."""

    def tensors(self, attachment: Attachment) -> dict[str, Tensor]:
        """The tensors to write, by peft's names."""


PEFT_FORMATS: dict[str, PeftFormat] = {
    "LORA": peft_lora,
    "PROMPT_TUNING": peft_prompt.PROMPT_TUNING,
    "PREFIX_TUNING": peft_prefix,
    "P_TUNING": peft_prompt.P_TUNING,
}


def read(model: Model, folder: Path, config: dict[str, Any]) -> Model:
    """Attach the adapter in a peft folder, whose `adapter_config.json` is `config`, to a bare model.

    Raises:
        LitPeftError: a file is missing, the method or a setting is not one that can be read, or the tensors do not
            fit the model. The model is as it was.
    """
    kind = PEFT_FORMATS.get(str(config["peft_type"]))
    if kind is None:
        raise LitPeftError(
            f"{folder}: adapters of type {config['peft_type']!r} cannot be read, only {', '.join(PEFT_FORMATS)}."
        )
    known = kind.READ | kind.NEUTRAL | _NEUTRAL
    active = sorted(name for name, value in config.items() if name not in known and value)
    if active:
        raise LitPeftError(
            f"{folder}/adapter_config.json sets {', '.join(active)}, which would change the result and cannot be read."
        )
    stored = read_tensors(folder, "adapter_model.safetensors", "adapter_model.bin")
    if stored is None:
        raise LitPeftError(f"{folder} has no adapter_model.safetensors: give the folder that peft's save wrote.")
    attach(model, kind.settings(model, {**config, "lit_peft": read_extra(folder)}, stored))
    try:
        kind.load_tensors(model, stored, folder)
    except BaseException:
        detach(model)
        raise
    return model


def holds(attachment: Attachment) -> bool:
    """Whether peft has the method of what is attached."""
    return any(kind.writes(attachment.settings) for kind in PEFT_FORMATS.values())


def write(model: nn.Module, folder: Path) -> None:
    """Write the attached method's files, as peft reads them, into an existing folder.

    Raises:
        LitPeftError: nothing is attached, peft does not have the method, or the adapter does not stand for the whole
            model.
    """
    attachment = attachment_of(model)
    kind = next((kind for kind in PEFT_FORMATS.values() if kind.writes(attachment.settings)), None)
    if kind is None:
        raise LitPeftError(f"{attachment.settings.method!r} cannot be written in peft's format: leave format out.")
    config = {
        "base_model_name_or_path": base_name_or_path(model) or None,
        "inference_mode": True,
        **kind.config(model, attachment),
    }
    write_extra(folder, config.pop("lit_peft", {}))
    tensors = {name: tensor.detach().contiguous() for name, tensor in kind.tensors(attachment).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)
