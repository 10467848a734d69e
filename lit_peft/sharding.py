"""Parameters in shards: giving each process its own (FSDP2), and making them whole for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_peft.errors import LitPeftError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: nn.Module, mesh: DeviceMesh, policy: Any = None) -> None:
    """Give each process its shard of every parameter (FSDP2), a group for each layer and one for the rest.

    A model whose weights are mapped from their files, as transformers loads safetensors, is never held whole: each
    layer's shard is copied, and the map let go.

    Args:
        model: the model, its method attached.
        mesh: the strategy's mesh, with a dimension `data_parallel`.
        policy: `torch.distributed.fsdp.MixedPrecisionPolicy`; parameters' own types when None.

    Raises:
        LitPeftError: the mesh asks for tensor parallelism.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise LitPeftError(
            f"tensor_parallel_size={mesh['tensor_parallel'].size()}: adapted layers are not split over processes. Use "
            "ModelParallelStrategy(data_parallel_size=DEVICES, tensor_parallel_size=1), which is FSDP2."
        )
    settings: dict[str, Any] = {"mesh": mesh["data_parallel"], "mp_policy": policy or MixedPrecisionPolicy()}
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, **settings)
    fully_shard(model, **settings)


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor (`DTensor`) whole, and any other as it is. Every process must call it."""
    full = getattr(tensor, "full_tensor", None)
    return full() if callable(full) else tensor


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
