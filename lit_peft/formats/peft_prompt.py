"""Prompt Tuning and P-Tuning in peft's format: one tensor of virtual tokens, computed to the end, and the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_peft.formats.files import copy_tensors
from lit_peft.formats.peft_task import HEADS, task_type
from lit_peft.methods.attachment import Attachment, MethodSettings, attachment_of
from lit_peft.methods.p_tuning import PTuningSettings
from lit_peft.methods.prompt_tuning import PromptTuningSettings
from lit_peft.methods.soft_prompt import SoftPromptSettings
from lit_peft.nn.prompt import PromptEncoder, SoftPrompt
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

_PREFIX = "base_model."
_PROMPT = "prompt_embeddings"
_OWN = ("positions", "prompt_token_id")
_SHARED = {"num_virtual_tokens", "num_transformer_submodules", "modules_to_save"}


class PromptKind:
    """Reads and writes the folders of one of the two `peft_type`s."""

    def __init__(self, peft_type: str, settings_class: type[SoftPromptSettings], own: set[str]) -> None:
        self.peft_type = peft_type
        self.settings_class = settings_class
        self.READ = {*_SHARED, *own}
        # The stored tensor says these too, or they are about how it came to be.
        self.NEUTRAL = {
            "num_attention_heads",
            "num_layers",
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "token_dim",
            "tokenizer_kwargs",
            "tokenizer_name_or_path",
        }

    def writes(self, settings: MethodSettings) -> bool:
        """Whether the settings are this method's."""
        return isinstance(settings, self.settings_class)

    def settings(self, model: nn.Module, config: dict[str, Any], stored: dict[str, Tensor]) -> SoftPromptSettings:
        """The settings in a folder's configuration; positions as peft counts them, where peft wrote it."""
        if _PROMPT not in stored or stored[_PROMPT].dim() != 2:
            raise LitPeftError(f"adapter_model.safetensors has no table {_PROMPT}: it is not one that peft saved.")
        # The network that computed the virtual tokens was folded away: no need to build it as large as it was.
        values = {name: value for name, value in config.items() if name in _SHARED and value is not None}
        rows, length = len(stored[_PROMPT]), values.get("num_virtual_tokens")
        if not isinstance(length, int) or length < 1 or rows not in (length, 2 * length):
            raise LitPeftError(
                f"adapter_config.json: num_virtual_tokens={brief(length)}, and {_PROMPT} has {rows} rows: the folder "
                "is not whole."
            )
        values["modules_to_save"] = config["lit_peft"].get("modules_to_save", _stored_modules(stored)) or None
        values["num_transformer_submodules"] = rows // length
        if self.settings_class is PromptTuningSettings:
            values["prompt_tuning_init"] = "RANDOM"
        own = {"positions": "sequence", **config["lit_peft"]}
        return self.settings_class(**values, **{name: own[name] for name in _OWN if name in own})

    def load_tensors(self, model: nn.Module, stored: dict[str, Tensor], folder: Path) -> None:
        """Copy a folder's tensors into what was attached; what computed the virtual tokens is not needed any more."""
        attachment = attachment_of(model)
        prompt = _prompt(attachment)
        prompt.fold()
        found = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
        # peft stores a head in any case; what was not trained is the base's own.
        places = {**attachment.saved, _PROMPT: prompt.embedding.weight}
        copy_tensors(places, found, folder, ignored=set(model.state_dict()) - set(places))

    def config(self, model: nn.Module, attachment: Attachment) -> dict[str, Any]:
        """The configuration of what is attached."""
        settings = attachment.settings
        assert isinstance(settings, SoftPromptSettings)
        top: Any = model
        config = top.config.get_text_config()
        own = {key: getattr(settings, key) for key in _OWN}
        trained = list(settings.modules_to_save) if settings.modules_to_save else []
        dim = _prompt(attachment).embedding.weight.shape[1]
        values = {key: getattr(settings, key) for key in self.READ}
        if "encoder_hidden_size" in values:
            values["encoder_hidden_size"] = values["encoder_hidden_size"] or max(1, dim // 2)
        return {
            **values,
            "peft_type": self.peft_type,
            "task_type": task_type(model),
            "modules_to_save": _saved_by_peft(attachment) or None,
            "token_dim": dim,
            "num_layers": getattr(config, "num_hidden_layers", None),
            "num_attention_heads": getattr(config, "num_attention_heads", None),
            "lit_peft": {**{key: value for key, value in own.items() if value is not None}, "modules_to_save": trained},
        }

    def tensors(self, attachment: Attachment) -> dict[str, Tensor]:
        """The virtual tokens, and the trained modules by peft's names."""
        state, heads = attachment.model.state_dict(), _saved_by_peft(attachment)
        names = [*attachment.saved, *(name for name in state if any(name.startswith(f"{head}.") for head in heads))]
        return {_PROMPT: _prompt(attachment).folded(), **{f"{_PREFIX}{name}": state[name].clone() for name in names}}


def _prompt(attachment: Attachment) -> SoftPrompt | PromptEncoder:
    prompt: Any = attachment.adapted["prompt_encoder"]
    found: SoftPrompt | PromptEncoder = prompt
    return found


PROMPT_TUNING = PromptKind("PROMPT_TUNING", PromptTuningSettings, set())
P_TUNING = PromptKind(
    "P_TUNING",
    PTuningSettings,
    {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"},
)


def _saved_by_peft(attachment: Attachment) -> list[str]:
    """The modules peft stores whole: those to save, and its task's head, found by the ends of their names."""
    ends = (*(attachment.settings.modules_to_save or ()), *HEADS.get(task_type(attachment.model), ()))
    return [name for name, _ in attachment.model.named_modules() if name.endswith(ends)] if ends else []


def _stored_modules(stored: dict[str, Tensor]) -> list[str]:
    """The modules whose tensors a folder holds, beside the virtual tokens; a parameter outside of any by its name."""
    names = (name.removeprefix(_PREFIX) for name in stored if name != _PROMPT)
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
