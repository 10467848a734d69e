"""A long run, with everything that is written on the way, takes no more memory at its end than at its middle."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
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


def run(folder: Path, steps: int, decoder: Path, reviews: Path, watch: pl.Callback, every: int) -> None:
    """Train with checkpoints, adapters and a validation every few steps."""
    module = lit_peft.LoRA(base=str(decoder), r=4, lora_dropout=0.1, learning_rate=1e-3)
    data = lit_peft.CausalLMData(base=str(decoder), train=str(reviews), batch_size=4)
    trainer = pl.Trainer(
        **{**QUIET, "logger": RunLogger(folder, name=None)},
        max_steps=steps,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        callbacks=[
            watch,
            GracefulStop(),
            ExactResume(),
            Throughput(),
            AdapterNorms(),
            AdapterCheckpoint(monitor="val_loss", save_top_k=2, every_n_train_steps=every),
            ModelCheckpoint(save_last=True, every_n_train_steps=every),
        ],
    )
    trainer.fit(module, data)
    assert trainer.global_step == steps and len(list(folder.glob("version_0/adapters/best-*"))) == 2


class LiveTensors(pl.Callback):
    """The number of tensors that are alive, after each of some steps."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step % 10 == 5:
            gc.collect()
            self.counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))


def test_no_tensor_outlives_its_step(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    watch = LiveTensors()
    run(tmp_path, 40, decoder, reviews, watch, every=10)
    # The first steps make the optimizer's state. One tensor kept by each step after them would be 20 more.
    assert len(watch.counts) == 4 and watch.counts[-1] - watch.counts[1] < 10, watch.counts


@pytest.mark.heavy
@pytest.mark.skipif(not process_memory("VmRSS"), reason="memory is read from /proc")
def test_memory_is_flat_over_a_long_run(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    """LIT_PEFT_SOAK steps (300; the full check: 2000), with checkpoints, adapters and a validation every 50."""
    resident = Resident()
    run(tmp_path, STEPS, decoder, reviews, resident, every=50)
    assert resident.steps[-1] == STEPS
    half = len(resident.steps) // 2
    slope = np.polyfit(resident.steps[half:], resident.bytes[half:], 1)[0]
    print(f"\n{STEPS} steps: {resident.bytes[-1] / 2**20:.0f} MB at the end, {slope:+.0f} bytes a step")
    # A leaked batch would be 4 kB a step, a leaked copy of the adapter 8 kB.
    assert slope < 2_000
