"""NaN and infinite numbers reach neither the weights nor a checkpoint nor a good-looking metric."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_peft.callbacks import AdapterCheckpoint, LastCheckpoint, NonFiniteGuard
from models import QUIET
from safetensors.torch import load_file
from test_callbacks import Plain
from test_resume import write_config
from torch import nn

import lit_peft
from lit_peft.cli import main
from lit_peft.nn.finite import largest, non_finite_names, undo_step_if
from lit_peft.tasks import TASKS, find_task
from lit_peft.tasks.base import watch_output
from lit_peft.training.module import BaseLM
from lit_peft.util.errors import LitPeftError

BAD = [math.nan, math.inf, -math.inf]


class Bad(Plain):
    """One of its gradients is not finite at some steps."""

    def __init__(self, steps: set[int], value: float = math.inf) -> None:
        super().__init__((1.0,) * 9)
        self.steps, self.value = steps, value
        self.before: dict[int, dict[str, Any]] = {}

    def on_after_backward(self) -> None:
        step = self.trainer.global_step
        optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
        self.before[step] = copy.deepcopy({"weights": self.state_dict(), "optimizer": optimizer.state_dict()})
        if step in self.steps:
            assert self.trained.weight.grad is not None
            self.trained.weight.grad[0, 1] = self.value


def train(module: pl.LightningModule, folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    settings = {"max_epochs": 2, "gradient_clip_val": 1.0, "enable_checkpointing": False, **QUIET, **settings}
    trainer = pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **settings)
    trainer.fit(module)
    return trainer


# ----------------------------------------------------------------------------------------------- the guard


@pytest.mark.parametrize("value", BAD)
def test_a_step_with_an_infinite_gradient_is_skipped_and_counted(value: float, tmp_path: Path) -> None:
    guard, module = NonFiniteGuard(), Bad({2, 5}, value)
    with pytest.warns(UserWarning, match="The gradient is not finite at step 2: the step is skipped"):
        assert train(module, tmp_path, guard).global_step == 8
    assert guard.skipped == 2 and guard.problem is None and guard.saved is None
    for step in (2, 5):
        for name, weight in module.before[step]["weights"].items():
            assert torch.equal(module.before[step + 1]["weights"][name], weight)
        moments = [module.before[at]["optimizer"]["state"][0]["exp_avg"] for at in (step, step + 1)]
        assert torch.equal(*moments)
    assert all(weight.isfinite().all() for weight in module.state_dict().values())
    assert not torch.equal(module.before[3]["weights"]["trained.weight"], module.before[4]["weights"]["trained.weight"])


@pytest.mark.parametrize(("most", "last"), [(0, 2), (2, 4)])
def test_training_stops_after_some_such_steps_in_a_row(most: int, last: int, tmp_path: Path) -> None:
    guard = NonFiniteGuard(max_skipped=most)
    with pytest.warns(UserWarning, match=f"The gradient is not finite at step {last}"):
        assert train(Bad({2, 3, 4, 5, 6}), tmp_path, guard).global_step == last + 1
    assert guard.problem is not None and guard.saved == tmp_path / f"nonfinite-step={last}-rank=0.safetensors"
    assert load_file(guard.saved)["batch"].shape == (2, 4)


def test_others_in_between_begin_the_row_again(tmp_path: Path) -> None:
    guard = NonFiniteGuard(max_skipped=1)
    assert train(Bad({1, 3, 5}), tmp_path, guard).global_step == 8
    assert guard.skipped == 3 and guard.problem is None
    with pytest.raises(LitPeftError, match="max_skipped=-1"):
        NonFiniteGuard(max_skipped=-1)


class Overflow(Plain):
    """Its weights become infinite by a step with a finite loss and finite gradients."""

    def __init__(self, step: int) -> None:
        super().__init__((3.0, 2.0, 1.0, 0.5))
        self.step = step

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.trainer.global_step == self.step - 1:  # the step counts when this returns
            with torch.no_grad():
                self.trained.bias.fill_(math.inf)


@pytest.mark.parametrize("step", [6, 8])
def test_no_checkpoint_has_such_weights_and_the_last_good_one_is_named(step: int, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "c", "best-{step}", monitor="val_loss")
    adapters = AdapterCheckpoint(str(tmp_path / "a"), monitor="val_loss")
    with pytest.raises(LitPeftError) as problem:
        train(
            Overflow(step), tmp_path, NonFiniteGuard(), adapters, best, LastCheckpoint(str(tmp_path / "c")),
            enable_checkpointing=True,
        )  # fmt: skip
    assert "trained.bias" in str(problem.value) and f"checkpoint is {tmp_path / 'c' / 'last.ckpt'}" in str(
        problem.value
    )
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["best-step=4.ckpt", "last.ckpt"]
    for file in (tmp_path / "c").iterdir():
        state = torch.load(file, weights_only=True)
        assert state["global_step"] == 4 and all(value.isfinite().all() for value in state["state_dict"].values())
    for file in (tmp_path / "a").glob("*/*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values())


def test_weights_are_checked_at_the_end_without_any_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(LitPeftError, match=r"After step 8, trained weights are NaN or infinite \(trained.bias\)"):
        train(Overflow(8), tmp_path, NonFiniteGuard())


# ------------------------------------------------------------------------------- undone by the device itself


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2).to(torch.float64).float())


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True, amsgrad=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_bad_step_is_undone_and_a_good_one_is_untouched(name: str) -> None:
    """With the same operations as on a GPU."""
    plain, undone = network(), network()
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (plain, undone)]
    for step in range(6):
        bad = step in (0, 3)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        before = copy.deepcopy((undone.state_dict(), optimizers[1].state_dict()["state"]))
        for model, optimizer in zip((plain, undone), optimizers, strict=True):
            if bad and model is plain:
                continue
            optimizer.zero_grad()
            (model(x).square().sum() * (math.nan if bad else 1.0)).backward()
            if model is undone:
                undo_step_if(torch.tensor(bad), optimizer)
            optimizer.step()
        if bad:
            assert all(torch.equal(value, before[0][key]) for key, value in undone.state_dict().items())
            for index, state in before[1].items():
                for key, value in state.items():
                    now = optimizers[1].state_dict()["state"][index][key]
                    assert key == "step" or torch.equal(now, value), key
    finite = [
        value for state in optimizers[1].state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    assert finite and all(value.isfinite().all() for value in finite)
    # Nothing but the counter of steps, which is on the CPU here, differs from a run without the bad steps.
    if name in ("SGD", "RMSprop"):
        for one, other in zip(plain.parameters(), undone.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_good_step_has_the_same_result_to_the_bit() -> None:
    plain, watched = network(), network()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in (plain, watched)]
    for step in range(4):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((plain, watched), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if model is watched:
                undo_step_if(torch.tensor(False), optimizer)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert not optimizers[1]._optimizer_step_post_hooks


class Delayed(NonFiniteGuard):
    """The way of a GPU: the device undoes the step, and the flags are read one step later."""

    def _can_wait(self, flags: torch.Tensor, module: pl.LightningModule) -> bool:
        return True


def test_flags_that_are_read_a_step_later_give_the_same_run(tmp_path: Path) -> None:
    modules = [Bad({2, 5}), Bad({2, 5})]
    guards = [NonFiniteGuard(), Delayed()]
    for module, guard in zip(modules, guards, strict=True):
        with pytest.warns(UserWarning, match="The gradient is not finite at step 2"):
            train(module, tmp_path, guard)
    assert guards[1].skipped == 2
    for step in (3, 6):  # the step after it, whose weights are those of before
        for name, weight in modules[1].before[step]["weights"].items():
            assert torch.equal(modules[1].before[step - 1]["weights"][name], weight)
    assert all(weight.isfinite().all() for weight in modules[1].state_dict().values())


def test_a_loss_that_is_read_a_step_later_stops_with_its_own_batch(tmp_path: Path) -> None:
    class Loss(Plain):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.batches = [*getattr(self, "batches", []), batch]
            return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 1 else 1.0)

    guard, module = Delayed(), Loss((1.0,) * 9)
    with pytest.warns(UserWarning, match="The loss is not finite at step 1: training stops"):
        trainer = train(module, tmp_path, guard)
    assert trainer.global_step == 3 and guard.saved == tmp_path / "nonfinite-step=1-rank=0.safetensors"
    assert torch.equal(load_file(guard.saved)["batch"], module.batches[1])
    assert all(weight.isfinite().all() for weight in module.state_dict().values())


# ---------------------------------------------------------------------------------- metrics, folders, command


def test_the_largest_value_shows_what_is_not_finite() -> None:
    good = {"a": torch.full((3,), 3e38), "b": torch.zeros(2, dtype=torch.bfloat16), "empty": torch.zeros(0)}
    assert largest(good.values()) == 3e38 and non_finite_names(good.items()) == []
    for value in BAD:
        bad = {**good, "c": torch.tensor([0.0, value]), "d": torch.tensor([value], dtype=torch.float16)}
        assert not largest(bad.values()).isfinite() and non_finite_names(bad.items()) == ["c", "d"]


class Answers(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = nn.functional.one_hot(labels, 2).float()
        logits[0] = logits[0].masked_fill(torch.tensor([False, True]), self.value)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=torch.tensor(0.1), logits=logits)


@pytest.mark.parametrize(("value", "is_finite"), [(0.0, True), (-math.inf, True), (math.inf, False), (math.nan, False)])
def test_metrics_of_an_output_that_is_not_finite_are_nan(value: float, is_finite: bool) -> None:
    task = find_task("sequence_classification")
    config = transformers.BertConfig(num_labels=2)
    metrics = task.metrics(config)
    good = {"input_ids": torch.zeros(4, 2), "labels": torch.tensor([0, 1, 0, 1])}
    for answers in (Answers(0.0), Answers(value)):
        with watch_output(answers, metrics):
            task.evaluate(answers, metrics, dict(good), None)  # type: ignore[arg-type]
        assert not answers._forward_hooks
    for name in ("accuracy", "f1", "mcc", "binary_f1"):
        assert bool(metrics[name].compute().isfinite()) == is_finite, name
        metrics[name].reset()
        assert metrics[name].non_finite == 0


@pytest.mark.parametrize("name", list(TASKS))
def test_every_metric_of_every_task_can_be_nan(name: str) -> None:
    task = find_task(name)
    for count in (2, 3) if name == "token_classification" else (1, 2, 3):
        config = transformers.BertConfig(num_labels=count)
        for metric_name, metric in task.metrics(config).items():
            assert metric.non_finite == 0, metric_name
            metric.non_finite += 1
            with torch.no_grad():
                assert bool(metric.or_nan(torch.tensor(1.0)).isnan())


def test_an_adapter_with_such_weights_is_not_saved(decoder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder)
    lit_peft.attach(model, lit_peft.LoRASettings(r=2))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = math.nan
    with pytest.raises(LitPeftError, match="NaN or infinite weights"):
        lit_peft.save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
def test_the_command_fails_and_names_the_last_good_checkpoint(
    what: str, decoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = write_config(tmp_path, decoder, reviews, 3, callbacks=None, accumulate_grad_batches=1)
    step, after, update = BaseLM.training_step, BaseLM.on_after_backward, BaseLM.optimizer_step

    def training_step(self: Any, *args: Any) -> Any:
        loss = step(self, *args)
        return loss * math.nan if what == "loss" and self.global_step == 13 else loss

    def on_after_backward(self: Any) -> None:
        after(self)
        if what == "gradient" and self.global_step == 13:
            next(p for p in self.parameters() if p.requires_grad).grad[0, 0] = math.inf

    def optimizer_step(self: Any, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        if what == "weights" and self.global_step == 14:
            with torch.no_grad():
                next(p for p in self.parameters() if p.requires_grad)[0, 0] = math.inf

    monkeypatch.setattr(BaseLM, "training_step", training_step)
    monkeypatch.setattr(BaseLM, "on_after_backward", on_after_backward)
    monkeypatch.setattr(BaseLM, "optimizer_step", optimizer_step)
    runs = tmp_path / "runs"
    status = main(["fit", "--config", str(config), "--trainer.default_root_dir", str(runs)])
    said = capsys.readouterr()
    last = runs / "version_0" / "checkpoints" / "last.ckpt"
    assert status == (0 if what == "gradient" else 2)
    if what != "gradient":
        assert f"The last good checkpoint is {last}" in said.err
    if what == "loss":
        assert "The loss is not finite at step 13" in said.err and (runs / "version_0" / "adapter").is_dir()
    files = list(runs.rglob("*.ckpt"))
    assert len(files) == 2
    for file in files:
        assert all(value.isfinite().all() for value in torch.load(file, weights_only=True)["state_dict"].values())
    for file in runs.rglob("adapter_model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values())
