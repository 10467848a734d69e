"""Models that read images, with each method: compared with peft, and with what the same tokens as text would give."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import close, scramble
from vision_models import FAMILIES, batch_of, chats, model_of

import lit_peft
from lit_peft.methods.targets import find_targets
from lit_peft.models.towers import describe_towers, tower_of, towers
from lit_peft.tasks.image_text_to_text import ImageTextToText
from lit_peft.util.errors import LitPeftError

SETTINGS: dict[str, Any] = {
    "LoRA": lit_peft.LoRASettings(r=2),
    "IA3": lit_peft.IA3Settings(),
    "AdapterH": lit_peft.AdapterHSettings(reduction_factor=4),
    "AdapterP": lit_peft.AdapterPSettings(reduction_factor=4),
    "Parallel": lit_peft.ParallelSettings(reduction_factor=4),
    "PrefixTuning": lit_peft.PrefixTuningSettings(num_virtual_tokens=3),
    "PTuningV2": lit_peft.PTuningV2Settings(num_virtual_tokens=3),
    "PTuning": lit_peft.PTuningSettings(num_virtual_tokens=3),
    "PromptTuning": lit_peft.PromptTuningSettings(num_virtual_tokens=3, prompt_tuning_init="RANDOM"),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats(tmp_path_factory.mktemp("chats"))


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", SETTINGS)
def test_a_method_trains_the_language_model_whatever_the_padding(family: str, method: str, file: Path) -> None:
    right, left = batch_of(family, file), batch_of(family, file, padding_side="left")
    base = model_of(family)
    with torch.no_grad():
        before = base(**inputs(right)).logits
    model = lit_peft.attach(base, SETTINGS[method])
    scramble(model)
    model.train()
    model(**right).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {tower_of(name, towers(model)) for name in trained} <= {"language", None}
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained.values())
    model.eval()
    task = ImageTextToText()
    task.prepare(model)
    with torch.no_grad():
        close(task.forward(model, right).loss, task.forward(model, left).loss)
        assert not torch.equal(model(**inputs(right)).logits, before)
        assert torch.equal(lit_peft.detach(model)(**inputs(right)).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_virtual_tokens_that_are_words_are_like_the_words(family: str, file: Path) -> None:
    """Positions on a grid, masks by kind of token and padding: all as if the words stood in the text."""
    words = [7, 8, 9]
    batch = inputs(batch_of(family, file, "predict"))
    width = batch["input_ids"].shape[1]
    longer = {**batch}
    for name, value in (("input_ids", None), ("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name not in batch:
            continue
        rows = []
        for row, mask in zip(batch[name], batch["attention_mask"].bool(), strict=True):
            added = torch.tensor(words if value is None else [value] * 3)
            rows.append(torch.cat([row[~mask], added, row[mask]]))
        longer[name] = torch.stack(rows)
    base = model_of(family)
    model = lit_peft.attach(copy.deepcopy(base), SETTINGS["PromptTuning"]).eval()
    (prompt,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
    unwanted = {"bad_words_ids": [[token] for token in range(260, base.config.get_text_config().vocab_size)]}
    generation: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, **unwanted}
    with torch.no_grad():
        prompt.copy_(base.get_input_embeddings()(torch.tensor(words)))  # Gemma scales its embeddings
        shown = batch["attention_mask"].bool()
        expected = base(**longer).logits[:, 3:]
        close(model(**batch).logits[:, -width:][shown], expected[:, -width:][shown])
        ours, theirs = model.generate(**batch, **generation), base.generate(**longer, **generation)
    assert torch.equal(ours[:, width:], theirs[:, width + 3 :])


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_has_the_loss_and_gradients_of_peft(family: str, file: Path) -> None:
    peft = pytest.importorskip("peft")
    batch = batch_of(family, file)
    ours = lit_peft.attach(model_of(family), lit_peft.LoRASettings(r=2, target_modules="all"))
    scramble(ours)
    names = find_targets(model_of(family), "all")
    theirs = peft.get_peft_model(model_of(family), peft.LoraConfig(r=2, lora_alpha=16, target_modules=names))
    state = {f"base_model.model.{name}.default.weight": value for name, value in ours.named_parameters()}
    missing = theirs.load_state_dict({name: value for name, value in state.items() if ".lora_" in name}, strict=False)
    assert not missing.unexpected_keys and not [name for name in missing.missing_keys if ".lora_" in name]
    losses = [model(**batch).loss for model in (ours, theirs)]
    close(*losses)
    for loss in losses:
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, gradients[f"base_model.model.{name}.default.weight"], 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_named_towers_gets_a_gradient(family: str, file: Path) -> None:
    parts = ["language", "vision"] + (["projector"] if family != "gemma3" else [])
    batch = batch_of(family, file)
    for part in [*parts, parts, "all"]:
        model = lit_peft.attach(model_of(family), lit_peft.LoRASettings(r=2, target_modules=part))
        scramble(model)
        model(**batch).loss.backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        wanted = set(parts) if part == "all" else {part} if isinstance(part, str) else set(part)
        assert {tower_of(name, towers(model)) for name in trained} == wanted
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained.values())
        lit_peft.detach(model)


def test_a_tower_without_linear_layers_is_refused() -> None:
    with pytest.raises(LitPeftError, match="names 'projector', but Gemma3ForConditionalGeneration has no linear"):
        lit_peft.attach(model_of("gemma3"), lit_peft.LoRASettings(target_modules="projector"))


def test_names_can_stand_beside_towers() -> None:
    model = model_of("llava")
    found = find_targets(model, ["projector", "q_proj"])
    assert {tower_of(name, towers(model)) for name in found} == {"projector", "language", "vision"}
    assert {name.rpartition(".")[2] for name in found} == {"linear_1", "linear_2", "q_proj"}


def test_the_towers_are_described() -> None:
    model = lit_peft.attach(model_of("llava"), lit_peft.LoRASettings(r=2, target_modules="projector"))
    count = lit_peft.trainable_parameters(model)
    assert describe_towers(model) == f"projector ({count:,} parameters) trained, language and vision frozen"
    lit_peft.detach(model)
    words = describe_towers(lit_peft.attach(model, lit_peft.LoRASettings(r=2, target_modules="all")))
    assert re.fullmatch(r"language \(\S+ parameters\), vision \(\S+ \w+\) and projector \(\S+ \w+\) trained", words)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [None, "all"])
def test_a_lora_goes_to_peft_and_back_and_merges(family: str, targets: Any, file: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    batch = inputs(batch_of(family, file))
    model = lit_peft.attach(model_of(family), lit_peft.LoRASettings(r=2, target_modules=targets)).eval()
    scramble(model)
    lit_peft.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model_of(family), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = model(**batch).logits
        close(theirs(**batch).logits, expected)
        close(lit_peft.load_adapter(model_of(family), tmp_path / "theirs").eval()(**batch).logits, expected)
        close(lit_peft.merge(model)(**batch).logits, expected, 1e-4)


@pytest.mark.parametrize("method", SETTINGS)
def test_an_adapter_is_saved_and_loaded(method: str, file: Path, tmp_path: Path) -> None:
    batch = inputs(batch_of("qwen2_5_vl", file))
    model = lit_peft.attach(model_of("qwen2_5_vl"), SETTINGS[method]).eval()
    scramble(model)
    lit_peft.save_adapter(model, tmp_path / "adapter")
    loaded = lit_peft.load_adapter(model_of("qwen2_5_vl"), tmp_path / "adapter").eval()
    with torch.no_grad():
        close(loaded(**batch).logits, model(**batch).logits)
