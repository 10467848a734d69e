"""A new LoRA out of several: linear, cat, svd, TIES (arXiv:2306.01708), DARE (arXiv:2311.03099)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lit_peft.methods.adapters import adapters_of, new_adapter
from lit_peft.methods.attach import attach
from lit_peft.methods.attachment import Attachment, Model, attachment_of
from lit_peft.methods.lora import LoRASettings
from lit_peft.nn.lora import LoRALayer
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief

Combination = Literal["linear", "cat", "svd", "ties", "dare"]


@torch.no_grad()
def combine_adapters(
    model: Model,
    name: str,
    weights: Mapping[str, float],
    combination: Combination = "cat",
    r: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Model:
    """Make a new LoRA, the active one, out of others on the same model.

    Args:
        model: a model with LoRA adapters.
        name: the new adapter's name.
        weights: how much each one counts, by name.
        combination: `cat` is the weighted sum of the updates ΔW, exactly (ranks add up); `svd` the same sum at rank
            `r`; `linear` sums A and B apart, each by the root of weight · scale, as peft does (equal ranks only);
            `ties` and `dare` work on the updates, and bring the result to rank `r`.
        r: the rank for `svd`, `ties` and `dare`; the largest of the adapters' when None.
        density: share of each update's entries that `ties` (the largest) and `dare` (drawn at random) keep.
        seed: of `dare`'s draw.

    Raises:
        LitPeftError: an adapter is missing or not a plain LoRA, they adapt other modules, or a setting is wrong.
    """
    if combination not in get_args(Combination):
        known = closest(combination, get_args(Combination), 5)
        raise LitPeftError(f"combination={combination!r} is not known: use {known}.")
    if not weights:
        raise LitPeftError("weights is empty: give the adapters to combine, e.g. {'a': 0.5, 'b': 0.5}.")
    wrong = {
        name: weight for name, weight in weights.items() if not (isinstance(weight, Real) and math.isfinite(weight))
    }
    if wrong:
        raise LitPeftError(f"weights={brief(wrong)}: give each adapter a finite number, e.g. 0.5.")
    if r is not None and combination in ("cat", "linear"):
        raise LitPeftError(
            f"r={r} has no effect on combination={combination!r}, whose rank follows from the adapters': leave it out, "
            "or use 'svd'."
        )
    if r is not None and r < 1:
        raise LitPeftError(f"r={r}: give a rank of at least 1, or leave it out for the largest of the adapters'.")
    if not 0 < density <= 1:
        raise LitPeftError(f"density={density}: give the share of entries to keep, above 0 and up to 1.")
    adapters = adapters_of(model)
    sources = [(adapters.find(source), weight) for source, weight in weights.items()]
    for (source, _), label in zip(sources, weights, strict=True):
        _check(label, source, sources[0][0])
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    draw = torch.Generator().manual_seed(seed)
    for path in sources[0][0].adapted:
        layers = [(source.adapted[path], weight) for source, weight in sources]
        plain = [(layer, weight) for layer, weight in layers if isinstance(layer, LoRALayer)]
        factors[path] = _combined(plain, combination, r, density, draw)
    first = sources[0][0].settings
    assert isinstance(first, LoRASettings)
    ranks = {path: a.shape[0] for path, (a, _) in factors.items()}
    rank = max(ranks.values())
    settings = replace(
        first,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        target_modules=list(factors),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={path.replace(".", r"\."): own for path, own in ranks.items() if own != rank},
        alpha_pattern={path.replace(".", r"\."): own for path, own in ranks.items() if own != rank},
        init_lora_weights="kaiming",
    )
    with new_adapter(model, name):
        attach(model, settings)
        for path, layer in attachment_of(model).adapted.items():
            assert isinstance(layer, LoRALayer)
            layer.lora_A.copy_(factors[path][0])
            layer.lora_B.copy_(factors[path][1])
    return model


def _check(label: str, source: Attachment, first: Attachment) -> None:
    layers: list[nn.Module] = list(source.adapted.values())
    plain = all(
        isinstance(layer, LoRALayer) and layer.lora_magnitude is None and layer.original_weight is None
        for layer in layers
    )
    if not plain or source.trained:
        raise LitPeftError(
            f"The adapter {label!r} cannot be combined: only LoRAs can, without DoRA, PiSSA or OLoRA, trained modules "
            "and biases."
        )
    if set(source.adapted) != set(first.adapted):
        differing = sorted(set(source.adapted) ^ set(first.adapted))[:2]
        raise LitPeftError(f"The adapter {label!r} adapts other modules than the first, e.g. {', '.join(differing)}.")


def _combined(
    layers: list[tuple[LoRALayer, float]], how: str, r: int | None, density: float, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A and B, scale 1, of one layer's combined update."""
    if how == "cat":
        a = torch.cat([layer.lora_A for layer, _ in layers])
        return a, torch.cat([layer.lora_B * (layer.scaling * weight) for layer, weight in layers], 1)
    if how == "linear":
        if len({layer.r for layer, _ in layers}) > 1:
            raise LitPeftError("combination='linear' needs adapters of one rank: use 'cat' or 'svd'.")
        # The sign of a negative weight goes to A alone.
        roots = [(abs(weight) * layer.scaling) ** 0.5 for layer, weight in layers]
        signs = [1.0 if weight >= 0 else -1.0 for _, weight in layers]
        scaled = [layer.lora_A * (root * sign) for (layer, _), root, sign in zip(layers, roots, signs, strict=True)]
        b = torch.stack([layer.lora_B * root for (layer, _), root in zip(layers, roots, strict=True)]).sum(0)
        return torch.stack(scaled).sum(0), b
    updates = [layer.delta_weight().float() for layer, _ in layers]
    amounts = [weight for _, weight in layers]
    if how == "ties":
        total = _ties([_largest(update, density) for update in updates], amounts)
    else:
        if how == "dare":
            masks = [torch.rand(update.shape, generator=draw).to(update.device) < density for update in updates]
            updates = [update * mask / density for update, mask in zip(updates, masks, strict=True)]
        total = torch.stack([update * amount for update, amount in zip(updates, amounts, strict=True)]).sum(0)
    rank = min(r or max(layer.r for layer, _ in layers), *total.shape)
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _largest(update: Tensor, density: float) -> Tensor:
    """The update with all but its largest entries, a share of `density`, set to zero."""
    places = update.abs().flatten().topk(max(1, int(density * update.numel()))).indices
    kept = torch.zeros_like(update).flatten()
    kept[places] = update.flatten()[places]
    return kept.view_as(update)


def _ties(updates: list[Tensor], amounts: list[float]) -> Tensor:
    """For each entry: elect the sign of the total, and take the weighted mean of those that agree (section 3)."""
    stacked = torch.stack(updates)
    agrees = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1, -1)
    weighted = stacked * stacked.new_tensor(amounts)[:, None, None]
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)
