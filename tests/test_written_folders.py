"""The folders that `save_adapter` writes: all that was trained, peft's and AdapterHub's configurations, model cards."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GOLDEN, SEQ2SEQS, batch, close, make, scramble
from safetensors import safe_open

import lit_peft
from lit_peft import (
    AdapterHSettings,
    AdapterPSettings,
    LitPeftError,
    LoRASettings,
    ParallelSettings,
    PrefixTuningSettings,
    PromptTuningSettings,
    PTuningSettings,
    PTuningV2Settings,
)
from lit_peft.methods.attachment import attachment_of

REFERENCES = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no reference cases: set LIT_PEFT_GOLDEN to their folder")
# Settings that differ in a peft folder of ours: a prompt or prefix is stored without the network that computed it,
# modules have their full names, and the initialization and the base's path are not known.
DIFFERENT = {
    "base_model_name_or_path",
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_reparameterization_type",
    "init_weights",
    "modules_to_save",
    "num_attention_heads",
    "prefix_projection",
    "target_modules",
}


HEAD = {"bert": "classifier", "clip": "text_projection"}
BOTTLENECKS = (AdapterHSettings, AdapterPSettings, ParallelSettings)
PREFIXES = (PrefixTuningSettings, PTuningV2Settings)
PROMPTS = (PromptTuningSettings, PTuningSettings)
# Base, settings, and the formats besides the default one that can hold the result; the others must refuse it.
WHOLE: list[tuple[str, Any, str]] = [
    ("bert", LoRASettings(modules_to_save=["classifier"]), "peft adapterhub"),
    ("bert", LoRASettings(bias="all", use_dora=True, target_modules="all-linear", modules_to_save=["pooler"]), "peft"),
    ("opt", LoRASettings(bias="lora_only", init_lora_weights="pissa", r=4), "peft"),
    ("gpt2", LoRASettings(target_modules=["c_attn", "wte"], modules_to_save=["transformer.ln_f.bias"]), "peft"),
    ("clip", LoRASettings(modules_to_save=["text_projection", "logit_scale"]), "peft adapterhub"),
    ("t5", AdapterHSettings(cross_adapter=True, reduction_factor={"0": 4, "default": 8}), "adapterhub"),
    ("opt", AdapterHSettings(train_layer_norms=True), ""),
    ("clip", AdapterHSettings(train_layer_norms=True, placement="llm_adapters", bottleneck_size=4), ""),
    *((base, kind(modules_to_save=[HEAD[base]]), "adapterhub") for kind in BOTTLENECKS for base in HEAD),
    *(("bart", kind(bias=False, modules_to_save=["lm_head"]), "") for kind in BOTTLENECKS),
    *(("bert", kind(modules_to_save=["encoder.layer.1"]), "adapterhub") for kind in BOTTLENECKS),
    *(("bert", kind(positions="adapterhub", modules_to_save=["classifier"]), "peft adapterhub") for kind in PREFIXES),
    *(("bert", kind(modules_to_save=["bert"]), "peft") for kind in PREFIXES),
    *(("llama", kind(modules_to_save=["model.norm.weight", "lm_head"]), "peft") for kind in PREFIXES),
    *(("t5", kind(modules_to_save=["lm_head"]), "") for kind in PREFIXES),
    *(("bart", kind(encoder_prefix=False, positions="adapterhub"), "adapterhub") for kind in PREFIXES),
    *(("t5", kind(cross_prefix=False, positions="adapterhub"), "adapterhub") for kind in PREFIXES),
    *(("clip", kind(modules_to_save=["text_projection"]), "") for kind in PREFIXES),
    *((base, kind(modules_to_save=[HEAD[base]]), "peft") for kind in PROMPTS for base in HEAD),
    *(("t5", kind(num_transformer_submodules=2, modules_to_save=["encoder"]), "peft") for kind in PROMPTS),
    *(("bart", kind(positions="sequence", modules_to_save=["lm_head"]), "peft") for kind in PROMPTS),
]


@cache
def made_clip() -> Any:
    import transformers

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": 61, "max_position_embeddings": 64, "eos_token_id": 2}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


def fresh(base: str) -> Any:
    return copy.deepcopy(made_clip()) if base == "clip" else make(base)


@torch.no_grad()
def output(model: Any, base: str) -> torch.Tensor:
    inputs = batch("bert" if base == "clip" else base)
    if base not in SEQ2SEQS:
        del inputs["labels"]
    if base != "clip":
        return model.eval()(**inputs).logits
    found = model.eval()(**inputs, pixel_values=torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16))
    return torch.cat([found.text_embeds, found.image_embeds, found.logits_per_text / 10], 1)


def trained_of_the_base(model: Any) -> dict[str, torch.Tensor]:
    """The parameters trained in full; a module that is trained in full may contain an adapter."""
    saved = attachment_of(model).saved
    return {name: value for name, value in saved.items() if "_adapter." not in name and "_prefix." not in name}


def test_the_cases_have_every_method() -> None:
    methods = {settings.method for _, settings, _ in WHOLE}
    assert methods == {kind.method for kind in (LoRASettings, *BOTTLENECKS, *PREFIXES, *PROMPTS)}


@pytest.mark.filterwarnings("ignore:modules_to_save")
@pytest.mark.parametrize(
    ("base", "settings", "formats"),
    [pytest.param(*case, id=f"{case[1].method}-{case[0]}-{number}") for number, case in enumerate(WHOLE)],
)
def test_a_folder_has_everything_that_was_trained(base: str, settings: Any, formats: str, tmp_path: Path) -> None:
    model = lit_peft.attach(fresh(base), settings)
    scramble(model)
    expected, trained = output(model, base), trained_of_the_base(model)
    for format in (None, *formats.split()):
        folder = lit_peft.save_adapter(model, tmp_path / f"{format}", format)
        again = lit_peft.load_adapter(fresh(base), folder)
        close(output(again, base), expected)
        found = trained_of_the_base(again)
        assert found.keys() == trained.keys() and all(torch.equal(found[name], trained[name]) for name in found)
        assert attachment_of(again).settings.method == settings.method
    for format in {"peft", "adapterhub"} - set(formats.split()):
        with pytest.raises(LitPeftError, match=r"cannot be written|cannot hold|has no place|changed the base"):
            lit_peft.save_adapter(model, tmp_path / format, format)
        assert not (tmp_path / format).exists()


@pytest.mark.parametrize(
    "settings",
    [LoRASettings(), AdapterPSettings(), PTuningV2Settings(), PromptTuningSettings()],
    ids=lambda settings: settings.method,
)
def test_a_parameter_that_is_trained_outside_of_the_adapter_is_refused(settings: Any, tmp_path: Path) -> None:
    model = lit_peft.attach(make("llama"), settings)
    for name in ("lm_head.weight", "model.layers.1.self_attn.q_proj.base_layer.weight")[: 1 + ("r" in vars(settings))]:
        model.get_parameter(name).requires_grad_(True)
        for format in (None, "peft", "adapterhub"):
            with pytest.raises(LitPeftError, match=f"{name} requires gradients, .* modules_to_save"):
                lit_peft.save_adapter(model, tmp_path / "adapter", format)
        model.get_parameter(name).requires_grad_(False)
    lit_peft.save_adapter(model, tmp_path / "adapter")


def cases(library: str) -> list[Any]:
    return [pytest.param(case.parent, id=case.parent.name) for case in sorted((GOLDEN / library).glob("*/case.json"))]


def loaded(case: Path) -> Any:
    import transformers

    facts = json.loads((case / "case.json").read_text())
    model = getattr(transformers, facts["auto_class"]).from_pretrained(case / "base")
    lit_peft.load_adapter(model, case / "adapter")
    assert attachment_of(model).settings.method == facts["method"]
    return model


def config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return values


@REFERENCES
@pytest.mark.parametrize("case", cases("peft"))
def test_pefts_configurations(case: Path, tmp_path: Path) -> None:
    theirs = config(case / "adapter")
    ours = config(lit_peft.save_adapter(loaded(case), tmp_path / "ours", format="peft"))
    assert set(ours) - set(theirs) <= {"lit_peft"} and not ours.get("prefix_projection")
    for name in set(ours) & set(theirs) - DIFFERENT:
        assert ours[name] == theirs[name], name


@REFERENCES
@pytest.mark.parametrize("case", cases("adapters"))
def test_adapterhubs_configurations(case: Path, tmp_path: Path) -> None:
    theirs = config(case / "adapter")
    folder = lit_peft.save_adapter(loaded(case), tmp_path / "ours", format="adapterhub", name="ref")
    ours = config(folder)
    for part, whole in ((ours["config"], theirs["config"]), (ours, theirs)):
        for name in set(part) - {"config", "lit_peft", "model_name"}:
            assert part[name] == whole[name], name
    assert ours["model_name"] == str(case / "base")
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            assert stored.metadata() == {"format": "pt"}


@pytest.mark.parametrize("base", ["org/model", "/models/base", "pkg:some-base", "three/parts/long", "."])
def test_the_card(base: str, tmp_path: Path) -> None:
    model = make("llama")
    model.name_or_path = base
    lit_peft.attach(model, PromptTuningSettings(num_virtual_tokens=3, tokenizer_name_or_path=None))
    lines = (lit_peft.save_adapter(model, tmp_path / "ours") / "README.md").read_text().splitlines()
    front = lines[1 : lines.index("---", 1)]
    tags = ["library_name: peft", "tags:", "- lit-peft", "- prompt-tuning"]
    assert front == [*(["base_model: org/model"] if base == "org/model" else []), *tags]
    assert f"Trained on `{base}` with `PromptTuningSettings`:" in lines
    assert "| num_virtual_tokens | 3 |" in lines and not any(line.endswith("| None |") for line in lines)
    assert f"{lit_peft.trainable_parameters(model):,} trained parameters in this folder." in lines


def test_a_card_leaves_out_what_is_not_set(tmp_path: Path) -> None:
    model = lit_peft.attach(make("llama"), LoRASettings(target_modules="(a|.*q)_proj"))
    card = (lit_peft.save_adapter(model, tmp_path / "ours") / "README.md").read_text()
    assert r"| target_modules | (a\|.*q)_proj |" in card
    assert "rank_pattern" not in card and "None" not in card


def test_a_head_beside_an_adapterhub_folder(tmp_path: Path) -> None:
    model = lit_peft.attach(make("bert"), AdapterPSettings(modules_to_save=["classifier"]))
    folder = lit_peft.save_adapter(model, tmp_path / "ours", format="adapterhub", name="x")
    with safe_open(folder / "model_head.safetensors", "pt") as stored:
        assert stored.metadata() == {"format": "pt"} and set(stored.keys()) == {"classifier.weight", "classifier.bias"}
    head = json.loads((folder / "head_config.json").read_text())
    assert head["config"] is head["name"] is None and head["model_class"] == "BertForSequenceClassification"
    loaded_model = lit_peft.load_adapter(make("bert"), folder)
    assert set(attachment_of(loaded_model).saved) == {"classifier.weight", "classifier.bias"}


def test_a_tied_head_beside_an_adapterhub_folder(tmp_path: Path) -> None:
    model = lit_peft.attach(make("gpt2"), AdapterPSettings(modules_to_save=["lm_head"]))
    scramble(model)
    folder = lit_peft.save_adapter(model, tmp_path / "ours", format="adapterhub")
    again = lit_peft.load_adapter(make("gpt2"), folder)
    assert torch.equal(again.eval()(**batch("gpt2")).logits, model.eval()(**batch("gpt2")).logits)


def test_a_prefixs_modules_and_parameters(tmp_path: Path) -> None:
    for number, saved in enumerate((["classifier"], ["classifier.weight"], ["bert.pooler", "classifier.bias"])):
        model = lit_peft.attach(make("bert"), PTuningV2Settings(modules_to_save=saved))
        folder = lit_peft.save_adapter(model, tmp_path / str(number), format="peft")
        settings = attachment_of(lit_peft.load_adapter(make("bert"), folder)).settings
        assert settings.modules_to_save == saved and isinstance(settings, PTuningV2Settings)
