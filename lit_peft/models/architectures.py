"""Finding the layers of a model and the modules in them: by `model_type`, or by structure for unknown models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lit_peft.models.architecture_table import ARCHITECTURES, candidates
from lit_peft.models.call_arguments import arguments
from lit_peft.models.layer_forms import Architecture, Sublayer
from lit_peft.models.towers import decoder_path
from lit_peft.models.transformers_internals import has_model_class
from lit_peft.nn.linear import linear_features
from lit_peft.util.errors import LitPeftError

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Layer",
    "Sublayer",
    "attention_of",
    "counts_over_mask",
    "has_module",
    "is_causal",
    "kv_shape",
    "layer_stacks",
    "learned_positions",
    "max_positions",
    "position_table",
    "room_for",
    "token_model",
]


class Layer(NamedTuple):
    """A transformer layer: its path in the model, its architecture, and the config of the model around it."""

    path: str
    module: nn.Module
    architecture: Architecture
    config: Any


def layer_stacks(model: nn.Module) -> list[list[Layer]]:
    """Find a model's layers: one list per stack (encoder, decoder), in the model's order.

    In a model that reads images, these are the layers of its language model.

    Args:
        model: a transformers model, or a module that contains some.

    Returns:
        The stacks; at least one.

    Raises:
        LitPeftError: the model has no list of layers of a known structure.
    """
    stacks: list[list[Layer]] = []
    language = f"{path}." if (path := decoder_path(model)) else ""
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or not f"{path}.".startswith(language):
            continue
        config = _config_of(model, path)
        owner = model.get_submodule(path.rpartition(".")[0])
        ends_in_norm = has_module(owner, "layer_norm") or has_module(owner, "final_layer_norm")
        for family in candidates(config, ends_in_norm):
            found = [next((each for each in family if _fits(each, layer)), None) for layer in module]
            layers = [
                Layer(f"{path}.{number}", layer, architecture, config)
                for number, (layer, architecture) in enumerate(zip(module, found, strict=True))
                if architecture is not None
            ]
            if len(layers) == len(module):
                stacks.append(layers)
                break
    if not stacks:
        raise LitPeftError(
            f"{type(model).__name__} has no transformer layers of a known structure, so there is no known place for an "
            "adapter: name the linear layers to adapt, with placement='llm_adapters' and target_modules=[...]."
        )
    return stacks


def token_model(model: nn.Module, layer: Layer) -> str | None:
    """Return the path of the innermost model around a layer that takes `input_ids`; None if there is none."""
    path = layer.path
    while path:
        path = path.rpartition(".")[0]
        if "input_ids" in arguments(model.get_submodule(path)):
            return path
    return None


def attention_of(layer: Layer) -> str | None:
    """Return the path, inside a layer, of the module that computes self-attention; None if the layer has none.

    Other layers of a hybrid model mix tokens by a recurrence or a convolution, which has no keys and values.
    """
    kinds = getattr(layer.config, "layer_types", None) or ()
    number = int(layer.path.rpartition(".")[2])
    if number < len(kinds) and kinds[number] == "linear_attention":
        return None
    return layer.architecture.self_attention


def kv_shape(attention: nn.Module, config: Any) -> tuple[int, ...]:
    """Return the shape of an attention module's keys and values.

    Args:
        attention: the module that computes attention.
        config: the config of the model it belongs to.

    Returns:
        The number of heads and the width of a head; in latent attention, the widths of a key and of a value.
    """
    heads, size = _key_shape(attention, config)
    value = getattr(attention, "v_head_dim", None)
    return (heads, size) if value in (None, size) else (heads, size, int(value))


def _key_shape(attention: nn.Module, config: Any) -> tuple[int, int]:

    def first(owner: Any, *names: str) -> Any:
        return next((getattr(owner, name) for name in names if getattr(owner, name, None) is not None), None)

    heads = first(attention, "num_heads", "num_attention_heads", "n_heads") or config.num_attention_heads
    size = first(attention, "qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim") or first(
        config, "head_dim"
    )
    size = int(size or config.hidden_size // heads)
    for name in ("k_proj", "key", "k_lin", "k", "key_proj"):
        projection = attention.get_submodule(name) if has_module(attention, name) else None
        if projection is not None and isinstance(getattr(projection, "weight", None), Tensor):
            return linear_features(projection)[1] // size, size
    groups = first(attention, "num_key_value_groups")
    if groups is not None:
        return int(heads) // int(groups), size
    # Falcon's newer architecture repeats each key for all queries of its group.
    if not getattr(attention, "new_decoder_architecture", False):
        heads = first(attention, "num_kv_heads") or first(config, "num_key_value_heads") or heads
    return int(heads), size


def has_module(module: nn.Module, path: str) -> bool:
    """Return whether `module` has a submodule at `path`."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _config_of(model: nn.Module, path: str) -> Any:
    """Return the config of the innermost model around `path`; None if there is none."""
    parts = path.split(".")
    for length in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:length])), "config", None)
        if hasattr(config, "hidden_size"):
            return config
    return None


def _fits(architecture: Architecture, layer: nn.Module) -> bool:
    places = [
        place
        for sublayer in (architecture.attention, architecture.ffn)
        if sublayer is not None
        for place in (
            sublayer.output,
            sublayer.residual,
            sublayer.norm,
            sublayer.more_residual,
            sublayer.more_output,
        )
    ]
    # A list of modules is never called itself: in such a layer there are several of a sublayer.
    return all(
        place is None or (has_module(layer, place) and not isinstance(layer.get_submodule(place), nn.ModuleList))
        for place in (*places, *architecture.marks)
    )


def position_table(host: nn.Module) -> nn.Embedding | None:
    """Return a model's table of position embeddings, not one of places in images; None if it has none."""
    host = host.get_submodule(decoder_path(host))
    for name, module in host.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and last in ("position_embeddings", "embed_positions", "wpe"):
            return module
    return None


def learned_positions(host: nn.Module) -> int | None:
    """Return how many positions a model's table of position embeddings has; None if it has no table."""
    table = position_table(host)
    if table is None:
        return None
    before = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(getattr(table, "offset", before))


def max_positions(host: nn.Module) -> int | None:
    """Return the number of positions that a model was made for; None if any number is possible.

    They are those of its table of positions or, with rotary positions that are not scaled, what its config says: beyond
    them such a model computes, but it was never trained there. Scaled rotary positions, relative positions and ALiBi
    have no limit that is known.
    """
    learned = learned_positions(host)
    if learned is not None:
        return learned
    for name, table in host.named_buffers():
        # A table that is computed, not learned (GPT-J, CodeGen).
        if name.rpartition(".")[2] == "embed_positions":
            return len(table)
    config: Any = getattr(host, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping) or getattr(config, "alibi", False):
        return None
    # Gemma 3 has one entry for each kind of layer.
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, Mapping)} - {None}
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit and kinds == {"default"} else None


def room_for(num_virtual_tokens: int, host: nn.Module, model: nn.Module) -> int | None:
    """Return how many positions a table limits the model to, with room for virtual tokens; None without a table.

    Args:
        num_virtual_tokens: the number of virtual tokens.
        host: the part of the model whose inputs they join.
        model: the model, for the message.

    Raises:
        LitPeftError: the virtual tokens fill the table, so that no room is left.
    """
    positions = learned_positions(host)
    if positions is not None and num_virtual_tokens >= positions:
        raise LitPeftError(
            f"num_virtual_tokens={num_virtual_tokens} leaves no room in the {positions} positions of "
            f"{type(model).__name__}: give a smaller number."
        )
    return positions


def is_causal(config: Any) -> bool:
    """Return whether each token of a model sees only the tokens before it, whatever the model's head."""
    if not getattr(config, "is_encoder_decoder", False) and has_model_class("AutoModelForImageTextToText", config):
        return True
    # BERT and its relatives can be both; their configs say which.
    encodes = has_model_class("AutoModelForMaskedLM", config) and not getattr(config, "is_decoder", False)
    return has_model_class("AutoModelForCausalLM", config) and not encodes


def counts_over_mask(host: nn.Module, config: Any) -> bool:
    """Return whether a causal model takes positions that are counted over its attention mask, from 0."""
    # RoBERTa's positions start after its padding id, and it skips padding itself.
    skips_padding = getattr(position_table(host), "padding_idx", None) is not None
    is_plain = has_model_class("AutoModelForCausalLM", config)  # others place the tokens of images in ways of their own
    return is_plain and is_causal(config) and "position_ids" in arguments(host) and not skips_padding
