"""Where a model takes its tokens: its embeddings, the part without the head, an ordinary token."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_peft.models.call_arguments import arguments


def token_embeddings(host: Any, by_value: bool = False) -> nn.Embedding | None:
    """The table from which the host looks up its input; None if virtual tokens cannot stand among its tokens.

    Args:
        host: the module that is called with token ids.
        by_value: whether it must take `inputs_embeds` in place of ids.
    """
    names = arguments(host)
    if getattr(host, "main_input_name", "input_ids") != "input_ids" or (by_value and "inputs_embeds" not in names):
        return None
    config = getattr(host, "config", None)
    has_prompt = getattr(config, "prompt_length", None) and getattr(config, "use_prompt", True)
    # XLNet attends in the order of a permutation of its input; XLM has a language for each token, and writes from a
    # mask token; CPM-Ant puts a prompt of its own in front.
    if "perm_mask" in names or "langs" in names or has_prompt:
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
