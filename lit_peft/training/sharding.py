"""Sharded parameters: give each process its shard (FSDP2), and gather the shards for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_peft.models.transformers_internals import no_split_classes
from lit_peft.training.tensor_parallel import split_matrices

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: nn.Module, mesh: DeviceMesh, policy: Any = None) -> None:
    """Keep in each process its part of the matrices (tensor parallelism), and its shard of all parameters (FSDP2).

    A model whose weights are memory-mapped from their files, as transformers loads safetensors, is never in memory as a
    whole: the shard of each layer is copied, and the map is released.

    Args:
        model: the model with its method attached.
        mesh: the strategy's mesh, with dimensions `data_parallel` and `tensor_parallel`.
        policy: `torch.distributed.fsdp.MixedPrecisionPolicy`; if None, parameters keep their types.

    Raises:
        LitPeftError: the mesh has tensor parallelism, and the model or the method cannot be split that way.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mesh["tensor_parallel"].size() > 1:
        split_matrices(model, mesh["tensor_parallel"])
    settings: dict[str, Any] = {"mesh": mesh["data_parallel"], "mp_policy": policy or MixedPrecisionPolicy()}
    layer_classes = tuple(no_split_classes(model))
    for module in list(model.modules()):
        if isinstance(module, layer_classes):
            fully_shard(module, **settings)
    fully_shard(model, **settings)


def across_processes(loss: Tensor, weight: Tensor, mesh: DeviceMesh | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weight the mean loss of a process so that the average over processes is the mean over all their terms.

    Strategies average gradients over processes. If these have different numbers of tokens, the average of their means
    is not the mean over all tokens.

    Args:
        loss: the mean over the terms of this process, a scalar.
        weight: number of those terms, a scalar.
        mesh: the strategy's mesh; if None, every process has a part of the batch.

    Returns:
        The weighted loss for the backward pass; and, equal on every process, the mean over all terms and their number.
    """
    count = weight.to(loss.device, torch.float32)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return loss, loss, count
    group = None if mesh is None else mesh["data_parallel"].get_group()
    processes = torch.distributed.get_world_size(group)
    if processes == 1:
        return loss, loss, count
    sums = torch.stack([count, count * loss.detach().float()])
    torch.distributed.all_reduce(sums, group=group)
    # If nothing is supervised on any process: zero, not 0/0.
    total = sums[0].clamp(min=1)
    return loss * (count * processes / total).to(loss.dtype), sums[1] / total, sums[0]


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (`DTensor`); return any other tensor unchanged. Every process must call this."""
    full = getattr(tensor, "full_tensor", None)
    return full() if callable(full) else tensor


def sharded_like(place: Tensor | None, value: Tensor) -> Tensor:
    """Shard a whole tensor like a parameter of the same shape; return it unchanged if the parameter is not sharded."""
    if place is None or not hasattr(place, "full_tensor") or place.shape != value.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(place, DTensor)
    return distribute_tensor(value.to(place.device), place.device_mesh, place.placements)


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Gather the trained parameters of `module` within the block, on every process, so that they can be read.

    Supports the shards of FSDP2 and tensor parallelism (`DTensor`), of FSDP1, and of DeepSpeed's ZeRO-3. Every process
    must enter the block. Changes of the parameters inside the block are lost.

    Args:
        module: a module, which may be wrapped by its strategy.
    """
    with ExitStack() as stack:
        if "torch.distributed.fsdp" in sys.modules:
            from torch.distributed.fsdp import FullyShardedDataParallel

            if any(isinstance(inner, FullyShardedDataParallel) for inner in module.modules()):
                stack.enter_context(FullyShardedDataParallel.summon_full_params(module, writeback=False))
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if any(hasattr(parameter, "ds_id") for parameter in trained):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(trained))
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
                if parameter.requires_grad and hasattr(parameter, "full_tensor"):
                    with torch.no_grad():
                        setattr(owner, name, nn.Parameter(whole(parameter.detach())))
                    stack.callback(setattr, owner, name, parameter)
        yield
