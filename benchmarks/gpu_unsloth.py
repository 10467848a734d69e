"""Unsloth's training step on a saved Llama, for benchmarks/gpu.py: prints one line of JSON."""

from __future__ import annotations

import json
import os
import sys

os.environ.update(UNSLOTH_DISABLE_STATISTICS="1", HF_HUB_OFFLINE="1", WANDB_MODE="disabled")

import torch
import unsloth
from cases import LINEAR
from gpu import take_steps
from gpu_cases import SHAPES, Workbench, seed_adapters
from torch import Tensor


def main() -> None:
    """Measure one row."""
    folder, name, rounds, checkpointed = sys.argv[1:]
    shape, device = SHAPES[name], torch.device("cuda")
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        folder, max_seq_length=shape.length, dtype=torch.bfloat16, load_in_4bit=False
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=shape.r,
        lora_alpha=2 * shape.r,
        lora_dropout=0,
        bias="none",
        target_modules=LINEAR,
        use_gradient_checkpointing="unsloth" if checkpointed == "1" else False,
        random_state=0,
    )
    model.train()
    seed_adapters(model)
    batch = Workbench(shape, device, folder, "inductor").batch()

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss: Tensor = model(**batch).loss
        return loss

    print(json.dumps(take_steps((model, step), device, int(rounds))))


if __name__ == "__main__":
    main()
