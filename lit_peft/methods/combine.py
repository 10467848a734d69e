"""Combining several LoRAs into a new one: cat, linear, svd, TIES (arXiv:2306.01708), DARE (arXiv:2311.03099)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_peft.methods.adapters import adapters_of, new_adapter
from lit_peft.methods.attach import attach
from lit_peft.methods.attachment import Attachment, Model, attachment_of
from lit_peft.methods.expert_targets import is_expert_lora, target_name
from lit_peft.methods.lora import LoRASettings
from lit_peft.methods.threads import exclusive
from lit_peft.nn.invocation import InvokedLoRALinear
from lit_peft.nn.lora import LoRALayer
from lit_peft.nn.lora_attention import ProjectionLoRA
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief

Combination = Literal["linear", "cat", "svd", "ties", "dare"]


@exclusive
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
    """Combine LoRAs of a model into a new one, which becomes the active adapter.

    Args:
        model: a model with LoRA adapters.
        name: the new adapter's name.
        weights: the weight of each adapter to combine, by its name.
        combination: how to combine them. `cat` is exactly the weighted sum of the updates ΔW; its rank is the sum of
            their ranks. `svd` approximates the same sum at rank `r`. `linear` sums A and B separately, each scaled by
            the square root of weight · scale, as in peft; it needs equal ranks. `ties` and `dare` combine the updates
            and approximate the result at rank `r`.
        r: the rank for `svd`, `ties` and `dare`; when None, the largest rank of the adapters.
        density: the fraction of each update's entries to keep: the largest for `ties`, random ones for `dare`.
        seed: the seed of `dare`'s random choice.

    Returns:
        The same model.

    Raises:
        LitPeftError: an adapter does not exist or is not a plain LoRA, the adapters do not adapt the same modules, or
            an argument is not valid.
    """
    if combination not in get_args(Combination):
        known = closest(combination, get_args(Combination), 5)
        raise LitPeftError(f"combination={combination!r} is not known: use {known}.")
    if not weights:
        raise LitPeftError("weights is empty: give the adapters to combine, e.g. {'a': 0.5, 'b': 0.5}.")
    invalid = {
        name: weight for name, weight in weights.items() if not (isinstance(weight, Real) and math.isfinite(weight))
    }
    if invalid:
        raise LitPeftError(f"weights={brief(invalid)}: give each adapter a finite number, e.g. 0.5.")
    if r is not None and combination in ("cat", "linear"):
        raise LitPeftError(
            f"r={r} has no effect with combination={combination!r}, whose rank follows from the adapters: leave it "
            "out, or use 'svd'."
        )
    if r is not None and r < 1:
        raise LitPeftError(f"r={r}: give a rank of at least 1, or leave it out for the largest rank of the adapters.")
    if not 0 < density <= 1:
        raise LitPeftError(f"density={density}: give the fraction of entries to keep, above 0 and at most 1.")
    adapters = adapters_of(model)
    sources = [(adapters.find(source), weight) for source, weight in weights.items()]
    for (source, _), label in zip(sources, weights, strict=True):
        _check_source(label, source, sources[0][0])
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    for path in sources[0][0].adapted:
        layers = [(layer, weight) for s, weight in sources if isinstance(layer := s.adapted[path], LoRALayer)]
        stack = layers[0][0].stack
        parts = [
            _combine([_Update(layer, weight, expert) for layer, weight in layers], combination, r, density, generator)
            for expert in (range(stack[0]) if stack else [None])
        ]
        a, b = (torch.stack(factor) for factor in zip(*parts, strict=True))
        factors[path] = (a, b) if stack else (a[0], b[0])
    first = sources[0][0].settings
    assert isinstance(first, LoRASettings)
    names = {
        path: path.rpartition(".")[0] if isinstance(layer, ProjectionLoRA) else target_name(path, layer)
        for path, layer in sources[0][0].adapted.items()
    }
    parameters = [names[path] for path, layer in sources[0][0].adapted.items() if is_expert_lora(layer)]
    ranks = {names[path]: a.shape[-2] for path, (a, _) in factors.items()}
    rank = max(ranks.values())
    smaller_ranks = {name.replace(".", r"\."): value for name, value in ranks.items() if value != rank}
    settings = replace(
        first,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        target_modules=list(dict.fromkeys(name for name in names.values() if name not in parameters)),
        target_parameters=parameters or None,
        target_experts=False,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=smaller_ranks,
        alpha_pattern=dict(smaller_ranks),
        init_lora_weights="kaiming",
    )
    with new_adapter(model, name):
        attach(model, settings)
        for path, layer in attachment_of(model).adapted.items():
            assert isinstance(layer, LoRALayer)
            layer.lora_A.copy_(factors[path][0])
            layer.lora_B.copy_(factors[path][1])
    return model


def _check_source(label: str, source: Attachment, first: Attachment) -> None:
    """Check that an adapter is a plain LoRA on the same modules as the first one."""
    is_plain = all(
        isinstance(layer, LoRALayer)
        and layer.lora_magnitude is None
        and layer.original_weight is None
        and layer.lora_bias is None
        and layer.groups == 1
        and not isinstance(layer, InvokedLoRALinear)
        for layer in source.adapted.values()
    )
    if not is_plain or source.trained:
        raise LitPeftError(
            f"The adapter {label!r} cannot be combined: only LoRAs without DoRA, PiSSA, OLoRA, lora_bias, invocation "
            "tokens, convolutions with groups, trained modules and trained biases can."
        )
    if set(source.adapted) != set(first.adapted):
        differing = sorted(set(source.adapted) ^ set(first.adapted))[:2]
        raise LitPeftError(
            f"The adapter {label!r} does not adapt the same modules as the first one: they differ in "
            f"{', '.join(differing)}."
        )


class _Update:
    """A, B and the scale of one adapter's update of a module or of one expert, and the adapter's weight."""

    def __init__(self, layer: LoRALayer, weight: float, expert: int | None) -> None:
        a, b = layer.lora_A, layer.lora_B
        self.a, self.b = (a, b) if expert is None else (a[expert], b[expert])
        self.r, self.scaling, self.weight = layer.r, layer.scaling, weight


def _combine(
    updates: list[_Update], combination: Combination, r: int | None, density: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return A, [rank, in], and B, [out, rank], of the combination of updates, for a scale of 1."""
    if combination == "cat":
        a = torch.cat([update.a for update in updates])
        return a, torch.cat([update.b * (update.scaling * update.weight) for update in updates], 1)
    if combination == "linear":
        if len({update.r for update in updates}) > 1:
            raise LitPeftError("combination='linear' needs adapters of equal rank: use 'cat' or 'svd'.")
        # The sign of a negative weight goes to A only.
        roots = [(abs(update.weight) * update.scaling) ** 0.5 for update in updates]
        signs = [1.0 if update.weight >= 0 else -1.0 for update in updates]
        scaled = [update.a * (root * sign) for update, root, sign in zip(updates, roots, signs, strict=True)]
        b = torch.stack([update.b * root for update, root in zip(updates, roots, strict=True)]).sum(0)
        return torch.stack(scaled).sum(0), b
    deltas = [(update.b @ update.a * update.scaling).float() for update in updates]
    weights = [update.weight for update in updates]
    if combination == "ties":
        total = _ties([_keep_largest(delta, density) for delta in deltas], weights)
    else:
        if combination == "dare":
            masks = [torch.rand(delta.shape, generator=generator).to(delta.device) < density for delta in deltas]
            deltas = [delta * mask / density for delta, mask in zip(deltas, masks, strict=True)]
        total = torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)]).sum(0)
    rank = min(r or max(update.r for update in updates), *total.shape)
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _keep_largest(update: Tensor, density: float) -> Tensor:
    """Set all but the largest entries to zero; `density` is the fraction that stays."""
    index = update.abs().flatten().topk(max(1, int(density * update.numel()))).indices
    kept = torch.zeros_like(update).flatten()
    kept[index] = update.flatten()[index]
    return kept.view_as(update)


def _ties(updates: list[Tensor], weights: list[float]) -> Tensor:
    """For each entry, elect the sign of the sum, and average the weighted updates that have this sign (section 3)."""
    stacked = torch.stack(updates)
    agrees = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1, -1)
    weighted = stacked * stacked.new_tensor(weights)[:, None, None]
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)
