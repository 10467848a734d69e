"""A run that is killed, stopped or interrupted goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_peft.callbacks import AdapterCheckpoint, GracefulStop
from models import QUIET
from safetensors.torch import load_file
from test_callbacks import Plain

from lit_peft.training.checkpoint_io import AtomicCheckpointIO
from lit_peft.training.run_folder import RunLogger
from lit_peft.util.errors import LitPeftError

HERE = Path(__file__).parent
KILLS = int(os.environ.get("LIT_PEFT_KILLS", "3"))


def write_config(folder: Path, decoder: Path, reviews: Path, epochs: int, **trainer: object) -> Path:
    config = {
        "model": {
            "class_path": "LoRA",
            "init_args": {"base": str(decoder), "r": 4, "lora_dropout": 0.1, "learning_rate": 1e-2},
        },
        "data": {
            "class_path": "CausalLMData",
            "init_args": {"train": str(reviews), "batch_size": 4, "limit_train": 44},
        },
        "trainer": {
            "max_epochs": epochs,
            "accumulate_grad_batches": 2,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "default_root_dir": "runs",
            "enable_progress_bar": False,
            "callbacks": [
                {
                    "class_path": "lit_peft.callbacks.AdapterCheckpoint",
                    "init_args": {"monitor": "val_loss", "save_top_k": 3},
                },
                # In the middle of an epoch, too.
                {
                    "class_path": "lit_peft.callbacks.AdapterCheckpoint",
                    "init_args": {"monitor": "train_loss", "every_n_train_steps": 2, "dirpath": "steps"},
                },
                {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 3, "save_last": True}},
            ],
            **trainer,
        },
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def same_run(one: Path, other: Path) -> None:
    """The adapters, the log and the state of training are the same, bit for bit."""
    files = [
        {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file() and path.name[0] != "."}
        for run in (one, other)
    ]
    # Lightning's ModelCheckpoint does not know of one that was written as the process was killed.
    names = [sorted(name for name in found if not re.fullmatch(r"checkpoints/epoch.*", name)) for found in files]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith((".safetensors", "metrics.csv")):
            assert files[0][name].read_bytes() == files[1][name].read_bytes(), name
        elif name.endswith("adapter_checkpoint.json"):
            notes = [json.loads(found[name].read_text()) for found in files]
            assert notes[0]["step"] > 0 and notes[0] == {**notes[1], "run": notes[0]["run"]}
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)]
    assert states[0]["state_dict"]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name])


@pytest.mark.heavy
@pytest.mark.parametrize(("where", "kills"), [("moves", 3 * KILLS), ("times", KILLS)])
def test_a_killed_run_is_the_uninterrupted_one(
    where: str, kills: int, decoder: Path, reviews: Path, tmp_path: Path
) -> None:
    """`kill -9`, LIT_PEFT_KILLS times (3; the full check: 30), at random moments of one run, and thrice as often
    just before or after something is put in its place."""
    config = write_config(tmp_path, decoder, reviews, epochs=3 + kills)
    command = [sys.executable, str(HERE / "kill_run.py"), where, str(tmp_path), str(kills), str(kills), str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "killed" / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr[-3000:] + (log.read_text()[-3000:] if log.exists() else "")
    assert done.stdout.count("kill ") == kills
    # One run, in one folder, however often it was started.
    assert len(list((tmp_path / "killed" / "runs").iterdir())) == 1
    same_run(tmp_path / "whole/runs/version_0", tmp_path / "killed/runs/version_0")
    # In a folder of its own choice, what a start left that had no checkpoint yet belongs to nobody.
    kept = [
        {path.parent.name: path.read_bytes() for path in (tmp_path / run).glob("steps/*/*.safetensors")}
        for run in ("whole", "killed")
    ]
    assert kept[0] and kept[0].items() <= kept[1].items()
    assert load_file(tmp_path / "killed/runs/version_0/adapter/adapter_model.safetensors")


class Send(pl.Callback):
    """Sends this process signals at one step."""

    def __init__(self, *signals: int, step: int) -> None:
        self.signals, self.step = signals, step

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        # In the middle of a step: the weights are not what they are going to be.
        if trainer.global_step == self.step:
            for number in self.signals:
                os.kill(os.getpid(), number)


def fit(folder: Path, *callbacks: pl.Callback, resume: str | None = None, **settings: Any) -> Plain:
    module = Plain()
    keep = ModelCheckpoint(folder / "c", save_last=True)
    settings = {
        "max_epochs": 3,
        "default_root_dir": folder,
        "callbacks": [GracefulStop(), keep, *callbacks],
        **settings,
    }
    pl.Trainer(**settings, **QUIET).fit(module, ckpt_path=resume)
    return module


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [1, 3])
def test_a_signal_writes_a_checkpoint_and_stops(
    number: int, status: int, step: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, Send(number, step=step))
    assert stopped.value.code == status
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    said = capsys.readouterr().out
    assert signal.Signals(number).name in said and f"after step {step + 1}" in said and "--ckpt_path last" in said
    # The step is whole, and so is the validation after the last one of an epoch.
    checkpoint = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == step + 1
    if step == 3:
        whole, resumed = fit(tmp_path / "whole"), fit(tmp_path, resume="last")
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name])


def test_a_signal_waits_for_the_optimizers_step(tmp_path: Path) -> None:
    class Early(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        fit(tmp_path, Early(), accumulate_grad_batches=2)
    progress = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert progress["epoch_loop.batch_progress"]["total"]["completed"] == 2


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, Send(signal.SIGINT, signal.SIGINT, step=1))
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").glob("last*"))


def test_slurm_requeues_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "scontrol"
    script.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/requeued\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}.items():
        monkeypatch.setenv(name, value)
    slurm = SLURMEnvironment(auto_requeue=True)
    seen = []

    class Look(Send):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                seen.extend(torch.load(file, weights_only=True)["global_step"] for file in tmp_path.rglob("*.ckpt"))

    fit(tmp_path, Look(signal.SIGUSR1, step=1), plugins=[slurm])
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    # `last.ckpt` and Lightning's own, both of the whole step.
    assert seen == [2, 2]


@pytest.mark.heavy
def test_the_command_ends_with_the_signals_status(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, decoder, reviews, epochs=2000)
    code = "import sys; from lit_peft.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "fit", "--config", str(config), "--trainer.callbacks", "null"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "version_0" / "metrics.csv"
    while not metrics.exists() and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    out, error = run.communicate(timeout=120)
    assert run.returncode == 130, error[-3000:]
    assert "Stopped by SIGINT" in out and "Traceback" not in error
    assert (tmp_path / "runs/version_0/checkpoints/last.ckpt").is_file()


# -------------------------------------------------------------------------------------- writing checkpoints


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, file = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"step": 1}, file)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LitPeftError, match="the disk is full"):
        writer.save_checkpoint({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_saved(small_disk: Path) -> None:
    keep = ModelCheckpoint(small_disk / "c", save_last=True, save_top_k=-1)
    adapters = AdapterCheckpoint(str(small_disk / "a"), save_top_k=-1)

    class Fill(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 2:
                with contextlib.suppress(OSError), (small_disk / "fill").open("wb") as file:
                    while True:
                        file.write(b"0" * 4096)
                        file.flush()

    trainer = pl.Trainer(max_epochs=9, callbacks=[adapters, keep, Fill()], plugins=[AtomicCheckpointIO()], **QUIET)
    with pytest.raises(LitPeftError, match="the disk is full"):
        trainer.fit(Plain((1,) * 9))
    assert len(list((small_disk / "c").glob("*.ckpt"))) >= 3
    for file in (small_disk / "c").iterdir():
        assert torch.load(file, weights_only=True)["state_dict"]
    for folder in (small_disk / "a").iterdir():
        assert folder.name == ".lock" or load_file(folder / "adapter_model.safetensors")


def test_a_read_only_file_system_is_said(small_disk: Path) -> None:
    remounted = subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True)
    if remounted.returncode:
        pytest.skip("a file system may not be made read-only here")
    with pytest.raises(LitPeftError, match="could not be written"):
        AtomicCheckpointIO().save_checkpoint({}, small_disk / "last.ckpt")
    with pytest.raises(LitPeftError, match="cannot be written to"):
        pl.Trainer(max_steps=1, callbacks=[AdapterCheckpoint(str(small_disk / "a"))], **QUIET).fit(Plain())


@pytest.mark.heavy
def test_two_processes_writing_one_checkpoint_never_leave_half_of_one(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from lit_peft.training.checkpoint_io import AtomicCheckpointIO\n"
        "for at in range(60):\n"
        "    AtomicCheckpointIO().save_checkpoint({'by': sys.argv[1], 'x': torch.zeros(9999)}, sys.argv[2])"
    )
    file = tmp_path / "last.ckpt"
    writers = [subprocess.Popen([sys.executable, "-c", code, name, str(file)]) for name in "ab"]
    while any(writer.poll() is None for writer in writers):
        if file.exists():
            assert torch.load(file, weights_only=True)["by"] in "ab"
    assert all(writer.returncode == 0 for writer in writers) and os.listdir(tmp_path) == ["last.ckpt"]


def test_the_log_knows_its_rows_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def log(steps: range) -> RunLogger:
        logger = RunLogger(tmp_path, name=None, version=0)
        for step in steps:
            logger.log_metrics({"train_loss": 0.5, **({"val_loss": 0.25} if step % 2 else {})}, step)
        return logger

    def rows_read() -> int:
        return len((tmp_path / "version_0" / "metrics.csv").read_text().splitlines()) - 1

    assert log(range(0)).rows() == 0
    logger = log(range(3))
    assert logger.rows() == rows_read() == 3
    logger = log(range(3, 5))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", None)
        assert logger.rows() == 5
    assert rows_read() == 5
    logger.go_back(4)
    logger.log_metrics({"train_loss": 1.0}, 9)
    assert logger.rows() == rows_read() == 5
    logger.go_back(9, {"train_loss": 1.0, "step": 10})
    assert logger.rows() == rows_read() == 6
    (tmp_path / "version_0" / "metrics.csv").write_bytes(b"")
    assert log(range(0)).rows() == 0 and log(range(2)).rows() == rows_read() == 2
    logger.go_back(0)
    logger.go_back(9)
    assert logger.rows() == 0 and not (tmp_path / "version_0" / "metrics.csv").exists()


def test_a_column_that_comes_later_never_empties_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = RunLogger(tmp_path, name=None, version=0)
    logger.log_metrics({"train_loss": 0.5}, 0)
    logger.save()
    file = tmp_path / "version_0" / "metrics.csv"
    before, seen = file.read_bytes(), []
    writerows = csv.DictWriter.writerows
    with monkeypatch.context() as patched:
        # What a process that is killed at this moment leaves.
        patched.setattr(csv.DictWriter, "writerows", lambda *a: (seen.append(file.read_bytes()), writerows(*a))[1])
        logger.log_metrics({"val_loss": 0.25}, 1)
        logger.save()
    assert seen[0] == before and seen[1] == b"step,train_loss,val_loss\r\n0,0.5,\r\n"
    assert file.read_bytes() == seen[1] + b"1,,0.25\r\n"
