"""Strategies under the class paths that configurations name, e.g. `class_path: lit_peft.strategies.ShardedStrategy`."""

from lit_peft.training.strategies import LayerFSDPStrategy, ShardedStrategy

__all__ = ["LayerFSDPStrategy", "ShardedStrategy"]
