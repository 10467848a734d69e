"""Training samples per second, packed against padded, on the lengths of real instruction files.

    python benchmarks/packing.py --tokenizer TOKENIZER FILE.json…

Both train LoRA on the same Llama with about the same number of tokens to a batch, padding included; padded and
packed batches take turns, and each pair gives one ratio. Time is the processor's, of one thread.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lit_peft
from lit_peft import ReasoningData
from lit_peft.data.base import lengths_of
from lit_peft.data.collate import PadCollator
from lit_peft.data.packing import PackCollator
from lit_peft.data.sampling import ByBatch, SeededBatches
from lit_peft.tasks.causal_lm import CausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--batch_size", type=int, default=32, help="examples in a padded batch")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--hidden_size", type=int, default=512, help="of the Llama; attention's share falls with it")
    parser.add_argument("--layers", type=int, default=8, help="of the Llama; the head's share falls with them")
    given = parser.parse_args()
    torch.set_num_threads(1)
    examples: list[dict[str, Any]] = []
    for file in given.files:
        settings: dict[str, Any] = {"tokenizer": given.tokenizer, "max_length": given.max_length}
        examples += list(ReasoningData(train=file, validation_fraction=0, **settings).examples("train"))
    lengths = lengths_of(examples)

    padded = SeededBatches(len(examples), given.batch_size, 0)
    budget = statistics.mean(max(lengths[at] for at in batch) * len(batch) for batch in padded)
    rows = round(budget / given.max_length)
    packed = SeededBatches(len(examples), rows, 0, lengths, given.max_length)
    batches = itertools.islice(zip(padded, packed, strict=False), given.pairs + 2)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1 + max(token for example in examples for token in example["input_ids"]),
        hidden_size=given.hidden_size,
        intermediate_size=4 * given.hidden_size,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden_size // 64,
    )
    model = lit_peft.attach(LlamaForCausalLM(config), lit_peft.LoRASettings(r=8))
    task, look_up = CausalLM(), ByBatch(examples)

    def step(batch: dict[str, Any]) -> float:
        began = time.process_time()
        with task.loss_alone(model):
            task.run(model, batch).loss.backward()
        return time.process_time() - began

    ratios, real, total, seconds = (
        [],
        {"padded": 0, "packed": 0},
        {"padded": 0, "packed": 0},
        {"padded": [], "packed": []},
    )
    for number, (plain, full) in enumerate(batches):
        counts = {"padded": len(plain), "packed": sum(map(len, full))}
        made = {"padded": PadCollator(0)(look_up[plain]), "packed": PackCollator(0)(look_up[full])}
        order = list(made) if number % 2 else list(made)[::-1]
        rates = {}
        for way in order:
            took = step(made[way])
            rates[way] = counts[way] / took
            if number >= 2:
                total[way] += made[way]["input_ids"].numel()
                real[way] += sum(lengths[at] for at in (plain if way == "padded" else itertools.chain(*full)))
                seconds[way].append(rates[way])
        if number >= 2:
            ratios.append(rates["packed"] / rates["padded"])
    for way in total:
        print(
            f"{way}: {statistics.median(seconds[way]):.0f} samples/s, {total[way] / given.pairs:.0f} tokens a batch, "
            f"{100 * real[way] / total[way]:.1f} % real"
        )
    print(
        f"packed/padded: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {len(ratios)} pairs"
    )


if __name__ == "__main__":
    main()
