"""What Prefix Tuning and P-Tuning v2 share: their settings, and how a prefix reaches every attention layer.

The prefix never enters the model's KV cache: each attention puts it in front of what the cache holds. So beam search,
cropping and a cache of fixed size need to know nothing of it, and checkpointed layers, which run without a cache, see
it too. transformers computes attention in three ways, and so there are three ways in:

- through its table of attention functions: the attention's config names a function of ours, which puts the prefix in
  front and calls the one that the model's config names;
- in code of its own that asks a cache for the keys (BLOOM, Falcon): that cache's answer carries the prefix;
- in code of its own without a cache (DeBERTa): the outputs of the key and value projections carry it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment, MethodSettings
from lit_peft.methods.targets import check_leave_out
from lit_peft.models.architectures import Layer, has_module, kv_shape, layer_stacks, room_for, token_model
from lit_peft.models.call_arguments import CACHES, arguments, by_name, cache_of
from lit_peft.nn.linear import adapter_dtype
from lit_peft.nn.prefix import Prefix
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

_FUNCTION = "lit_peft_prefix"
_LENGTHS = ("cache_length", "past_key_values_length")


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
        stacks = layer_stacks(model)
        check_leave_out(self.leave_out, sum(map(len, stacks)))
        crossed = any(_cross(layer) is not None for stack in stacks for layer in stack)
        number = 0
        for stack in stacks:
            layers = [layer for at, layer in enumerate(stack, number) if at not in self.leave_out]
            number += len(stack)
            is_encoder = crossed and _cross(stack[0]) is None
            owner = token_model(model, stack[0]) or ""
            role = "encoder" if is_encoder else "self"
            if layers and (self.encoder_prefix or not is_encoder):
                paths = [f"{layer.path}.{layer.architecture.self_attention}" for layer in layers]
                self._attach_role(model, attachment, owner, role, paths, layers, stack)
                if not is_encoder and self.positions != "adapterhub":
                    _Positions(self.num_virtual_tokens, self.positions).attach(model, attachment, owner, paths[0])
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
        attachment.hook(model.get_submodule(owner).register_forward_pre_hook(_Start(prefix)))
        relative = next((m for m in map(_self_attention, stack) if getattr(m, "has_relative_attention_bias", 0)), None)
        for number, (path, module) in enumerate(zip(paths, modules, strict=True)):
            place = _Place(prefix, number)
            names = arguments(module)
            if hasattr(module, "disentangled_attention_bias"):
                _Disentangled(place, module, attachment)
            elif "alibi" in names:
                attachment.hook(module.register_forward_pre_hook(_Cached(place), with_kwargs=True))
            elif "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names:
                bias_of = None if role == "cross" else relative
                through = _Through(place, module, bias_of, self.positions != "adapterhub")
                attachment.set(module, "config", through)
                if bias_of is not None:
                    attachment.hook(module.register_forward_pre_hook(through.count, with_kwargs=True))
            else:
                raise LitPeftError(
                    f"{path} ({type(module).__name__}) computes attention in a way of its own, so that no prefix can "
                    "be put in front of its keys and values: use another method, e.g. LoRA or PromptTuning."
                )

    def _shape(self, module: Any, config: Any) -> tuple[int, int]:
        heads, size = kv_shape(module, config)
        return heads * (getattr(module, "num_key_value_groups", 1) if self.per_query_head else 1), size


def _cross(layer: Layer) -> str | None:
    name = layer.architecture.cross_attention
    return name if name is not None and has_module(layer.module, name) else None


def _self_attention(layer: Layer) -> nn.Module:
    return layer.module.get_submodule(layer.architecture.self_attention)


class _Start:
    """Forward pre-hook of a model: its prefix is computed once for the pass, outside checkpointed layers."""

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.prefix.start()


class _Place:
    """One attention layer's prefix, and the columns it adds to masks."""

    def __init__(self, prefix: Prefix, number: int) -> None:
        self.prefix, self.number = prefix, number

    @property
    def length(self) -> int:
        return self.prefix.num_virtual_tokens

    @property
    def heads(self) -> int:
        return self.prefix.shapes[self.number][0]

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.prefix.extend(self.number, key, value)

    def seen(self, mask: Tensor) -> Tensor:
        """A mask (additive where it is of floating point, else true where seen) with the prefix seen by all."""
        return F.pad(mask, (self.length, 0), value=0 if mask.is_floating_point() and mask.dim() == 4 else 1)


class _Through:
    """Stands for an attention's config: names our attention function in place of the model's, which ours calls.

    Everything else is read from the config itself, what is set there later included.
    """

    _attn_implementation = _FUNCTION

    def __init__(self, place: _Place, module: nn.Module, relative: Any, moved: bool) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_FUNCTION, _attend)
        self.config: Any = module.config
        self.place, self.relative, self.moved, self.past = place, relative, moved, 0
        homes = (sys.modules[kind.__module__] for kind in type(module).__mro__)
        self.eager: Callable[..., Any] = next(
            home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward")
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":
            raise AttributeError(name)
        return getattr(self.config, name)

    def count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention: how many tokens came before, which a cache of fixed size hides."""
        values = by_name(module, args, kwargs)
        held = cache_of(values)
        self.past = 0 if held is None else int(held.get_seq_length(module.layer_idx))

    def bias(self, bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """T5's relative position bias, (1, heads, queries, keys), with the prefix just in front of the first key.

        AdapterHub moves the keys behind the prefix, and not the queries.
        """
        length, queries = self.place.length, query.shape[2]
        if self.relative is None:
            return F.pad(bias, (length, 0))
        keys = length + key.shape[2]
        start = self.past + (length if self.moved else 0)
        whole = self.relative.compute_bias(queries, keys, device=query.device, past_seen_tokens=start)
        if not self.moved:
            return whole.to(bias.dtype)
        return torch.cat([whole[..., :length].to(bias.dtype).expand(bias.shape[0], -1, -1, -1), bias], dim=-1)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """transformers' attention function for an attention with a prefix."""
    from transformers import AttentionInterface

    through: _Through = module.config
    name = through.config._attn_implementation
    place = through.place
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = through.bias(kwargs["position_bias"], query, key)
    queries, keys = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and queries > 1 and name == "sdpa":
        # It reads None as "the first query sees the first key alone", which a mask must say once the prefix is there.
        attention_mask = query.new_ones(queries, keys, dtype=torch.bool).tril()[None, None]
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise LitPeftError(
                f"attn_implementation={name!r} takes no prefix: load the model with attn_implementation='sdpa'."
            )
        attention_mask = place.seen(attention_mask)
    function = AttentionInterface().get_interface(name, through.eager)
    groups = getattr(module, "num_key_value_groups", 1)
    if place.heads == key.shape[1]:
        key, value = place.extend(key, value)
        return function(module, query, key, value, attention_mask, **kwargs)
    key, value = place.extend(key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1))
    module.num_key_value_groups = 1
    try:
        return function(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.num_key_value_groups = groups


class _Cached:
    """Forward pre-hook of an attention with code of its own that takes a mask, ALiBi's bias and a cache."""

    def __init__(self, place: _Place) -> None:
        self.place = place

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values, length = by_name(module, args, kwargs), self.place.length
        mask, alibi = values["attention_mask"], values["alibi"]
        if mask is not None:
            values["attention_mask"] = self.place.seen(mask)
        if alibi is not None:
            # ALiBi counts from the first key on; the prefix lies before it. Softmax sees differences alone.
            steps = torch.arange(-length, 0, device=alibi.device, dtype=alibi.dtype)
            build = sys.modules[type(module).__module__].build_alibi_tensor
            ones = torch.ones(1, 2, dtype=torch.long, device=alibi.device)
            columns = build(ones, module.num_heads, alibi.dtype)[:, :, 1:] * steps  # (heads, 1, v)
            if alibi.dim() == 3:
                left = columns.repeat(alibi.shape[0] // module.num_heads, 1, 1)
            else:
                left = columns.expand(alibi.shape[0], -1, -1, -1)
            values["alibi"] = torch.cat([left, alibi], dim=-1)
            if mask is not None and mask.shape[1] == module.num_heads:
                # Falcon has ALiBi in the mask as well.
                added = (columns * module.inv_norm_factor).expand(*mask.shape[:3], -1)
                values["attention_mask"] = torch.cat([added.to(mask.dtype), mask], dim=-1)
        name = next(name for name in CACHES if name in arguments(module))
        values[name] = _Answer(self.place, values.get(name))
        return (), values


class _Answer:
    """Stands for a cache: what it holds, the prefix in front."""

    def __init__(self, place: _Place, cache: Any) -> None:
        self.place, self.cache = place, cache

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        return self.place.extend(key, value)


class _Disentangled:
    """DeBERTa's attention: the prefix comes out of the key and value projections, and has no relative position."""

    def __init__(self, place: _Place, module: Any, attachment: Attachment) -> None:
        self.place = place
        self.bias, self.active = module.disentangled_attention_bias, True
        attachment.set(module, "disentangled_attention_bias", self.relative)
        attachment.hook(module.register_forward_pre_hook(self.masked, with_kwargs=True))
        attachment.hook(module.key_proj.register_forward_hook(self.key))
        attachment.hook(module.value_proj.register_forward_hook(self.value))

    def masked(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = by_name(module, args, kwargs)
        values["attention_mask"] = self.place.seen(values["attention_mask"].bool())
        return (), values

    def key(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return self._extended(output, 0) if self.active else None

    def value(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._extended(output, 1)

    def _extended(self, output: Tensor, part: int) -> Tensor:
        prefix = self.place.prefix.layer(self.place.number, output)[part]
        return torch.cat([prefix.transpose(1, 2).flatten(2), output], dim=1)

    def relative(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The projection of the keys may serve for the positions as well.
        self.active = False
        try:
            bias = self.bias(query, key[:, self.place.length :], *args, **kwargs)
        finally:
            self.active = True
        return F.pad(bias, (self.place.length, 0)) if isinstance(bias, Tensor) else bias


class _Positions:
    """Moves the positions of the real tokens behind the prefix, where a model has absolute or rotary ones."""

    def __init__(self, length: int, mode: str) -> None:
        self.length, self.mode = length, mode

    def attach(self, model: nn.Module, attachment: Attachment, owner: str, attention: str) -> None:
        module = model.get_submodule(owner)
        self.limit = room_for(self.length, module, model)
        embeddings = getattr(module, "embeddings", None)
        names = arguments(embeddings) if isinstance(embeddings, nn.Module) else ()
        positions = getattr(module, "embed_positions", None)
        if isinstance(positions, nn.Module):
            attachment.hook(positions.register_forward_pre_hook(self.of_table, with_kwargs=True))
        elif isinstance(embeddings, nn.Module) and any(name in names for name in _LENGTHS):
            attachment.hook(embeddings.register_forward_pre_hook(self.of_embeddings, with_kwargs=True))
        elif getattr(model.get_submodule(attention), "is_causal", False) and "position_ids" in arguments(module):
            attachment.hook(module.register_forward_pre_hook(self.of_model, with_kwargs=True))

    def check(self, ids: Tensor | None, count: int) -> None:
        """Refuse what is longer than the table of positions, where no device has to be waited for."""
        if ids is not None and ids.device.type == "cpu" and ids.numel():
            count = int(ids.max()) + 1
        if self.limit is not None and count + self.length > self.limit:
            raise LitPeftError(
                f"{count} tokens behind a prefix of {self.length} are more than the {self.limit} positions the model "
                f"has: shorten the texts to {self.limit - self.length} tokens (data.max_length)."
            )

    def of_table(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A module called with the positions it embeds."""
        values = by_name(module, args, kwargs)
        ids = values["position_ids"]
        self.check(ids, ids.shape[-1])
        values["position_ids"] = torch.where(ids < 0, ids, ids + self.length)
        return (), values

    def of_embeddings(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A module that counts positions itself, from a given length on."""
        values = by_name(module, args, kwargs)
        tokens = values["input_ids"] if values.get("input_ids") is not None else values["inputs_embeds"]
        self.check(values.get("position_ids"), tokens.shape[1])
        if values.get("position_ids") is not None:
            values["position_ids"] = values["position_ids"] + self.length
        else:
            name = next(name for name in _LENGTHS if name in arguments(module))
            values[name] = values.get(name, 0) + self.length
        return (), values

    def of_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A decoder that takes positions, and counts from the cache's length on where it gets none."""
        values = by_name(module, args, kwargs)
        ids = values.get("position_ids")
        if ids is None:
            tokens = values.get("input_ids")
            tokens = values["inputs_embeds"] if tokens is None else tokens
            count, mask = tokens.shape[1], values.get("attention_mask")
            if self.mode == "mask" and isinstance(mask, Tensor) and mask.dim() == 2:
                ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]
            else:
                cache = cache_of(values)
                past = 0 if cache is None else cache.get_seq_length()
                ids = torch.arange(count, device=tokens.device)[None] + past
        self.check(ids, ids.shape[-1])
        values["position_ids"] = ids + self.length
        return (), values
