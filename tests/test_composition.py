"""Lightning's own callbacks on our modules: some copy the module, dump and restore it, or look for its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lit_peft.callbacks import AdapterEMA, FrozenWeightsGuard
from models import QUIET

import lit_peft
from lit_peft import CausalLMData


def run(decoder: Path, reviews: Path, where: Path, *callbacks: Any, method: str = "LoRA", **options: Any) -> Any:
    pl.seed_everything(0)
    data = CausalLMData(base=str(decoder), train=str(reviews), batch_size=16)
    settings = options.pop("settings", {})
    module = getattr(lit_peft, method)(base=str(decoder), learning_rate=5e-3, **settings)
    quiet = {**QUIET, "default_root_dir": where, "log_every_n_steps": 1, "enable_checkpointing": False}
    # A frozen weight that one of them moves is an error.
    trainer = pl.Trainer(callbacks=[*callbacks, FrozenWeightsGuard(1)], **{**quiet, "max_epochs": 4, **options})
    trainer.fit(module, data)
    return trainer


def test_early_stopping(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    stop = EarlyStopping("val_loss", patience=1, min_delta=10.0)
    trainer = run(decoder, reviews, tmp_path, stop)
    assert trainer.current_epoch == 2 and stop.stopped_epoch == 1


@pytest.mark.parametrize("method", ["LoRA", "AdapterH", "PrefixTuning", "PTuning"])
def test_stochastic_weight_averaging(method: str, decoder: Path, reviews: Path, tmp_path: Path) -> None:
    class Ends(pl.Callback):
        def __init__(self) -> None:
            self.weights: list[dict[str, torch.Tensor]] = []

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.weights.append({name: value.clone() for name, value in module.state_dict().items()})

    ends = Ends()
    average = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2, annealing_epochs=1)
    trainer = run(decoder, reviews, tmp_path, ends, average, method=method, settings={"lr_scheduler": "constant"})
    module = trainer.lightning_module
    # The mean of the tensors at the starts of the second epoch and of the two after it.
    for name, value in module.state_dict().items():
        expected = torch.stack([weights[name] for weights in ends.weights[:3]]).mean(0)
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    module.save_adapter(tmp_path / "a")
    batch = {"input_ids": torch.tensor([[7, 8, 9, 10]])}
    from transformers import AutoModelForCausalLM

    plain = lit_peft.load_adapter(AutoModelForCausalLM.from_pretrained(decoder), tmp_path / "a").eval()
    want = module.eval()(**batch).logits
    torch.testing.assert_close(plain(**batch).logits[:, -4:], want[:, -4:], atol=1e-5, rtol=0)


def test_learning_rate_monitor(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    settings = {"loraplus_lr_ratio": 4.0, "lr_scheduler": "constant", "warmup_steps": 0}
    run(decoder, reviews, tmp_path, LearningRateMonitor(), settings=settings, max_steps=2, logger=CSVLogger(tmp_path))
    (written,) = tmp_path.rglob("metrics.csv")
    header, *rows = (line.split(",") for line in written.read_text().splitlines())
    columns = [at for at, name in enumerate(header) if name.startswith("lr-")]
    rates = {float(row[at]) for row in rows for at in columns if row[at]}
    assert sorted(rates) == pytest.approx([5e-3, 2e-2])


def test_rich_progress_bar(decoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    run(decoder, reviews, tmp_path, RichProgressBar(), max_steps=2, enable_progress_bar=True)
    assert "train_loss" in capsys.readouterr().out


def test_batch_size_finder(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    finder = BatchSizeFinder(mode="power", init_val=2, max_trials=2, steps_per_trial=1)
    trainer = run(decoder, reviews, tmp_path, finder, max_steps=2)
    # Lightning 2.5 doubles once more than 2.6 before it stops.
    assert trainer.datamodule.batch_size == finder.optimal_batch_size in (4, 8)
    assert trainer.global_step == 2
    assert len(next(iter(trainer.train_dataloader))["input_ids"]) == finder.optimal_batch_size


def find_rate(decoder: Path, reviews: Path, where: Path) -> tuple[Any, LearningRateFinder]:
    finder = LearningRateFinder(min_lr=1e-4, max_lr=1e-1, num_training_steps=40, early_stop_threshold=None)
    settings = {"lr_scheduler": "constant", "warmup_steps": 0}
    return run(decoder, reviews, where, finder, max_steps=2, settings=settings), finder


def test_learning_rate_finder(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    trainer, finder = find_rate(decoder, reviews, tmp_path)
    assert finder.optimal_lr is not None
    assert trainer.lightning_module.learning_rate == finder.optimal_lr.suggestion() != 5e-3
    assert trainer.global_step == 2 and not list(tmp_path.glob(".lr_find*"))


def test_the_found_rate_is_trained_with(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    trainer, _ = find_rate(decoder, reviews, tmp_path)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(trainer.lightning_module.learning_rate)


def test_averages_of_ours_and_early_stopping_together(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    trainer = run(decoder, reviews, tmp_path, AdapterEMA(0.9), EarlyStopping("val_loss"), max_epochs=2)
    assert trainer.current_epoch == 2
