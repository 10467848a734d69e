"""Packed rows: loss and gradients of the examples one by one, rows that are full, and who may not have them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import DECODERS, close, make, scramble

import lit_peft
from lit_peft import InstructionData, LitPeftError
from lit_peft.data.collate import PadCollator
from lit_peft.data.packing import PackCollator, pack, swap_equal_lengths
from lit_peft.tasks.causal_lm import CausalLM
from lit_peft.tasks.packed import check_packing, packed_inputs

METHODS = {
    "LoRA": lit_peft.LoRASettings(r=4),
    "IA3": lit_peft.IA3Settings(),
    "AdapterH": lit_peft.AdapterHSettings(reduction_factor=4),
    "Parallel": lit_peft.ParallelSettings(reduction_factor=4),
}


def examples(*lengths: int) -> list[dict[str, Any]]:
    """Each with a prompt without a loss, a third of it."""
    draw = random.Random(0)
    made = [[draw.randrange(3, 61) for _ in range(length)] for length in lengths]
    return [{"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]} for ids in made]


def results(model: Any, batch: dict[str, Any], alone: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    task = CausalLM()
    model.zero_grad()
    context = task.loss_only(model) if alone else torch.enable_grad()
    with context:
        loss = task.run(model, batch).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("alone", [True, False], ids=["supervised", "whole"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_loss_and_gradients_are_those_of_the_examples_apart(
    name: str, method: str, attention: str, alone: bool
) -> None:
    model = make(name)
    model.set_attn_implementation(attention)
    lit_peft.attach(model, METHODS[method])
    scramble(model)
    rows = examples(9, 4, 12, 2, 7, 1)
    packed = PackCollator(0)([[rows[0], rows[1], rows[3]], [rows[2], rows[4]], [rows[5]]])
    assert packed["input_ids"].shape == (3, 19) and "attention_mask" not in packed
    loss, gradients = results(model, packed, alone)
    wanted, grown = results(model, PadCollator(0)(rows), alone)
    close(loss, wanted)
    assert len(gradients) == len(grown) >= 4
    for gradient, other in zip(gradients, grown, strict=True):
        close(gradient, other)
    # One row of all rows, as flash attention takes them.
    model.config._attn_implementation_internal, before = "flash_attention_2", model.config._attn_implementation
    flat = packed_inputs(model, packed)
    model.config._attn_implementation_internal = before
    assert flat["input_ids"].shape == (1, 57)
    close(model(**flat).loss, wanted)


def test_rows_that_are_not_kept_apart_are_seen() -> None:
    """The comparison above can fail: without positions that begin again, and with a cache."""
    model, rows = make("llama"), examples(9, 4, 12)
    packed = PackCollator(0)([rows])
    wanted = model(**PadCollator(0)(rows)).loss
    running = torch.arange(25)[None]
    for changed in ({"use_cache": True}, {"use_cache": False, "position_ids": running}):
        loss = model(**{**packed, **changed}).loss
        assert (loss - wanted).abs() > 1e-4


@pytest.mark.parametrize("name", DECODERS)
def test_every_model_keeps_packed_examples_apart_or_is_refused(name: str) -> None:
    model, rows = make(name), examples(5, 6)
    packed = PackCollator(0)([rows])
    if name.split()[0] in ("bloom", "opt"):
        with pytest.raises(LitPeftError, match="lets the tokens of one example see"):
            check_packing(model)
    else:
        close(CausalLM().run(model, packed).loss, CausalLM().run(model, PadCollator(0)(rows)).loss)


@pytest.mark.parametrize("method", ["PrefixTuning", "PTuningV2", "PTuning", "PromptTuning"])
def test_virtual_tokens_are_refused(method: str, decoder: Path) -> None:
    module = getattr(lit_peft, method)(base=str(decoder), num_virtual_tokens=2)
    data = InstructionData(base=str(decoder), packing=True)
    with pytest.raises(LitPeftError, match=r"data.packing is set, but the virtual tokens of"):
        module.check_data(data)
    module.configure_model()
    batch = PackCollator(0)([examples(5, 6)])
    with pytest.raises(LitPeftError, match=r"data.packing"):
        module.training_step({name: value % 20 for name, value in batch.items()}, 0)
    other = lit_peft.LoRA(base=str(decoder), task="sequence_classification", num_labels=2)
    with pytest.raises(LitPeftError, match="has no use for InstructionData, whose rows are for 'causal_lm'"):
        other.check_data(data)


# --------------------------------------------------------------------------------------------- packing


def skewed(count: int, capacity: int) -> list[int]:
    """Lengths as instructions have them: most short, some long (log-normal, median 60)."""
    draw = random.Random(1)
    return [min(max(2, round(draw.lognormvariate(math.log(60), 0.8))), capacity) for _ in range(count)]


def test_rows_are_full_and_hold_every_example_once() -> None:
    lengths = skewed(3000, 512)
    packs = pack(lengths, 512)
    assert sorted(at for row in packs for at in row) == list(range(3000))
    assert max(sum(lengths[at] for at in row) for row in packs) <= 512
    assert sum(lengths) / (len(packs) * 512) > 0.99
    # By hand: 6+4, 5+5, 3.
    assert sorted(sorted(row) for row in pack([5, 6, 3, 4, 5], 10)) == [[0, 4], [1, 3], [2]]
    assert pack([], 4) == []


def test_examples_change_places_with_those_of_their_length() -> None:
    lengths = torch.tensor(skewed(500, 64))
    taken = swap_equal_lengths(lengths, torch.Generator().manual_seed(0))
    assert sorted(taken.tolist()) == list(range(500)) and (taken != torch.arange(500)).float().mean() > 0.8
    assert (lengths[taken] == lengths).all()


def instructions(file: Path, tokens: list[int]) -> str:
    draw = random.Random(2)
    words = "a bad film good great is it of poor the this was well weak".split()  # noqa: SIM905
    rows = [
        {"instruction": f"{at} good film", "output": " ".join(draw.choices(words, k=n))} for at, n in enumerate(tokens)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("workers", [0, 2])
def test_at_least_95_percent_of_the_tokens_are_real(workers: int, decoder: Path, tmp_path: Path) -> None:
    file = instructions(tmp_path / "a.jsonl", skewed(800, 400))
    settings: dict[str, Any] = {"base": str(decoder), "train": file, "validation_fraction": 0, "max_length": 512}
    packed = InstructionData(**settings, packing=True, batch_size=4, num_workers=workers)
    loader = packed.train_dataloader()
    seen: list[list[tuple[int, ...]]] = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        real = total = count = 0
        rows = []
        for batch in loader:
            labelled = (batch["labels"] != -100).sum()
            starts = (batch["position_ids"] == 0) & (batch["input_ids"] != 0)
            real, total, count = real + int((batch["input_ids"] != 0).sum()), total + batch["labels"].numel(), count + 1
            assert labelled > 0 and starts.any()
            rows += [tuple(row[row != 0].tolist()) for row in batch["input_ids"]]
        assert count == len(loader)
        assert real / total >= 0.95, real / total
        seen.append(rows)
    examples = packed.examples("train")
    assert real == sum(map(len, examples["input_ids"]))
    assert seen[0] != seen[1] and sorted(map(len, seen[0])) == sorted(map(len, seen[1]))


def test_training_on_packed_rows_learns(decoder: Path, tmp_path: Path) -> None:
    file = instructions(tmp_path / "a.jsonl", [4, 9, 30, 2, 5, 11] * 8)
    data = InstructionData(base=str(decoder), train=file, validation=file, packing=True, batch_size=2, max_length=96)
    data.drops_overlap = False
    module = lit_peft.FullFineTuning(base=str(decoder), learning_rate=5e-3)
    quiet: dict[str, Any] = {
        "logger": False,
        "inference_mode": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", enable_model_summary=False, **quiet)
    before = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    trainer.fit(module, data)
    assert trainer.callback_metrics["val_loss"] < before - 0.3
    with pytest.raises(LitPeftError, match="group_by_length"):
        InstructionData(base=str(decoder), packing=True, group_by_length=True)
