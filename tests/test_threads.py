"""Several threads on one model: forwards and generation at once, and switching adapters."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import make, scramble
from torch import Tensor

import lit_peft
from lit_peft import (
    AdapterHSettings,
    AdapterPSettings,
    LoRASettings,
    ParallelSettings,
    PrefixTuningSettings,
    PromptTuningSettings,
    PTuningSettings,
    PTuningV2Settings,
)

THREADS = 8
METHODS: dict[str, Any] = {
    "LoRA": LoRASettings(r=4, use_dora=True),
    "AdapterH": AdapterHSettings(reduction_factor=4),
    "AdapterP": AdapterPSettings(reduction_factor=4),
    "AdapterP with the norms around it": AdapterPSettings(
        reduction_factor=4, original_ln_before=True, residual_before_ln=False
    ),
    "Parallel": ParallelSettings(reduction_factor=4),
    "PrefixTuning": PrefixTuningSettings(num_virtual_tokens=5, prefix_projection_size=16),
    "PTuningV2": PTuningV2Settings(num_virtual_tokens=5),
    "PTuning": PTuningSettings(num_virtual_tokens=5, encoder_hidden_size=16),
    "PromptTuning": PromptTuningSettings(num_virtual_tokens=5, prompt_tuning_init="RANDOM"),
    "placeholders": PromptTuningSettings(num_virtual_tokens=2, prompt_tuning_init="RANDOM", prompt_token_id=60),
}


def inputs(number: int, placeholders: bool = False) -> dict[str, Tensor]:
    """A batch of another size, length and padding for each number."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 60, (1 + number % 3, 5 + number), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, : number % 4] = 0
    if placeholders:
        ids[:, -3:-1] = 60
    return {"input_ids": ids, "attention_mask": mask}


def in_threads(calls: list[Callable[[], Any]], repeats: int) -> list[list[Any]]:
    """Call each function in a thread of its own, all at once, `repeats` times; return the results of each."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> list[Any]:
        start.wait(30)
        return [call() for _ in range(repeats)]

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(120) for future in [pool.submit(run, call) for call in calls]]


@pytest.fixture(autouse=True)
def switch_often() -> Any:
    """Let threads take turns within a forward, not only between two."""
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("grad", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["llama", "t5", "bloom"])
def test_forwards_and_generation_in_8_threads_are_those_of_one(base: str, method: str, grad: bool) -> None:
    if base != "llama" and method == "placeholders":
        pytest.skip("one base is enough: the model's own code is not involved")
    model = lit_peft.attach(make(base), METHODS[method]).eval()
    scramble(model)

    def forward(number: int) -> Tensor:
        batch = inputs(number, method == "placeholders")
        if base == "t5":
            batch["decoder_input_ids"] = batch["input_ids"][:, :4]
        return model(**batch).logits.detach()

    def generate(number: int) -> Tensor:
        return model.generate(**inputs(number, method == "placeholders"), max_new_tokens=4, do_sample=False)

    def call(number: int) -> Tensor:
        with torch.set_grad_enabled(grad):
            return (generate if number % 4 == 3 else forward)(number)

    expected = [call(number) for number in range(THREADS)]
    found = in_threads([lambda number=number: call(number) for number in range(THREADS)], repeats=4)
    for number, results in enumerate(found):
        for result in results:
            assert torch.equal(result, expected[number]), f"thread {number}"
