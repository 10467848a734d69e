"""Parameters that a strategy keeps in shards, made whole for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


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
