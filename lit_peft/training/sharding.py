"""Parameters in shards: giving each process its own (FSDP2), and making them whole for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_peft.training.tensor_parallel import split_matrices

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: nn.Module, mesh: DeviceMesh, policy: Any = None) -> None:
    """Give each process its part of the model: of the matrices (tensor parallelism), and its shard of all (FSDP2).

    A model whose weights are mapped from their files, as transformers loads safetensors, is never held whole: each
    layer's shard is copied, and the map let go.

    Args:
        model: the model, its method attached.
        mesh: the strategy's mesh, with dimensions `data_parallel` and `tensor_parallel`.
        policy: `torch.distributed.fsdp.MixedPrecisionPolicy`; parameters' own types when None.

    Raises:
        LitPeftError: the mesh asks for tensor parallelism, and the model or the method cannot be split that way.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mesh["tensor_parallel"].size() > 1:
        split_matrices(model, mesh["tensor_parallel"])
    settings: dict[str, Any] = {"mesh": mesh["data_parallel"], "mp_policy": policy or MixedPrecisionPolicy()}
    kinds = tuple(layer_kinds(model))
    for module in list(model.modules()):
        if isinstance(module, kinds):
            fully_shard(module, **settings)
    fully_shard(model, **settings)


def layer_kinds(model: nn.Module) -> set[type[nn.Module]]:
    """The classes of a model's layers, as transformers names them (`_no_split_modules`)."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return {type(module) for module in model.modules() if type(module).__name__ in names}


def across_processes(loss: Tensor, weight: Tensor, mesh: DeviceMesh | None) -> tuple[Tensor, Tensor]:
    """Weigh a process' mean loss so that the average over processes is the mean over all their terms.

    Strategies average gradients over processes, each of which may have another number of tokens: the average of means
    is not the mean.

    Args:
        loss: the mean over this process' terms, a scalar.
        weight: how many terms there are, a scalar.
        mesh: the strategy's mesh; None: all processes have parts of one batch.

    Returns:
        The weighed loss, to go backward from, and the mean over all terms, alike on every process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return loss, loss
    group = None if mesh is None else mesh["data_parallel"].get_group()
    processes = torch.distributed.get_world_size(group)
    if processes == 1:
        return loss, loss
    count = weight.to(loss.device, torch.float32)
    sums = torch.stack([count, count * loss.detach().float()])
    torch.distributed.all_reduce(sums, group=group)
    # Nothing supervised on any of them: zero, not 0/0.
    total = sums[0].clamp(min=1)
    return loss * (count * processes / total).to(loss.dtype), sums[1] / total


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor (`DTensor`) whole, and any other as it is. Every process must call it."""
    full = getattr(tensor, "full_tensor", None)
    return full() if callable(full) else tensor


def sharded_like(place: Tensor | None, value: Tensor) -> Tensor:
    """Return a whole tensor in shards like those of a parameter, where they have one shape; else as it is."""
    if place is None or not hasattr(place, "full_tensor") or place.shape != value.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(place, DTensor)
    return distribute_tensor(value.to(place.device), place.device_mesh, place.placements)


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Within the block, on every process, each trainable parameter of `module` is whole and can be read.

    Knows the shards of FSDP2 and tensor parallelism (`DTensor`), of FSDP1, and of DeepSpeed's ZeRO-3. Every process
    must enter the block; what is written to the parameters inside it is lost.

    Args:
        module: a module, wrapped by its strategy or not.
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
            for name, parameter in owner._parameters.items():
                if parameter is not None and parameter.requires_grad and hasattr(parameter, "full_tensor"):
                    with torch.no_grad():
                        owner._parameters[name] = nn.Parameter(whole(parameter.detach()))
                    stack.callback(owner._parameters.__setitem__, name, parameter)
        yield
