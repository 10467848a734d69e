"""The order of training: the same with any number of workers, and gone on with in the middle of an epoch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lit_peft
from lit_peft import CausalLMData, LitPeftError, TextClassificationData
from lit_peft.data.loaders import StatefulLoader
from lit_peft.data.sampling import ByBatch, SeededBatches

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"batch_size": 4},
    "packing": {"batch_size": 2, "packing": True},
    "bucketing": {"batch_size": 4, "group_by_length": True},
}
ROWS = 50
STOP = 5


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path, draw = tmp_path_factory.mktemp("rows") / "rows.jsonl", random.Random(0)
    words = "a bad film good great is it of poor the this was well weak wonderful awful story acting".split()  # noqa: SIM905
    texts = {" ".join(draw.choices(words, k=3 + at % 14)) for at in range(ROWS)}
    assert len(texts) == ROWS
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sorted(texts)))
    return str(path)


class Seen(pl.Callback):
    """Records the batches that were trained on and their losses; raises an error at a given batch."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.batches: list[list[tuple[int, ...]]] = []
        self.losses: list[float] = []
        self.dies_at = dies_at

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.dies_at is not None and len(self.batches) == self.dies_at:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "died.ckpt")
            raise RuntimeError("killed")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(examples_of(batch))
        self.losses.append(float(outputs["loss"]))


def examples_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """The tokens of each example, without padding (0)."""
    found: list[list[int]] = []
    for ids, row in zip(batch["input_ids"].tolist(), range(len(batch["input_ids"])), strict=True):
        begins = batch["position_ids"][row].tolist() if "position_ids" in batch else range(len(ids))
        for token, position in zip(ids, begins, strict=True):
            if position == 0:
                found.append([])
            if token:
                found[-1].append(token)
    return [tuple(ids) for ids in found if ids]


def run(
    decoder: Path, file: str, folder: Path, way: str, resume: Any = None, dies_at: int | None = None, **settings: Any
) -> tuple[Seen, dict[str, torch.Tensor]]:
    pl.seed_everything(0)
    workers, accumulate = settings.pop("num_workers", 0), settings.pop("accumulate_grad_batches", 1)
    data = CausalLMData(
        base=str(decoder),
        train=file,
        validation_fraction=0.0,
        max_length=20,
        num_workers=workers,
        **{**WAYS[way], **settings},
    )
    module = lit_peft.LoRA(
        base=str(decoder), learning_rate=1e-2, lr_scheduler="constant", warmup_steps=0, lora_dropout=0.0
    )
    seen = Seen(dies_at)
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=STOP, save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        default_root_dir=folder,
        callbacks=[seen, checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return seen, {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def same(
    one: tuple[Seen, dict[str, torch.Tensor]], other: tuple[Seen, dict[str, torch.Tensor]], since: int = 0
) -> None:
    assert one[0].batches == other[0].batches[since:]
    assert one[0].losses == pytest.approx(other[0].losses[since:], rel=1e-6)
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_sees_the_remaining_batches_and_ends_with_equal_weights(
    way: str, decoder: Path, file: str, tmp_path: Path
) -> None:
    whole = run(decoder, file, tmp_path / "whole", way)
    batches = len(whole[0].batches) // 3
    assert batches > STOP and len(whole[0].batches) == 3 * batches
    for epoch in range(3):
        seen = [ids for batch in whole[0].batches[epoch * batches : (epoch + 1) * batches] for ids in batch]
        assert len(set(seen)) == len(seen) == ROWS
    same(run(decoder, file, tmp_path / "workers", way, num_workers=2), whole)
    # In the first epoch, in a later one with workers, and with a checkpoint that is written while a batch is at work.
    for step, workers in ((STOP, 0), (4 * STOP, 2), (2 * STOP, 0)):
        stored = tmp_path / "whole" / f"step={step}.ckpt"
        assert step % batches
        same(run(decoder, file, tmp_path / f"from {step}", way, stored, num_workers=workers), whole, since=step)
    with pytest.raises(RuntimeError, match="killed"):
        run(decoder, file, tmp_path, way, dies_at=batches + 3, num_workers=2)
    same(run(decoder, file, tmp_path / "after", way, tmp_path / "died.ckpt"), whole, since=batches + 3)


def test_accumulated_gradients_are_whole_after_a_resume(decoder: Path, file: str, tmp_path: Path) -> None:
    whole = run(decoder, file, tmp_path / "whole", "plain", accumulate_grad_batches=2)
    stored = tmp_path / "whole" / f"step={STOP}.ckpt"
    again = run(decoder, file, tmp_path / "again", "plain", stored, accumulate_grad_batches=2, num_workers=2)
    same(again, whole, since=2 * STOP)


def test_an_epochs_end_is_not_its_middle(decoder: Path, file: str, tmp_path: Path) -> None:
    whole = run(decoder, file, tmp_path / "whole", "plain", batch_size=10)
    assert len(whole[0].batches) == 15  # the epoch ends with step 5
    same(run(decoder, file, tmp_path / "b", "plain", tmp_path / "whole" / "step=5.ckpt", batch_size=10), whole, since=5)


def test_another_plan_is_refused_in_the_middle_of_an_epoch(decoder: Path, file: str, tmp_path: Path) -> None:
    run(decoder, file, tmp_path, "plain")
    with pytest.raises(LitPeftError, match=r"data.batch_size times devices 4, and now it is 5"):
        run(decoder, file, tmp_path / "b", "plain", tmp_path / "step=5.ckpt", batch_size=5)
    with pytest.raises(LitPeftError, match=r"data.group_by_length 0, and now it is 1"):
        run(decoder, file, tmp_path / "b", "bucketing", tmp_path / "step=5.ckpt")


# ------------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize("capacity", [None, 70], ids=["bucketing", "packing"])
def test_each_example_once_among_processes(capacity: int | None) -> None:
    draw = random.Random(0)
    lengths = [draw.randint(2, 60) for _ in range(997)]

    def batches(processes: int, epoch: int, size: int) -> list[list[Any]]:
        shares = []
        for rank in range(processes):
            sampler = SeededBatches(997, size, 3, lengths, capacity, num_replicas=processes, rank=rank)
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
            assert len(shares[-1]) == len(sampler)
        return [[item for share in step for item in share] for step in zip(*shares, strict=True)]

    one, two, later = batches(1, 0, 8), batches(2, 0, 4), batches(1, 1, 8)
    assert [sorted(step) for step in one[:-1]] == [sorted(step) for step in two[:-1]]
    assert one != later
    for run in (one, later):
        flat = [at for step in run for item in step for at in (item if capacity else [item])]
        assert sorted(flat) == list(range(997))
    if capacity is None:
        padded = sum(len(step) * max(lengths[at] for at in step) for step in one)
        assert sum(lengths) / padded > 0.93, "a random order has about 0.58"
    else:
        assert all(sum(lengths[at] for at in row) <= capacity for step in one for row in step)


def test_bucketed_batches_of_any_task(encoder: Path, reviews: Path) -> None:
    data = TextClassificationData(base=str(encoder), train=str(reviews), group_by_length=True, batch_size=8)
    loader = data.train_dataloader()
    assert isinstance(loader, StatefulLoader) and isinstance(loader.dataset, ByBatch)
    assert sum(len(batch["labels"]) for batch in loader) == len(data.examples("train"))
    # Broken off and begun again, a loader begins again.
    first = next(iter(loader))["input_ids"]
    assert torch.equal(first, next(iter(loader))["input_ids"])
    state = torch.get_rng_state()
    list(loader)
    assert torch.equal(state, torch.get_rng_state())
