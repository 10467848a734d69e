"""The only file that uses private names of Lightning. `tests/test_internals_lightning.py` fails when one changes."""

from __future__ import annotations

import csv
import inspect
import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lit_peft.util.disk import whole_file, write_file


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """Return the Trainer that runs a module; None without one."""
    # The public `trainer` raises without one, and under Fabric returns a stand-in that cannot log.
    return module._trainer


def datamodule_of(module: pl.LightningModule) -> Any:
    """Return the data module of the Trainer that runs a module; None without one."""
    return getattr(trainer_of(module), "datamodule", None)


# ------------------------------------------------------------------------------------- stopping and resuming


def cluster_environment(trainer: pl.Trainer) -> Any:
    """Return the environment that started the processes, e.g. SLURM's; None on a single device."""
    # Strategies of one device do not have the public attribute.
    return trainer._accelerator_connector.cluster_environment


def request_stop(trainer: pl.Trainer, stop: bool) -> None:
    """Make the training loop stop with `SIGTERMException` at the next place where it checks, or withdraw that."""
    # `trainer.received_sigterm` is public, but read-only. `should_stop` would end training as if it were complete.
    trainer._signal_connector.received_sigterm = stop


def is_within_step(trainer: pl.Trainer) -> bool:
    """Return whether a batch was trained on and its callbacks are running."""
    # The counters of the loops are no documented interface.
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return bool(trainer.training) and total.completed == total.processed - 1


def validation_follows(trainer: pl.Trainer) -> bool:
    """Return whether the loop will validate after the batch that it has just trained on."""
    # The rule combines five settings with the loop's counters; only the loop itself can evaluate it.
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def accumulates_further(trainer: pl.Trainer) -> bool:
    """Return whether the optimizer steps only after a later batch than the present one."""
    # It also steps at the end of an epoch; only the loop knows which batch is the last.
    return trainer.fit_loop._should_accumulate()


def log_row_of_step(trainer: pl.Trainer) -> dict[str, Any] | None:
    """Return the row that the loggers will get for the step that is ending; None if nothing is logged now."""
    # Lightning logs a step after all callbacks ran, so that a checkpoint of this step is written before its row.
    loggers, recorder = trainer.loggers, _Recorder()
    try:
        trainer.loggers = [recorder]  # type: ignore[list-item]
        trainer._logger_connector.update_train_step_metrics()
    finally:
        trainer.loggers = loggers
    return recorder.row


class _Recorder:
    """Takes the place of a logger, to record what it would get."""

    row: dict[str, Any] | None = None

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        self.row = {**metrics, "step": step}

    def save(self) -> None:
        pass


def validation_is_next(loops: dict[str, Any]) -> None:
    """Change the state of the loops in a checkpoint so that a resumed run starts with the validation of this step."""
    # The loops have no public way to save a point between a batch and its validation.
    for counts in ("total", "current"):
        loops["epoch_loop.batch_progress"][counts]["completed"] += 1
        validated = loops["epoch_loop.val_loop.batch_progress"][counts]
        completed = validated["completed"] if counts == "total" else 0
        validated.update(ready=completed + 1, started=completed + 1, processed=completed, completed=completed)


def validations_are_done(loops: dict[str, Any]) -> None:
    """Change the state of the loops in a checkpoint so that a resumed run does not take a whole validation for half."""
    # A run that is resumed with a validation counts it twice as begun, and once as completed.
    progress = loops["epoch_loop.val_loop.batch_progress"]
    if progress["current"]["ready"] == progress["current"]["completed"]:
        total = progress["total"]
        total.update(ready=total["completed"], started=total["completed"], processed=total["completed"])


def mark_resumed_checkpoint(trainer: pl.Trainer) -> None:
    """Tell the `ModelCheckpoint` that wrote the checkpoint being resumed that it has saved this step.

    Otherwise, while gradients are accumulated over batches, it saves again after the next batch of the same step, whose
    gradient is in no checkpoint.
    """
    # Lightning restores the paths of saved checkpoints, but not the step of the last one.
    for callback in trainer.checkpoint_callbacks:
        paths = (getattr(callback, "best_model_path", None), getattr(callback, "last_model_path", None))
        if isinstance(callback, ModelCheckpoint) and trainer.ckpt_path and trainer.ckpt_path in paths:
            callback._last_global_step_saved = trainer.global_step


# ---------------------------------------------------------------------------------- callbacks and strategies


def replace_average_model(callback: StochasticWeightAveraging, model: pl.LightningModule) -> None:
    """Set the module in which `StochasticWeightAveraging` keeps the average."""
    # It copies the module in `setup`, before `configure_model` has put a model into it.
    callback._average_model = model


def data_parallel_size(strategy: ModelParallelStrategy) -> int | str:
    """Return the number of processes that share a batch, `"auto"` if it is not decided yet."""
    # The strategy keeps its two arguments privately.
    return strategy._data_parallel_size


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set the number of processes that share a batch, before the strategy sets up its processes."""
    # "auto" means the number of nodes to Lightning.
    strategy._data_parallel_size = size


def tensor_parallel_size(strategy: ModelParallelStrategy) -> int | str:
    """Return the number of processes that share each matrix."""
    # As above.
    return strategy._tensor_parallel_size


class SelectiveCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint`'s rules of what to keep and when to save, with public methods that do the work.

    Subclasses write something else than a training checkpoint: they override `write`, `remove` and `after_last`.
    """

    # ModelCheckpoint calls private methods to write and to remove files; there is no public hook for either.

    def write(self, trainer: pl.Trainer, path: str) -> None:
        """Save to `path`."""
        raise NotImplementedError

    def remove(self, trainer: pl.Trainer, path: str) -> None:
        """Remove what `write` saved to `path`."""
        raise NotImplementedError

    def after_last(self, trainer: pl.Trainer) -> None:
        """Run after the last one was saved, or would have been."""

    @property
    def saved_step(self) -> int:
        """The optimizer step at which this callback last saved."""
        return self._last_global_step_saved

    @saved_step.setter
    def saved_step(self, step: int) -> None:
        self._last_global_step_saved = step

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        self.write(trainer, filepath)

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self.after_last(trainer)

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.remove(trainer, filepath)


# --------------------------------------------------------------------------------------------------- the log


class _AppendingWriter(ExperimentWriter):
    """Lightning's writer of `metrics.csv`, which continues an existing file instead of deleting it.

    Attributes:
        rows: number of rows in the file.
    """

    # Lightning's writer deletes and truncates files in private methods that have no switch.

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        # The file of a run that was killed before its first row is empty.
        header, *rows = (file.read_text(encoding="utf-8") if file.is_file() else "").splitlines() or [""]
        self.metrics_keys = header.split(",") if header else []
        self.rows = len(rows)

    def log_hparams(self, params: dict[str, Any]) -> None:
        # Lightning writes them in place, and a full disk leaves a part of the file.
        self.hparams.update(params)
        with whole_file(Path(self.log_dir) / self.NAME_HPARAMS_FILE) as temporary:
            save_hparams_to_yaml(temporary, self.hparams)

    def save(self) -> None:
        # Lightning's file is buffered, and what an error leaves in the buffer would be written when the file closes.
        if not self.metrics:
            return
        file, text, keys = Path(self.metrics_file_path), io.StringIO(newline=""), self.metrics_keys.copy()
        try:
            if self._record_new_keys() and file.is_file():
                self._rewrite_with_new_header(self.metrics_keys)
        except OSError:
            self.metrics_keys = keys  # those of the file, to which another save may still append
            raise
        writer = csv.DictWriter(text, self.metrics_keys)
        size = file.stat().st_size if file.is_file() else 0
        if not size:
            writer.writeheader()
        writer.writerows(self.metrics)
        with file.open("ab", buffering=0) as out:
            left = memoryview(text.getvalue().encode())
            try:
                while left:
                    left = left[out.write(left) :]
            except OSError:
                # A full disk takes a part of a row.
                out.truncate(size)
                raise
        self.rows += len(self.metrics)
        self.metrics = []

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        # Lightning empties the file first, so that a kill at this moment loses the log.
        file, text = Path(self.metrics_file_path), io.StringIO(newline="")
        with file.open(encoding="utf-8", newline="") as old:
            rows = list(csv.DictReader(old))
        writer = csv.DictWriter(text, fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_file(file, text.getvalue().encode())


class AppendingCSVLogger(CSVLogger):
    """A `CSVLogger` that continues the log in its folder."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        # The class of the writer cannot be set in a public way.
        if self._experiment is None:
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment


# -------------------------------------------------------------------------------------- the LightningModule


class DtypeKeepingModule(pl.LightningModule):
    """A LightningModule in which some tensors are not rounded when it is cast, e.g. by precision `bf16-true`."""

    def parameters_not_rounded(self) -> list[nn.Parameter]:
        """Return the parameters that are never cast to a narrower type."""
        return []

    def buffers_not_rounded(self) -> list[tuple[nn.Module, str]]:
        """Return the buffers that are never cast to a narrower type, each as its module and its name."""
        return []

    def after_cast(self) -> None:
        """Run after a cast that would have rounded some of these parameters."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `to`, `half` and `bfloat16` all call this private method, and casts have no public hook.
        parameters = [(p, p.data, None if p.grad is None else p.grad.data) for p in self.parameters_not_rounded()]
        buffers = [(owner, name, getattr(owner, name)) for owner, name in self.buffers_not_rounded()]
        super()._apply(fn, recurse)
        cast = False
        for parameter, data, grad in parameters:
            if parameter.dtype != data.dtype and parameter.dtype.itemsize <= data.dtype.itemsize:
                parameter.grad = None
                parameter.data = data.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
                cast = True
        for owner, name, before in buffers:
            now = getattr(owner, name)
            if now.dtype != before.dtype and now.dtype.itemsize <= before.dtype.itemsize:
                setattr(owner, name, before.to(now.device))
        if cast:
            self.after_cast()
        return self


def subclass_arguments(module: Any) -> dict[str, Any]:
    """Return the arguments of the running `__init__` methods of a module, if they are plain data, by name.

    Called by `BaseLM.__init__`, so that checkpoints contain the arguments that a user's subclass adds.
    """
    # Lightning's `save_hyperparameters` reads the frames too, but only those of the class that calls it.
    found: dict[str, Any] = {}
    frame = inspect.currentframe()
    frame = None if frame is None else frame.f_back
    while frame is not None and frame.f_code.co_name == "__init__":
        code, values = frame.f_code, frame.f_locals
        owner, *names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if values[owner] is not module:
            break
        found |= {name: values[name] for name in names if _is_plain(values[name])}
        frame = frame.f_back
    return found


def _is_plain(value: Any) -> bool:
    """Return whether a value is data that a checkpoint can be loaded with, without running code."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
