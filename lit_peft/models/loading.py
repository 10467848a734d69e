"""Load a base model. Training, the commands and the server all use this code."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lit_peft.models import varlen_attention
from lit_peft.models.quantization import loading_arguments, quantize
from lit_peft.models.sources import BaseSource, hub_error, resolve_base
from lit_peft.util.errors import LitPeftError


@dataclass(frozen=True)
class BaseSettings:
    """Which base model to load, and how.

    Args:
        base: hub id, model folder, `.gguf` file or `pkg:DISTRIBUTION`.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run code that a hub model brings with it.
        attn_implementation: name of an attention implementation; transformers' choice if None.
        quantization: a setting that `lit_peft.models.quantization.check_quantization` accepts.
    """

    base: str
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    quantization: str | Mapping[str, Any] | None = None

    @cached_property
    def source(self) -> BaseSource:
        """The folder or hub id of the base; a `.gguf` file is converted the first time."""
        return resolve_base(self.base)

    @property
    def hub_arguments(self) -> dict[str, Any]:
        """Arguments of every `from_pretrained`."""
        # False rather than unset: transformers would otherwise ask on a terminal.
        found: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.revision is not None:
            found["revision"] = self.revision
        return found

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments of a model's `from_pretrained`."""
        attention = self.attn_implementation
        if attention == varlen_attention.NAME:
            varlen_attention.register()
        return self.hub_arguments if attention is None else {**self.hub_arguments, "attn_implementation": attention}


def load_config(
    settings: BaseSettings,
    labels: Sequence[str] | None = None,
    num_labels: int | None = None,
    needs_padding: bool = False,
) -> Any:
    """Load the base's configuration.

    Args:
        settings: which base.
        labels: names of the labels, for a classification head.
        num_labels: number of labels, if they have no names.
        needs_padding: make sure that there is a padding token: decoders use it to find the last token of each row.

    Raises:
        LitPeftError: there is no such base, or it cannot be read.
    """
    import transformers

    path = settings.source.path
    try:
        config = transformers.AutoConfig.from_pretrained(path, **settings.hub_arguments)
    except Exception as problem:  # OSError, ValueError, ImportError or KeyError, depending on what is wrong
        raise hub_error(settings.base, problem) from problem
    if labels is not None:
        config.id2label = {index: str(name) for index, name in enumerate(labels)}
        config.label2id = {name: index for index, name in config.id2label.items()}
    elif num_labels is not None:
        config.num_labels = num_labels
    if needs_padding and getattr(config, "pad_token_id", None) is None:
        end = getattr(config, "eos_token_id", None)
        config.pad_token_id = end[0] if isinstance(end, list) else end
    return config


def load_base(
    settings: BaseSettings,
    config: Any,
    model_class: Any,
    dtype: torch.dtype | str = "auto",
    heads: tuple[str, ...] = (),
) -> tuple[Any, set[str]]:
    """Load the base model in evaluation mode.

    Args:
        settings: which base, and how to load it.
        config: its configuration, from `load_config`.
        model_class: a transformers class with `from_pretrained`, e.g. an auto class.
        dtype: type of the weights; `"auto"`: as they are stored.
        heads: names of task heads, which are never quantized.

    Returns:
        The model, and the names of the parameters that the base has no weights for.

    Raises:
        LitPeftError: the base cannot be loaded or quantized.
    """
    compute_dtype = torch.float32 if isinstance(dtype, str) else dtype
    try:
        model, report = model_class.from_pretrained(
            settings.source.path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            **settings.model_arguments,
            **loading_arguments(settings.quantization, compute_dtype, heads),
        )
        model._lit_peft_base = settings.base
        missing = _load_backbone(model, settings, dtype, set(report["missing_keys"]))
    except Exception as problem:  # OSError, ValueError, ImportError or KeyError, depending on what is wrong
        raise hub_error(settings.base, problem) from problem
    quantize(model, settings.quantization, heads)
    return model.eval(), missing


def _load_backbone(model: Any, settings: BaseSettings, dtype: torch.dtype | str, missing: set[str]) -> set[str]:
    """Load the backbone on its own if none of its weights were found; return what is still missing.

    transformers' QuestionAnswering classes of Llama and Qwen call the backbone by another name than the other classes
    do, and would leave it random without an error.
    """
    prefix = f"{model.base_model_prefix}."
    backbone = getattr(model, model.base_model_prefix, None)
    tensors = set() if backbone is None else set(backbone.state_dict())
    if not tensors or not {f"{prefix}{name}" for name in tensors} <= missing:
        return missing
    import transformers

    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    compute_dtype = torch.float32 if isinstance(dtype, str) else dtype
    arguments = {**settings.model_arguments, **loading_arguments(settings.quantization, compute_dtype)}
    loaded = transformers.AutoModel.from_pretrained(settings.source.path, config=config, dtype=dtype, **arguments)
    setattr(model, model.base_model_prefix, loaded)
    return {name for name in missing if not name.startswith(prefix)}


def empty_model(settings: BaseSettings, config: Any, model_class: Any) -> Any:
    """Build the model on the meta device: its modules and shapes without memory for its weights."""
    with torch.device("meta"):
        return model_class.from_config(config, trust_remote_code=settings.trust_remote_code)


def check_weights_found(base: str, task: str, missing: set[str]) -> None:
    """Refuse a base without weights for a part that the task does not train.

    Raises:
        LitPeftError: names the first missing parameters.
    """
    if missing:
        raise LitPeftError(
            f"base={base!r} has no weights for {', '.join(sorted(missing)[:3])}, which task={task!r} needs: choose a "
            "base that was trained for this task, or another task."
        )
