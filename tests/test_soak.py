"""A long run, with everything that is written on the way, takes no more memory at its end than at its middle."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_peft.callbacks import AdapterCheckpoint, AdapterNorms, ExactResume, GracefulStop, Throughput
from models import QUIET

import lit_peft
from lit_peft.training.run_folder import RunLogger
from lit_peft.util.memory import process_memory

STEPS = int(os.environ.get("LIT_PEFT_SOAK", "300"))


class Resident(pl.Callback):
    """The process' resident bytes, every ten steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.bytes: list[int] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step % 10 == 0:
            gc.collect()
            self.steps.append(trainer.global_step)
            self.bytes.append(process_memory("VmRSS") or 0)


@pytest.mark.skipif(not process_memory("VmRSS"), reason="memory is read from /proc")
def test_memory_is_flat_over_a_long_run(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    """LIT_PEFT_SOAK steps (300; the full check: 2000), with checkpoints, adapters and a validation every 50."""
    module = lit_peft.LoRA(base=str(decoder), r=4, lora_dropout=0.1, learning_rate=1e-3)
    data = lit_peft.CausalLMData(base=str(decoder), train=str(reviews), batch_size=4)
    resident = Resident()
    trainer = pl.Trainer(
        **{**QUIET, "logger": RunLogger(tmp_path, name=None)},
        max_steps=STEPS,
        val_check_interval=50,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        callbacks=[
            resident,
            GracefulStop(),
            ExactResume(),
            Throughput(),
            AdapterNorms(),
            AdapterCheckpoint(monitor="val_loss", save_top_k=2, every_n_train_steps=50),
            ModelCheckpoint(save_last=True, every_n_train_steps=50),
        ],
    )
    trainer.fit(module, data)
    assert resident.steps[-1] == STEPS and len(list(tmp_path.glob("version_0/adapters/best-*"))) == 2
    half = len(resident.steps) // 2
    slope = np.polyfit(resident.steps[half:], resident.bytes[half:], 1)[0]
    print(f"\n{STEPS} steps: {resident.bytes[-1] / 2**20:.0f} MB at the end, {slope:+.0f} bytes a step")
    # A leaked batch would be 4 kB a step, a leaked copy of the adapter 8 kB.
    assert slope < 2_000
