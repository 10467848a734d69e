"""The last checkpoint, as `lit-peft fit` writes it by default: apart from the best one, and often."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_peft.callbacks import ExactResume, GracefulStop, LastCheckpoint
from models import QUIET
from test_callbacks import Plain
from test_resume import HERE, KILLS, Send, same_run, write_config

from lit_peft.cli import main
from lit_peft.training.run_folder import RunLogger
from lit_peft.util.errors import LitPeftError

OFTEN = {"class_path": "lit_peft.callbacks.LastCheckpoint", "init_args": {"every_n_minutes": 0.002}}
STEPS = {"class_path": "lit_peft.callbacks.LastCheckpoint", "init_args": {"every_n_train_steps": 2}}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"callbacks": None},
    "default, accumulated": {"callbacks": None, "val_check_interval": 3, "accumulate_grad_batches": 2},
    "steps, within epochs": {"callbacks": [STEPS], "val_check_interval": 4, "accumulate_grad_batches": 1},
    "clock": {"callbacks": [OFTEN]},
    "clock, no validation": {"callbacks": [OFTEN], "validation": False},
}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "where", "workers"),
    [
        (kind, where, workers)
        for kind in KINDS
        for where in ("moves", "times")
        for workers in (0, 2)
        if kind == "default" or (where, workers) == ("times", 0)
    ],
)
def test_a_killed_run_is_the_uninterrupted_one(
    kind: str, where: str, workers: int, decoder: Path, reviews: Path, tmp_path: Path
) -> None:
    """`kill -9`, without callbacks of one's own, or with nothing but a more frequent last checkpoint."""
    settings = {"accumulate_grad_batches": 1, **KINDS[kind]}
    validates = settings.pop("validation", True)
    config = write_config(tmp_path, decoder, reviews, epochs=4 + 3 * KILLS, **settings)
    content = yaml.safe_load(config.read_text())
    content["data"]["init_args"]["num_workers"] = workers
    if not validates:
        content["data"]["init_args"]["validation_fraction"] = 0.0
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, str(HERE / "kill_run.py"), where, str(tmp_path), str(KILLS), str(KILLS), str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "killed" / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr[-3000:] + (log.read_text()[-3000:] if log.exists() else "")
    assert done.stdout.count("kill ") == KILLS
    runs = tmp_path / "whole/runs/version_0", tmp_path / "killed/runs/version_0"
    assert len(list((tmp_path / "killed" / "runs").iterdir())) == 1
    same_run(*runs)
    # Nothing that was half done or that belongs to nobody is left: not even hidden.
    assert [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in runs[:1]] == [
        sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in runs[1:]
    ]


# ---------------------------------------------------------------------------------------- when it is written


class Look(pl.Callback):
    """Notes the step of `last.ckpt` at the end of each batch, before callbacks of checkpoints write it."""

    def __init__(self, file: Path) -> None:
        self.file, self.seen = file, []  # type: ignore[var-annotated]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        found = torch.load(self.file, weights_only=True)["global_step"] if self.file.exists() else 0
        self.seen.append((trainer.fit_loop.total_batch_idx + 1, found))


def train(folder: Path, *callbacks: pl.Callback, losses: tuple[float, ...] = (1, 2, 3), **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **{"max_epochs": 3, **QUIET, **settings})
    trainer.fit(Plain(losses))
    return trainer


@pytest.mark.parametrize(
    ("last", "settings", "expected"),
    [
        # Four batches an epoch; only the first validation is a new best.
        ({"every_n_minutes": None}, {}, [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8]),
        ({"every_n_minutes": None}, {"val_check_interval": 2}, [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]),
        ({"every_n_minutes": None}, {"limit_val_batches": 0}, [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8]),
        ({"every_n_train_steps": 3}, {}, [0, 0, 0, 3, 4, 4, 6, 6, 8, 9, 9, 9]),
        # A validation in the middle of a step: the checkpoint follows the step, or its gradient would be lost.
        ({"every_n_minutes": None}, {"accumulate_grad_batches": 2, "val_check_interval": 1},
         [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    ],
)  # fmt: skip
def test_it_is_written_apart_from_the_best(
    last: dict[str, Any], settings: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    monitor = None if settings.get("limit_val_batches") == 0 else "val_loss"
    best = ModelCheckpoint(tmp_path, "best-{step}", monitor=monitor)
    look = Look(tmp_path / "last.ckpt")
    train(tmp_path, look, best, LastCheckpoint(str(tmp_path), **last), **settings)
    assert [found for _, found in look.seen] == expected
    if monitor:
        assert Path(best.best_model_path).name.startswith("best-step=")
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert state["global_step"] == (6 if "accumulate_grad_batches" in settings else 12)


def test_it_shares_the_file_of_a_callback_that_writes_one(tmp_path: Path) -> None:
    """Lightning 2.6 writes it only with a new best one."""
    keeper = ModelCheckpoint(tmp_path, "best-{step}", monitor="val_loss", save_last=True)
    train(tmp_path, keeper, LastCheckpoint())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["best-step=4.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 12


def test_it_must_come_last_and_have_a_sensible_interval(tmp_path: Path) -> None:
    with pytest.raises(LitPeftError, match="put it last"):
        train(tmp_path, LastCheckpoint(str(tmp_path)), ModelCheckpoint(tmp_path))
    with pytest.raises(LitPeftError, match="every_n_minutes=0"):
        LastCheckpoint(every_n_minutes=0)
    with pytest.raises(LitPeftError, match="every_n_train_steps=0"):
        LastCheckpoint(every_n_train_steps=0)


class Clock(pl.Callback):
    """A clock by which each batch takes a minute, and each checkpoint some minutes more."""

    def __init__(self, checkpoint: float, patch: pytest.MonkeyPatch) -> None:
        self.now, self.checkpoint = 0.0, checkpoint
        patch.setattr("lit_peft.callbacks.last_checkpoint.time.monotonic", lambda: self.now)

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += 60

    def on_save_checkpoint(self, *_: Any) -> None:
        self.now += 60 * self.checkpoint


def test_the_clock_decides_between_validations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look, last = Look(tmp_path / "last.ckpt"), LastCheckpoint(str(tmp_path), every_n_minutes=2)
    train(tmp_path, look, Clock(0, monkeypatch), last, max_epochs=2, limit_val_batches=0)
    assert [found for _, found in look.seen] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_a_slow_checkpoint_is_written_less_often_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, last = Look(tmp_path / "last.ckpt"), LastCheckpoint(str(tmp_path), every_n_minutes=1)
    with pytest.warns(UserWarning, match="took 6 s to write, so that it is written every 2 minutes, not every 1"):
        train(tmp_path, look, Clock(0.1, monkeypatch), last, max_epochs=1, limit_val_batches=0)
    # Twenty times as long as writing takes.
    assert [found for _, found in look.seen] == [0, 1, 1, 3]


def test_a_resumed_run_forgets_what_is_gone_and_removes_what_came_later(tmp_path: Path) -> None:
    def parts() -> tuple[ModelCheckpoint, LastCheckpoint, RunLogger]:
        best = ModelCheckpoint(monitor="val_loss", filename="best-{step}", save_top_k=2, enable_version_counter=False)
        return best, LastCheckpoint(), RunLogger(tmp_path, name=None, version=0)

    best, last, logger = parts()
    losses = (3.0, 2.0, 1.0, 0.5)
    settings = {**QUIET, "logger": logger, "max_epochs": 2}
    pl.Trainer(callbacks=[ExactResume(), best, last], default_root_dir=tmp_path, **settings).fit(Plain(losses))
    folder = tmp_path / "version_0" / "checkpoints"
    names = ["best-step=4.ckpt", "best-step=8.ckpt", "last.ckpt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    # The next two best ones were written, and the first one removed, before the process was killed.
    state = torch.load(folder / "best-step=8.ckpt", weights_only=True)
    for step in (12, 16):
        torch.save({**state, "global_step": step}, folder / f"best-step={step}.ckpt")
    (folder / "mine.ckpt").write_bytes(b"no checkpoint")
    (folder / "best-step=4.ckpt").unlink()
    best, last, logger = parts()

    class There(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.found = sorted(path.name for path in folder.iterdir())
            self.listed = {Path(path).name for path in best.best_k_models}

    there = There()
    settings = {**QUIET, "logger": logger, "max_epochs": 3}
    trainer = pl.Trainer(callbacks=[there, ExactResume(), best, last], default_root_dir=tmp_path, **settings)
    trainer.fit(Plain(losses), ckpt_path=str(folder / "last.ckpt"))
    assert there.found == ["best-step=8.ckpt", "last.ckpt", "mine.ckpt"] and there.listed == {"best-step=8.ckpt"}
    assert {Path(path).name for path in best.best_k_models} == {"best-step=8.ckpt", "best-step=12.ckpt"}
    assert Path(best.best_model_path).name == "best-step=12.ckpt" and float(best.best_model_score or 0) == 1.0


# ----------------------------------------------------------------------------------------------- the command


def command(decoder: Path, reviews: Path, folder: Path, *more: str) -> list[str]:
    config = write_config(folder, decoder, reviews, 2, callbacks=None, accumulate_grad_batches=1)
    return ["fit", "--config", str(config), "--trainer.default_root_dir", str(folder / "runs"), *more]


def test_the_command_has_it_and_says_so(
    decoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    assert main(command(decoder, reviews, tmp_path)) == 0
    said = capsys.readouterr()
    assert "last.ckpt: every validation, every epoch and every 5 minutes" in said.out
    assert "weights_only" not in said.err
    folder = tmp_path / "runs" / "version_0"
    assert not [path for path in folder.rglob(".*")]
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert len(names) == 2 and names[0].startswith("best-step=") and names[1] == "last.ckpt"
    # The signals of this process are what they were.
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_closed_terminal_stops_as_sigterm_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path, Send(signal.SIGHUP, step=1), GracefulStop(), LastCheckpoint(str(tmp_path)))
        assert stopped.value.code == 129 and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, outside)
    assert "Stopped by SIGHUP after step 2" in capsys.readouterr().out
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_nohup_is_respected(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = train(tmp_path, Send(signal.SIGHUP, step=1), GracefulStop(), LastCheckpoint(str(tmp_path)))
        assert trainer.global_step == 12 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
