"""Prompt Tuning and P-Tuning: peft's reference cases and the installed peft, every architecture, generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import ALL, DECODERS, ENCODERS, GOLDEN, batch, close, make, scramble
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
        close(lit_peft.detach(model)(**inputs)[facts["output"]], io["output_base"])
    lit_peft.attach(model, fresh(json.loads((case / "adapter" / "adapter_config.json").read_text())))
    assert lit_peft.trainable_parameters(model) == facts["trainable"]


def task_of(name: str) -> str:
    return "CAUSAL_LM" if name in DECODERS else "SEQ_CLS" if name in ENCODERS else "SEQ_2_SEQ_LM"


def padded(inputs: dict[str, torch.Tensor], side: str, pad: int, by: int = 3) -> dict[str, torch.Tensor]:
    """The batch with `by` columns of padding, which its first row fills with nothing else."""
    amount = (by, 0) if side == "left" else (0, by)
    fills = {"input_ids": pad, "attention_mask": 0, "labels": -100, "token_type_ids": 0}
    wide = {"input_ids", "attention_mask", "token_type_ids"} | ({"labels"} if inputs["labels"].shape[1:] else set())
    if "decoder" not in str(inputs.keys()) and inputs["labels"].shape != inputs["input_ids"].shape:
        wide -= {"labels"}
    return {
        key: torch.nn.functional.pad(value, amount, value=fills[key]) if key in wide else value
        for key, value in inputs.items()
    }


def pad_of(model: Any) -> int:
    return getattr(model.config, "pad_token_id", None) or 0


def their_config(name: str, method: str, task: str | None = None) -> Any:
    import peft

    config: Any = make(name).config
    dim = make(name).get_input_embeddings().weight.shape[1]
    common = {"task_type": task or task_of(name), "num_virtual_tokens": 5, "token_dim": dim, "num_layers": 2}
    common["num_attention_heads"] = getattr(config, "num_attention_heads", 4)
    if method == "prompt_tuning":
        return peft.PromptTuningConfig(**common)
    return peft.PromptEncoderConfig(
        **common, encoder_hidden_size=6, encoder_reparameterization_type=method.removeprefix("p_tuning ")
    )


KINDS = ("prompt_tuning", "p_tuning LSTM", "p_tuning MLP")


@pytest.mark.parametrize("name", ALL)
def test_reads_what_peft_writes(name: str, tmp_path: Path) -> None:
    import peft

    method = KINDS[list(ALL).index(name) % 3]
    theirs = peft.get_peft_model(make(name), their_config(name, method)).eval()
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    ours = lit_peft.load_adapter(make(name), tmp_path).eval()
    inputs = padded(batch(name), "left" if name in DECODERS else "right", pad_of(theirs))
    with torch.no_grad():
        expected = theirs(**inputs)
        output = ours(**inputs)
        close(output.logits, expected.logits[:, -output.logits.shape[1] :])
        close(output.loss, expected.loss)


@pytest.mark.parametrize("name", ALL)
def test_peft_reads_what_we_write_and_learns_the_same(name: str, tmp_path: Path) -> None:
    import peft

    kind = PromptTuningSettings if list(ALL).index(name) % 2 else PTuningSettings
    head = ["classifier"] if name in ENCODERS else None
    ours = lit_peft.attach(make(name), kind(num_virtual_tokens=5, modules_to_save=head)).eval()
    scramble(ours)
    lit_peft.save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(make(name), str(tmp_path / "a")).eval()
    inputs = batch(name)
    with torch.no_grad():
        expected, output = theirs(**inputs), ours(**inputs)
        close(output.logits, expected.logits[:, -output.logits.shape[1] :])
        close(output.loss, expected.loss)
        again = lit_peft.load_adapter(make(name), tmp_path / "a").eval()
        close(again(**inputs).logits, output.logits)
    prompt = theirs.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    theirs(**inputs).loss.backward()
    again(**inputs).loss.backward()
    close(again.prompt_encoder.embedding.weight.grad, prompt.grad)
