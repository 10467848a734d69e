"""A step with LoRA on the experts of a mixture, beside peft's `target_parameters` and the frozen model.

    python benchmarks/experts.py

Mixtral's and Qwen3-MoE's shapes, made smaller; r=8 on all experts and on nothing else, 4 × 128 tokens, fp32, one
thread, the processor's time. All variants take steps in turn; a ratio is the median over the rounds.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers

import lit_peft

ROUNDS, R = 9, 8
SHARED = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, int]] = {
    "mixtral": {**SHARED, "intermediate_size": 1792, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {**SHARED, "moe_intermediate_size": 192, "num_experts": 64, "num_experts_per_tok": 8, "head_dim": 64},
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def main() -> None:
    torch.set_num_threads(1)
    for kind, shape in SHAPES.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, vocab_size=2048, **shape)
        base: Any = transformers.AutoModelForCausalLM.from_config(config)
        ids = torch.randint(0, 2048, (4, 128))
        frozen = copy.deepcopy(base).requires_grad_(False)
        theirs = peft.LoraConfig(r=R, target_modules=[], target_parameters=EXPERTS)
        settings = lit_peft.LoRASettings(r=R, target_modules=[], target_experts=True)

        def floor(frozen: Any = frozen, ids: torch.Tensor = ids) -> None:
            inputs = frozen.get_input_embeddings()(ids).requires_grad_()
            frozen(inputs_embeds=inputs, labels=ids).loss.backward()

        steps = {
            "lit_peft": _step(lit_peft.attach(copy.deepcopy(base), settings).train(), ids),
            "peft": _step(peft.get_peft_model(copy.deepcopy(base), theirs).train(), ids),
            "floor": floor,
        }
        for step in steps.values():
            step()
        taken = {name: [0.0] * ROUNDS for name in steps}
        for index in range(ROUNDS):
            for name, step in steps.items():
                start = time.process_time()
                step()
                taken[name][index] = time.process_time() - start
        medians = {name: f"{statistics.median(times) * 1e3:.0f} ms" for name, times in taken.items()}
        ratios = {
            other: statistics.median(a / b for a, b in zip(taken["lit_peft"], taken[other], strict=True))
            for other in ("peft", "floor")
        }
        print(f"{kind}: {medians}, of peft's {ratios['peft']:.2f}, of the floor's {ratios['floor']:.2f}")


def _step(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
