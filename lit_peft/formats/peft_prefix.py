"""Prefix Tuning and P-Tuning v2 in peft's format: one table `prompt_embeddings`, any MLP folded away.

peft's encoder-decoders have a prefix at the decoder's self-attention alone, and read the table of L layers in a way of
their own: layer l has entry 2l mod L of it. Its positions count padding, ours do not; what a folder of ours was trained
with stands in `lit_peft.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.formats.files import copy_tensors
from lit_peft.formats.peft_task import HEADS, task_type
from lit_peft.methods.attachment import Attachment, MethodSettings, attachment_of
from lit_peft.methods.p_tuning_v2 import PTuningV2Settings
from lit_peft.methods.prefix import PrefixSettings
from lit_peft.methods.prefix_tuning import PrefixTuningSettings
from lit_peft.nn.prefix import Prefix
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief, check_types

_PREFIX = "base_model."
_TABLE = "prompt_embeddings"

READ = {"num_virtual_tokens", "num_layers", "num_transformer_submodules", "modules_to_save"}
# The table and the model say these too, or they are about how the table came to be.
NEUTRAL = {"encoder_hidden_size", "init_weights", "num_attention_heads", "prefix_projection", "token_dim"}


def writes(settings: MethodSettings) -> bool:
    """Whether the settings are those of a prefix."""
    return isinstance(settings, PrefixSettings)


def settings(model: nn.Module, config: dict[str, Any], stored: dict[str, Tensor]) -> PrefixSettings:
    """The settings in a folder's configuration: a table without an MLP, which has been folded away."""
    kind = PTuningV2Settings if str(config.get("task_type")) in HEADS else PrefixTuningSettings
    table, length = stored.get(_TABLE), config.get("num_virtual_tokens")
    if table is None or table.dim() != 2 or not isinstance(length, int) or len(table) != length:
        shape = None if table is None else tuple(table.shape)
        raise LitPeftError(
            f"adapter_config.json: num_virtual_tokens={brief(length)}, and the stored {_TABLE} has the shape {shape}: "
            "the folder is not whole."
        )
    saved = config.get("modules_to_save") or ()
    check_types(PrefixSettings, {"modules_to_save": saved}, "adapter_config.json: ")
    trained = [name.removeprefix(_PREFIX) for name in stored if name != _TABLE]
    modules = [name for name in dict.fromkeys(saved) if any(f".{name}." in f".{path}" for path in trained)]
    # peft knows modules alone.
    parameters = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    single = [path for path in trained if path in parameters and not any(f".{name}." in f".{path}" for name in modules)]
    return kind(
        num_virtual_tokens=length,
        prefix_projection=False,
        encoder_prefix=False,
        cross_prefix=False,
        positions=config["lit_peft"].get("positions", "peft"),
        modules_to_save=[*modules, *single] or None,
    )


def load_tensors(model: nn.Module, stored: dict[str, Tensor], folder: Path) -> None:
    """Copy a folder's table and trained modules into what was attached."""
    attachment = attachment_of(model)
    found = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    (prefix,), table = _prefixes(attachment), found.get(_TABLE)
    if table is not None and _is_twofold(model):
        layers = len(prefix.shapes)
        if table.shape[-1] % layers == 0:
            entries = table.unflatten(-1, (layers, -1))
            found[_TABLE] = entries[:, [2 * layer % layers for layer in range(layers)]].flatten(1)
    copy_tensors({_TABLE: prefix.embedding, **attachment.saved}, found, folder)


def config(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    """The configuration of the attached prefix.

    Raises:
        LitPeftError: peft cannot have such a prefix.
    """
    settings = attachment.settings
    assert isinstance(settings, PrefixSettings)
    prefix, twofold = _writable(attachment), _is_twofold(model)
    heads, size = prefix.shapes[0]
    return {
        "encoder_hidden_size": heads * size,
        "init_weights": None,
        "lit_peft": {"method": settings.method, "positions": settings.positions},
        "modules_to_save": [name for name in settings.modules_to_save or () if name not in attachment.saved] or None,
        "num_attention_heads": heads,
        "num_layers": len(prefix.shapes),
        "num_transformer_submodules": 2 if twofold else 1,
        "num_virtual_tokens": settings.num_virtual_tokens,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "task_type": task_type(model),
        "token_dim": heads * size,
    }


@torch.no_grad()
def tensors(attachment: Attachment) -> dict[str, Tensor]:
    """The table, the MLP folded away, and the trained modules, by peft's names."""
    prefix = _writable(attachment)
    table = prefix()
    if _is_twofold(attachment.model):
        layers = len(prefix.shapes)
        entries = table.unflatten(-1, (layers, -1))
        stored = torch.empty_like(entries)
        for layer in range(layers):
            stored[:, 2 * layer % layers] = entries[:, layer]
        table = stored.flatten(1)
    return {_TABLE: table.clone(), **{f"{_PREFIX}{name}": value for name, value in attachment.saved.items()}}


def _is_twofold(model: nn.Module) -> bool:
    """Whether peft takes the model for an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _prefixes(attachment: Attachment) -> list[Prefix]:
    return [module for module in attachment.adapted.values() if isinstance(module, Prefix)]


def problem(attachment: Attachment) -> str | None:
    """What about the attached prefixes peft's format cannot hold."""
    settings, (prefix, *others) = attachment.settings, _prefixes(attachment)
    assert isinstance(settings, PrefixSettings)
    if others or (settings.encoder_prefix and _is_twofold(attachment.model)):
        return "a prefix at the encoder or at cross-attention (encoder_prefix, cross_prefix)"
    if settings.per_query_head:
        return "per_query_head=True"
    if settings.leave_out:
        return f"leave_out={list(settings.leave_out)}"
    if len(set(prefix.shapes)) > 1:
        return "layers with keys of different widths"
    if _is_twofold(attachment.model) and len(prefix.shapes) % 2 == 0:
        return "a prefix of its own in each layer of an encoder-decoder with an even number of layers"
    return None


def _writable(attachment: Attachment) -> Prefix:
    """The one prefix that peft has a place for.

    Raises:
        LitPeftError: there are others, or peft would read another one from the table.
    """
    wrong = problem(attachment)
    if wrong is not None:
        raise LitPeftError(f"peft's format cannot hold {wrong}: leave format out to write a folder for load_adapter.")
    return _prefixes(attachment)[0]
