"""How a method's parameters, memory and files grow from 135M to 70B: `python benchmarks/scaling.py` prints Markdown.

Everything is counted on the meta device, no weight is made. Memory of training is what must be there whatever the
batch: the frozen base in bf16, the trained parameters in fp32 with their gradients and AdamW's two moments; activations
come on top and grow with the batch.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lit_peft
from lit_peft import AdapterHSettings, AdapterPSettings, LoRASettings, ParallelSettings
from lit_peft.methods.attachment import MethodSettings

# hidden, intermediate, layers, heads, KV heads, vocabulary, tied embeddings
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "SmolLM2 135M": (576, 1536, 30, 9, 3, 49_152, True),
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8, 128_256, True),
    "Llama 3.2 3B": (3072, 8192, 28, 24, 8, 128_256, True),
    "Llama 2 7B": (4096, 11_008, 32, 32, 32, 32_000, False),
    "Llama 3.1 8B": (4096, 14_336, 32, 32, 8, 128_256, False),
    "Llama 2 13B": (5120, 13_824, 40, 40, 40, 32_000, False),
    "Llama 3.1 70B": (8192, 28_672, 80, 64, 8, 128_256, False),
}
METHODS: dict[str, MethodSettings | None] = {
    "LoRA r=8, q and v": LoRASettings(r=8),
    "LoRA r=16, all linears": LoRASettings(r=16, target_modules="all-linear"),
    "DoRA r=16, all linears": LoRASettings(r=16, target_modules="all-linear", use_dora=True),
    "AdapterH /16": AdapterHSettings(),
    "AdapterP /16": AdapterPSettings(),
    "Parallel, bottleneck 512": ParallelSettings(bottleneck_size=512),
    "Prefix Tuning v=30, folded": None,
    "Prompt Tuning v=20": None,
    "full fine-tuning": None,
}
GPUS = (24, 80)


@cache
def model(name: str) -> Any:
    """The model of that name on the meta device."""
    hidden, intermediate, layers, heads, groups, vocabulary, tied = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@cache
def trained(name: str, method: str) -> tuple[int, int]:
    """Return the numbers of the base's parameters and of the trained ones."""
    made, settings = model(name), METHODS[method]
    base = sum(parameter.numel() for parameter in made.parameters())
    if settings is not None:
        parameters = lit_peft.trainable_parameters(lit_peft.attach(made, settings))
        lit_peft.detach(made)
        return base, parameters
    config = made.config
    if method.startswith("Prefix"):
        return base, 30 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return base, 20 * config.hidden_size if method.startswith("Prompt") else base


def memory(base: int, parameters: int) -> float:
    """GB that training holds without activations."""
    frozen = base if parameters < base else 0
    return (2 * frozen + 16 * parameters) / 1e9


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, help="write the Markdown there, too")
    options = parser.parse_args()
    text = tables(options.models)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


def tables(models: list[str]) -> str:
    """Both tables as Markdown."""
    lines = [f"| method | {' | '.join(models)} |", "|---|" + "---:|" * len(models)]
    fits: dict[int, list[str]] = {gpu: [] for gpu in GPUS}
    for method in METHODS:
        cells = []
        for name in models:
            base, parameters = trained(name, method)
            held = memory(base, parameters)
            cells.append(
                f"{parameters / 1e6:,.2f} M ({100 * parameters / base:.3g} %), {held:,.1f} GB, {size(parameters)}"
            )
        lines.append(f"| {method} | {' | '.join(cells)} |")
        for gpu in GPUS:
            # A fifth of the card is left to activations and the rest.
            able = [name for name in models if memory(*trained(name, method)) <= 0.8 * gpu]
            fits[gpu].append(able[-1] if able else "none")
    lines += [
        "",
        "Each cell: trained parameters (share of the base), memory of training without activations, adapter file.",
        "",
        f"| largest that trains on one GPU | {' | '.join(f'{gpu} GB' for gpu in GPUS)} |",
        "|---|" + "---|" * len(GPUS),
    ]
    lines += [f"| {method} | {' | '.join(fits[gpu][at] for gpu in GPUS)} |" for at, method in enumerate(METHODS)]
    return "\n".join(lines)


def size(parameters: int) -> str:
    """Bytes of the adapter's file in fp32, for people."""
    count = 4 * parameters
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    main()
