"""What the frozen layers below the lowest trained one compute, kept from the first epoch for all that follow."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lit_peft.callbacks.activation_store import DiskStore, MemoryStore
from torch import Tensor, nn

from lit_peft.models.architectures import Layer, layer_stacks, token_model
from lit_peft.models.call_arguments import arguments, by_name, cache_of
from lit_peft.util.errors import LitPeftError


class ActivationCache(Callback):
    """Runs the layers below the lowest trained one once for each example, not once for each epoch.

        layers cut … L-1, trained      every step
        ─────────── hidden states ◄─── from the second epoch on read from here, keyed by the row's tokens
        layers 0 … cut-1, frozen       the first time a row is seen

    Adapt the upper layers alone (`layers_to_transform` of LoRA, `leave_out` of the others), or the head alone. A row is
    known by its tokens, positions and types, padding aside, so it is found again in another batch, order or padding.
    The losses are those without the cache. Works with any LightningModule around a transformers model; in training
    steps only.

    Args:
        folder: where to keep the states on disk, for further runs too; in the processor's memory when None. Each base
            and cut has a subfolder of its own, named by a fingerprint of the weights below the cut.
        max_gb: keep no more than this; rows beyond it are computed each time.

    Raises:
        LitPeftError: when fitting starts, nothing frozen lies below the trained layers, the model is an
            encoder-decoder, its layers hand on more than hidden states (T5), or dropout is on below the cut (each epoch
            would have to see another mask); at the first step, something below the cut is trained after all, e.g. a
            prompt.
    """

    def __init__(self, folder: str | None = None, max_gb: float = 16.0) -> None:
        self.folder, self.max_gb = folder, max_gb
        self.hits = self.misses = 0
        self._undo: list[Callable[[], object]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the cut and stand in for the layers below it."""
        stacks = layer_stacks(pl_module)
        layers = stacks[0]
        if len(stacks) != 1 or "position_bias" in arguments(layers[0].module):
            raise LitPeftError(
                "ActivationCache knows models with one stack of layers, each of which hands on hidden states and no "
                f"more, and {type(layers[0].module).__name__} is of another kind: leave the callback out."
            )
        cut = next((at for at, layer in enumerate(layers) if _is_trained(layer.module)), len(layers))
        if not cut:
            raise LitPeftError(
                f"ActivationCache has nothing to keep: layer 0 of {len(layers)} is trained. Adapt the upper layers "
                f"alone, e.g. layers_to_transform={list(range(len(layers) * 3 // 4, len(layers)))}, or leave the "
                "callback out."
            )
        owner = _owner(pl_module, layers[0])
        below = _below(owner, layers, cut)
        _check_dropout(below)
        limit = int(self.max_gb * 1e9)
        if self.folder is None:
            self._store: MemoryStore = MemoryStore(limit)
        else:
            name = f"{_fingerprint(below, str(trainer.precision))}-{cut}"
            self._store = DiskStore(limit, Path(self.folder) / name, trainer.global_rank)
        self._keys: list[bytes] | None = None
        self._states: Tensor | None = None
        self._undo.append(owner.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        for number, layer in enumerate(layers[:cut]):
            self._stand_in(layer.module, last=number == cut - 1)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learn of the rows that other processes stored."""
        self._store.refresh()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Leave the model as it was."""
        while self._undo:
            self._undo.pop()()
        self._keys = self._states = None

    on_exception = teardown

    # ---------------------------------------------------------------------------------------- one step

    def _before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model around the layers: look its rows up."""
        self._keys = self._states = None
        if not (owner.training and torch.is_grad_enabled()):
            return
        given = by_name(owner, args, kwargs)
        rows = _rows(given)
        if rows is None:
            warnings.warn(
                "ActivationCache cannot tell the rows of this batch apart (no input_ids, a KV cache, or a mask of "
                "another form than [batch, length]): it is computed in full.",
                stacklevel=2,
            )
            return
        self._keys, self._mask = rows
        if all(key in self._store for key in self._keys):
            self.hits += len(self._keys)
            found = [self._store[key] for key in self._keys]
            states = found[0].new_zeros(*self._mask.shape, found[0].shape[-1])
            states[self._mask] = torch.cat(found)
            self._states = states.to(given["input_ids"].device)
        else:
            self.misses += len(self._keys)

    def _stand_in(self, layer: nn.Module, last: bool) -> None:
        whole = layer.forward
        parts: int | None = None  # of the layer's output, where it is a tuple

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal parts
            if self._states is not None:
                hidden = self._states if last else (args[0] if args else kwargs["hidden_states"])
                return hidden if parts is None else (hidden, *[None] * (parts - 1))
            output = whole(*args, **kwargs)
            if self._keys is not None:
                parts = len(output) if isinstance(output, tuple) else None
                if last:
                    self._record(layer, output)
            return output

        layer.forward = forward
        self._undo.append(partial(delattr, layer, "forward"))

    def _record(self, layer: nn.Module, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            raise LitPeftError(
                "ActivationCache cannot be used here: something below the lowest trained layer is trained as well (a "
                "prompt, a prefix or the embeddings). Leave the callback out."
            )
        if hidden.shape[:2] != self._mask.shape:
            raise LitPeftError(
                f"ActivationCache needs hidden states of shape [batch, length, d], and {type(layer).__name__} gives "
                f"{tuple(hidden.shape)} for tokens of shape {tuple(self._mask.shape)}: leave the callback out."
            )
        assert self._keys is not None
        hidden = hidden.detach().cpu()
        for key, states, mask in zip(self._keys, hidden, self._mask, strict=True):
            if key not in self._store:
                self._store.put(key, states[mask])
        self._keys = None


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _owner(model: nn.Module, layer: Layer) -> nn.Module:
    path = token_model(model, layer)
    if path is None:
        raise LitPeftError(f"No model around {layer.path} takes input_ids: leave ActivationCache out.")
    return model.get_submodule(path)


def _below(owner: nn.Module, layers: list[Layer], cut: int) -> list[tuple[str, nn.Module]]:
    """Every module of the owner by name, those of the layers from the cut on left out."""
    above = {id(inner) for layer in layers[cut:] for inner in layer.module.modules()}
    return [(name, module) for name, module in owner.named_modules() if id(module) not in above]


def _check_dropout(below: list[tuple[str, nn.Module]]) -> None:
    """Refuse dropout, be it a module or a probability that a module keeps as a number."""
    for name, module in below:
        numbers = {key: value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            numbers = {"p": module.p}
        for key, value in numbers.items():
            if value:
                raise LitPeftError(
                    f"ActivationCache keeps what the frozen layers compute, and dropout would change it from epoch to "
                    f"epoch: {name}.{key}={value}. Set the base's dropout to 0 in its config.json, or leave the "
                    "callback out."
                )


def _fingerprint(below: list[tuple[str, nn.Module]], precision: str) -> str:
    """A hash of the names, shapes, types and a sample of the values of all weights below the cut."""
    digest = hashlib.blake2b(precision.encode(), digest_size=12)
    for name, module in below:
        for key, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            local: Any = value.detach()
            flat = (local.to_local() if hasattr(local, "to_local") else local).reshape(-1)
            places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), 64), device=flat.device).long()
            sample = flat[places].float().tolist()
            digest.update(repr((name, key, tuple(value.shape), str(value.dtype), sample)).encode())
    return digest.hexdigest()


def _rows(given: dict[str, Any]) -> tuple[list[bytes], Tensor] | None:
    """Return a key for each row and the mask of its real tokens, [batch, length] on the CPU; None where that fails."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(ids, Tensor) or cache_of(given) is not None:
        return None
    if mask is None:
        mask = torch.ones_like(ids)
    # Whatever else comes with a token is part of its row's key.
    others = {key: value for key, value in given.items() if isinstance(value, Tensor) and key != "attention_mask"}
    if not isinstance(mask, Tensor) or any(value.shape != ids.shape for value in (mask, *others.values())):
        return None
    mask = mask.bool().cpu()
    columns = torch.stack([others[key].long() for key in sorted(others)], dim=-1).cpu()
    names = repr(sorted(others)).encode()
    keys = [
        hashlib.blake2b(names + row[seen].numpy().tobytes(), digest_size=16).digest()
        for row, seen in zip(columns, mask, strict=True)
    ]
    return keys, mask
