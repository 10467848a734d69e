"""Build the model of a module: load the base, attach the method, set the types and shards."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lit_peft.methods.adapter_dtype import set_trained_dtype
from lit_peft.methods.attachment import attachment_of
from lit_peft.methods.changes import tied_names
from lit_peft.models.loading import BaseSettings, check_weights_found, empty_model, load_base, load_config
from lit_peft.nn.float8 import multiplies_float8
from lit_peft.nn.torch_internals import DtypeKeepingDict
from lit_peft.tasks.base import Task, float32_default
from lit_peft.training.lightning_internals import replace_average_model, trainer_of
from lit_peft.training.new_tokens import choose_rows, start_rows
from lit_peft.training.sharding import shard
from lit_peft.training.stack_setting import load_below, put_on_top
from lit_peft.training.start_adapter import attach_from_folder, fold_prompts


def build_model(module: Any) -> nn.Module:
    """Load the base of a `BaseLM`, attach its method, and shard the result if the strategy does.

    Raises:
        LitPeftError: the base cannot be loaded, or the method's settings do not fit it.
    """
    hparams, task = module.hparams, module.task
    model, missing = load_bare_base(module)
    if not task.new_head:
        check_weights_found(hparams.base, hparams.task, missing)
    trainer = trainer_of(module)
    if hparams.quantization == "fp8" and trainer is not None and not multiplies_float8(trainer.strategy.root_device):
        rank_zero_warn(
            f"quantization='fp8': {trainer.strategy.root_device.type} has no products of 8-bit floating point here, so "
            "they are computed in a wider type, which is slower than no quantization. Hopper and newer GPUs have them."
        )
    model.train()  # transformers returns models in evaluation mode, and Lightning keeps the mode it finds
    if hparams.gradient_checkpointing:
        # transformers renamed it, and warns about the old name.
        renamed = hasattr(model, "activation_checkpointing_enable")
        getattr(model, f"{'activation' if renamed else 'gradient'}_checkpointing_enable")()
    _attach(module, model, missing)
    if module.device_mesh is not None:  # set by ModelParallelStrategy
        shard(model, module.device_mesh)
    return model


def load_bare_base(module: Any) -> tuple[nn.Module, set[str]]:
    """Load the base of a `BaseLM` without its method; also return the names of the parameters that it lacks.

    Raises:
        LitPeftError: the base cannot be loaded.
    """
    hparams, task = module.hparams, module.task
    config = _config(module)
    dtype = getattr(torch, hparams.dtype) if hparams.dtype else torch.get_default_dtype()
    return load_base(_base_settings(hparams), config, task.model_class(config), dtype, task.heads)


def build_empty_model(module: Any) -> Any:
    """Build the model of a `BaseLM` with its method on the meta device, without loading weights.

    Raises:
        LitPeftError: there is no such base, or the method's settings do not fit it.
    """
    config = _config(module)
    model = empty_model(_base_settings(module.hparams), config, module.task.model_class(config))
    _attach(module, model, ())
    return model


def build_metrics(task: Task, config: Any) -> DtypeKeepingDict:
    """Return new metrics of a task by name; their states are float32 or integers in every precision."""
    with float32_default():
        return DtypeKeepingDict(task.metrics(config))


def share_average_model(module: pl.LightningModule) -> None:
    """Give `StochasticWeightAveraging`, which copied the module before its model was built, a copy that has one."""
    for callback in getattr(trainer_of(module), "callbacks", ()):
        if isinstance(callback, StochasticWeightAveraging):
            # The frozen parameters are shared: they are their own mean.
            frozen: dict[int, Any] = {id(p): p for p in module.parameters() if not p.requires_grad}
            replace_average_model(callback, copy.deepcopy(module, frozen))


def _base_settings(hparams: Any) -> BaseSettings:
    return BaseSettings(
        hparams.base,
        revision=hparams.revision,
        trust_remote_code=hparams.trust_remote_code,
        attn_implementation=hparams.attn_implementation,
        quantization=hparams.quantization,
    )


def _config(module: Any) -> Any:
    hparams, task = module.hparams, module.task
    labels = {"labels": hparams.labels, "num_labels": hparams.num_labels} if task.labelled else {}
    return load_config(_base_settings(hparams), needs_padding=task.new_head, **labels)


def _attach(module: Any, model: nn.Module, missing: Collection[str]) -> None:
    """Attach the module's method, and train the task's head: the known heads, and what the base has no weights for."""
    head = {name for name, _ in model.named_children() if name in module.task.heads}
    new = {name for name, _ in model.named_parameters(remove_duplicate=False) if name in missing}
    unused = module.task.unused
    trained = (name for name in new if name.partition(".")[0] not in unused and not _is_second_name(model, name))
    for name in trained:
        # The module, if all of its parameters are new; else this parameter alone.
        owner = name.rpartition(".")[0]
        inside = {f"{owner}.{inner}" for inner, _ in model.get_submodule(owner).named_parameters()}
        head.add(owner if inside <= new else name)
    adapter = module.hparams.adapter
    below = load_below(module, model)
    choose_rows(module, model)
    if adapter is not None and not module.started and Path(adapter).is_dir():
        attach_from_folder(module, model, sorted(head))
    else:  # a folder that is gone is an error when the run starts, unless it is resumed from a checkpoint
        module.attach_method(model, sorted(head))
        start_rows(module, model)
        if adapter is not None:
            fold_prompts(model)
    put_on_top(model, below)
    if module.hparams.add_tokens:
        attachment_of(model).tokenizer = module.tokenizer
    for name, part in model.named_children():
        if name in unused:  # it gets no gradient, for which DDP would wait
            part.requires_grad_(False)
    if module.hparams.adapter_dtype is not None:
        set_trained_dtype(attachment_of(model), getattr(torch, module.hparams.adapter_dtype))


def _is_second_name(model: nn.Module, name: str) -> bool:
    """Whether a parameter is one that a layer inside its module computes with: the bias of BERT's output embeddings."""
    owner = name.rpartition(".")[0]
    return any(other.startswith(f"{owner}.") for other in tied_names(model, name))
