"""What AdapterH, AdapterP and Parallel share: settings, the places of their adapters, and AdapterDrop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from torch import nn

from lit_peft.methods.attachment import Attachment, MethodSettings, Model, attachment_of
from lit_peft.methods.targets import check_expression, check_leave_out, find_targets, is_linear
from lit_peft.models.architectures import Layer, Sublayer, has_module, layer_stacks
from lit_peft.models.call_arguments import arguments
from lit_peft.nn.bottleneck import Bottleneck, InitBottleneck, SublayerAdapter, check
from lit_peft.nn.linear import adapter_dtype, linear_features
from lit_peft.util.errors import LitPeftError


@dataclass(frozen=True)
class BottleneckSettings(MethodSettings):
    """The settings that AdapterH, AdapterP and Parallel share.

    None selects the default of the placement: that of the method's paper, or that of LLM-Adapters (arXiv:2304.01933),
    which is bottleneck size 256, tanh, no biases and scaling 1.

    Args:
        reduction_factor: hidden size divided by bottleneck size. Either a number, or numbers by layer index, e.g.
            `{"0": 8, "default": 16}`. Indices count from 0, and a decoder's layers follow those of the encoder.
        bottleneck_size: width of the bottleneck, as an alternative to `reduction_factor`.
        non_linearity: name of the activation, e.g. `relu`, `swish`, `gelu`, `tanh`.
        bias: whether the two projections have biases.
        scaling: factor on the adapter's output: a number, `learned` (one number) or `channel` (one per feature).
        dropout: dropout probability on the adapter's output.
        init_weights: `mam_adapter` (the adapter's output starts at zero, so the model's output is unchanged), `bert`
            or `houlsby` (small random weights, so the adapter's output starts near zero).
        use_gating: multiply the adapter's output by a trained gate, averaged over the sequence. Padding and the KV
            cache affect that average.
        ln_before: add a LayerNorm before the bottleneck.
        ln_after: add a LayerNorm after the bottleneck.
        adapter_residual_before_ln: add the residual before the LayerNorm of `ln_after`.
        original_ln_before: apply the layer's residual and LayerNorm to the sublayer's output before the adapter.
        original_ln_after: apply the layer's residual and LayerNorm after the adapter.
        residual_before_ln: take the adapter's own residual from before the layer's residual and LayerNorm; `post_add`
            takes it from between the two.
        mh_adapter: adapt each self-attention.
        output_adapter: adapt each feed-forward block.
        cross_adapter: adapt each cross-attention.
        leave_out: indices of the layers to leave without adapters (AdapterDrop, arXiv:2010.11918). Indices count from
            0, and a decoder's layers follow those of the encoder.
        placement: `paper` adapts the sublayers as in the method's paper; `llm_adapters` adapts linear layers.
        target_modules: names of the linear layers for `placement="llm_adapters"`. None selects those that LLM-Adapters
            uses for the method. In a model that reads images, `"language"`, `"vision"`, `"projector"` and `"all"`
            select those of these parts; without them, its language model is adapted.

    Raises:
        LitPeftError: a setting is invalid, has no effect, or contradicts another.
    """

    defaults: ClassVar[dict[str, Any]] = {"bias": True, "scaling": 1.0}
    is_parallel: ClassVar[bool] = False
    stacks: ClassVar[bool] = True

    reduction_factor: float | dict[str, float] | None = None
    bottleneck_size: int | None = None
    non_linearity: str | None = None
    bias: bool | None = None
    scaling: float | Literal["learned", "channel"] | None = None
    dropout: float = 0.0
    init_weights: InitBottleneck = "mam_adapter"
    use_gating: bool = False
    ln_before: bool = False
    ln_after: bool = False
    adapter_residual_before_ln: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | Literal["post_add"] = True
    mh_adapter: bool = False
    output_adapter: bool = True
    cross_adapter: bool = False
    leave_out: Sequence[int] = field(default_factory=tuple)
    placement: Literal["paper", "llm_adapters"] = "paper"
    target_modules: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            bottleneck_size=self.bottleneck_size,
            non_linearity=self.non_linearity,
            scaling=self.scaling,
            dropout=self.dropout,
            init_weights=self.init_weights,
        )
        if self.placement not in ("paper", "llm_adapters"):
            raise LitPeftError(f"placement={self.placement!r} is not known: use 'paper' or 'llm_adapters'.")
        if self.residual_before_ln not in (True, False, "post_add"):
            raise LitPeftError(
                f"residual_before_ln={self.residual_before_ln!r} is not known: use true, false or 'post_add'."
            )
        if self.reduction_factor is not None and self.bottleneck_size is not None:
            raise LitPeftError(
                f"reduction_factor={self.reduction_factor} and bottleneck_size={self.bottleneck_size} both set the "
                "width of the bottleneck: give one of them."
            )
        factors = self.reduction_factor
        for factor in factors.values() if isinstance(factors, dict) else [factors]:
            if factor is not None and not factor > 0:
                raise LitPeftError(f"reduction_factor={factors}: give positive numbers, e.g. reduction_factor=16.")
        if self.placement == "llm_adapters":
            defaults = {field.name: field.default for field in fields(self)}
            changed = [name for name in SUBLAYER_SETTINGS if getattr(self, name) != defaults[name]]
            if changed:
                raise LitPeftError(
                    f"{changed[0]}={getattr(self, changed[0])!r} has no effect with placement='llm_adapters', which "
                    "adapts linear layers instead of sublayers: leave it out."
                )
        if isinstance(self.target_modules, str):
            check_expression("target_modules", self.target_modules)
        if not (self.mh_adapter or self.output_adapter or self.cross_adapter):
            raise LitPeftError("mh_adapter, output_adapter and cross_adapter are all false: set at least one to true.")
        if self.target_modules is not None and self.placement == "paper":
            raise LitPeftError(
                f"target_modules={self.target_modules!r} has no effect with placement='paper': set "
                "placement='llm_adapters' to adapt linear layers, or leave target_modules out."
            )

    def value(self, name: str) -> Any:
        """Return the value of a setting, or the default of the placement if it is None.

        Args:
            name: the setting.

        Returns:
            Its value; None if the placement has no default either.
        """
        value = getattr(self, name)
        if value is not None:
            return value
        return (_LLM_ADAPTERS if self.placement == "llm_adapters" else self.defaults).get(name)

    def size(self, width: int, index: int | None) -> int:
        """Return the width of one bottleneck.

        Args:
            width: number of features of what the bottleneck adapts.
            index: the layer that it is in; None outside all layers.

        Returns:
            The number of features between the two projections.

        Raises:
            LitPeftError: `reduction_factor` has neither this layer nor a default.
        """
        factor = self.reduction_factor
        if factor is None:
            size = self.value("bottleneck_size")
            if size is not None:
                return int(size)
            factor = self.value("reduction_factor")
        if isinstance(factor, dict):
            if str(index) not in factor and "default" not in factor:
                place = "modules outside the layers" if index is None else f"layer {index}"
                raise LitPeftError(
                    f"reduction_factor={factor} has neither a value for {place} nor a default: add one, e.g. "
                    "'default': 16."
                )
            factor = factor.get(str(index), factor.get("default"))
        assert factor is not None
        return max(1, int(width // factor))

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Add an adapter at each selected place. The adapters run in forward hooks.

        Args:
            model: the frozen model.
            attachment: makes and records the changes.

        Raises:
            LitPeftError: the settings do not fit the model, or leave it without adapters.
        """
        if self.placement == "paper":
            self._attach_to_sublayers(layer_stacks(model), attachment)
        else:
            self._attach_to_linears(model, attachment)
        if not attachment.adapted:
            raise LitPeftError(
                f"leave_out={list(self.leave_out)} with mh_adapter={self.mh_adapter}, "
                f"output_adapter={self.output_adapter} and cross_adapter={self.cross_adapter} leaves "
                f"{type(model).__name__} without any adapter: leave out fewer layers."
            )

    def _attach_to_sublayers(self, stacks: list[list[Layer]], attachment: Attachment) -> None:
        if self.cross_adapter and not any(
            layer.architecture.cross is not None and has_module(layer.module, layer.architecture.cross.output)
            for stack in stacks
            for layer in stack
        ):
            raise LitPeftError("cross_adapter=True, but this model has no cross-attention: leave cross_adapter out.")
        for index, layer in enumerate(self._all_layers(stacks)):
            for name, enabled, sublayer in roles(layer, self) if index not in self.leave_out else ():
                if enabled and sublayer is not None and has_module(layer.module, sublayer.output):
                    self._attach_to_sublayer(layer, name, sublayer, index, attachment)

    def _attach_to_sublayer(
        self, layer: Layer, name: str, sublayer: Sublayer, index: int, attachment: Attachment
    ) -> None:
        width = int(layer.config.hidden_size)
        norm = None if sublayer.norm is None else layer.module.get_submodule(sublayer.norm)
        if norm is not None and len(arguments(norm)) > 1:
            raise LitPeftError(
                f"{layer.path}.{sublayer.norm} ({type(norm).__name__}) takes more than the hidden states, so an "
                "adapter cannot call it: use another method, e.g. LoRA."
            )
        adapter = SublayerAdapter(
            width,
            self.size(width, index),
            is_parallel=self.is_parallel,
            original_ln_before=self.original_ln_before and sublayer.normed_before,
            original_ln_after=self.original_ln_after,
            residual_before_ln=self.residual_before_ln,
            norm=norm,
            factors=tuple(float(getattr(layer.module, name)) for name in sublayer.factors or ()) or (1.0, 1.0),
            **self._layer_settings(layer.module),
        )
        attachment.add(f"{layer.path}.{name}", adapter)
        if adapter.needs_residual:
            residual = f"{layer.path}.{sublayer.residual}".rstrip(".")
            attachment.forward_pre_hook(residual, adapter.capture, with_kwargs=True)
            if sublayer.more_residual is not None:
                attachment.forward_hook(f"{layer.path}.{sublayer.more_residual}", adapter.capture_more)
        if sublayer.more_output is not None:
            attachment.forward_hook(f"{layer.path}.{sublayer.more_output}", adapter.capture_output)
        attachment.forward_hook(f"{layer.path}.{sublayer.output}", adapter.adapt)
        if sublayer.norm is not None and not self.original_ln_after:
            attachment.forward_hook(f"{layer.path}.{sublayer.norm}", adapter.pass_over)

    def _attach_to_linears(self, model: nn.Module, attachment: Attachment) -> None:
        try:
            stacks = layer_stacks(model)
        except LitPeftError:
            # The layers of an unknown architecture are only needed for settings that count layers.
            if self.target_modules is None or self.leave_out or isinstance(self.reduction_factor, dict):
                raise
            stacks = []
        layers = self._all_layers(stacks)
        if self.target_modules is not None:
            targets = find_targets(model, self.target_modules)
        else:
            targets = [
                f"{layer.path}.{name}"
                for layer in layers
                for name in self.target_names(layer)
                if has_module(layer.module, name)
            ]
        for path in targets:
            index = next((index for index, layer in enumerate(layers) if path.startswith(layer.path + ".")), None)
            if index in self.leave_out:
                continue
            linear = model.get_submodule(path)
            if not is_linear(linear):
                raise LitPeftError(
                    f"target_modules={self.target_modules!r} matches {path}, which is a {type(linear).__name__}, but "
                    "adapters need linear layers: name linear layers only."
                )
            d_in, d_out = linear_features(linear)
            # A layer that widens is adapted on its input, which has the hidden size, and any other on its output.
            before = d_out > d_in and not self.is_parallel
            width = d_in if before or self.is_parallel else d_out
            size = self.size(width, index)
            adapter = Bottleneck(width, size, d_out if self.is_parallel else width, **self._layer_settings(linear))
            attachment.add(f"{path}.adapter", adapter)
            if before:
                attachment.forward_pre_hook(path, adapter.before)
            else:
                attachment.forward_hook(path, adapter.beside if self.is_parallel else adapter.after)

    def target_names(self, layer: Layer) -> tuple[str, ...]:
        """Return the linear layers that `placement="llm_adapters"` adapts if `target_modules` is None.

        Args:
            layer: a transformer layer.

        Returns:
            Names relative to the layer, including names that it may not have.
        """
        return layer.architecture.ffn_linears

    def _all_layers(self, stacks: list[list[Layer]]) -> list[Layer]:
        """All layers in the order of their indices. Raises if a setting names an index that does not exist."""
        layers = [layer for stack in stacks for layer in stack]
        check_leave_out(self.leave_out, len(layers))
        factors = self.reduction_factor if isinstance(self.reduction_factor, dict) else {}
        unknown = [name for name in factors if name != "default" and name not in map(str, range(len(layers)))]
        if unknown:
            raise LitPeftError(
                f"reduction_factor={factors} names {unknown}, but the model's layers are 0 to {len(layers) - 1}: use "
                "these indices, and 'default' for all other layers."
            )
        return layers

    def _layer_settings(self, adapted: nn.Module) -> dict[str, Any]:
        """The arguments of a bottleneck layer, whose parameters go to the device of the module that it adapts."""
        weight = next(adapted.parameters())
        return {
            "non_linearity": self.value("non_linearity"),
            "bias": self.value("bias"),
            "scaling": self.value("scaling"),
            "dropout": self.dropout,
            "init_weights": self.init_weights,
            "use_gating": self.use_gating,
            "ln_before": self.ln_before,
            "ln_after": self.ln_after,
            "adapter_residual_before_ln": self.adapter_residual_before_ln,
            "device": weight.device,
            "dtype": adapter_dtype(weight),
        }


# The settings that only apply to sublayers: which are adapted, and how with the layer's residual and LayerNorm.
SUBLAYER_SETTINGS = (
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
    "mh_adapter",
    "output_adapter",
    "cross_adapter",
)
_LLM_ADAPTERS: dict[str, Any] = {"bottleneck_size": 256, "non_linearity": "tanh", "bias": False, "scaling": 1.0}


def roles(layer: Layer, settings: BottleneckSettings) -> list[tuple[str, bool, Sublayer | None]]:
    """Return the possible adapters of a layer.

    Args:
        layer: a transformer layer.
        settings: the method's settings.

    Returns:
        For each sublayer: the name of its adapter, whether `settings` enable it, and the sublayer (None if the layer
        has none).
    """
    architecture = layer.architecture
    return [
        ("attention_adapter", settings.mh_adapter, architecture.attention),
        ("cross_adapter", settings.cross_adapter, architecture.cross),
        ("ffn_adapter", settings.output_adapter, architecture.ffn),
    ]


def drop_adapters(model: Model, lowest: int) -> Model:
    """Disable the adapters of the lowest layers (AdapterDrop, arXiv:2010.11918, section 3).

    Those layers compute what the base model computes, which is faster. `lowest=0` enables all adapters again.

    Args:
        model: a model with AdapterH, AdapterP or Parallel attached.
        lowest: the number of layers in each stack (encoder, decoder), counted from the input.

    Returns:
        The same model.

    Raises:
        LitPeftError: no method is attached, the method has no bottleneck adapters, or there are fewer layers.
    """
    attachment = attachment_of(model)
    modules = [item for found in (attachment, *attachment.below) for item in found.adapted.items()]
    adapters = {path: module for path, module in modules if isinstance(module, Bottleneck)}
    if not adapters:
        raise LitPeftError(
            f"The attached method {attachment.settings.method!r} has no bottleneck adapters to drop: use AdapterH, "
            "AdapterP or Parallel."
        )
    stacks = layer_stacks(model)
    num_layers = max(len(stack) for stack in stacks)
    if not 0 <= lowest <= num_layers:
        raise LitPeftError(f"lowest={lowest}: give a number of layers from 0 to {num_layers}.")
    for stack in stacks:
        for index, layer in enumerate(stack):
            for path, adapter in adapters.items():
                if path.startswith(layer.path + "."):
                    adapter.enabled = index >= lowest
    return model
