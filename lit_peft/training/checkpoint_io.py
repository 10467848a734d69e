"""Training checkpoints that are whole or not there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lit_peft.util.disk import write_failure, write_file
from lit_peft.util.errors import LitPeftError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs it to the disk, and renames it. A plugin of the Trainer.

    Lightning writes to the system's temporary folder and moves the file, which copies where that is another file
    system: a process killed, or a disk full, during the copy leaves half a checkpoint in the place of a good one.
    Checkpoints elsewhere than in the file system (`s3://…`) are Lightning's own.

    Raises:
        LitPeftError: the file cannot be written; the one that was there still is.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # In memory first: torch's own writer has no clear error for a full disk.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            write_file(Path(path), content.getbuffer())
        except OSError as error:
            raise LitPeftError(write_failure("The checkpoint", Path(path), error)) from error
