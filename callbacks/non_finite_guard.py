"""Keep NaN and infinite numbers out of the weights and the checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lit_peft.callbacks.last_checkpoint import last_good
from lit_peft.callbacks.tensors import trained
from safetensors.torch import save_file
from torch import Tensor

from lit_peft.nn.finite import largest, non_finite_names, undo_step_if
from lit_peft.util.errors import LitPeftError

# Copies of the trained tensors are cheap up to this share of all parameters.
_FEW = 0.1


class NonFiniteGuard(Callback):
    """Keeps NaN and infinite numbers out of the weights and the checkpoints.

    - A loss that is infinite or NaN: the optimizer step is skipped, so that the weights and the optimizer do not
      change, and training ends as with `EarlyStopping`, including its checkpoints. The tensors of the batch are written
      by name to `nonfinite-step=STEP-rank=RANK.safetensors`, with step, batch index and loss as metadata.
    - A gradient that is infinite or NaN: the step is skipped and counted. After `max_skipped` such steps in a row,
      training ends in the same way. With precision `16-mixed`, the gradient scaler does this itself.
    - Before a checkpoint is written, and at the end, the trained weights are checked: if one is infinite or NaN,
      training fails, and no file is written.

    All processes do the same if one has such a number. On a GPU nothing waits for the loss: the device itself undoes
    the step, and the loss is looked at one step later. If more than a tenth of the parameters is trained, copies of
    them would be too large, and each step waits for its loss.

    Args:
        dirpath: folder for the batch; the run's folder if unset.
        max_skipped: number of steps in a row that may be skipped for their gradient; 0: training ends at the first.

    Attributes:
        saved: the file with this process's batch; None if there is none.
        skipped: number of steps that were skipped for their gradient.
        problem: why training ended early, in a sentence; None if it did not.

    Raises:
        LitPeftError: a trained weight is infinite or NaN, or `max_skipped` is negative.
    """

    def __init__(self, dirpath: str | None = None, max_skipped: int = 10) -> None:
        if max_skipped < 0:
            raise LitPeftError(f"max_skipped={max_skipped}: give a number of steps, or 0 to stop at the first.")
        self.dirpath, self.max_skipped = dirpath, max_skipped
        self.saved: Path | None = None
        self.skipped = 0
        self.problem: str | None = None
        self._folder = Path()
        self._in_a_row = 0
        self._batch: tuple[Any, int] = (None, 0)
        self._parts: list[_Part] = []
        self._waiting: _Step | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.saved, self.problem, self._waiting, self._parts = None, None, None, []
            self.skipped = self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict.get("skipped", 0)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The run's folder communicates, so all processes need to ask.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    # ------------------------------------------------------------------------------------- losses, gradients

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch, batch_idx

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        loss = loss.detach()
        self._parts.append(_Part(~loss.isfinite().all(), loss, *self._batch))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._look(trainer)
        parts, self._parts = self._parts, []
        # A gradient scaler (16-mixed) skips the step itself, and needs the gradients to decide that.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = [] if scaled else [p.grad for p in pl_module.parameters() if p.grad is not None]
        bad_loss = torch.stack([part.bad for part in parts]).any() if parts else torch.tensor(False)
        bad_gradient = ~largest(gradients).isfinite().to(bad_loss.device) if gradients else torch.zeros_like(bad_loss)
        flags = torch.stack([bad_loss, bad_gradient]).float()
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        step = _Step(trainer.global_step, parts, flags)
        if self._can_wait(flags, pl_module):
            if not scaled:
                undo_step_if(flags.amax() > 0, optimizer)
            step.fetch()
            self._waiting = step
        elif self._judge(trainer, step) and not scaled:
            for parameter in pl_module.parameters():
                parameter.grad = None

    def _can_wait(self, flags: Tensor, module: pl.LightningModule) -> bool:
        """Whether the device undoes a bad step by itself, so that its flags can be read one step later."""
        if not flags.is_cuda:
            return False
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
        return sum(size for size, is_trained in sizes if is_trained) <= _FEW * sum(size for size, _ in sizes)

    def _look(self, trainer: pl.Trainer) -> None:
        """Look at the flags of the step before."""
        step, self._waiting = self._waiting, None
        if step is not None:
            self._judge(trainer, step)

    def _judge(self, trainer: pl.Trainer, step: _Step) -> bool:
        """Count, report or stop; return whether the step is bad."""
        bad_loss, bad_gradient = step.read()
        if bad_loss:
            self._save(trainer, step, only_bad=True)
            self._stop(trainer, f"The loss is not finite at step {step.number}")
        elif bad_gradient:
            self.skipped += 1
            self._in_a_row += 1
            if self._in_a_row > self.max_skipped:
                self._save(trainer, step, only_bad=False)
                row = f", as in the {self.max_skipped} steps before" if self.max_skipped else ""
                self._stop(trainer, f"The gradient is not finite at step {step.number}{row}")
            elif self._in_a_row == 1:
                rank_zero_warn(
                    f"The gradient is not finite at step {step.number}: the step is skipped (skipped so far: "
                    f"{self.skipped})."
                )
        else:
            self._in_a_row = 0
        return bad_loss or bad_gradient

    def _stop(self, trainer: pl.Trainer, what: str) -> None:
        trainer.should_stop = True
        if self.problem is None:
            self.problem = f"{what}: training stops without this step" + (
                f", and the batch is in {self.saved}." if self.saved else "."
            )
            rank_zero_warn(self.problem)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._batch = None, 0
        if trainer.is_last_batch:
            self._look(trainer)

    def _save(self, trainer: pl.Trainer, step: _Step, only_bad: bool) -> None:
        part = next((part for part in step.parts if not only_bad or bool(part.bad)), None)
        if part is None:  # another process has it
            return
        folder = Path(self.dirpath) if self.dirpath else self._folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"nonfinite-step={step.number}-rank={trainer.global_rank}.safetensors"
        facts = {"step": step.number, "batch_idx": part.batch_idx, "loss": float(part.loss.float().sum())}
        save_file(_tensors(part.batch), path, metadata={name: str(value) for name, value in facts.items()})
        self.saved = path

    # ---------------------------------------------------------------------------------------------- weights

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(trainer)
        check_weights(trainer, trained(pl_module).items(), "no checkpoint of them is written")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)
        check_weights(trainer, trained(pl_module).items(), "training has failed")
        if self.skipped:
            rank_zero_warn(f"Steps that were skipped because their gradient was not finite: {self.skipped}.")


def check_weights(trainer: pl.Trainer, tensors: Iterable[tuple[str, Tensor]], consequence: str) -> None:
    """Refuse weights that are infinite or NaN. Every process must call this; all of them raise if one does.

    Raises:
        LitPeftError: the message names the weights and the last good checkpoint.
    """
    found = non_finite_names(tensors)
    if not trainer.strategy.reduce_boolean_decision(bool(found), all=False):
        return
    good = last_good(trainer)
    raise LitPeftError(
        f"After step {trainer.global_step}, trained weights are NaN or infinite ("
        f"{', '.join(found[:3]) or 'in another process'}), so {consequence}: lower learning_rate, set "
        "trainer.gradient_clip_val=1.0, or use another trainer.precision. "
        + (f"The last good checkpoint is {good}." if good else "There is no earlier checkpoint.")
    )


@dataclass
class _Part:
    """One backward pass of a step."""

    bad: Tensor
    loss: Tensor
    batch: Any
    batch_idx: int


class _Step:
    """The backward passes of an optimizer step, and whether a loss or a gradient is not finite."""

    def __init__(self, number: int, parts: list[_Part], flags: Tensor) -> None:
        self.number, self.parts, self._flags = number, parts, flags
        self._ready: Any = None

    def fetch(self) -> None:
        """Let the device copy the flags here when it gets there."""
        here = torch.empty(self._flags.shape, pin_memory=self._flags.is_cuda)
        self._flags = here.copy_(self._flags, non_blocking=True)
        if torch.cuda.is_available():
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> tuple[bool, bool]:
        """Return whether a loss, and whether a gradient, of any process is not finite."""
        if self._ready is not None:
            self._ready.synchronize()
        bad_loss, bad_gradient = self._flags.tolist()
        return bad_loss > 0, bad_gradient > 0


def _tensors(batch: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors in nested dicts, lists and tuples, by their paths."""
    if isinstance(batch, Tensor):
        return {name or "batch": batch.detach().cpu().clone().contiguous()}
    items = batch.items() if isinstance(batch, dict) else enumerate(batch) if isinstance(batch, list | tuple) else ()
    return {
        key: value
        for part, inner in items
        for key, value in _tensors(inner, f"{name}.{part}" if name else str(part)).items()
    }
