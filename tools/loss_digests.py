"""Print a digest of the loss and of every gradient, for each method on each small test model.

Run it before and after a change that must not alter any result, and compare the two outputs:

    python tools/loss_digests.py > before.txt
    python tools/loss_digests.py > after.txt && diff before.txt after.txt

The digests depend on the processor and on torch's version, so compare runs of one machine only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from models import ALL, DECODERS, ENCODERS, batch, make

import lit_peft

SETTINGS: dict[str, Any] = {
    "LoRA": lit_peft.LoRASettings(),
    "LoRA all-linear, dropout": lit_peft.LoRASettings(target_modules="all-linear", lora_dropout=0.1),
    "LoRA DoRA": lit_peft.LoRASettings(use_dora=True, use_rslora=True, bias="all"),
    "LoRA PiSSA": lit_peft.LoRASettings(init_lora_weights="pissa", r=4),
    "LoRA OLoRA": lit_peft.LoRASettings(init_lora_weights="olora", r=4),
    "AdapterH": lit_peft.AdapterHSettings(),
    "AdapterP": lit_peft.AdapterPSettings(),
    "Parallel": lit_peft.ParallelSettings(),
    "PromptTuning": lit_peft.PromptTuningSettings(),
    "PTuning": lit_peft.PTuningSettings(),
    "PrefixTuning": lit_peft.PrefixTuningSettings(),
    "PTuningV2": lit_peft.PTuningV2Settings(),
}
MODULES = (*(name.partition(" ")[0] for name in SETTINGS if " " not in name), "FullFineTuning", "HeadOnly")


def digest(loss: torch.Tensor, model: torch.nn.Module) -> str:
    """Hash a loss and the gradients that its backward pass left, in the parameters' own order."""
    found = hashlib.sha256(loss.detach().numpy().tobytes())
    for _, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            found.update(parameter.grad.contiguous().numpy().tobytes())
    return f"{loss.item():.9g} {found.hexdigest()[:16]}"


def of_models() -> Iterator[str]:
    """One line for each method attached to each architecture."""
    for architecture in ALL:
        for name, settings in SETTINGS.items():
            torch.manual_seed(0)
            try:
                model = lit_peft.attach(make(architecture), settings).train()
            except lit_peft.LitPeftError as problem:
                yield f"{architecture} | {name} | refused: {type(problem).__name__}"
                continue
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:  # away from the start, where many gradients are zero
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            torch.manual_seed(2)
            loss = model(**batch(architecture)).loss
            loss.backward()
            yield f"{architecture} | {name} | {digest(loss, model)}"


def of_modules(folder: Path) -> Iterator[str]:
    """One line for each LightningModule on one model of each kind, through its own training step."""
    tasks = {"llama": "causal_lm", "bert": "sequence_classification", "bart": "seq2seq"}
    for architecture, task in tasks.items():
        base = folder / architecture
        make(architecture).save_pretrained(base)
        for name in MODULES:
            torch.manual_seed(0)
            more = {"num_labels": 2} if architecture in ENCODERS else {}
            module = getattr(lit_peft, name)(base=str(base), task=task, **more)
            module.configure_model()
            inputs = batch(architecture)
            if architecture in DECODERS:
                inputs["labels"] = inputs["labels"].clone()
                inputs["labels"][:, :3] = -100
            torch.manual_seed(2)
            loss = module.training_step(inputs, 0)
            loss.backward()
            yield f"module {architecture} | {name} | {digest(loss, module)}"


def main() -> None:
    """Print all lines."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for line in of_models():
        print(line, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for line in of_modules(Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
