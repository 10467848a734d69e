"""Where a model takes its tokens: its embeddings, the part without the head, an ordinary token."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_peft.models.call_arguments import arguments


def token_embeddings(host: Any) -> nn.Embedding | None:
    """The table from which the host looks up its input; None if it has none, or cannot take other embeddings."""
    if getattr(host, "main_input_name", "input_ids") != "input_ids" or "inputs_embeds" not in arguments(host):
        return None
    if "perm_mask" in arguments(host):  # XLNet's layers attend in the order of a permutation of the input
        return None
    try:
        embeddings = host.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # transformers finds no embeddings (CANINE)
        return None
    return embeddings if isinstance(embeddings, nn.Embedding) else None


def decoder_of(model: Any) -> Any:
    """The part of a model that embeds the tokens and runs the layers, without the head."""
    decoder = model.base_model.get_decoder()
    if decoder is not model:
        return decoder
    # The `base_model_prefix` of some models (Llama 4) names no module.
    children = (child for child in model.children() if hasattr(child, "get_input_embeddings"))
    return next((child for child in children if "inputs_embeds" in arguments(child)), model)


def ordinary_token_id(config: Any) -> int:
    """The lowest token id that is not special. Some configs have several end tokens."""
    special: set[Any] = set()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(config, name, None)
        special.update(value if isinstance(value, (list, tuple)) else [value])
    return next(token_id for token_id in range(len(special) + 1) if token_id not in special)
