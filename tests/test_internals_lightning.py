"""Lightning's private names do what `lightning_internals` needs of them, in the version that is installed."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from models import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_peft.training import lightning_internals as fence


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(8, 4), batch_size=2)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.ones(2, 4))


def fit(tmp_path: Path, *callbacks: pl.Callback, ckpt_path: str | None = None, **settings: Any) -> pl.Trainer:
    options = {**QUIET, "max_epochs": 1, "enable_checkpointing": False, **settings}
    trainer = pl.Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **options)
    trainer.fit(Plain(), ckpt_path=ckpt_path)
    return trainer


def test_the_trainer_of_a_module(tmp_path: Path) -> None:
    assert fence.trainer_of(Plain()) is None and fence.datamodule_of(Plain()) is None
    trainer = fit(tmp_path, max_steps=1)
    assert fence.trainer_of(trainer.lightning_module) is trainer


def test_the_environment_is_known_on_a_single_device() -> None:
    assert isinstance(fence.cluster_environment(pl.Trainer(**QUIET)), LightningEnvironment)


def test_a_stop_is_requested_and_withdrawn(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        steps = 0

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.steps += 1
            fence.request_stop(trainer, True)
            fence.request_stop(trainer, self.steps == 3)

    stop = Stop()
    with pytest.raises(SIGTERMException):
        fit(tmp_path, stop)
    assert stop.steps == 3


def test_where_a_loop_is_within_a_step(tmp_path: Path) -> None:
    class Look(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, bool, bool, dict[str, Any] | None]] = []
            self.inside: list[bool] = []

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            assert not fence.accumulates_further(trainer)
            facts = (fence.is_within_step(trainer), fence.validation_follows(trainer), fence.log_row_of_step(trainer))
            self.seen.append((trainer.global_step, *facts))

        def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.inside.append(fence.is_within_step(trainer))

    look = Look()
    trainer = fit(tmp_path, look, val_check_interval=2, log_every_n_steps=2, logger=CSVLogger(tmp_path))
    assert [seen[:3] for seen in look.seen] == [(n, True, n % 2 == 0) for n in (1, 2, 3, 4)]
    assert look.inside == [False, False]
    rows = [row for *_, row in look.seen]
    assert rows[0] is None and rows[2] is None
    assert rows[1] is not None and rows[1]["step"] == 1 and rows[1]["train_loss"] > 0
    assert trainer.loggers and isinstance(trainer.loggers[0], CSVLogger)


def test_where_gradients_are_accumulated_further(tmp_path: Path) -> None:
    class Look(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(fence.accumulates_further(trainer))

    seen: list[bool] = []
    fit(tmp_path, Look(), accumulate_grad_batches=3)  # of four batches, the last ends the epoch
    assert seen == [True, True, False, False]


def test_a_checkpoint_within_a_step_resumes_with_its_validation(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                checkpoint = {"loops": {"fit_loop": trainer.fit_loop.state_dict()}}
                fence.validation_is_next(checkpoint["loops"]["fit_loop"])
                trainer.save_checkpoint(tmp_path / "at2.ckpt")
                stored = torch.load(tmp_path / "at2.ckpt", weights_only=True)
                stored["loops"]["fit_loop"] = checkpoint["loops"]["fit_loop"]
                torch.save(stored, tmp_path / "at2.ckpt")

    class Steps(pl.Callback):
        def __init__(self) -> None:
            self.events: list[tuple[str, int]] = []

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.events.append(("train", trainer.global_step))

        def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.events.append(("validate", trainer.global_step))

    fit(tmp_path, Save(), val_check_interval=2)
    steps = Steps()
    fit(tmp_path, steps, val_check_interval=2, ckpt_path=str(tmp_path / "at2.ckpt"))
    assert steps.events == [("validate", 2), ("train", 3), ("train", 4), ("validate", 4)]


def test_a_validation_that_a_resumed_run_completed_is_not_run_again(tmp_path: Path) -> None:
    """Killed and resumed twice at one step: before its validation, and after it."""

    class Save(pl.Callback):
        def __init__(self, name: str, mend: bool) -> None:
            self.name, self.mend, self.validated = name, mend, 0

        def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.validated += 1
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / self.name)

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2 and self.name == "first":
                trainer.save_checkpoint(tmp_path / "before")

        def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
            if self.mend:
                fence.validations_are_done(checkpoint["loops"]["fit_loop"])
            if fence.is_within_step(trainer):
                fence.validation_is_next(checkpoint["loops"]["fit_loop"])

    validated = []
    for mend in (True, False):
        for name, resumed in (("first", None), ("after", "before"), ("end", "after")):
            save = Save(name, mend)
            fit(tmp_path, save, val_check_interval=2, ckpt_path=resumed and str(tmp_path / resumed))
        validated.append(save.validated)
    # Without it, Lightning validates at step 2 again.
    assert validated == [1, 2]


def test_a_resumed_checkpoint_is_not_saved_again_in_its_step(tmp_path: Path) -> None:
    class Resumed(pl.Callback):
        def __init__(self, mark: bool) -> None:
            self.mark = mark

        def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if self.mark:
                fence.mark_resumed_checkpoint(trainer)

    class Saves(ModelCheckpoint):
        def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
            saved.append(trainer.global_step)
            super()._save_checkpoint(trainer, filepath)

    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "limit_val_batches": 0}
    saved: list[int] = []
    fit(tmp_path, Saves(tmp_path, every_n_train_steps=1, filename="{step}"), max_steps=1, **settings)
    for mark in (True, False):
        saved.clear()
        keeper = Saves(tmp_path, every_n_train_steps=1, filename="{step}")
        fit(tmp_path, Resumed(mark), keeper, ckpt_path=str(tmp_path / "step=1.ckpt"), max_steps=2, **settings)
        assert saved == ([2] if mark else [1, 2])


def test_the_average_of_weight_averaging_is_replaced() -> None:
    callback, module = StochasticWeightAveraging(swa_lrs=0.1), Plain()
    callback.setup(pl.Trainer(**QUIET), Plain(), "fit")
    fence.replace_average_model(callback, module)
    callback.transfer_weights(Plain(), callback._average_model)
    assert callback._average_model is module


def test_the_sizes_of_model_parallelism() -> None:
    strategy = ModelParallelStrategy("auto", 2)
    assert fence.data_parallel_size(strategy) == "auto" and fence.tensor_parallel_size(strategy) == 2
    fence.set_data_parallel_size(strategy, 3)
    assert fence.data_parallel_size(strategy) == 3


def test_the_rules_of_checkpoints_are_applied_to_other_files(tmp_path: Path) -> None:
    class Names(fence.SelectiveCheckpoint):
        def write(self, trainer: pl.Trainer, path: str) -> None:
            events.append(("write", Path(path).name))

        def remove(self, trainer: pl.Trainer, path: str) -> None:
            events.append(("remove", Path(path).name))

        def after_last(self, trainer: pl.Trainer) -> None:
            events.append(("last", str(self.saved_step)))

    events: list[tuple[str, str]] = []
    keeper = Names(tmp_path / "a", "{step}", every_n_train_steps=2, save_top_k=1)
    fit(tmp_path, keeper, limit_val_batches=0, enable_checkpointing=True)
    assert [e for e in events if e[0] != "last"] == [
        ("write", "step=2.ckpt"),
        ("write", "step=4.ckpt"),
        ("remove", "step=2.ckpt"),
    ]
    assert ("last", "2") in events and keeper.saved_step == 4
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_log_is_continued(tmp_path: Path) -> None:
    for start, name in ((0, "loss"), (2, "loss"), (4, "accuracy")):
        logger = fence.AppendingCSVLogger(tmp_path, name=None, version=0)
        for step in range(start, start + 2):
            logger.log_metrics({name: 1.0}, step)
        logger.save()
        assert logger.experiment.rows == start + 2
    lines = (tmp_path / "version_0" / "metrics.csv").read_text().split()
    assert lines == ["accuracy,loss,step", ",1.0,0", ",1.0,1", ",1.0,2", ",1.0,3", "1.0,,4", "1.0,,5"]


def test_a_log_whose_header_could_not_be_written_keeps_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    logger = fence.AppendingCSVLogger(tmp_path, name=None, version=0)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    logger.log_metrics({"accuracy": 1.0}, 1)
    with monkeypatch.context() as disk, pytest.raises(OSError, match="No space"):
        disk.setattr(fence, "write_file", full)
        logger.save()
    log = tmp_path / "version_0" / "metrics.csv"
    assert log.read_text().split() == ["loss,step", "1.0,0"]
    logger.save()  # at the end of a run that failed, when there may be space again
    assert log.read_text().split() == ["accuracy,loss,step", ",1.0,0", "1.0,,1"]


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_some_tensors_keep_their_type(cast: Any) -> None:
    class Kept(fence.DtypeKeepingModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

            self.layer.register_buffer("frequencies", torch.rand(4), persistent=False)

        def parameters_not_rounded(self) -> list[nn.Parameter]:
            return [self.layer.weight]

        def buffers_not_rounded(self) -> list[tuple[nn.Module, str]]:
            return [(self.layer, "frequencies")]

    module = Kept()
    weight = module.layer.weight.detach().clone()
    module.layer(torch.ones(4)).sum().backward()
    parameter = module.layer.weight
    cast(module)
    assert module.layer.bias.dtype != torch.float32
    assert module.layer.weight is parameter and torch.equal(parameter, weight)
    assert parameter.grad is not None and parameter.grad.dtype == torch.float32
    assert module.layer.frequencies.dtype == torch.float32
    assert module.double().layer.weight.dtype == module.layer.frequencies.dtype == torch.float64
    module.zero_grad()
    assert module.to("meta").layer.weight.is_meta and module.layer.frequencies.is_meta


class Recorded(pl.LightningModule):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.found = fence.subclass_arguments(self)


class Inner(Recorded):
    def __init__(self, size: int = 3, rate: float = 0.5, layer: nn.Module | None = None) -> None:
        super().__init__(size + 1)


def test_arguments_of_the_running_init_methods_are_found_if_they_are_plain() -> None:
    assert Inner(rate=0.25, layer=nn.Linear(1, 1)).found == {"rate": 0.25, "size": 3}
