"""Different adapters for the rows of one batch, in a single forward of the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lit_peft.methods.adapters import adapters_of, set_adapter
from lit_peft.methods.attachment import Attachment, MethodSettings, base_name
from lit_peft.nn.bottleneck import Bottleneck, SublayerAdapter
from lit_peft.nn.lora import LoRALayer, LoRALinear
from lit_peft.nn.rows import LoRARows, ModuleRows
from lit_peft.nn.torch_internals import has_forward_hooks
from lit_peft.util.errors import LitPeftError


@contextmanager
def row_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the block, each row of a batch goes through its own adapter, all of them in one forward.

    The base's layers compute all rows at once, and so do plain LoRAs of linear layers. The other parts of an adapter
    (DoRA, embeddings, PiSSA, bottlenecks, trained modules and biases) compute their own rows. This is for inference:
    the adapters get no gradient.

    Args:
        model: a model with LoRAs and bottleneck adapters, in evaluation mode.
        names: the adapter of each row, None for the base. In `generate`, which repeats rows for beams and returned
            sequences, the copies of a row use its adapter.

    Raises:
        LitPeftError: there is no adapter of a name, one adds virtual tokens to the whole batch (prompts, prefixes), or
            the model is in training mode. Within the block: a batch does not have one row for each name.
    """
    if model.training:
        raise LitPeftError(
            "row_adapters was called in training mode, but it gives the adapters no gradient and no dropout: call "
            "model.eval() first, or train each adapter in batches of its own with set_adapter."
        )
    adapters = adapters_of(model)
    if not names:
        raise LitPeftError("names is empty: give the adapter of each row of the batch.")
    order = list(dict.fromkeys(name for name in names if name is not None))
    kept = [adapters.find(name) for name in order]
    for name, attachment in zip(order, kept, strict=True):
        _check(name, attachment)
    before = adapters.active
    set_adapter(model, None)
    index = torch.tensor([order.index(name) if name is not None else len(order) for name in names])
    mixed = Attachment(model, MethodSettings())
    try:
        _check_rows(mixed, len(names))
        for number, attachment in enumerate(kept):
            _hook(mixed, attachment, (index == number).nonzero().flatten(), len(names))
        trained = [_trained(attachment) for attachment in kept]
        updates = [{path: x for path, x in a.adapted.items() if isinstance(x, LoRALayer)} for a in kept]
        for path in dict.fromkeys([*(path for part in trained for path in part), *(p for u in updates for p in u)]):
            layers = [part.get(path) for part in updates]
            _replace(mixed, path, layers, [part.get(path, {}) for part in trained], index)
        yield
    finally:
        mixed.revert()
        for attachment in kept:
            for adapter in _bottlenecks(attachment):
                adapter.rows = None
        set_adapter(model, before)


def can_share(model: nn.Module, name: str) -> bool:
    """Whether rows of the adapter can share a batch with those of others, in `row_adapters`.

    Raises:
        LitPeftError: there is no adapter of that name.
    """
    attachment = adapters_of(model).find(name)
    try:
        _check(name, attachment)
    except LitPeftError:
        return False
    return True


def _check(name: str, attachment: Attachment) -> None:
    layers = attachment.adapted.values()
    bottlenecks = [layer for layer in layers if isinstance(layer, SublayerAdapter)]
    passing = any(not layer.original_ln_after and layer.norm[0] is not None for layer in bottlenecks)
    if passing or not all(isinstance(layer, LoRALayer | Bottleneck) for layer in layers):
        raise LitPeftError(
            f"The adapter {name!r} ({attachment.settings.method}) cannot share a batch with others: LoRAs and "
            "bottleneck adapters can, but none with original_ln_after=False. Run its rows in a batch of their own with "
            "set_adapter."
        )
    if attachment.trained and any(layer.original_ln_before for layer in bottlenecks):
        raise LitPeftError(
            f"The adapter {name!r} trains modules of the base and has bottlenecks with original_ln_before, which may "
            "use them: it cannot share a batch with others. Run its rows in a batch of their own with set_adapter."
        )


def _hook(mixed: Attachment, attachment: Attachment, rows: Tensor, count: int) -> None:
    """Let an adapter's bottlenecks act on its rows."""
    bottlenecks = _bottlenecks(attachment)
    for adapter in bottlenecks:
        adapter.rows = (rows, count)
        if adapter.training:
            adapter.eval()
    for hook in attachment.hooks if bottlenecks else ():
        mixed.make(replace(hook, handle=None))


def _bottlenecks(attachment: Attachment) -> list[Bottleneck]:
    return [layer for layer in attachment.adapted.values() if isinstance(layer, Bottleneck)]


class _RowCount:
    """Checks that a batch has one row for each name. `generate` may repeat rows; a plain forward may not."""

    def __init__(self, rows: int) -> None:
        self.rows, self.generates = rows, False

    def check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model."""
        if not self.generates:
            self._compare(args, kwargs)

    def generate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of the model's `generate`."""
        self._compare(args, kwargs)
        self.generates = True
        try:
            return type(model).generate(model, *args, **kwargs)
        finally:
            self.generates = False

    def _compare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), None)
        if first is not None and len(first) != self.rows:
            raise LitPeftError(
                f"row_adapters was given {self.rows} names, and the batch has {len(first)} rows: give one name for "
                "each row, None for the base."
            )


def _check_rows(mixed: Attachment, rows: int) -> None:
    count = _RowCount(rows)
    mixed.forward_pre_hook("", count.check, with_kwargs=True)
    if hasattr(mixed.model, "generate"):
        mixed.set("", "generate", partial(count.generate, mixed.model))


def _trained(attachment: Attachment) -> dict[str, dict[str, Tensor]]:
    """The tensors trained in place of the base's own, by module and name."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in attachment.trained_copies.items():
        path, _, last = base_name(name).rpartition(".")
        found.setdefault(path, {})[last] = parameter.detach()
    return found


def _replace(
    mixed: Attachment,
    path: str,
    layers: Sequence[LoRALayer | None],
    trained: Sequence[Mapping[str, Tensor]],
    index: Tensor,
) -> None:
    """Put a module that serves every row at `path`."""
    base = mixed.model.get_submodule(path)
    plain = [layer if _is_plain(layer) else None for layer in layers]
    rows: nn.Module
    if not any(trained) and plain == list(layers):
        rows = LoRARows(base, plain, index)
    else:
        if isinstance(base, nn.Embedding) and base.num_embeddings != _vocabulary(mixed.model):
            raise LitPeftError(f"{path} is the same for the whole batch, so adapters of it cannot share one.")
        if has_forward_hooks(base):
            raise LitPeftError(
                f"A bottleneck adapter and a LoRA with DoRA, PiSSA, OLoRA or trained tensors stand at {path} both: "
                "they cannot share a batch. Run their rows in batches of their own with set_adapter."
            )
        rows = ModuleRows(base, [_form(base, x, own) for x, own in zip(layers, trained, strict=True)], index)
    mixed.replace(path, rows.eval())


def _form(
    base: nn.Module, layer: LoRALayer | None, trained: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, Tensor]]:
    if layer is None:
        return base, dict(trained)
    tensors = {f"base_layer.{name}": tensor for name, tensor in trained.items()}
    if layer.residual_weight is not None:
        tensors["base_layer.weight"] = layer.residual_weight
    return layer.eval(), tensors


def _is_plain(layer: LoRALayer | None) -> TypeGuard[LoRALinear]:
    return isinstance(layer, LoRALinear) and layer.lora_magnitude is None and layer.residual_weight is None


def _vocabulary(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    found: int | None = None if config is None else config.get_text_config().vocab_size
    return found
