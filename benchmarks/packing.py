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
from lit_peft.data.collate import PadCollator
from lit_peft.data.encoding import token_counts
from lit_peft.data.packing import PackCollator
from lit_peft.data.sampling import ByBatch, SeededBatches
from lit_peft.tasks.causal_lm import CausalLM

# Pairs that are not counted.
WARM_UP = 1


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
    lengths = token_counts(examples)

    padded = SeededBatches(len(examples), given.batch_size, 0)
    budget = statistics.mean(max(lengths[at] for at in batch) * len(batch) for batch in padded)
    rows = round(budget / given.max_length)
    packed = SeededBatches(len(examples), rows, 0, lengths, given.max_length)
    batches = itertools.islice(zip(padded, packed, strict=False), given.pairs + WARM_UP)

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
        with task.loss_only(model):
            task.run(model, batch).loss.backward()
        return time.process_time() - began

    ways = ("padded", "packed")
    ratios, real, total = [], dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    samples, seconds = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
    for number, (plain, full) in enumerate(batches):
        chosen = {"padded": list(plain), "packed": list(itertools.chain(*full))}
        made = {"padded": PadCollator(0)(look_up[plain]), "packed": PackCollator(0)(look_up[full])}
        rates = {}
        for way in ways if number % 2 else ways[::-1]:
            took = step(made[way])
            if number < WARM_UP:
                continue
            rates[way] = len(chosen[way]) / took
            samples[way] += len(chosen[way])
            seconds[way] += took
            total[way] += made[way]["input_ids"].numel()
            real[way] += sum(lengths[at] for at in chosen[way])
        if rates:
            ratios.append(rates["packed"] / rates["padded"])
    for way in ways:
        print(
            f"{way}: {samples[way] / seconds[way]:.2f} samples/s, {total[way] / given.pairs:.0f} tokens a batch, "
            f"{100 * real[way] / total[way]:.1f} % real"
        )
    whole = samples["packed"] / seconds["packed"] * seconds["padded"] / samples["padded"]
    print(f"packed/padded: {whole:.2f} of {given.pairs} pairs ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
