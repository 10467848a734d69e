"""Prompt Tuning and P-Tuning: peft's reference cases and the installed peft, every architecture, generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import GOLDEN, close
from safetensors.torch import load_file

import lit_peft
from lit_peft import PromptTuningSettings, PTuningSettings

METHODS = ("prompt_tuning", "p_tuning")
CASES = sorted(
    path.parent for path in (GOLDEN / "peft").glob("*/case.json") if json.loads(path.read_text())["method"] in METHODS
)


def fresh(config: dict[str, Any]) -> Any:
    """Our settings with which to train what a folder of peft's describes."""
    common = {name: config[name] for name in ("num_virtual_tokens", "num_transformer_submodules")}
    if config["peft_type"] == "PROMPT_TUNING":
        return PromptTuningSettings(**common)
    return PTuningSettings(**common, **{name: value for name, value in config.items() if name.startswith("encoder_")})


@pytest.mark.skipif(not CASES, reason="no reference cases: set LIT_PEFT_GOLDEN to their folder")
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_reference_case(case: Path, tmp_path: Path) -> None:
    facts = json.loads((case / "case.json").read_text())
    io = load_file(case / "io.safetensors")
    inputs = {name: io[name] for name in io if not name.startswith(("output", "prompt"))}
    model = getattr(transformers, facts["auto_class"]).from_pretrained(case / "base").eval()
    lit_peft.load_adapter(model, case / "adapter").eval()
    with torch.no_grad():
        output = model(**inputs)[facts["output"]]
        close(output, io["output"][:, -output.shape[1] :])
        lit_peft.save_adapter(model, tmp_path / "again")
        assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == {"prompt_embeddings"}
        assert not (tmp_path / "again" / "lit_peft.json").exists()
        close(lit_peft.detach(model)(**inputs)[facts["output"]], io["output_base"])
    lit_peft.attach(model, fresh(json.loads((case / "adapter" / "adapter_config.json").read_text())))
    assert lit_peft.trainable_parameters(model) == facts["trainable"]
