"""What holds for every method on every architecture, whatever the settings: hypothesis looks for what does not.

`HYPOTHESIS_PROFILE=thorough python -m pytest tests/test_properties.py` looks further.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from models import ALL, DECODERS, ENCODERS, batch, close, make, scramble
from safetensors.torch import load_file
from torch import nn

import lit_peft
from lit_peft import LitPeftError
from lit_peft.methods.bottleneck import SUBLAYER_SETTINGS
from lit_peft.methods.merging import merge_adapter, unmerge_adapter

settings.register_profile(
    "quick",
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
settings.register_profile(
    "thorough",
    settings.get_profile("quick"),
    max_examples=200,
    derandomize=False,
    phases=[Phase.generate, Phase.shrink],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

FLAG = st.booleans()
LEAVE_OUT = st.sampled_from([(), (0,), (1,)])
BOTTLENECK = {
    "non_linearity": st.sampled_from(["relu", "swish", "gelu", "tanh", None]),
    "scaling": st.sampled_from([None, 1.0, 0.25, "learned", "channel"]),
    "init_weights": st.sampled_from(["mam_adapter", "bert", "houlsby"]),
    "use_gating": FLAG,
    "ln_before": FLAG,
    "ln_after": FLAG,
    "adapter_residual_before_ln": FLAG,
    "original_ln_before": FLAG,
    "original_ln_after": FLAG,
    "residual_before_ln": st.sampled_from([True, False, "post_add"]),
    "mh_adapter": FLAG,
    "leave_out": LEAVE_OUT,
    "bias": st.sampled_from([None, True, False]),
    "placement": st.sampled_from(["paper", "paper", "llm_adapters"]),
    "bottleneck_size": st.integers(1, 9),
}
PREFIX = {
    "num_virtual_tokens": st.integers(1, 5),
    "leave_out": LEAVE_OUT,
    "encoder_prefix": FLAG,
    "cross_prefix": FLAG,
    "positions": st.sampled_from(["mask", "peft", "adapterhub"]),
    "per_query_head": FLAG,
    "prefix_projection": FLAG,
}
PROMPT = {
    "num_virtual_tokens": st.integers(1, 5),
    "positions": st.sampled_from(["mask", "sequence"]),
    "num_transformer_submodules": st.sampled_from([1, 2]),
}
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (
        lit_peft.LoRASettings,
        {
            "r": st.integers(1, 9),
            "lora_alpha": st.sampled_from([1, 4.5, 16]),
            "target_modules": st.sampled_from([None, "all-linear", r".*[01]\..*"]),
            "layers_to_transform": st.sampled_from([None, 0, [1]]),
            "rank_pattern": st.sampled_from([{}, {".*1.*": 3}]),
            "alpha_pattern": st.sampled_from([{}, {".*0.*": 7}]),
            "bias": st.sampled_from(["none", "all", "lora_only"]),
            "use_rslora": FLAG,
            "use_dora": FLAG,
            "init_lora_weights": st.sampled_from(["kaiming", "gaussian", "pissa", "olora"]),
        },
    ),
    "IA3": (
        lit_peft.IA3Settings,
        {
            "target_modules": st.sampled_from([None, "all-linear"]),
            "feedforward_modules": st.sampled_from([None, [], ".*[02468].*"]),
            "layers_to_transform": st.sampled_from([None, 0, [1]]),
        },
    ),
    "AdapterH": (lit_peft.AdapterHSettings, {**BOTTLENECK, "train_layer_norms": FLAG}),
    "AdapterP": (lit_peft.AdapterPSettings, BOTTLENECK),
    "Parallel": (lit_peft.ParallelSettings, BOTTLENECK),
    "PrefixTuning": (lit_peft.PrefixTuningSettings, PREFIX),
    "PTuningV2": (lit_peft.PTuningV2Settings, PREFIX),
    "PromptTuning": (
        lit_peft.PromptTuningSettings,
        {**PROMPT, "prompt_tuning_init": st.sampled_from(["RANDOM", "SAMPLE_VOCAB"])},
    ),
    "PTuning": (
        lit_peft.PTuningSettings,
        {
            **PROMPT,
            "encoder_reparameterization_type": st.sampled_from(["LSTM", "MLP"]),
            "encoder_hidden_size": st.integers(1, 9),
        },
    ),
}
# The names of what each method adds.
ADDED = {
    "LoRA": r"lora_(A|B|magnitude)$",
    "IA3": r"ia3_l$",
    **dict.fromkeys(("AdapterH", "AdapterP", "Parallel"), r"(^|\.)((attention|cross|ffn)_)?adapter\."),
    **dict.fromkeys(("PrefixTuning", "PTuningV2"), r"(^|\.)(self|encoder|cross)_prefix\."),
    **dict.fromkeys(("PromptTuning", "PTuning"), r"^prompt_encoder\."),
}


def logits(model: Any, name: str) -> torch.Tensor:
    inputs = {key: value for key, value in batch(name).items() if key != "labels" or name not in DECODERS | ENCODERS}
    with torch.no_grad():
        out: torch.Tensor = model.eval()(**inputs).logits
    return out


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def shape(model: nn.Module) -> list[Any]:
    """What a model is besides its tensors: attributes, hooks, what is trained."""
    return [
        (path, set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    ] + [(path, parameter.requires_grad) for path, parameter in model.named_parameters(remove_duplicate=False)]


def is_base(model: nn.Module, tensors: dict[str, torch.Tensor], before: list[Any]) -> None:
    now = model.state_dict()
    assert list(now) == list(tensors)
    assert all(torch.equal(now[name], value) for name, value in tensors.items())
    assert shape(model) == before


@pytest.mark.parametrize("method", SETTINGS)
@given(data=st.data())
def test_whatever_the_settings(method: str, data: st.DataObject) -> None:
    kind, fields = SETTINGS[method]
    name = data.draw(st.sampled_from(list(ALL)), label="architecture")
    chosen = data.draw(st.fixed_dictionaries({}, optional=fields), label="settings")
    if chosen.get("placement") == "llm_adapters":
        chosen = {field: value for field, value in chosen.items() if field not in SUBLAYER_SETTINGS}
    if name in ENCODERS and data.draw(FLAG, label="head"):
        chosen["modules_to_save"] = ["classifier"]
    model = make(name)
    tensors, before, expected = snapshot(model), shape(model), logits(model, name)
    torch.manual_seed(0)
    try:
        wanted = kind(**chosen)
        lit_peft.attach(model, wanted)
    except LitPeftError as refusal:
        event(f"refused: {str(refusal)[:60]}")
        is_base(model, tensors, before)
        return

    # What is trained is what the settings declare.
    for path, parameter in model.named_parameters():
        plain = path.replace(".base_layer.", ".")
        declared = (
            re.search(ADDED[method], path) is not None
            or ("modules_to_save" in chosen and re.search(r"(^|\.)classifier\.", path) is not None)
            or (chosen.get("bias") == "all" and method == "LoRA" and path.endswith(".bias"))
            or (chosen.get("bias") == "lora_only" and path.endswith(".base_layer.bias"))
            or (bool(chosen.get("train_layer_norms")) and re.search(r"norm|ln_|layer_?norm", plain, re.I) is not None)
        )
        assert parameter.requires_grad == declared, path

    # A training step moves that and nothing else.
    frozen = {path: value.clone() for path, value in model.named_parameters() if not value.requires_grad}
    model.train()
    model(**batch(name)).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    model.zero_grad()
    assert all(torch.equal(value, frozen[path]) for path, value in model.named_parameters() if path in frozen)
    scramble(model)
    trained = logits(model, name)

    # The state comes back into a model attached afresh.
    again = lit_peft.attach(make(name), wanted)
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(again, name), trained)

    # So does the folder, and saved again, it holds the same.
    with tempfile.TemporaryDirectory() as folder:
        try:
            first = lit_peft.save_adapter(model, Path(folder) / "first")
        except LitPeftError as refusal:
            event(f"not saved: {str(refusal)[:60]}")
        else:
            loaded = lit_peft.load_adapter(make(name), first)
            close(logits(loaded, name), trained)
            second = lit_peft.save_adapter(loaded, Path(folder) / "second")
            (one,), (two,) = (list(found.glob("adapter*.safetensors")) for found in (first, second))
            one, two = load_file(one), load_file(two)
            assert one.keys() == two.keys()
            for key, value in one.items():
                close(two[key], value, 1e-6)

    # Merged, it answers alike; unmerged, it is what it was.
    if method == "LoRA":
        state = snapshot(model)
        try:
            merge_adapter(model)
        except LitPeftError as refusal:
            event(f"not merged: {str(refusal)[:60]}")
        else:
            close(logits(model, name), trained, 1e-4)
            unmerge_adapter(model)
        now = model.state_dict()
        assert all(torch.equal(now[path], value) for path, value in state.items())

    lit_peft.detach(model)
    is_base(model, tensors, before)
    assert torch.equal(logits(model, name), expected)
