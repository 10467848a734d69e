"""What Prefix Tuning and P-Tuning v2 share: their settings, and which attention layers of a model get a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lit_peft.methods.attachment import Attachment, MethodSettings
from lit_peft.methods.prefix_attention import LayerPrefix, StartPrefix, put_prefix_at
from lit_peft.methods.prefix_positions import ShiftPositions
from lit_peft.methods.targets import check_leave_out
from lit_peft.models.architectures import Layer, has_module, kv_shape, layer_stacks, token_model
from lit_peft.nn.linear import adapter_dtype
from lit_peft.nn.prefix import Prefix
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief


@dataclass(frozen=True)
class PrefixSettings(MethodSettings):
    """What the settings of Prefix Tuning and P-Tuning v2 share.

    Args:
        num_virtual_tokens: length v of the prefix.
        prefix_projection: compute keys and values from a smaller table by an MLP, rather than train them themselves.
        prefix_projection_size: width of the MLP's hidden layer; the model's hidden size when None.
        non_linearity: the MLP's activation by name.
        dropout: dropout probability on the prefix's keys and values.
        init_std: standard deviation of the trained table at the start.
        encoder_prefix: in an encoder-decoder, a prefix at the encoder's self-attention.
        cross_prefix: in an encoder-decoder, a prefix at the decoder's cross-attention.
        leave_out: numbers of the layers without a prefix, counted from 0 through all stacks: a decoder's go on from
            the encoder's.
        positions: where absolute and rotary positions of the real tokens start. `mask`: behind the prefix, padding
            not counted, so that padding changes nothing; `peft`: behind the prefix, padding counted unless the model
            itself does not; `adapterhub`: as without a prefix (T5: its keys alone move behind the prefix).
        per_query_head: where several query heads share keys, a prefix of its own for each of them, as early
            versions of AdapterHub did.
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
    roles: ClassVar[tuple[str, ...]] = ("self", "encoder", "cross")

    def __post_init__(self) -> None:
        super().__post_init__()
        # The layer checks its own settings.
        size = self.prefix_projection_size if self.prefix_projection else None
        Prefix(
            self.num_virtual_tokens,
            [(1, 1)],
            projection_size=size,
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
        """Put the prefix in front of every attention layer's keys and values."""
        stacks = _by_model(model, layer_stacks(model))
        check_leave_out(self.leave_out, sum(map(len, stacks)))
        crossed = any(_cross(layer) is not None for stack in stacks for layer in stack)
        first = 0
        for stack in stacks:
            layers = [layer for index, layer in enumerate(stack, first) if index not in self.leave_out]
            first += len(stack)
            is_encoder = crossed and _cross(stack[0]) is None
            owner = token_model(model, stack[0]) or ""
            role = "encoder" if is_encoder else "self"
            if layers and (self.encoder_prefix or not is_encoder):
                paths = [f"{layer.path}.{layer.architecture.self_attention}" for layer in layers]
                self._attach_role(model, attachment, owner, role, paths, layers, stack)
                if not is_encoder and self.positions != "adapterhub":
                    ShiftPositions(self.num_virtual_tokens, self.positions).attach(model, attachment, owner, paths[0])
            if layers and _cross(stack[0]) is not None and self.cross_prefix:
                paths = [f"{layer.path}.{_cross(layer)}" for layer in layers]
                self._attach_role(model, attachment, owner, "cross", paths, layers, stack)
        if not attachment.adapted:
            raise LitPeftError(
                f"leave_out={list(self.leave_out)} leaves {type(model).__name__} without any prefix: leave out fewer "
                "layers."
            )

    def _attach_role(
        self,
        model: nn.Module,
        attachment: Attachment,
        owner: str,
        role: str,
        paths: list[str],
        layers: list[Layer],
        stack: list[Layer],
    ) -> None:
        modules = [model.get_submodule(path) for path in paths]
        weight = next(modules[0].parameters())
        width = int(layers[0].config.hidden_size)
        prefix = Prefix(
            self.num_virtual_tokens,
            [self._shape(module, layer.config) for module, layer in zip(modules, layers, strict=True)],
            projection_size=(self.prefix_projection_size or width) if self.prefix_projection else None,
            hidden_size=width,
            non_linearity=self.non_linearity,
            dropout=self.dropout,
            init_std=self.init_std,
            device=weight.device,
            dtype=adapter_dtype(weight),
        )
        name = f"{role}_prefix"
        attachment.add(f"{owner}.{name}" if owner else name, prefix)
        attachment.forward_pre_hook(owner, StartPrefix(prefix))
        relative = None
        if role != "cross":
            relative = next(filter(_has_relative_bias, map(_self_attention, stack)), None)
        for index, path in enumerate(paths):
            put_prefix_at(attachment, path, LayerPrefix(prefix, index), relative, self.positions != "adapterhub")

    def _shape(self, module: Any, config: Any) -> tuple[int, int]:
        heads, size = kv_shape(module, config)
        return heads * (getattr(module, "num_key_value_groups", 1) if self.per_query_head else 1), size


def _by_model(model: nn.Module, stacks: list[list[Layer]]) -> list[list[Layer]]:
    """Join the stacks of one model, which share its prefix, e.g. the two that HRM runs in turn."""
    joined: dict[tuple[str | None, bool], list[Layer]] = {}
    for stack in stacks:
        joined.setdefault((token_model(model, stack[0]), _cross(stack[0]) is not None), []).extend(stack)
    return list(joined.values())


def _cross(layer: Layer) -> str | None:
    name = layer.architecture.cross_attention
    return name if name is not None and has_module(layer.module, name) else None


def _self_attention(layer: Layer) -> nn.Module:
    return layer.module.get_submodule(layer.architecture.self_attention)


def _has_relative_bias(module: nn.Module) -> bool:
    return bool(getattr(module, "has_relative_attention_bias", False))
