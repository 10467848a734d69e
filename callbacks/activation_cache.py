"""Compute the frozen layers below the lowest trained one only in the first epoch."""

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
from lit_peft.models.towers import describe_towers
from lit_peft.util.errors import LitPeftError

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class ActivationCache(Callback):
    """Runs the layers below the lowest trained one once for each example instead of once in each epoch.

        layers cut … L-1, trained      every step
        ─────────── hidden states ◄─── from the second epoch on read from here, by the tokens of the row
        layers 0 … cut-1, frozen       the first time a row is used

    Train only the upper layers (`layers_to_transform` of LoRA, `leave_out` of the other methods) or only the head. The
    key of a row is made of its tokens, positions and types without padding, so that it is found again in another batch,
    order or padding. The losses are the same as without the cache. Works with any LightningModule around a transformers
    model, and only in training steps.

    Args:
        folder: folder for the states, which other runs can also use; if None, they are in the memory of the processor.
            Each base and cut has its own subfolder, named by a fingerprint of the weights below the cut.
        max_gb: maximal size; further rows are computed every time.

    Raises:
        LitPeftError: when fitting starts, if nothing frozen is below the trained layers, the model is an
            encoder-decoder, its layers pass on more than hidden states (T5), or there is dropout below the cut (which
            has to differ in each epoch); at the first step, if something below the cut is trained, e.g. a prompt.
    """

    # It finds the tokens of a row by the mask.
    needs_attention_mask = True

    def __init__(self, folder: str | None = None, max_gb: float = 16.0) -> None:
        self.folder, self.max_gb = folder, max_gb
        self.hits = self.misses = 0
        self._undo: list[Callable[[], object]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the cut and replace the forward of the layers below it."""
        if getattr(getattr(pl_module, "hparams", None), "neftune_noise_alpha", None):
            raise LitPeftError("ActivationCache would keep the noise of neftune_noise_alpha: leave one of them out.")
        if describe_towers(pl_module):
            raise LitPeftError(
                "ActivationCache finds rows by their tokens, which are the same for different images: leave it out."
            )
        stacks = layer_stacks(pl_module)
        layers = stacks[0]
        if len(stacks) != 1 or "position_bias" in arguments(layers[0].module):
            raise LitPeftError(
                "ActivationCache supports models with one stack of layers, each of which passes on only hidden states; "
                f"{type(layers[0].module).__name__} is different: leave the callback out."
            )
        cut = next((index for index, layer in enumerate(layers) if _is_trained(layer.module)), len(layers))
        if not cut:
            raise LitPeftError(
                f"ActivationCache cannot save anything: layer 0 of {len(layers)} is trained. Train only the upper "
                f"layers, e.g. layers_to_transform={list(range(len(layers) * 3 // 4, len(layers)))}, or leave the "
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
        for index, layer in enumerate(layers[:cut]):
            self._replace_forward(layer.module, last=index == cut - 1)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the rows that other processes stored."""
        self._store.refresh()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Restore the model."""
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
                "ActivationCache cannot identify the rows of this batch (no input_ids, a KV cache, or a mask that is "
                "not [batch, length]): it is computed in full.",
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

    def _replace_forward(self, layer: nn.Module, last: bool) -> None:
        original = layer.forward
        length: int | None = None  # of the layer's output, if that is a tuple

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal length
            if self._states is not None:
                hidden = self._states if last else (args[0] if args else kwargs["hidden_states"])
                return hidden if length is None else (hidden, *[None] * (length - 1))
            output = original(*args, **kwargs)
            if self._keys is not None:
                length = len(output) if isinstance(output, tuple) else None
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
                f"ActivationCache needs hidden states of shape [batch, length, d], but {type(layer).__name__} returns "
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
        raise LitPeftError(f"ActivationCache: no model around {layer.path} takes input_ids: leave the callback out.")
    return model.get_submodule(path)


def _below(owner: nn.Module, layers: list[Layer], cut: int) -> list[tuple[str, nn.Module]]:
    """Return the modules of the owner by name, without the layers from the cut on."""
    above = {id(inner) for layer in layers[cut:] for inner in layer.module.modules()}
    return [(name, module) for name, module in owner.named_modules() if id(module) not in above]


def _check_dropout(below: list[tuple[str, nn.Module]]) -> None:
    """Refuse dropout: modules, and probabilities that other modules have as attributes."""
    for name, module in below:
        numbers = {key: value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)}
        if isinstance(module, _DROPOUTS):
            numbers = {"p": module.p}
        for key, value in numbers.items():
            if value:
                raise LitPeftError(
                    f"ActivationCache stores what the frozen layers compute, but dropout changes it in every epoch: "
                    f"{name}.{key}={value}. Set the base's dropout to 0 in its config.json, or leave the callback "
                    "out."
                )


def _fingerprint(below: list[tuple[str, nn.Module]], precision: str) -> str:
    """Return a hash of the names, shapes and types of all weights below the cut, and of a sample of their values."""
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
    """Return a key for each row and the mask of its tokens, [batch, length] on the CPU; None if that is impossible."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(ids, Tensor) or cache_of(given) is not None:
        return None
    if mask is None:
        mask = torch.ones_like(ids)
    # All other values that belong to the tokens are part of the key.
    others = {key: value for key, value in given.items() if isinstance(value, Tensor) and key != "attention_mask"}
    if not isinstance(mask, Tensor) or any(value.shape != ids.shape for value in (mask, *others.values())):
        return None
    mask = mask.bool().cpu()
    columns = torch.stack([others[key].long() for key in sorted(others)], dim=-1).cpu()
    names = repr(sorted(others)).encode()
    keys = [
        hashlib.blake2b(names + row[real].numpy().tobytes(), digest_size=16).digest()
        for row, real in zip(columns, mask, strict=True)
    ]
    return keys, mask
