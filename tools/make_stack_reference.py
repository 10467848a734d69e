"""Write the reference case of stacked adapters in tests/golden/adapters-stack, with AdapterHub's library `adapters`.

It needs an environment of its own, because `adapters` needs an older transformers:

    python -m venv reference && . reference/bin/activate
    pip install adapters==1.3.0
    python tools/make_stack_reference.py

For each architecture: a tiny random model for classification, a language adapter and a task adapter; the logits of
their stack, of each adapter alone and of the base, and the gradients of the task adapter in the stack. The language
adapter of BERT is trained for a few steps by masked language modeling, and saved with its head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters.composition import Stack
from safetensors.torch import save_file

TARGET = Path(__file__).parents[1] / "tests" / "golden" / "adapters-stack"
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
GPT = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 16, "n_positions": 16}
# Name of the case: model type, its shape, and the configurations of the two adapters.
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "bert": ("bert", SHAPE, "seq_bn", "seq_bn"),
    "roberta": ("roberta", {**SHAPE, "num_hidden_layers": 1, "max_position_embeddings": 18}, "seq_bn", "double_seq_bn"),
    "gpt2": (
        "gpt2",
        {**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0, "num_labels": 3},
        "double_seq_bn",
        "seq_bn",
    ),
}


def scramble(model: torch.nn.Module) -> None:
    """Move every parameter away from its start, where adapters do nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def train_language(base: Path, config: str, folder: Path) -> None:
    """Train a language adapter for a few steps on random masked tokens, and save it with its head."""
    model: Any = adapters.AutoAdapterModel.from_pretrained(base, attn_implementation="eager")
    model.add_adapter("language", config=adapters.AdapterConfig.load(config, reduction_factor=4))
    model.add_masked_lm_head("language")
    model.train_adapter("language")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        ids = torch.randint(2, 32, (8, 7))
        labels = ids.masked_fill(torch.rand(ids.shape) > 0.3, -100)
        optimizer.zero_grad()
        model(input_ids=ids.masked_fill(labels != -100, 1), labels=labels).loss.backward()
        optimizer.step()
    model.save_adapter(str(folder), "language", with_head=True)


def make(name: str) -> None:
    """Write one case."""
    kind, shape, language, task = CASES[name]
    torch.manual_seed(11)
    config = transformers.AutoConfig.for_model(kind, **shape)
    model: Any = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    scramble(model)
    folder = TARGET / name
    model.save_pretrained(folder / "base")
    adapters.init(model)
    model.eval()
    if kind == "bert":
        train_language(folder / "base", language, folder / "language")
        model.load_adapter(str(folder / "language"), load_as="language", with_head=False)
    else:
        model.add_adapter("language", config=adapters.AdapterConfig.load(language, reduction_factor=4))
    model.add_adapter("task", config=adapters.AdapterConfig.load(task, reduction_factor=4))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".adapters.task." in path or (kind != "bert" and ".adapters." in path):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.randint(2, 32, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, config.pad_token_id), "attention_mask": mask}
    tensors = {**inputs, "labels": torch.tensor([0, 2, 1])}
    setups = {"base": None, "language": "language", "task": "task", "stack": Stack("language", "task")}
    for setup, active in setups.items():
        model.set_active_adapters(active)
        with torch.no_grad():
            tensors[f"logits_{setup}"] = model(**inputs).logits
    if kind != "bert":
        model.save_adapter(str(folder / "language"), "language", with_head=False)
    model.save_adapter(str(folder / "task"), "task", with_head=False)
    model.train_adapter("task")
    model.set_active_adapters(Stack("language", "task"))
    model(**inputs, labels=tensors["labels"]).loss.backward()
    for path, parameter in model.named_parameters():
        if ".adapters.task." in path:
            assert parameter.grad is not None
            tensors[f"gradient {path}"] = parameter.grad
        assert ".adapters.language." not in path or parameter.grad is None
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "io.safetensors")
    versions = {"adapters": adapters.__version__, "transformers": transformers.__version__}
    (folder / "case.json").write_text(json.dumps({"architecture": kind, **versions}, indent=1) + "\n")


if __name__ == "__main__":
    for case in CASES:
        make(case)
    size = sum(file.stat().st_size for file in TARGET.rglob("*") if file.is_file())
    print(f"{TARGET}: {size / 1000:.0f} kB")
