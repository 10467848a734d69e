"""Prefix Tuning and P-Tuning v2: reference cases, peft on every architecture, the paper's formula, folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import ALL, DECODERS, ENCODERS, GOLDEN, SEQ2SEQS, batch, close, make, scramble
from safetensors.torch import load_file

import lit_peft

CASES = sorted(
    path.parent
    for path in GOLDEN.glob("peft/*/case.json")
    if json.loads(path.read_text())["method"] in ("prefix_tuning", "p_tuning_v2")
)
# peft hands its prefix over in a cache, which these do not take.
WITHOUT_PEFT = {"distilbert", "deberta-v2", "modernbert"}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    inputs = batch(name)
    labels = inputs.pop("labels")
    return {**inputs, "decoder_input_ids": labels} if name in SEQ2SEQS else inputs


@pytest.mark.skipif(not CASES, reason="no reference cases: set LIT_PEFT_GOLDEN to their folder")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_reference_case(case: Path, attention: str) -> None:
    facts = json.loads((case / "case.json").read_text())
    io = load_file(case / "io.safetensors")
    inputs = {name: io[name] for name in io if not name.startswith("output")}
    auto = getattr(transformers, facts["auto_class"])
    model = auto.from_pretrained(case / "base", attn_implementation=attention).eval()
    with torch.no_grad():
        base = model(**inputs)[facts["output"]]
    lit_peft.load_adapter(model, case / "adapter").eval()
    with torch.no_grad():
        close(model(**inputs)[facts["output"]], io["output"])
        assert torch.equal(lit_peft.detach(model)(**inputs)[facts["output"]], base)


def peft_model(name: str, **settings: Any) -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    task = "CAUSAL_LM" if name in DECODERS else "SEQ_CLS" if name in ENCODERS else "SEQ_2_SEQ_LM"
    base = make(name)
    if name == "falcon new":
        del base.config.num_key_value_heads  # the table's; Falcon's own name for it is another
    elif name.startswith("falcon"):  # multi-query, which peft does not know
        settings = {"num_attention_heads": 1, "token_dim": 8, **settings}
    if name == "t5" or name == "mt5":
        settings = {"num_layers": 2, **settings}
    torch.manual_seed(3)
    model = get_peft_model(base, PrefixTuningConfig(task_type=task, num_virtual_tokens=4, **settings)).eval()
    scramble(model)
    if name in ENCODERS:
        # peft looks for an argument past_key_values, which transformers still takes, and now shows by another name.
        backbone = base.base_model
        original = backbone.forward

        def forward(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            return original(*args, past_key_values=past_key_values, **kwargs)

        backbone.forward = forward
    return model


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [name for name in ALL if name not in WITHOUT_PEFT])
def test_what_peft_saves_gives_its_logits(name: str, padded: bool, tmp_path: Path) -> None:
    theirs = peft_model(name, prefix_projection=padded, encoder_hidden_size=12)
    theirs.save_pretrained(str(tmp_path))
    ours = lit_peft.load_adapter(make(name), tmp_path).eval()
    inputs = inputs_of(name)
    if padded:
        inputs["attention_mask"][0, :3] = 0
        inputs["attention_mask"][1, 5:] = name in DECODERS
    with torch.no_grad():
        close(ours(**inputs).logits, theirs(**inputs).logits)
        assert (ours(**inputs).logits - make(name)(**inputs).logits).abs().max() > 1e-3
