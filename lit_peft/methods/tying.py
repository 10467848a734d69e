"""`ensure_weight_tying`: an embedding and the head that shares its weight get one update, so that both stay equal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from lit_peft.methods.changes import tied_names
from lit_peft.methods.patterns import first_fitting
from lit_peft.util.errors import LitPeftError


def tied_heads(model: nn.Module) -> tuple[str, list[str]] | None:
    """Return the path of the input embeddings and those of the modules that share their weight; None if none does."""
    top: Any = model
    try:
        embedding = top.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # a model of two towers, none of which is the first
        return None
    path = next((path for path, module in model.named_modules() if module is embedding), "")
    if embedding is None or not isinstance(getattr(embedding, "weight", None), nn.Parameter):
        return None
    heads = [name.removesuffix(".weight") for name in tied_names(model, f"{path}.weight") if name.endswith(".weight")]
    heads = [head for head in heads if isinstance(model.get_submodule(head), nn.Linear)]
    return (path, heads) if heads else None


def tying_matters(model: nn.Module, targets: Collection[str], saved: Sequence[str], tokens: bool) -> bool:
    """Return whether an adapter is on an embedding or a head that share their weight.

    Args:
        model: the bare model.
        targets: full names of the modules with an update.
        saved: names of modules that are trained in full.
        tokens: whether rows of tokens are trained.
    """
    tied = tied_heads(model)
    if tied is None:
        return False
    for name in (tied[0], *tied[1]):
        if name in targets or any(f".{name}".endswith(f".{each.removesuffix('.weight')}") for each in saved):
            return True
    return tokens


def split_tied(model: nn.Module, targets: list[str], saved: Sequence[str], tokens: bool) -> tuple[list[str], list[str]]:
    """Return the modules that get updates of their own, and those that share the one of the embedding.

    Args:
        model: the bare model.
        targets: full names of the modules to adapt.
        saved: names of modules that are trained in full.
        tokens: whether rows of tokens are trained.

    Raises:
        LitPeftError: the model has no tied weights, or the adapter does not touch them.
    """
    tied = tied_heads(model)
    if tied is None:
        raise LitPeftError(
            f"ensure_weight_tying=True, but {type(model).__name__} has no head that shares the weight of its "
            "embeddings: leave it out."
        )
    embedding, heads = tied
    if {embedding, *heads} & set(targets):
        return list(dict.fromkeys([*(path for path in targets if path not in heads), embedding])), heads
    if not tying_matters(model, targets, saved, tokens):
        raise LitPeftError(
            f"ensure_weight_tying=True, but neither target_modules nor modules_to_save names {embedding} or "
            f"{', '.join(heads)}, which share their weight: name one of them, or leave it out."
        )
    return targets, []


def check_tied_patterns(model: nn.Module, rank_pattern: Mapping[str, int], alpha_pattern: Mapping[str, float]) -> None:
    """Refuse patterns that name a head and give it another value than the embedding, whose update it shares.

    Raises:
        LitPeftError: names the pattern's setting and both values.
    """
    embedding, heads = tied_heads(model) or ("", [])
    for field, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        first = first_fitting(patterns, [embedding, *heads], field)
        values = {name: patterns[pattern] for name, pattern in first.items()}
        own = values.get(embedding)
        if any(head in values and values[head] != own for head in heads):
            raise LitPeftError(
                f"{field} gives {values}, and with ensure_weight_tying=True {embedding} and its head share one update: "
                "give the value of the embedding alone."
            )
