"""Prefix Tuning and P-Tuning v2 in peft's format: a table `prompt_embeddings`, computed by the MLP if there is one.

In an encoder-decoder, peft has a prefix at the decoder's self-attention only, and it reads the table of L layers in an
order of its own: layer l uses entry 2l mod L. Its positions count padding, ours do not: `lit_peft.json` says which ones
a folder of ours was trained with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.formats.files import copy_tensors
from lit_peft.formats.peft_task import HEADS, task_type
from lit_peft.formats.untrusted import check_names
from lit_peft.methods.attachment import Attachment, MethodSettings, attachment_of
from lit_peft.methods.p_tuning_v2 import PTuningV2Settings
from lit_peft.methods.prefix import PrefixSettings
from lit_peft.methods.prefix_tuning import PrefixTuningSettings
from lit_peft.models.architectures import attention_of, layer_stacks
from lit_peft.nn.prefix import Prefix
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief, check_types

_PREFIX = "base_model."
_TABLE = "prompt_embeddings"

READ = {"num_virtual_tokens", "num_layers", "num_transformer_submodules", "modules_to_save"}
# They follow from the table and the model, or only matter during training.
NEUTRAL = {"encoder_hidden_size", "init_weights", "num_attention_heads", "prefix_projection", "token_dim"}


def writes(settings: MethodSettings) -> bool:
    """Return whether these are the settings of a prefix."""
    return isinstance(settings, PrefixSettings)


def settings(model: nn.Module, config: dict[str, Any], stored: dict[str, Tensor]) -> PrefixSettings:
    """Return the settings in a folder's configuration: a table without an MLP."""
    has_head = str(config.get("task_type")) in HEADS
    method = config["lit_peft"].get("method", "p_tuning_v2" if has_head else "prefix_tuning")
    settings_class = PTuningV2Settings if method == "p_tuning_v2" else PrefixTuningSettings
    table, num_tokens = stored.get(_TABLE), config.get("num_virtual_tokens")
    if table is None or table.dim() != 2 or not isinstance(num_tokens, int) or len(table) != num_tokens:
        shape = None if table is None else tuple(table.shape)
        raise LitPeftError(
            f"adapter_config.json: num_virtual_tokens={brief(num_tokens)}, but the stored {_TABLE} has the shape "
            f"{shape}: the folder is incomplete."
        )
    saved = config.get("modules_to_save") or ()
    check_types(PrefixSettings, {"modules_to_save": saved}, "adapter_config.json: ")
    check_names(saved, "adapter_config.json: modules_to_save")
    # Those that the model does not have are refused when they are copied.
    parameters = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    trained = [path for path in (name.removeprefix(_PREFIX) for name in stored) if path in parameters]
    modules = [name for name in dict.fromkeys(saved) if any(f".{name}." in f".{path}" for path in trained)]
    # In peft, modules_to_save cannot name single parameters.
    single = [path for path in trained if not any(f".{name}." in f".{path}" for name in modules)]
    return settings_class(
        num_virtual_tokens=num_tokens,
        prefix_projection=False,
        encoder_prefix=False,
        cross_prefix=False,
        positions=config["lit_peft"].get("positions", "peft"),
        modules_to_save=[*modules, *single] or None,
    )


def load_tensors(model: nn.Module, stored: dict[str, Tensor], folder: Path) -> None:
    """Copy a folder's table and trained modules into the attached prefix and the model."""
    attachment = attachment_of(model)
    found = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    (prefix,), table = _prefixes(attachment), found.get(_TABLE)
    if table is not None and _is_encoder_decoder(model):
        num_layers = len(prefix.shapes)
        if table.shape[-1] % num_layers == 0:
            entries = table.unflatten(-1, (num_layers, -1))
            found[_TABLE] = entries[:, [2 * layer % num_layers for layer in range(num_layers)]].flatten(1)
    copy_tensors({**_trained_modules(attachment), _TABLE: prefix.embedding}, found, folder)


def config(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    """Return the configuration of the attached prefix.

    Raises:
        LitPeftError: peft does not support such a prefix.
    """
    settings = attachment.settings
    assert isinstance(settings, PrefixSettings)
    prefix = _supported_prefix(attachment)
    heads, head_dim = prefix.shapes[0]
    return {
        "encoder_hidden_size": heads * head_dim,
        "init_weights": None,
        "lit_peft": {"method": settings.method, "positions": settings.positions},
        "modules_to_save": [name for name in settings.modules_to_save or () if name not in attachment.saved] or None,
        "num_attention_heads": heads,
        "num_layers": len(prefix.shapes),
        "num_transformer_submodules": 2 if _is_encoder_decoder(model) else 1,
        "num_virtual_tokens": settings.num_virtual_tokens,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "task_type": task_type(model),
        "token_dim": heads * head_dim,
    }


@torch.no_grad()
def tensors(attachment: Attachment) -> dict[str, Tensor]:
    """Return the table, computed by the MLP if there is one, and the trained modules, by peft's names."""
    prefix = _supported_prefix(attachment)
    table = prefix()
    if _is_encoder_decoder(attachment.model):
        num_layers = len(prefix.shapes)
        entries = table.unflatten(-1, (num_layers, -1))
        reordered = torch.empty_like(entries)
        for layer in range(num_layers):
            reordered[:, 2 * layer % num_layers] = entries[:, layer]
        table = reordered.flatten(1)
    trained = _trained_modules(attachment)
    return {_TABLE: table.clone(), **{f"{_PREFIX}{name}": tensor for name, tensor in trained.items()}}


def unsupported(attachment: Attachment) -> str | None:
    """Return what peft's format does not support about the attached prefixes, in words; None if it supports them."""
    settings, (prefix, *others) = attachment.settings, _prefixes(attachment)
    assert isinstance(settings, PrefixSettings)
    is_encoder_decoder = _is_encoder_decoder(attachment.model)
    if others or (settings.encoder_prefix and is_encoder_decoder):
        return "a prefix at the encoder or at cross-attention (encoder_prefix, cross_prefix)"
    if settings.per_query_head:
        return "per_query_head=True"
    if settings.leave_out:
        return f"leave_out={list(settings.leave_out)}"
    if any(attention_of(layer) is None for stack in layer_stacks(attachment.model) for layer in stack):
        return "a prefix of a model in which only some layers have attention"
    if any(len(shape) > 2 for shape in prefix.shapes):
        return "keys and values of different widths"
    if len(set(prefix.shapes)) > 1:
        return "layers with keys of different widths"
    if is_encoder_decoder and len(prefix.shapes) % 2 == 0:
        return "a separate prefix for each layer of an encoder-decoder with an even number of layers"
    return None


def _supported_prefix(attachment: Attachment) -> Prefix:
    """Return the only attached prefix.

    Raises:
        LitPeftError: there are several, or peft would read the table as another prefix.
    """
    found = unsupported(attachment)
    if found is not None:
        raise LitPeftError(f"peft's format cannot hold {found}: leave format out to write a folder for load_adapter.")
    return _prefixes(attachment)[0]


def _prefixes(attachment: Attachment) -> list[Prefix]:
    return [module for module in attachment.adapted.values() if isinstance(module, Prefix)]


def _trained_modules(attachment: Attachment) -> dict[str, nn.Parameter]:
    """Return the trained parameters of the base; `modules_to_save` may name a module that contains the prefix too."""
    own = tuple(f"{path}." for path in attachment.adapted)
    return {path: parameter for path, parameter in attachment.saved.items() if not path.startswith(own)}


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
