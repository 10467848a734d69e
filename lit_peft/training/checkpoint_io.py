"""Training checkpoints that are never half written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lit_peft.util.disk import write_failure, write_file
from lit_peft.util.errors import LitPeftError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder, syncs it, and renames it. A plugin of the Trainer.

    Lightning writes to the system's temporary folder and moves the file, which means a copy if that is on another file
    system: if the process is killed or the disk is full during the copy, half a checkpoint replaces a good one.
    Checkpoints outside the file system (`s3://…`) are left to Lightning.

    Raises:
        LitPeftError: the file cannot be written; an existing one is unchanged.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # In memory first, since torch's own writer raises no clear error if the disk is full.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            write_file(Path(path), content.getbuffer())
        except OSError as error:
            raise LitPeftError(write_failure("The checkpoint", Path(path), error)) from error
