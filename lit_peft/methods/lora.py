"""LoRA (Hu et al. 2021, arXiv:2106.09685): settings, and how it attaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lit_peft.methods.attachment import Attachment, MethodSettings, Model, attachment_of, base_name, detach
from lit_peft.methods.mixin import MethodMixin
from lit_peft.methods.targets import check_expression, check_patterns, default_targets, find_targets, pattern_values
from lit_peft.models.quantization import dequantize
from lit_peft.nn.lora import InitLoRA, LoRAEmbedding, LoRALayer, LoRALinear, check, check_mergeable
from lit_peft.nn.quantized import dense_linear, is_quantized
from lit_peft.util.errors import LitPeftError


@dataclass(frozen=True)
class LoRASettings(MethodSettings):
    """Settings of LoRA.

    Args:
        r: rank of each update.
        lora_alpha: updates are scaled by `lora_alpha / r`.
        lora_dropout: dropout probability on the update's input.
        target_modules: names, a regular expression, or `"all-linear"`; the query and value projections when None.
        exclude_modules: names or a regular expression of modules to leave out.
        rank_pattern: rank by module name (regular expressions), where it differs from `r`.
        alpha_pattern: the same for `lora_alpha`.
        layers_to_transform: numbers of the layers to adapt, counted from 0; all when None.
        layers_pattern: the name of the list of layers.
        bias: which biases are trained as well: `none`, `all`, or `lora_only` (of the adapted layers).
        use_rslora: scale by `lora_alpha / sqrt(r)` (arXiv:2312.03732).
        use_dora: weight-decomposed updates (arXiv:2402.09353).
        init_lora_weights: `kaiming`, `gaussian`, `pissa` (arXiv:2404.02948) or `olora` (arXiv:2406.01775).
        loraplus_lr_ratio: B learns this many times faster than A (LoRA+, arXiv:2402.12354).
    """

    method: ClassVar[str] = "lora"
    learning_rate: ClassVar[float] = 5e-4
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: InitLoRA = "kaiming"
    loraplus_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(r=self.r, lora_dropout=self.lora_dropout, init_lora_weights=self.init_lora_weights)
        if any(rank < 1 for rank in self.rank_pattern.values()):
            raise LitPeftError(f"rank_pattern={self.rank_pattern}: the ranks must be positive integers, e.g. 8.")
        if self.bias not in ("none", "all", "lora_only"):
            raise LitPeftError(f"bias={self.bias!r} is not known: use 'none', 'all' or 'lora_only'.")
        if self.loraplus_lr_ratio <= 0:
            raise LitPeftError(f"loraplus_lr_ratio={self.loraplus_lr_ratio}: give a positive number, e.g. 16.")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_expression(name, value)
            elif name.endswith("_pattern"):
                for pattern in value or ():
                    check_expression(name, pattern)

    def learning_rate_factor(self, name: str) -> float:
        """B's learning rate is `loraplus_lr_ratio` times that of everything else."""
        return self.loraplus_lr_ratio if name.rpartition(".")[2] == "lora_B" else 1.0

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Wrap every target in a LoRA layer and train the biases that `bias` names."""
        paths = find_targets(
            model,
            self.target_modules if self.target_modules is not None else default_targets(model),
            self.exclude_modules,
            self.layers_to_transform,
            self.layers_pattern,
            self.modules_to_save,
        )
        check_patterns("rank_pattern", self.rank_pattern, paths)
        check_patterns("alpha_pattern", self.alpha_pattern, paths)
        ranks = pattern_values(self.rank_pattern, paths, self.r)
        alphas = pattern_values(self.alpha_pattern, paths, self.lora_alpha)
        for path in paths:
            base = model.get_submodule(path)
            kind = LoRAEmbedding if isinstance(base, nn.Embedding) else LoRALinear
            layer = kind(
                base,  # type: ignore[arg-type]
                r=int(ranks[path]),
                lora_alpha=alphas[path],
                lora_dropout=self.lora_dropout,
                use_rslora=self.use_rslora,
                use_dora=self.use_dora,
                init_lora_weights=self.init_lora_weights,
            )
            attachment.replace(path, layer)
            if self.bias == "lora_only" and layer.bias is not None:
                attachment.train(f"{path}.base_layer.bias")
        if self.bias == "all":
            for name, _ in list(model.named_parameters()):
                if name.endswith(".bias"):
                    attachment.train(name)


class LoRAMixin(MethodMixin):
    """LoRA as a LightningModule's method."""

    settings_class = LoRASettings


def merge(model: Model) -> Model:
    """Fold the trained updates into the base weights and return the plain model.

    A quantized base is dequantized for it, all of it, in the type of its input embeddings: the merged weights are
    those of the quantized base plus the update, up to that type's rounding. The original base's own weights differ
    from them by what quantizing took away.

    Raises:
        LitPeftError: nothing is attached, or the attached method is not a weight update.
    """
    attachment = attachment_of(model)
    layers = {path: layer for path, layer in attachment.adapted.items() if isinstance(layer, LoRALayer)}
    check_mergeable(model)
    if not layers:
        raise LitPeftError(f"{attachment.settings.method!r} is not a weight update and cannot be merged.")
    copies = [pair for path in layers for pair in _untie(model, f"{path}.base_layer.weight")]
    quantized = any(is_quantized(module) for module in model.modules())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad), torch.float32)
    for layer in layers.values():
        if is_quantized(layer.base_layer):
            layer.base_layer = dense_linear(layer.base_layer, dtype)
        # One after the other: the kept copy of W is let go before the next one is made.
        layer.merge()
        layer.keep_merged()
    saved = attachment.saved
    detach(model)
    for copy, original in copies:
        copy.requires_grad_(original.requires_grad)
    with torch.no_grad():
        for path, value in saved.items():
            _untie(model, base_name(path))
            model.get_parameter(base_name(path)).copy_(value)
    if quantized:
        dequantize(model, dtype)
    return model


def _untie(model: nn.Module, name: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Give every module that shares a parameter (tied embeddings) one of its own: it is about to change in one alone.

    All of them, since transformers saves a model whose config says that nothing is tied only if nothing is.

    Returns:
        Each new parameter, with the one that it is a copy of.
    """
    copies: list[tuple[nn.Parameter, nn.Parameter]] = []
    original = model.get_parameter(name)
    sharing = [other for other, p in model.named_parameters(remove_duplicate=False) if p is original and other != name]
    for other in sharing:
        parent, _, last = other.rpartition(".")
        copy = nn.Parameter(original.detach().clone(), original.requires_grad)
        setattr(model.get_submodule(parent), last, copy)
        copies.append((copy, original))
    config: Any = getattr(model, "config", None)
    if sharing and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return copies
