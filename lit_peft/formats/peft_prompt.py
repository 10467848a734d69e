"""Prompt Tuning and P-Tuning in peft's format: the computed embeddings of the virtual tokens, and the task's head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_peft.formats.files import copy_tensors
from lit_peft.formats.peft_task import HEADS, task_type
from lit_peft.formats.untrusted import check_names
from lit_peft.methods.attachment import Attachment, MethodSettings, attachment_of
from lit_peft.methods.p_tuning import PTuningSettings
from lit_peft.methods.prompt_tuning import PromptTuningSettings
from lit_peft.methods.soft_prompt import SoftPromptSettings
from lit_peft.nn.prompt import PromptEncoder, SoftPrompt
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

_PREFIX = "base_model."
_PROMPT = "prompt_embeddings"
# Settings of ours that peft has no field for.
_EXTRA = ("positions", "prompt_token_id")
_SHARED = {"num_virtual_tokens", "num_transformer_submodules", "modules_to_save"}


class PromptFormat:
    """Reads and writes the folders of one of the two methods.

    Args:
        peft_type: peft's name for the method.
        settings_class: the method's settings.
        fields: the settings that only this method has in peft's configuration.
    """

    def __init__(self, peft_type: str, settings_class: type[SoftPromptSettings], fields: set[str]) -> None:
        self.peft_type = peft_type
        self.settings_class = settings_class
        self.READ = {*_SHARED, *fields}
        # They follow from the stored tensor, or only matter during training.
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
        """Return whether these are the method's settings."""
        return isinstance(settings, self.settings_class)

    def settings(self, model: nn.Module, config: dict[str, Any], stored: dict[str, Tensor]) -> SoftPromptSettings:
        """Return the settings in a folder's configuration; positions count as in peft if peft wrote the folder."""
        if _PROMPT not in stored or stored[_PROMPT].dim() != 2:
            raise LitPeftError(f"adapter_model.safetensors has no table {_PROMPT}: give a folder that peft saved.")
        # The settings of P-Tuning's network are not needed: its output is stored, and the network is not.
        values = {name: value for name, value in config.items() if name in _SHARED and value is not None}
        rows, num_tokens = len(stored[_PROMPT]), values.get("num_virtual_tokens")
        if not isinstance(num_tokens, int) or num_tokens < 1 or rows not in (num_tokens, 2 * num_tokens):
            raise LitPeftError(
                f"adapter_config.json: num_virtual_tokens={brief(num_tokens)}, but {_PROMPT} has {rows} rows: the "
                "folder is incomplete."
            )
        values["modules_to_save"] = config["lit_peft"].get("modules_to_save", _stored_modules(stored)) or None
        check_names(values["modules_to_save"], "The list of the modules that the folder has")
        values["num_transformer_submodules"] = rows // num_tokens
        if self.settings_class is PromptTuningSettings:
            values["prompt_tuning_init"] = "RANDOM"
        extra = {"positions": "sequence", **config["lit_peft"]}
        return self.settings_class(**values, **{name: extra[name] for name in _EXTRA if name in extra})

    def load_tensors(self, model: nn.Module, stored: dict[str, Tensor], folder: Path) -> None:
        """Copy a folder's tensors into the attached prompt, and remove the network that would compute it."""
        attachment = attachment_of(model)
        prompt = _prompt(attachment)
        prompt.fold()
        found = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
        targets = {**attachment.saved, _PROMPT: prompt.embedding.weight}
        # peft always saves a head; one that was not trained is the base's own.
        copy_tensors(targets, found, folder, ignored=set(model.state_dict()) - set(targets))

    def config(self, model: nn.Module, attachment: Attachment) -> dict[str, Any]:
        """Return the configuration of the attached prompt."""
        settings = attachment.settings
        assert isinstance(settings, SoftPromptSettings)
        top: Any = model
        text_config = top.config.get_text_config()
        extra = {name: getattr(settings, name) for name in _EXTRA}
        dim = _prompt(attachment).embedding.weight.shape[1]
        values = {name: getattr(settings, name) for name in self.READ}
        if "encoder_hidden_size" in values:
            values["encoder_hidden_size"] = values["encoder_hidden_size"] or max(1, dim // 2)
        return {
            **values,
            "peft_type": self.peft_type,
            "task_type": task_type(model),
            "modules_to_save": _modules_saved_by_peft(attachment) or None,
            "token_dim": dim,
            "num_layers": getattr(text_config, "num_hidden_layers", None),
            "num_attention_heads": getattr(text_config, "num_attention_heads", None),
            "lit_peft": {
                **{name: value for name, value in extra.items() if value is not None},
                "modules_to_save": list(settings.modules_to_save or ()),
            },
        }

    def tensors(self, attachment: Attachment) -> dict[str, Tensor]:
        """Return the virtual tokens and the trained modules, by peft's names."""
        state = attachment.model.state_dict()
        modules = tuple(f"{path}." for path in _modules_saved_by_peft(attachment))
        names = [*attachment.saved, *(name for name in state if name.startswith(modules))]
        return {_PROMPT: _prompt(attachment).folded(), **{f"{_PREFIX}{name}": state[name].clone() for name in names}}


PROMPT_TUNING = PromptFormat("PROMPT_TUNING", PromptTuningSettings, set())
P_TUNING = PromptFormat(
    "P_TUNING",
    PTuningSettings,
    {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"},
)


def _prompt(attachment: Attachment) -> SoftPrompt | PromptEncoder:
    (prompt,) = attachment.adapted.values()
    assert isinstance(prompt, SoftPrompt | PromptEncoder)
    return prompt


def _modules_saved_by_peft(attachment: Attachment) -> list[str]:
    """Return the modules that peft saves: `modules_to_save` and the task's head, found by the ends of their names."""
    ends = (*(attachment.settings.modules_to_save or ()), *HEADS.get(task_type(attachment.model), ()))
    modules = (name for name, _ in attachment.model.named_modules() if name.partition(".")[0] not in attachment.adapted)
    return [name for name in modules if name.endswith(ends)] if ends else []


def _stored_modules(stored: dict[str, Tensor]) -> list[str]:
    """Return the modules that a folder has tensors of, and the parameters that are in no module."""
    names = (name.removeprefix(_PREFIX) for name in stored if name != _PROMPT)
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
