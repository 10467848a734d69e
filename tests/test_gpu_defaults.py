"""What is done in another way on a GPU, as far as it shows without one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.plugins.precision import MixedPrecision
from lit_peft.callbacks import run_banner
from torch import nn

import lit_peft
from lit_peft.data import loaders
from lit_peft.nn import cross_entropy
from lit_peft.nn.cross_entropy import head_cross_entropy
from lit_peft.training.optimizer import make_optimizer, with_fused


def groups() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [{"params": [nn.Parameter(torch.randn(3, 4))], "lr": 0.1}, {"params": [nn.Parameter(torch.randn(4))]}]


def chosen(name: str = "AdamW", trainer: Any = None, device: str = "cpu", **arguments: Any) -> dict[str, Any]:
    hparams = SimpleNamespace(optimizer=name, optimizer_args=arguments)
    return with_fused(hparams, groups(), trainer, device)


def test_adam_is_fused_where_it_can_be() -> None:
    assert chosen(betas=[0.9, 0.99]) == {"betas": [0.9, 0.99], "fused": True}
    assert chosen(device="cuda") == {}, "the parameters are on a CPU"
    assert chosen("SGD") == {} and chosen("torch.optim.AdamW") == {}
    for name in ("fused", "foreach", "capturable"):
        assert chosen(**{name: False}) == {name: False}


def test_gradients_that_lightning_clips_or_unscales_are_not_fused() -> None:
    mixed: Any = MixedPrecision("bf16-mixed", "cpu")
    trainers = SimpleNamespace(precision_plugin=mixed, gradient_clip_val=None)
    assert chosen(trainer=trainers) == {"fused": True}
    trainers.gradient_clip_val = 1.0
    assert chosen(trainer=trainers) == {}
    # Lightning refuses exactly these.
    optimizer = make_optimizer(groups(), "AdamW", 0.1, {"fused": True})
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        mixed.clip_gradients(optimizer, 1.0)
    scaled: Any = MixedPrecision("16-mixed", "cpu")
    assert chosen(trainer=SimpleNamespace(precision_plugin=scaled, gradient_clip_val=None)) == {}


def test_fused_steps_are_those_of_the_plain_optimizer() -> None:
    weights = []
    for arguments in ({}, chosen()):
        made = groups()
        optimizer = make_optimizer(made, "AdamW", 0.01, arguments)
        for step in range(4):
            for group in made:
                for parameter in group["params"]:
                    parameter.grad = torch.full_like(parameter, 0.3 * (step - 1.5))
            optimizer.step()
        weights.append(torch.cat([p.flatten() for group in made for p in group["params"]]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_workers_are_chosen_for_training_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lit_peft.CausalLMData(train="rows.jsonl").num_workers is None
    settings: Any = {"examples": [1, 2], "collate": list, "batch_size": 1, "seed": 0, "trainer": None}
    cpu = loaders.training_loader(**settings, num_workers=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loaders.os, "cpu_count", lambda: 16)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # undone after the test; what is set is kept
    gpu = loaders.training_loader(**settings, num_workers=None)
    own = loaders.training_loader(**settings, num_workers=0)
    evaluating = loaders.evaluation_loader([1, 2], list, 1, None)
    assert [cpu.num_workers, gpu.num_workers, own.num_workers, evaluating.num_workers] == [0, 2, 0, 0]
    assert not cpu.pin_memory and gpu.pin_memory and evaluating.pin_memory and gpu.persistent_workers
    monkeypatch.setattr(loaders.os, "cpu_count", lambda: 1)
    assert loaders.default_workers(None) == 0


def test_the_banner_says_what_is_done_on_a_gpu() -> None:
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    optimizer = make_optimizer(groups(), "AdamW", 0.1, chosen())
    data = SimpleNamespace(num_workers=3)
    trainer: Any = SimpleNamespace(strategy=strategy, optimizers=[optimizer], datamodule=data)
    assert run_banner._on_gpu(trainer) == "fused AdamW, batches by 3 processes"
    data.num_workers, data.streaming = None, True
    assert run_banner._on_gpu(trainer) == "fused AdamW"
    strategy.root_device = torch.device("cpu")
    assert run_banner._on_gpu(trainer) == "" and loaders.default_workers(trainer) == 0


def test_lightning_copies_pinned_batches_without_waiting() -> None:
    class Batch(torch.Tensor):
        def to(self, device: Any, **settings: Any) -> Any:
            self.settings = settings
            return self

    batch = Batch()
    move_data_to_device({"input_ids": batch, "max_length_q": 3}, torch.device("cuda", 0))
    assert batch.settings == {"non_blocking": True}


@pytest.mark.parametrize(("gigabytes", "rows"), [(80, 2436), (24, 730), (8, 256), (512, 4096)])
def test_blocks_of_the_head_are_sized_by_the_memory(gigabytes: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert cross_entropy._rows_at_once(torch.device("cuda"), 128_256) == rows
    assert cross_entropy._rows_at_once(torch.device("cpu"), 128_256) == 256


def test_the_size_of_the_blocks_does_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(50, 8, requires_grad=True), torch.randn(30, 8), torch.randint(30, (50,))
    found = []
    for rows in (7, 50):
        monkeypatch.setattr(cross_entropy, "_rows_at_once", lambda *_: rows)  # noqa: B023
        loss = head_cross_entropy(hidden, weight, targets)
        found.append((loss, *torch.autograd.grad(loss, hidden)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
