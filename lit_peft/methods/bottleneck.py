"""What the bottleneck methods share: their settings, where their adapters go, dropping adapters at inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from torch import nn

from lit_peft.methods.attachment import Attachment, MethodSettings, Model, attachment_of
from lit_peft.methods.targets import check_expression, check_leave_out, find_targets, is_linear
from lit_peft.models.architectures import Layer, Sublayer, has_module, layer_stacks
from lit_peft.nn.bottleneck import Bottleneck, InitBottleneck, SublayerAdapter, check
from lit_peft.nn.linear import adapter_dtype, linear_features
from lit_peft.util.errors import LitPeftError


@dataclass(frozen=True)
class BottleneckSettings(MethodSettings):
    """What the settings of AdapterH, AdapterP and Parallel share.

    A value of None stands for the placement's own: the method's paper, or LLM-Adapters (arXiv:2304.01933): bottleneck
    256, tanh, no biases, scaling 1.

    Args:
        reduction_factor: the hidden size divided by the bottleneck's; a number, or numbers by layer, counted from 0
            through all stacks, e.g. `{"0": 8, "default": 16}`.
        bottleneck_size: width of the bottleneck itself, in place of `reduction_factor`.
        non_linearity: the activation by name, e.g. `relu`, `swish`, `gelu`, `tanh`.
        bias: whether the two projections have biases.
        scaling: factor on the adapter's output: a number, `learned` (one number) or `channel` (one per feature).
        dropout: dropout probability on the adapter's output.
        init_weights: `mam_adapter` (starts as zero: the model's output is unchanged), `bert` or `houlsby` (both
            random and small, near zero).
        use_gating: a trained gate on the adapter's output, averaged over the sequence; padding and the KV cache
            change that average.
        ln_before: a new LayerNorm before the bottleneck.
        ln_after: a new LayerNorm after it.
        adapter_residual_before_ln: add the residual before that LayerNorm.
        original_ln_before: give the adapter the sublayer's output after the layer's residual and LayerNorm.
        original_ln_after: let the layer's residual and LayerNorm follow the adapter.
        residual_before_ln: take the residual around the adapter before the layer's LayerNorm; `post_add`: between
            the layer's residual and its LayerNorm.
        mh_adapter: an adapter at each self-attention.
        output_adapter: an adapter at each feed-forward block.
        cross_adapter: an adapter at each cross-attention.
        leave_out: numbers of the layers without adapters (AdapterDrop, arXiv:2010.11918), counted from 0 through all
            stacks: a decoder's go on from the encoder's.
        placement: `paper`: at the sublayers, as the method's paper; `llm_adapters`: at named linear layers.
        target_modules: the linear layers' names with `placement="llm_adapters"`; the method's own when None.
    """

    defaults: ClassVar[dict[str, Any]] = {"bias": True, "scaling": 1.0}
    is_parallel: ClassVar[bool] = False

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
                "bottleneck's width: give one of them."
            )
        factors = self.reduction_factor
        for factor in factors.values() if isinstance(factors, dict) else [factors]:
            if factor is not None and not factor > 0:
                raise LitPeftError(f"reduction_factor={factors}: give positive numbers, e.g. reduction_factor=16.")
        if self.placement == "llm_adapters":
            own = {field.name: field.default for field in fields(self)}
            idle = next((name for name in _AT_SUBLAYERS if getattr(self, name) != own[name]), None)
            if idle is not None:
                raise LitPeftError(
                    f"{idle}={getattr(self, idle)!r} has no effect with placement='llm_adapters', whose adapters stand "
                    "at linear layers: leave it out."
                )
        if isinstance(self.target_modules, str):
            check_expression("target_modules", self.target_modules)
        if not (self.mh_adapter or self.output_adapter or self.cross_adapter):
            raise LitPeftError("mh_adapter, output_adapter and cross_adapter are all false: set at least one to true.")
        if self.target_modules is not None and self.placement == "paper":
            raise LitPeftError(
                f"target_modules={self.target_modules!r} has no effect with placement='paper': add "
                "placement='llm_adapters' to adapt named linear layers, or leave target_modules out."
            )

    def value(self, name: str) -> Any:
        """The setting of that name, or where it is None, the placement's own value."""
        given = getattr(self, name)
        if given is not None:
            return given
        return (_LLM_ADAPTERS if self.placement == "llm_adapters" else self.defaults).get(name)

    def size(self, width: int, number: int | None) -> int:
        """The bottleneck's width in layer `number` at a place of the given width.

        Raises:
            LitPeftError: `reduction_factor` names neither the layer nor a default.
        """
        factor = self.reduction_factor
        if factor is None:
            size = self.value("bottleneck_size")
            if size is not None:
                return int(size)
            factor = self.value("reduction_factor")
        if isinstance(factor, dict):
            if str(number) not in factor and "default" not in factor:
                raise LitPeftError(
                    f"reduction_factor={factor} names neither layer {number} nor a default: add 'default', e.g. "
                    "'default': 16."
                )
            factor = factor.get(str(number), factor.get("default"))
        assert factor is not None
        return max(1, int(width // factor))

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Put an adapter at each place, through forward hooks."""
        if self.placement == "paper":
            self._attach_to_sublayers(layer_stacks(model), attachment)
        else:
            self._attach_to_linears(model, attachment)
        if not attachment.adapted:
            raise LitPeftError(
                f"leave_out={list(self.leave_out)} (mh_adapter={self.mh_adapter}, "
                f"output_adapter={self.output_adapter}, cross_adapter={self.cross_adapter}) leaves "
                f"{type(model).__name__} without any adapter: leave out fewer layers."
            )

    def _attach_to_sublayers(self, stacks: list[list[Layer]], attachment: Attachment) -> None:
        if self.cross_adapter and not any(
            layer.architecture.cross is not None and has_module(layer.module, layer.architecture.cross.output)
            for stack in stacks
            for layer in stack
        ):
            raise LitPeftError("cross_adapter=True, and this model has no cross-attention: leave cross_adapter out.")
        numbers = self._numbers(stacks)
        for path, layer in self._layers(stacks).items():
            for role, wanted, sublayer in roles(layer, self):
                if wanted and sublayer is not None and has_module(layer.module, sublayer.output):
                    self._attach_to_sublayer(layer, role, sublayer, numbers[path], attachment)

    def _attach_to_sublayer(
        self, layer: Layer, role: str, place: Sublayer, number: int, attachment: Attachment
    ) -> None:
        width = int(layer.config.hidden_size)
        norm = None if place.norm is None else layer.module.get_submodule(place.norm)
        adapter = SublayerAdapter(
            width,
            self.size(width, number),
            is_parallel=self.is_parallel,
            original_ln_before=self.original_ln_before and place.normed_before,
            original_ln_after=self.original_ln_after,
            residual_before_ln=self.residual_before_ln,
            norm=norm,
            **self._bottleneck(layer.module),
        )
        attachment.add(f"{layer.path}.{role}", adapter)
        if adapter.needs_residual:
            attachment.forward_pre_hook(f"{layer.path}.{place.residual}", adapter.capture, with_kwargs=True)
            if place.more_residual is not None:
                attachment.forward_hook(f"{layer.path}.{place.more_residual}", adapter.capture_more)
        attachment.forward_hook(f"{layer.path}.{place.output}", adapter.adapt)
        if place.norm is not None and not self.original_ln_after:
            attachment.forward_hook(f"{layer.path}.{place.norm}", adapter.pass_over)

    def _attach_to_linears(self, model: nn.Module, attachment: Attachment) -> None:
        try:
            stacks = layer_stacks(model)
        except LitPeftError:
            # Names are enough where no setting counts layers.
            if self.target_modules is None or self.leave_out or isinstance(self.reduction_factor, dict):
                raise
            stacks = []
        layers, numbers = self._layers(stacks), self._numbers(stacks)
        if self.target_modules is not None:
            targets = find_targets(model, self.target_modules)
        else:
            targets = [
                f"{path}.{name}"
                for path, layer in layers.items()
                for name in self.target_names(layer)
                if has_module(layer.module, name)
            ]
        for path in targets:
            owner = next((name for name in numbers if path.startswith(name + ".")), None)
            if owner is not None and owner not in layers:
                continue
            linear = model.get_submodule(path)
            if not is_linear(linear):
                raise LitPeftError(
                    f"target_modules={self.target_modules!r} matches {path}, a {type(linear).__name__}, and adapters "
                    "stand at linear layers: name linear layers only."
                )
            d_in, d_out = linear_features(linear)
            # An expanding layer is adapted before it, on the hidden states; any other after it.
            before = d_out > d_in and not self.is_parallel
            width = d_in if before or self.is_parallel else d_out
            size = self.size(width, None if owner is None else numbers[owner])
            adapter = Bottleneck(width, size, d_out if self.is_parallel else width, **self._bottleneck(linear))
            attachment.add(f"{path}.adapter", adapter)
            if before:
                attachment.forward_pre_hook(path, adapter.before)
            else:
                attachment.forward_hook(path, adapter.beside if self.is_parallel else adapter.after)

    def target_names(self, layer: Layer) -> tuple[str, ...]:
        """The linear layers that `placement="llm_adapters"` adapts in a layer when `target_modules` is None."""
        return layer.architecture.ffn_linears

    def _numbers(self, stacks: list[list[Layer]]) -> dict[str, int]:
        return {layer.path: number for number, layer in enumerate(layer for stack in stacks for layer in stack)}

    def _layers(self, stacks: list[list[Layer]]) -> dict[str, Layer]:
        """The layers to adapt, by name."""
        layers = [layer for stack in stacks for layer in stack]
        check_leave_out(self.leave_out, len(layers))
        named = self.reduction_factor if isinstance(self.reduction_factor, dict) else {}
        unknown = [name for name in named if name != "default" and name not in map(str, range(len(layers)))]
        if unknown:
            raise LitPeftError(
                f"reduction_factor={named} names {unknown}, and the model's layers are 0 to {len(layers) - 1}: name "
                "some of those, and 'default' for the rest."
            )
        return {layer.path: layer for number, layer in enumerate(layers) if number not in self.leave_out}

    def _bottleneck(self, near: nn.Module) -> dict[str, Any]:
        """The settings of the bottleneck itself, its parameters on the device of the module it adapts."""
        weight = next(near.parameters())
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


# What says where an adapter stands at a sublayer, and how it goes with the layer's own residual and LayerNorm.
_AT_SUBLAYERS = (
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
    "mh_adapter",
    "output_adapter",
    "cross_adapter",
)
_LLM_ADAPTERS: dict[str, Any] = {"bottleneck_size": 256, "non_linearity": "tanh", "bias": False, "scaling": 1.0}


def roles(layer: Layer, settings: BottleneckSettings) -> list[tuple[str, bool, Sublayer | None]]:
    """The name of the adapter of each sublayer, whether `settings` want it, and the sublayer."""
    kind = layer.architecture
    return [
        ("attention_adapter", settings.mh_adapter, kind.attention),
        ("cross_adapter", settings.cross_adapter, kind.cross),
        ("ffn_adapter", settings.output_adapter, kind.ffn),
    ]


def drop_adapters(model: Model, lowest: int) -> Model:
    """Leave the adapters of the lowest layers out of the computation (AdapterDrop, arXiv:2010.11918, section 3).

    Those layers run as the base model's own, and so faster. Nothing is removed: `lowest=0` brings all back.

    Args:
        model: a model with AdapterH, AdapterP or Parallel attached.
        lowest: in how many layers of each stack (encoder, decoder), counted from the input.

    Returns:
        The same model.

    Raises:
        LitPeftError: nothing is attached, the method has no bottleneck adapters, or there are fewer layers.
    """
    attachment = attachment_of(model)
    adapters = {path: a for path, a in attachment.adapted.items() if isinstance(a, Bottleneck)}
    if not adapters:
        raise LitPeftError(f"{attachment.settings.method!r} has no bottleneck adapters to drop.")
    stacks = layer_stacks(model)
    most = max(len(stack) for stack in stacks)
    if not 0 <= lowest <= most:
        raise LitPeftError(f"lowest={lowest}: give a number of layers from 0 to {most}, which is all of them.")
    for stack in stacks:
        for number, layer in enumerate(stack):
            for path, adapter in adapters.items():
                if path.startswith(layer.path + "."):
                    adapter.enabled = number >= lowest
    return model
