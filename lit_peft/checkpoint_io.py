"""The Trainer plugin under the class path that configurations name: `lit_peft.checkpoint_io.AtomicCheckpointIO`."""

from lit_peft.training.checkpoint_io import AtomicCheckpointIO

__all__ = ["AtomicCheckpointIO"]
