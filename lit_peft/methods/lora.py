"""LoRA (Hu et al. 2021, arXiv:2106.09685): settings, attaching and merging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lit_peft.methods.attach import detach
from lit_peft.methods.attachment import Attachment, MethodSettings, Model, attachment_of, base_name
from lit_peft.methods.changes import owner_of, tied_names
from lit_peft.methods.expert_targets import adapt_parameters, find_parameters
from lit_peft.methods.mixin import MethodMixin
from lit_peft.methods.targets import check_expression, check_patterns, default_targets, find_targets, pattern_values
from lit_peft.methods.threads import exclusive
from lit_peft.methods.tokens import merged_rows, write_rows
from lit_peft.models.quantization import dequantize
from lit_peft.nn.expert_lora import ExpertLoRA
from lit_peft.nn.lora import InitLoRA, LoRAEmbedding, LoRALayer, LoRALinear, check, check_mergeable
from lit_peft.nn.quantized import dense_linear, is_quantized
from lit_peft.nn.quantized_experts import make_dense
from lit_peft.util.errors import LitPeftError


@dataclass(frozen=True)
class LoRASettings(MethodSettings):
    """Settings of LoRA: `h = W x + s · B A x` with s = `lora_alpha / r` (section 4.1).

    Args:
        r: rank of each update.
        lora_alpha: scales the updates by `lora_alpha / r`.
        lora_dropout: dropout probability on the input of the update.
        target_modules: the modules to adapt: a list of names, a regular expression, or `"all-linear"`. None selects
            the query and value projections, and an empty list none (for `target_parameters` alone). In a model that
            reads images, `"language"`, `"vision"`, `"projector"` and `"all"` select all linear layers of these parts,
            also in a list; None selects from its language model.
        target_parameters: parameters to adapt that are no linear layers, by their names or the last parts of them, as
            in peft: the stacked weights of a mixture's experts, e.g. `["experts.gate_up_proj", "experts.down_proj"]`.
            Each expert has an A and a B of its own.
        target_experts: adapt every parameter that holds the weights of several experts, besides `target_modules`. This
            trains r · (d_in + d_out) parameters for each of the experts, so many more than for the other layers.
        exclude_modules: names or a regular expression of modules to leave out.
        rank_pattern: ranks that differ from `r`, by regular expression on the module's name.
        alpha_pattern: values that differ from `lora_alpha`, by regular expression on the module's name.
        layers_to_transform: indices of the layers to adapt, counted from 0. None adapts all layers.
        layers_pattern: name of the model's list of layers.
        bias: which biases to train: `none`, `all`, or `lora_only` (those of the adapted layers).
        use_rslora: scale by `lora_alpha / sqrt(r)` instead (arXiv:2312.03732).
        use_dora: weight-decomposed updates (arXiv:2402.09353).
        init_lora_weights: `kaiming`, `gaussian`, `pissa` (arXiv:2404.02948) or `olora` (arXiv:2406.01775).
        loraplus_lr_ratio: ratio of B's learning rate to A's (LoRA+, arXiv:2402.12354).

    Raises:
        LitPeftError: a setting is invalid.
    """

    method: ClassVar[str] = "lora"
    learning_rate: ClassVar[float] = 5e-4
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    target_parameters: list[str] | tuple[str, ...] | None = None
    target_experts: bool = False
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
            raise LitPeftError(f"rank_pattern={self.rank_pattern}: each rank must be a positive integer, e.g. 8.")
        if self.bias not in ("none", "all", "lora_only"):
            raise LitPeftError(f"bias={self.bias!r} is not known: use 'none', 'all' or 'lora_only'.")
        if self.loraplus_lr_ratio <= 0:
            raise LitPeftError(f"loraplus_lr_ratio={self.loraplus_lr_ratio}: give a positive number, e.g. 16.")
        if self.target_parameters or self.target_experts:
            self._check_parameters()
        for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
            value = getattr(self, name) or ()
            # A list of modules holds names, not regular expressions.
            patterns = [value] if isinstance(value, str) else value if name.endswith("_pattern") else ()
            for pattern in patterns:
                check_expression(name, pattern)

    def _check_parameters(self) -> None:
        """Check the settings that a LoRA on parameters does not have."""
        field = "target_experts" if self.target_experts else "target_parameters"
        if self.use_dora or self.lora_dropout:
            wrong = "use_dora=True" if self.use_dora else f"lora_dropout={self.lora_dropout}"
            raise LitPeftError(
                f"{wrong} does not work with {field}, neither here nor in peft: leave one of them out. Weight decay or "
                "a smaller r also counter overfitting."
            )
        if self.init_lora_weights not in ("kaiming", "gaussian"):
            raise LitPeftError(
                f"init_lora_weights={self.init_lora_weights!r} is defined for linear layers only: use 'kaiming' or "
                f"'gaussian' with {field}."
            )

    def learning_rate_factor(self, name: str) -> float:
        """Return `loraplus_lr_ratio` for B, and 1 for any other parameter."""
        return self.loraplus_lr_ratio if name.rpartition(".")[2] == "lora_B" else 1.0

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Wrap each target in a LoRA layer and train the biases that `bias` selects.

        Args:
            model: the frozen model.
            attachment: makes and records the changes.

        Raises:
            LitPeftError: a setting matches nothing in the model, or a layer cannot be adapted.
        """
        parameters = find_parameters(
            model,
            self.target_parameters,
            self.target_experts,
            self.exclude_modules,
            self.layers_to_transform,
            self.layers_pattern,
            self.modules_to_save,
        )
        targets = self.target_modules if self.target_modules is not None else default_targets(model)
        paths = (
            find_targets(
                model,
                targets,
                self.exclude_modules,
                self.layers_to_transform,
                self.layers_pattern,
                self.modules_to_save,
                with_experts=bool(parameters),
            )
            if targets or not parameters
            else []
        )
        names = [*paths, *parameters]
        check_patterns("rank_pattern", self.rank_pattern, names)
        check_patterns("alpha_pattern", self.alpha_pattern, names)
        ranks = pattern_values(self.rank_pattern, names, self.r)
        alphas = pattern_values(self.alpha_pattern, names, self.lora_alpha)
        for path in paths:
            base = model.get_submodule(path)
            layer_class = LoRAEmbedding if isinstance(base, nn.Embedding) else LoRALinear
            layer = layer_class(
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
        adapt_parameters(attachment, parameters, ranks, alphas, self.use_rslora, self.init_lora_weights)
        if self.bias == "all":
            for name, _ in list(model.named_parameters(remove_duplicate=False)):
                if name.endswith(".bias"):
                    attachment.train(name)


class LoRAMixin(MethodMixin):
    """Makes LoRA the method of a LightningModule."""

    settings_class = LoRASettings


@exclusive
def merge(model: Model) -> Model:
    """Fold the trained updates into the base weights permanently (2106.09685, section 4.1).

    A quantized base is dequantized completely, to the dtype of its first frozen floating-point parameter. The merged
    weights are those of the quantized base plus the update, rounded to that dtype; what quantization lost stays lost.

    Args:
        model: a model with LoRA attached.

    Returns:
        The same model, without LoRA layers.

    Raises:
        LitPeftError: no method is attached, or the attached method is not a weight update.
    """
    attachment = attachment_of(model)
    layers = {path: layer for path, layer in attachment.adapted.items() if isinstance(layer, LoRALayer)}
    check_mergeable(model)
    if not layers:
        raise LitPeftError(
            f"The attached method {attachment.settings.method!r} is not a weight update and cannot be merged: save it "
            "with lit_peft.save_adapter instead."
        )
    modules = [path for path, layer in layers.items() if not isinstance(layer, ExpertLoRA)]
    copies = [pair for path in modules for pair in _untie(model, f"{path}.base_layer.weight")]
    quantized = any(is_quantized(module) for module in model.modules())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad), torch.float32)
    for layer in layers.values():
        if is_quantized(layer.base_layer):
            layer.base_layer = dense_linear(layer.base_layer, dtype)
        elif isinstance(layer, ExpertLoRA):
            make_dense(layer.base_layer, layer.parameter_name, dtype)
        # `keep_merged` frees the copy of W that `merge` makes, so only one copy exists at a time.
        layer.merge()
        layer.keep_merged()
    saved, tokens = attachment.saved, merged_rows(attachment)
    detach(model)
    write_rows(model, *tokens)
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
    """Give each module that shares a parameter (tied embeddings) a copy, because one of them is about to change.

    All of them get one: with `tie_word_embeddings=False`, transformers can only save a model that has no tied weights.

    Returns:
        Pairs of a new parameter and the one that it copies.
    """
    copies: list[tuple[nn.Parameter, nn.Parameter]] = []
    original = model.get_parameter(name)
    for tied_name in tied_names(model, name):
        copy = nn.Parameter(original.detach().clone(), original.requires_grad)
        owner, last = owner_of(model, tied_name)
        setattr(owner, last, copy)
        copies.append((copy, original))
    config: Any = getattr(model, "config", None)
    if copies and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return copies
