"""What Prefix Tuning and P-Tuning v2 share: settings, and the choice of attention layers that get a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lit_peft.methods.attachment import Attachment, MethodSettings
from lit_peft.methods.layer_prefix import LayerPrefix, StartPrefix
from lit_peft.methods.positions import ShiftPositions
from lit_peft.methods.prefix_attention import attach_layer_prefix
from lit_peft.methods.targets import check_leave_out
from lit_peft.models.architectures import (
    Layer,
    attention_of,
    has_module,
    kv_shape,
    layer_stacks,
    position_table,
    token_model,
)
from lit_peft.models.call_arguments import arguments
from lit_peft.nn.linear import adapter_dtype
from lit_peft.nn.prefix import Prefix
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief


@dataclass(frozen=True)
class PrefixSettings(MethodSettings):
    """The settings that Prefix Tuning and P-Tuning v2 share.

    Args:
        num_virtual_tokens: length v of the prefix.
        prefix_projection: compute keys and values from a smaller table with an MLP instead of training them directly.
        prefix_projection_size: width of the MLP's hidden layer. None selects the model's hidden size.
        non_linearity: name of the MLP's activation.
        dropout: dropout probability on the prefix's keys and values.
        init_std: standard deviation of the initial table.
        encoder_prefix: in an encoder-decoder, add a prefix to the encoder's self-attention.
        cross_prefix: in an encoder-decoder, add a prefix to the decoder's cross-attention.
        leave_out: indices of the layers to leave without a prefix. Indices count from 0, and a decoder's layers follow
            those of the encoder.
        positions: absolute and rotary positions of the input's tokens. `mask`: they start after the prefix and skip
            padding, so that padding has no effect. `peft`: they start after the prefix and count padding, unless the
            model skips it. `adapterhub`: they are the same as without a prefix (in T5, those of the keys start after
            the prefix).
        per_query_head: give each query head a separate prefix where several share keys, as early versions of
            AdapterHub did.

    Raises:
        LitPeftError: a setting is invalid or has no effect.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    prefix_projection_size: int | None = None
    non_linearity: str = "tanh"
    dropout: float = 0.0
    init_std: float = 0.02
    encoder_prefix: bool = True
    cross_prefix: bool = True
    leave_out: Sequence[int] = field(default_factory=tuple)
    positions: Literal["mask", "peft", "adapterhub"] = "mask"
    per_query_head: bool = False

    packs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # The layer checks its arguments; on the meta device it takes no memory.
        Prefix(
            self.num_virtual_tokens,
            [(1, 1)],
            projection_size=self.prefix_projection_size if self.prefix_projection else None,
            hidden_size=1,
            non_linearity=self.non_linearity,
            dropout=self.dropout,
            init_std=self.init_std,
            device=torch.device("meta"),
        )
        if self.prefix_projection_size is not None and not self.prefix_projection:
            raise LitPeftError(
                f"prefix_projection_size={self.prefix_projection_size} has no effect with prefix_projection=False: set "
                "prefix_projection=True, or leave it out."
            )
        if self.non_linearity != "tanh" and not self.prefix_projection:
            raise LitPeftError(
                f"non_linearity={self.non_linearity!r} has no effect with prefix_projection=False: set "
                "prefix_projection=True, or leave it out."
            )
        if self.positions not in ("mask", "peft", "adapterhub"):
            raise LitPeftError(f"positions={brief(self.positions)} is not known: use 'mask', 'peft' or 'adapterhub'.")

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Put the prefix in front of the keys and values of each attention layer. Other layers of a hybrid have none.

        Args:
            model: the frozen model.
            attachment: makes and records the changes.

        Raises:
            LitPeftError: the settings do not fit the model, leave it without a prefix, or a layer cannot have one.
        """
        try:
            stacks = _by_model(model, layer_stacks(model))
        except LitPeftError:
            raise LitPeftError(
                f"{type(model).__name__} has no transformer layers of a known structure, so there is no known place "
                "for a prefix: use another method, e.g. LoRA or PromptTuning."
            ) from None
        check_leave_out(self.leave_out, sum(map(len, stacks)))
        is_encoder_decoder = any(_cross_attention(layer) is not None for stack in stacks for layer in stack)
        first = 0
        for stack in stacks:
            layers = [layer for index, layer in enumerate(stack, first) if index not in self.leave_out]
            first += len(stack)
            has_cross_attention = _cross_attention(stack[0]) is not None
            is_encoder = is_encoder_decoder and not has_cross_attention
            owner = token_model(model, stack[0]) or ""
            if layers and (self.encoder_prefix or not is_encoder):
                attentions = _self_attentions(model, stack)
                own = {path: layer for path, layer in attentions.items() if layer in layers}
                if own:
                    paths = list(own)
                    modules = (model.get_submodule(path) for path in attentions)
                    relative = next((module for module in modules if _has_relative_bias(module)), None)
                    name = "encoder_prefix" if is_encoder else "self_prefix"
                    self._attach_prefix(attachment, owner, name, paths, list(own.values()), relative)
                    if not is_encoder and self.positions != "adapterhub":
                        ShiftPositions(self.num_virtual_tokens, self.positions).attach(attachment, owner, paths[0])
                    elif is_encoder and self.positions == "mask" and _has_rotary_positions(model.get_submodule(owner)):
                        # The prefix stands as far from the first token in a padded row as in any other.
                        attachment.forward_pre_hook(owner, ShiftPositions(0, "mask").shift_decoder, with_kwargs=True)
            if layers and has_cross_attention and self.cross_prefix:
                paths = [f"{layer.path}.{_cross_attention(layer)}" for layer in layers]
                self._attach_prefix(attachment, owner, "cross_prefix", paths, layers, None)
        if not attachment.adapted:
            raise LitPeftError(
                f"leave_out={list(self.leave_out)} leaves {type(model).__name__} without any prefix: leave out fewer "
                "layers."
            )

    def _attach_prefix(
        self,
        attachment: Attachment,
        owner: str,
        name: str,
        paths: list[str],
        layers: list[Layer],
        relative: nn.Module | None,
    ) -> None:
        """Add one prefix for the attention modules at `paths`, one in each of `layers`."""
        modules = [attachment.model.get_submodule(path) for path in paths]
        weight = next(modules[0].parameters())
        hidden_size = int(layers[0].config.hidden_size)
        prefix = Prefix(
            self.num_virtual_tokens,
            [self._shape(module, layer.config) for module, layer in zip(modules, layers, strict=True)],
            projection_size=(self.prefix_projection_size or hidden_size) if self.prefix_projection else None,
            hidden_size=hidden_size,
            non_linearity=self.non_linearity,
            dropout=self.dropout,
            init_std=self.init_std,
            device=weight.device,
            dtype=adapter_dtype(weight),
        )
        attachment.add(f"{owner}.{name}" if owner else name, prefix)
        attachment.forward_pre_hook(owner, StartPrefix(prefix))
        shifts_positions = self.positions != "adapterhub"
        for index, (path, module, layer) in enumerate(zip(paths, modules, layers, strict=True)):
            # T5 has one table of relative positions in its first layer, UMT5 one in each.
            table = module if relative is not None and _has_relative_bias(module) else relative
            # With cross-attention, such a module looks for two caches in one, which is not taken apart here.
            own = layer.architecture.own_attention if _cross_attention(layer) is None else None
            attach_layer_prefix(attachment, path, LayerPrefix(prefix, index), table, shifts_positions, own)

    def _shape(self, module: Any, config: Any) -> tuple[int, ...]:
        """The shape of an attention's prefix."""
        heads, *sizes = kv_shape(module, config)
        return heads * (getattr(module, "num_key_value_groups", 1) if self.per_query_head else 1), *sizes


def _by_model(model: nn.Module, stacks: list[list[Layer]]) -> list[list[Layer]]:
    """Join the stacks of one model, which share its prefix, e.g. the two that HRM runs in turn."""
    joined: dict[tuple[str | None, bool], list[Layer]] = {}
    for stack in stacks:
        joined.setdefault((token_model(model, stack[0]), _cross_attention(stack[0]) is not None), []).extend(stack)
    return list(joined.values())


def _cross_attention(layer: Layer) -> str | None:
    name = layer.architecture.cross_attention
    return name if name is not None and has_module(layer.module, name) else None


def _self_attentions(model: nn.Module, stack: list[Layer]) -> dict[str, Layer]:
    """The paths of a stack's self-attentions, and their layers. Attention that several layers share is there once.

    Raises:
        LitPeftError: no layer has attention, or a layer's attention is not where it is in other models.
    """
    found: dict[str, Layer] = {}
    seen: set[nn.Module] = set()
    for layer in stack:
        name = attention_of(layer)
        if name is None:
            continue
        if not has_module(layer.module, name):
            raise LitPeftError(
                f"{layer.path} ({type(model).__name__}) has no {name}, where a prefix could be put in front of keys "
                "and values: use another method, e.g. LoRA."
            )
        module = layer.module.get_submodule(name)
        if module not in seen:
            found[f"{layer.path}.{name}"] = layer
        seen.add(module)
    if not found:
        raise LitPeftError(
            f"{type(model).__name__} has no attention in its layers, so there are no keys and values to put a prefix "
            "in front of: use another method, e.g. LoRA or PromptTuning."
        )
    return found


def _has_rotary_positions(module: nn.Module) -> bool:
    return "position_ids" in arguments(module) and position_table(module) is None


def _has_relative_bias(module: nn.Module) -> bool:
    return bool(getattr(module, "has_relative_attention_bias", False))
