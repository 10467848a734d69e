"""Strategies that shard a model: FSDP2 and tensor parallelism with ordinary checkpoints, and FSDP1 by layers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lit_peft.models.transformers_internals import no_split_classes
from lit_peft.training.lightning_internals import (
    data_parallel_size,
    set_data_parallel_size,
    tensor_parallel_size,
)
from lit_peft.training.sharding import sharded_like, whole
from lit_peft.util.errors import LitPeftError


class ShardedStrategy(ModelParallelStrategy):
    """`ModelParallelStrategy` whose checkpoints are those of a single process: whole tensors in one file.

    A run can therefore be resumed with another number of processes or another strategy. (Lightning's own strategy
    numbers the optimizer's states by all parameters, and cannot read them back if some are frozen.)

    Args:
        data_parallel_size: processes that divide the batch, each with its shard of every layer (FSDP2); if `auto`, all
            that `tensor_parallel_size` leaves.
        tensor_parallel_size: processes that divide the layers' matrices, and see the same batch.
        process_group_backend: `nccl` or `gloo`; the device's default if unset.
        timeout: how long processes wait for each other.

    Raises:
        LitPeftError: the number of processes is not a multiple of `tensor_parallel_size`.
    """

    def __init__(
        self,
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size,
            tensor_parallel_size,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        world, parts = self.num_nodes * self.num_processes, int(tensor_parallel_size(self))
        if data_parallel_size(self) == "auto":
            set_data_parallel_size(self, max(1, world // parts))
        if int(data_parallel_size(self)) * parts != world:
            raise LitPeftError(
                f"data_parallel_size={data_parallel_size(self)} times tensor_parallel_size={parts} is not the number "
                f"of processes, {world}: give another trainer.devices, or data_parallel_size='auto'."
            )
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._gathered(plain.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = self.broadcast(checkpoint_path)
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        places = dict(self.lightning_module.named_parameters())
        state = {name: sharded_like(places.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [place for group in optimizer.param_groups for place in group["params"]]
            shards = {
                index: {
                    name: sharded_like(parameters[index], value) if isinstance(value, Tensor) else value
                    for name, value in values.items()
                }
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shards})

    def _gathered(self, state: Any) -> Any:
        """Return every tensor whole, on the CPU of the first process; the other processes take part and get None."""
        if isinstance(state, Tensor):
            full = whole(state.detach())
            return full.cpu() if self.is_global_zero else None
        if isinstance(state, dict):
            return {key: self._gathered(value) for key, value in state.items()}
        return [self._gathered(value) for value in state] if isinstance(state, list) else state


class LayerFSDPStrategy(FSDPStrategy):
    """FSDP1 with each layer of the model, as transformers names them, as a unit. Arguments as in `FSDPStrategy`.

    Its checkpoints can only be resumed under FSDP1. Prefer `ShardedStrategy`: here the frozen parameters of a layer
    also take memory for gradients, since they share a unit with trained ones.
    """

    def setup(self, trainer: pl.Trainer) -> None:
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        assert self.model is not None
        layer_classes = no_split_classes(self.model)
        if layer_classes:
            self.kwargs.setdefault("auto_wrap_policy", ModuleWrapPolicy(layer_classes))
        super().setup(trainer)
