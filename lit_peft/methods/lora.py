"""LoRA (Hu et al. 2021, arXiv:2106.09685): settings, attaching and merging."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lit_peft.methods.attach import detach
from lit_peft.methods.attachment import Attachment, MethodSettings, Model, attachment_of, base_name
from lit_peft.methods.changes import ReplaceModule, owner_of, tied_names
from lit_peft.methods.expert_targets import adapt_parameters, find_parameters
from lit_peft.methods.invocation import add_invocation, invoked_layer
from lit_peft.methods.layer_kinds import can_adapt, lora_class, new_layer
from lit_peft.methods.mixin import MethodMixin
from lit_peft.methods.patterns import check_patterns, pattern_values
from lit_peft.methods.targets import check_expression, default_targets, find_targets
from lit_peft.methods.threads import exclusive
from lit_peft.methods.tokens import merged_rows, write_rows
from lit_peft.methods.tying import check_tied_patterns, split_tied
from lit_peft.models.quantization import dequantize
from lit_peft.nn.expert_lora import ExpertLoRA
from lit_peft.nn.lora import InitLoRA, LoRAEmbedding, LoRALayer, check, check_mergeable
from lit_peft.nn.lora_attention import LoRAMultihead
from lit_peft.nn.lora_sum import ParameterLoRASum
from lit_peft.nn.lora_tied import TiedLoRALinear
from lit_peft.nn.quantized import dense_linear, is_quantized
from lit_peft.nn.quantized_experts import make_dense
from lit_peft.nn.weight_update import WeightUpdate
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
        ensure_weight_tying: whether an embedding and the head that shares its weight get one update together (or one
            trained copy, with modules_to_save), so that they stay tied, also when they are merged.
        alora_invocation_tokens: ids of tokens; the update acts only from their last occurrence in a row on, so that
            keys and values that the base has cached for the text before stay valid (aLoRA, arXiv:2504.12397).
        lora_bias: whether each update has a bias of its own, `s · (B A x + bias)`. Merging needs layers with a bias.

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
    ensure_weight_tying: bool = False
    alora_invocation_tokens: list[int] | tuple[int, ...] | None = None
    lora_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(r=self.r, lora_dropout=self.lora_dropout, init_lora_weights=self.init_lora_weights)
        if any(rank < 1 for rank in self.rank_pattern.values()):
            raise LitPeftError(f"rank_pattern={self.rank_pattern}: each rank must be a positive integer, e.g. 8.")
        if self.bias not in ("none", "all", "lora_only"):
            raise LitPeftError(f"bias={self.bias!r} is not known: use 'none', 'all' or 'lora_only'.")
        if self.loraplus_lr_ratio <= 0:
            raise LitPeftError(f"loraplus_lr_ratio={self.loraplus_lr_ratio}: give a positive number, e.g. 16.")
        if self.lora_bias and (self.use_dora or self.init_lora_weights in ("pissa", "olora")):
            wrong = "use_dora=True" if self.use_dora else f"init_lora_weights={self.init_lora_weights!r}"
            raise LitPeftError(f"lora_bias=True does not work with {wrong}, neither here nor in peft: leave one out.")
        if self.ensure_weight_tying and isinstance(self.trainable_token_indices, dict):
            raise LitPeftError(
                "ensure_weight_tying=True does not work with trainable_token_indices by the names of modules: give one "
                "list of token ids, which counts for the embeddings and the head that shares their weight."
            )
        if self.alora_invocation_tokens is not None:
            self._check_invocation()
        if self.target_parameters or self.target_experts:
            self._check_parameters()
        for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
            value = getattr(self, name) or ()
            # A list of modules holds names, not regular expressions.
            patterns = [value] if isinstance(value, str) else value if name.endswith("_pattern") else ()
            for pattern in patterns:
                check_expression(name, pattern)

    def _check_invocation(self) -> None:
        """Check the invocation tokens, and the settings that a LoRA with them does not have."""
        tokens = self.alora_invocation_tokens
        if not tokens or any(isinstance(token, bool) or token < 0 for token in tokens):
            raise LitPeftError(
                f"alora_invocation_tokens={tokens}: give the ids of one or more tokens, e.g. those of a tokenizer's "
                "encode(text, add_special_tokens=False), or leave it out."
            )
        wrong = {
            "use_dora=True": self.use_dora,
            f"init_lora_weights={self.init_lora_weights!r}": self.init_lora_weights in ("pissa", "olora"),
            "ensure_weight_tying=True": self.ensure_weight_tying,
            "target_parameters": self.target_parameters,
            "target_experts=True": self.target_experts,
        }
        first = next((name for name, is_set in wrong.items() if is_set), None)
        if first is not None:
            raise LitPeftError(f"alora_invocation_tokens do not work with {first}, nor in peft: leave one of them out.")

    def _check_parameters(self) -> None:
        """Check the settings that a LoRA on parameters does not have."""
        field = "target_experts" if self.target_experts else "target_parameters"
        if self.use_dora or self.lora_dropout or self.lora_bias:
            dropout_or_bias = f"lora_dropout={self.lora_dropout}" if self.lora_dropout else "lora_bias=True"
            wrong = "use_dora=True" if self.use_dora else dropout_or_bias
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
        """Return `loraplus_lr_ratio` for B and the update's bias, and 1 for any other parameter."""
        return self.loraplus_lr_ratio if name.rpartition(".")[2] in ("lora_B", "lora_bias") else 1.0

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
                can_adapt=can_adapt,
            )
            if targets or not parameters
            else []
        )
        tied: list[str] = []
        if self.ensure_weight_tying:
            paths, tied = split_tied(model, paths, self.modules_to_save or (), bool(self.trainable_token_indices))
            if tied and self.use_dora:
                raise LitPeftError(
                    "ensure_weight_tying=True does not work with use_dora=True, whose magnitudes of an embedding and "
                    "of its head differ: leave one of them out."
                )
        names = [*paths, *tied, *parameters]
        check_patterns("rank_pattern", self.rank_pattern, names)
        check_patterns("alpha_pattern", self.alpha_pattern, names)
        ranks = pattern_values(self.rank_pattern, names, self.r)
        alphas = pattern_values(self.alpha_pattern, names, self.lora_alpha)
        if tied:
            check_tied_patterns(model, self.rank_pattern, self.alpha_pattern)
        invocation = add_invocation(attachment, self.alora_invocation_tokens)
        tied_embedding = model.get_input_embeddings() if tied else None  # type: ignore[operator]
        for path in paths:
            base = model.get_submodule(path)
            settings = {
                "r": int(ranks[path]),
                "lora_alpha": alphas[path],
                "use_rslora": self.use_rslora,
                "init_lora_weights": self.init_lora_weights,
            }
            if lora_class(base) is None and invocation is None:
                self._adapt_attention(attachment, path, settings)
                continue
            others = {"lora_dropout": self.lora_dropout, "use_dora": self.use_dora, "lora_bias": self.lora_bias}
            if invocation is not None:
                layer: LoRALayer = invoked_layer(path, base, invocation, {**settings, **others})
            else:
                layer = new_layer(base, {**settings, **others})
            attachment.replace(path, layer)
            if isinstance(layer, LoRAEmbedding) and tied and base is tied_embedding:
                for head in tied:
                    attachment.replace(head, TiedLoRALinear(model.get_submodule(head), layer, **settings, **others))
            if self.bias == "lora_only" and layer.bias is not None:
                attachment.train(f"{path}.base_layer.bias")
        adapt_parameters(attachment, parameters, ranks, alphas, self.use_rslora, self.init_lora_weights)
        if self.bias == "all":
            for name, _ in list(model.named_parameters(remove_duplicate=False)):
                if name.endswith(".bias"):
                    attachment.train(name)

    def _adapt_attention(self, attachment: Attachment, path: str, settings: dict[str, Any]) -> None:
        """Add a LoRA to both projections of an `nn.MultiheadAttention`."""
        if self.use_dora or self.lora_bias or self.lora_dropout:
            dropout_or_bias = f"lora_dropout={self.lora_dropout}" if self.lora_dropout else "lora_bias=True"
            wrong = "use_dora=True" if self.use_dora else dropout_or_bias
            raise LitPeftError(
                f"{wrong} does not work with {path}, an nn.MultiheadAttention, whose code needs whole weights: leave "
                "the module out of target_modules, or leave the setting out."
            )
        base: Any = attachment.model.get_submodule(path)
        layers = LoRAMultihead.updates(base, **settings)
        attachment.make(ReplaceModule(path, LoRAMultihead(base, layers).train(base.training)))
        attachment.adapted.update({f"{path}.lora_{name.split('.')[0]}": layer for name, layer in layers.items()})
        if self.bias == "lora_only" and base.out_proj.bias is not None:
            attachment.train(f"{path}.base_layer.out_proj.bias")


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
    layers = {path: layer for path, layer in attachment.adapted.items() if isinstance(layer, WeightUpdate)}
    check_mergeable(model)
    if not layers:
        raise LitPeftError(
            f"The attached method {attachment.settings.method!r} is not a weight update and cannot be merged: save it "
            "with lit_peft.save_adapter instead."
        )
    tied = tied_layers(layers.values())
    modules = [
        path
        for path, layer in layers.items()
        if not isinstance(layer, ExpertLoRA | ParameterLoRASum) and id(layer) not in tied
    ]
    copies = [pair for path in modules for pair in _untie(model, f"{path}.base_layer.weight")]
    quantized = any(is_quantized(module) for module in model.modules())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad), torch.float32)
    for layer in layers.values():
        if is_quantized(layer.base_layer):
            layer.replace_base(dense_linear(layer.base_layer, dtype))
        elif isinstance(layer, ExpertLoRA | ParameterLoRASum):
            make_dense(layer.base_layer, layer.parameter_name, dtype)
        # `keep_merged` frees the copy of W that `merge` makes, so only one copy exists at a time.
        layer.merge(check=quantized)
        layer.keep_merged()
    saved, tokens = attachment.saved, merged_rows(attachment)
    detach(model)
    write_rows(model, *tokens)
    for copy, original in copies:
        copy.requires_grad_(original.requires_grad)
    with torch.no_grad():
        for path, value in saved.items():
            if not set(tied_names(model, base_name(path))) <= {base_name(name) for name in saved}:
                _untie(model, base_name(path))
            model.get_parameter(base_name(path)).copy_(value)
    if quantized:
        dequantize(model, dtype)
    return model


def tied_layers(layers: Iterable[nn.Module]) -> set[int]:
    """Return the ids of layers that share their weight and their update: heads, and the embeddings they are tied to."""
    return {number for layer in layers if isinstance(layer, TiedLoRALinear) for number in (id(layer), id(layer.source))}


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
