"""Different adapters for the rows of one batch, in a single forward of the base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lit_peft.methods.adapters import adapters_of, use_adapter
from lit_peft.methods.attachment import Attachment, MethodSettings, base_name
from lit_peft.methods.fast_path import fast_path_changes
from lit_peft.methods.invocation import invocation_hooks
from lit_peft.methods.threads import changing
from lit_peft.nn.bottleneck import Bottleneck, SublayerAdapter
from lit_peft.nn.expert_lora import ExpertLoRA
from lit_peft.nn.ia3 import IA3Linear
from lit_peft.nn.invocation import InvokedLoRALinear
from lit_peft.nn.lora import LoRALayer, LoRALinear
from lit_peft.nn.rows import IA3Rows, LoRARows, ModuleRows
from lit_peft.nn.torch_internals import has_forward_hooks
from lit_peft.nn.weight_update import WeightUpdate
from lit_peft.util.errors import LitPeftError


@contextmanager
def row_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Apply a different adapter to each row of a batch in the block, in a single forward.

    The base's layers, plain LoRAs of linear layers and (IA)³ compute all rows at once. Other parts of an adapter (DoRA,
    embeddings, PiSSA, bottlenecks, trained modules and biases) compute only their rows. This is for inference: the
    adapters get no gradient.

    The block belongs to its thread: blocks of other threads on the same model wait for it, and forwards outside of
    blocks are refused in the meantime.

    Args:
        model: a model with LoRAs, (IA)³ and bottleneck adapters, in evaluation mode.
        names: the adapter of each row; None for the base. Where `generate` repeats a row for beams or several returned
            sequences, the copies use the same adapter.

    Raises:
        LitPeftError: an adapter does not exist or cannot share a batch (prompts and prefixes add tokens to all rows),
            or the model is in training mode. In the block: the batch does not have one row for each name.
    """
    if model.training:
        raise LitPeftError(
            "row_adapters was called in training mode, but it gives the adapters no gradients and no dropout: call "
            "model.eval() first, or use set_adapter to train each adapter on separate batches."
        )
    if not names:
        raise LitPeftError("names is empty: give the adapter of each row of the batch.")
    with changing(model):
        several = next((name for name in names if not isinstance(name, str | None)), None)
        if several is not None:
            raise LitPeftError(
                f"row_adapters takes the name of one adapter, or None, for each row, not {several!r}: run the rows of "
                "several adapters in a separate batch with set_adapter."
            )
        used = list(dict.fromkeys(name for name in names if name is not None))
        attachments = [adapters_of(model).find(name) for name in used]
        for name, attachment in zip(used, attachments, strict=True):
            _check_can_share(name, attachment)
        adapter_of_row = torch.tensor([used.index(name) if name is not None else len(used) for name in names])
        with use_adapter(model, None), _mixed(model, attachments, adapter_of_row):
            yield


@contextmanager
def _mixed(model: nn.Module, attachments: Sequence[Attachment], adapter_of_row: Tensor) -> Iterator[None]:
    """Apply the attachments to their rows of a batch in the block. The model is the bare base before."""
    mixed = Attachment(model, MethodSettings())
    try:
        _attach_row_count(mixed, len(adapter_of_row))
        for index, attachment in enumerate(attachments):
            rows = (adapter_of_row == index).nonzero().flatten()
            _attach_bottlenecks(mixed, attachment, rows, len(adapter_of_row))
            for hook in invocation_hooks(attachment):
                mixed.make(replace(hook, handle=None))
        trained = [_trained_tensors(attachment) for attachment in attachments]
        updates = [
            {path: module for path, module in attachment.adapted.items() if isinstance(module, WeightUpdate)}
            for attachment in attachments
        ]
        for path in dict.fromkeys([*chain(*trained), *chain(*updates)]):
            layers = [modules.get(path) for modules in updates]
            _replace_module(mixed, path, layers, [tensors.get(path, {}) for tensors in trained], adapter_of_row)
        for change in fast_path_changes(model, mixed.adapted):
            mixed.make(change)
        yield
    finally:
        mixed.revert()
        for attachment in attachments:
            for bottleneck in _bottlenecks(attachment):
                bottleneck.rows = None


def can_share(model: nn.Module, name: str) -> bool:
    """Return whether an adapter can share a batch with others in `row_adapters`.

    Args:
        model: a model with adapters.
        name: the adapter.

    Returns:
        True if its rows can be in the same batch as those of other adapters.

    Raises:
        LitPeftError: there is no adapter of that name.
    """
    attachment = adapters_of(model).find(name)
    try:
        _check_can_share(name, attachment)
    except LitPeftError:
        return False
    return True


def _check_can_share(name: str, attachment: Attachment) -> None:
    layers = attachment.adapted.values()
    sublayer_adapters = [layer for layer in layers if isinstance(layer, SublayerAdapter)]
    skips_norm = any(not layer.original_ln_after and layer.norm[0] is not None for layer in sublayer_adapters)
    if skips_norm or not all(isinstance(layer, WeightUpdate | Bottleneck) for layer in layers):
        raise LitPeftError(
            f"The adapter {name!r} ({attachment.settings.method}) cannot share a batch with others. Only LoRAs, (IA)³ "
            "and bottleneck adapters without original_ln_after=False can: run its rows in a separate batch with "
            "set_adapter."
        )
    if any(isinstance(layer, InvokedLoRALinear) and layer.lora_bias is not None for layer in layers):
        raise LitPeftError(
            f"The adapter {name!r} has both alora_invocation_tokens and lora_bias=True, so it cannot share a batch "
            "with others: run its rows in a separate batch with set_adapter."
        )
    if any(isinstance(layer, ExpertLoRA) for layer in layers):
        raise LitPeftError(
            f"The adapter {name!r} adapts the experts of a mixture or an nn.MultiheadAttention, which compute all rows "
            "with the same weights, so it cannot share a batch with others: run its rows in a separate batch with "
            "set_adapter."
        )
    if attachment.trained and any(layer.original_ln_before for layer in sublayer_adapters):
        raise LitPeftError(
            f"The adapter {name!r} cannot share a batch with others, because its bottlenecks with original_ln_before "
            "may use modules of the base that it trains: run its rows in a separate batch with set_adapter."
        )


def _attach_bottlenecks(mixed: Attachment, attachment: Attachment, rows: Tensor, num_rows: int) -> None:
    """Register the hooks of an adapter's bottlenecks, limited to `rows` of the `num_rows` in the batch."""
    bottlenecks = _bottlenecks(attachment)
    for bottleneck in bottlenecks:
        bottleneck.rows = (rows, num_rows)
        if bottleneck.training:
            bottleneck.eval()
    for hook in attachment.hooks if bottlenecks else ():
        mixed.make(replace(hook, handle=None))


def _bottlenecks(attachment: Attachment) -> list[Bottleneck]:
    return [layer for layer in attachment.adapted.values() if isinstance(layer, Bottleneck)]


class _RowCount:
    """Checks that a batch has one row for each name. `generate` may repeat rows; any other forward may not."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows, self.is_generating = num_rows, False

    def check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model."""
        if not self.is_generating:
            self._check_batch(args, kwargs)

    def generate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces the model's `generate`: checks the batch before its rows are repeated."""
        self._check_batch(args, kwargs)
        self.is_generating = True
        try:
            return type(model).generate(model, *args, **kwargs)
        finally:
            self.is_generating = False

    def _check_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), None)
        if batch is not None and len(batch) != self.num_rows:
            raise LitPeftError(
                f"row_adapters was given {self.num_rows} names, but the batch has {len(batch)} rows: give one name for "
                "each row, or None for the base."
            )


def _attach_row_count(mixed: Attachment, num_rows: int) -> None:
    row_count = _RowCount(num_rows)
    mixed.forward_pre_hook("", row_count.check, with_kwargs=True)
    if hasattr(mixed.model, "generate"):
        mixed.set("", "generate", partial(row_count.generate, mixed.model))


def _trained_tensors(attachment: Attachment) -> dict[str, dict[str, Tensor]]:
    """The trained copies of base parameters, by module path and parameter name."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for path, parameter in attachment.trained_copies.items():
        module_path, _, name = base_name(path).rpartition(".")
        # In the dtype of the base's own parameter, which is on the model now.
        dtype = attachment.model.get_parameter(base_name(path)).dtype
        tensors.setdefault(module_path, {})[name] = parameter.detach().to(dtype)
    return tensors


def _replace_module(
    mixed: Attachment,
    path: str,
    layers: Sequence[WeightUpdate | None],
    trained: Sequence[Mapping[str, Tensor]],
    adapter_of_row: Tensor,
) -> None:
    """Replace the module at `path` by one that applies each row's layer and trained tensors."""
    base = mixed.model.get_submodule(path)
    plain = [layer if _is_plain(layer) else None for layer in layers]
    scaled = [layer if isinstance(layer, IA3Linear) else None for layer in layers]
    module = base
    if not any(trained) and all(layer in (*plain, *scaled) for layer in layers):
        if any(scaled):
            module = IA3Rows(module, scaled, adapter_of_row)
        if any(plain):
            module = LoRARows(module, plain, adapter_of_row)
    else:
        if isinstance(base, nn.Embedding) and base.num_embeddings != _vocabulary_size(mixed.model):
            raise LitPeftError(
                f"{path} is computed once for the whole batch, so adapters that change it cannot share a batch: run "
                "their rows in separate batches with set_adapter."
            )
        if has_forward_hooks(base):
            raise LitPeftError(
                f"{path} has both a bottleneck adapter and trained tensors or a LoRA with DoRA, PiSSA or OLoRA, which "
                "cannot share a batch: run their rows in separate batches with set_adapter."
            )
        variants = [_variant(base, layer, tensors) for layer, tensors in zip(layers, trained, strict=True)]
        module = ModuleRows(base, variants, adapter_of_row)
    mixed.replace(path, module.eval())


def _variant(
    base: nn.Module, layer: WeightUpdate | None, trained: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module that one adapter puts in the place of `base`, and the tensors that it replaces in it."""
    if layer is None:
        return base, dict(trained)
    tensors = {f"base_layer.{name}": tensor for name, tensor in trained.items()}
    if isinstance(layer, LoRALayer) and layer.residual_weight is not None:
        tensors["base_layer.weight"] = layer.residual_weight
    return layer.eval(), tensors


def _is_plain(layer: WeightUpdate | None) -> TypeGuard[LoRALinear]:
    plain = isinstance(layer, LoRALinear) and layer.lora_magnitude is None and layer.residual_weight is None
    return plain and layer is not None and layer.lora_bias is None


def _vocabulary_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    size: int | None = None if config is None else config.get_text_config().vocab_size
    return size
