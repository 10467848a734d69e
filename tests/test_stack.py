"""Stacked adapters: equal to AdapterHub's, frozen below, saved apart, and in a run from its settings."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from models import QUIET, close, make, scramble, trained_of
from safetensors.torch import load_file

import lit_peft
from lit_peft import AdapterHSettings, AdapterPSettings, LitPeftError, LoRASettings, ParallelSettings, Stack
from lit_peft.cli import main

CASES = sorted(path.parent for path in (Path(__file__).parent / "golden" / "adapters-stack").glob("*/case.json"))
SEQUENCE = Stack("language", "task")


def reference(case: Path) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model with both adapters, its inputs, and what AdapterHub's library computed."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(case / "base", attn_implementation="eager")
    lit_peft.load_adapter(model, case / "language", name="language", with_head=False)
    lit_peft.load_adapter(model, case / "task", name="task")
    io = load_file(case / "io.safetensors")
    return model.eval(), {name: io[name] for name in ("input_ids", "attention_mask")}, io


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_a_stack_computes_what_adapterhub_computes(case: Path) -> None:
    model, inputs, io = reference(case)
    for name, active in {"stack": SEQUENCE, "language": "language", "task": "task", "base": None}.items():
        lit_peft.set_adapter(model, active)
        with torch.no_grad():
            close(model(**inputs).logits, io[f"logits_{name}"])
    # The other way round is another model.
    lit_peft.set_adapter(model, Stack("task", "language"))
    assert (model(**inputs).logits - io["logits_stack"]).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_gradients_in_a_stack_are_adapterhubs(case: Path) -> None:
    model, inputs, io = reference(case)
    lit_peft.set_adapter(model, SEQUENCE)
    model(**inputs, labels=io["labels"]).loss.backward()
    expected = {name: value for name, value in io.items() if name.startswith("gradient ")}
    found = trained_of(model)
    assert len(found) == len(expected) and not any("below" in name for name in found)

    def place(name: str) -> tuple[str, bool, str, str]:
        (layer,) = (part for part in name.split(".") if part.isdecimal() and f"h.{part}." in name.replace("layer", "h"))
        part = "down" if "down" in name else "up"
        return layer, "attention" in name, part, name.rpartition(".")[2]

    by_place = {place(name.removeprefix("gradient ").replace("adapter_down.0", "down")): value for name, value in expected.items()}
    for name, parameter in found.items():
        assert parameter.grad is not None
        close(parameter.grad, by_place[place(name)])
