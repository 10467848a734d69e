"""Callbacks: what they save, measure and guard, on a model of ours and on any other."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_peft.callbacks import AdapterCheckpoint
from models import QUIET
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

import lit_peft
from lit_peft.data import CausalLMData
from lit_peft.util.errors import LitPeftError

WEIGHTS = "adapter_model.safetensors"


class Plain(pl.LightningModule):
    """A module that knows nothing of lit_peft: a frozen layer, a trained one, a given validation loss per epoch."""

    def __init__(self, losses: tuple[float, ...] = (3, 1, 2, 0.5)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.trained = nn.Linear(4, 1)
        self.losses = losses
        self.learning_rate, self.batch_size = 1e-2, 2

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.trained(self.frozen(batch).relu()).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(float(self.losses[self.current_epoch])), batch_size=1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.zeros(1, 4))


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if not p.name.startswith("."))


# ------------------------------------------------------------------------------------------ AdapterCheckpoint


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_best_k_and_the_last_are_kept(tmp_path: Path, asynchronous: bool) -> None:
    keep = AdapterCheckpoint(
        str(tmp_path / "a"), "{epoch}", monitor="val_loss", save_top_k=2, asynchronous=asynchronous
    )
    module = Plain()
    pl.Trainer(max_epochs=4, callbacks=[keep], default_root_dir=tmp_path, **QUIET).fit(module)
    assert folders(tmp_path / "a") == ["best-epoch=1", "best-epoch=3", "last", "last-step=16"]
    assert Path(keep.best_model_path).name == "best-epoch=3" and keep.best_model_score == 0.5
    note = json.loads((tmp_path / "a" / "best-epoch=1" / "adapter_checkpoint.json").read_text())
    assert (note["monitor"], note["value"], note["step"], note["epoch"]) == ("val_loss", 1.0, 8, 1)
    stored = load_file(tmp_path / "a" / "last" / WEIGHTS)
    assert set(stored) == {"trained.weight", "trained.bias"}
    assert all(torch.equal(value, module.get_parameter(name)) for name, value in stored.items())
    # Lightning's own checkpoint of the run is there besides.
    assert list((tmp_path / "checkpoints").glob("*.ckpt"))


def test_folders_of_a_method_are_what_load_adapter_and_peft_read(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module = lit_peft.LoRA(base=str(decoder), r=4, learning_rate=1e-2)
    data = CausalLMData(base=str(decoder), train=str(reviews), batch_size=8)
    keep = AdapterCheckpoint(str(tmp_path / "a"), every_n_train_steps=2, save_top_k=0)
    pl.Trainer(max_steps=4, callbacks=[keep], enable_checkpointing=False, default_root_dir=tmp_path, **QUIET).fit(
        module, data
    )
    batch = {"input_ids": torch.tensor([[7, 8, 9, 10]])}
    expected = module.eval()(**batch).logits
    ours = lit_peft.load_adapter(AutoModelForCausalLM.from_pretrained(decoder), tmp_path / "a" / "last").eval()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decoder), tmp_path / "a" / "last").eval()
    for model in (ours, theirs):
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)
    assert folders(tmp_path / "a") == ["last", "last-step=4"]


def test_a_resumed_run_goes_on_with_its_list(tmp_path: Path) -> None:
    def run(epochs: int, resume: str | None, where: Path) -> AdapterCheckpoint:
        keep = AdapterCheckpoint(str(where / "a"), "{epoch}", monitor="val_loss", save_top_k=2)
        last = ModelCheckpoint(where / "c", save_last=True)
        trainer = pl.Trainer(max_epochs=epochs, callbacks=[last, keep], default_root_dir=where, **QUIET)
        trainer.fit(Plain(), ckpt_path=resume)
        return keep

    whole = run(4, None, tmp_path / "whole")
    for epochs in (1, 2, 3, 4):
        resumed = run(epochs, "last", tmp_path / "parts")
    assert folders(tmp_path / "parts" / "a") == folders(tmp_path / "whole" / "a")
    assert sorted(map(float, resumed.best_k_models.values())) == [0.5, 1.0]
    assert resumed.best_model_score == whole.best_model_score
    for name in folders(tmp_path / "whole" / "a"):
        one, other = (load_file(tmp_path / run / "a" / name / WEIGHTS) for run in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_training_checkpoint_never_lists_a_folder_that_is_gone(tmp_path: Path) -> None:
    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            for file in (tmp_path / "c").glob("*.ckpt"):
                states = torch.load(file, weights_only=True)["callbacks"]
                state = next(value for key, value in states.items() if key.startswith("AdapterCheckpoint"))
                assert state["best_k_models"] and all(Path(path).is_dir() for path in state["best_k_models"])

    keep = AdapterCheckpoint(str(tmp_path / "a"), monitor="train_loss", every_n_train_steps=1, save_top_k=1)
    rare = ModelCheckpoint(tmp_path / "c", every_n_train_steps=3)
    trainer = pl.Trainer(max_steps=12, callbacks=[keep, rare, Look()], default_root_dir=tmp_path, **QUIET)
    trainer.fit(Plain((1,) * 9))
    assert len(folders(tmp_path / "a")) == 3  # the best, the last, the link


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_said_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    import lit_peft.util.disk

    calls = []

    def full(path: Path) -> None:
        calls.append(path)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lit_peft.util.disk, "sync", full)
    keep = AdapterCheckpoint(str(tmp_path / "a"), every_n_train_steps=1, save_last=False, asynchronous=asynchronous)
    trainer = pl.Trainer(max_epochs=4, callbacks=[keep], enable_checkpointing=False, **QUIET)
    with pytest.raises(LitPeftError, match="the disk is full"):
        trainer.fit(Plain())
    kept = [p for p in (tmp_path / "a").iterdir() if p.name != ".lock"]
    assert kept and not any(".tmp" in p.name for p in kept)
    for folder in kept:
        assert len(load_file(folder / WEIGHTS)) == 2


@pytest.mark.heavy
def test_a_file_size_limit_leaves_no_half_written_folder(tmp_path: Path) -> None:
    code = (
        "import resource, sys, test_callbacks as t, lightning.pytorch as pl\n"
        "from lit_peft.callbacks import AdapterCheckpoint\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "class Limit(pl.Callback):\n"
        "    def on_train_batch_start(self, trainer, *a):\n"
        "        if trainer.global_step == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "keep = AdapterCheckpoint(sys.argv[1], every_n_train_steps=1, save_last=False)\n"
        "pl.Trainer(max_epochs=2, callbacks=[keep, Limit()], enable_checkpointing=False, **t.QUIET).fit(t.Plain())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert "could not be written" in done.stderr and "LitPeftError" in done.stderr
    assert folders(tmp_path / "a") == ["step=2"]
    assert len(load_file(tmp_path / "a" / "step=2" / WEIGHTS)) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes to read-only folders")
def test_a_read_only_folder_is_said_before_training(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    trainer = pl.Trainer(max_steps=1, callbacks=[AdapterCheckpoint(str(tmp_path / "a"))], **QUIET)
    with pytest.raises(LitPeftError, match="cannot be written to"):
        trainer.fit(Plain())


def test_a_folder_that_cannot_be_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trainer = pl.Trainer(max_steps=1, callbacks=[AdapterCheckpoint(str(tmp_path / "file" / "a"))], **QUIET)
    with pytest.raises(LitPeftError, match="cannot be written to"):
        trainer.fit(Plain())


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    lock = str(tmp_path / ".lock")
    hold = f"import filelock; lock = filelock.FileLock({lock!r}); lock.acquire(); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline()
    try:
        with pytest.raises(LitPeftError, match="another run"):
            pl.Trainer(max_steps=1, callbacks=[AdapterCheckpoint(str(tmp_path))], **QUIET).fit(Plain())
    finally:
        other.communicate(b"\n")
    pl.Trainer(max_steps=1, callbacks=[AdapterCheckpoint(str(tmp_path))], default_root_dir=tmp_path, **QUIET).fit(
        Plain()
    )
    assert (tmp_path / "last" / WEIGHTS).is_file()
