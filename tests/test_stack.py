"""Stacked adapters: equal to AdapterHub's, frozen below, saved apart, and in a run from its settings."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from masked_base import save_base
from models import ALL, batch, checkpointing_changes_nothing, close, make, scramble, trained_of
from safetensors.torch import load_file

import lit_peft
from lit_peft import AdapterHSettings, AdapterPSettings, LitPeftError, LoRASettings, ParallelSettings, Stack
from lit_peft.cli import main
from lit_peft.formats.adapterhub_bottleneck import tensors
from lit_peft.methods.attachment import attachment_of

CASES = sorted(path.parent for path in (Path(__file__).parent / "golden" / "adapters-stack").glob("*/case.json"))
SEQUENCE = Stack("language", "task")


def reference(case: Path) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model with both adapters, its inputs, and what AdapterHub's library computed."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(case / "base", attn_implementation="eager")
    lit_peft.load_adapter(model, case / "language", name="language", with_head=False)
    lit_peft.load_adapter(model, case / "task", name="task")
    io = load_file(case / "io.safetensors")
    return model.eval(), {name: io[name] for name in ("input_ids", "attention_mask")}, io


def stacked(name: str, lower: Any = None, upper: Any = None, scrambled: tuple[str, ...] = ("language", "task")) -> Any:
    """A model of an architecture with two adapters, away from their start, in a stack."""
    model = make(name)
    for adapter, settings in (("language", lower), ("task", upper)):
        lit_peft.add_adapter(model, adapter, settings or AdapterPSettings(reduction_factor=4))
        if adapter in scrambled:
            scramble(model)
    return lit_peft.set_adapter(model, SEQUENCE)


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch(name)).logits
    return found


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
    found = tensors(attachment_of(model), "task")
    expected = {name.removeprefix("gradient "): value for name, value in io.items() if name.startswith("gradient ")}
    assert expected and {id(found[name]) for name in expected} == {id(p) for p in trained_of(model).values()}
    for name, gradient in expected.items():
        assert found[name].grad is not None
        close(found[name].grad, gradient)


@pytest.mark.parametrize("kinds", ["H on P", "Parallel on P", "P on Parallel"])
@pytest.mark.parametrize("name", ALL)
def test_an_adapter_that_does_nothing_leaves_the_other_one(name: str, kinds: str) -> None:
    settings: dict[str, Any] = {
        "H": AdapterHSettings(reduction_factor=4),
        "P": AdapterPSettings(reduction_factor=4),
        "Parallel": ParallelSettings(),
    }
    upper, lower = (settings[kind] for kind in kinds.split(" on "))
    base = logits(make(name), name)
    for alone in ("language", "task"):
        # An adapter begins with an output of zero.
        model = stacked(name, lower, upper, scrambled=(alone,))
        together = logits(model, name)
        lit_peft.set_adapter(model, alone)
        close(together, logits(model, name))
        assert not torch.equal(together, base)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_leaving_a_stack_leaves_nothing(name: str) -> None:
    base = make(name)
    before = logits(base, name)
    model = stacked(name)
    inside = logits(model, name)
    assert lit_peft.active_adapter(model) == SEQUENCE and lit_peft.adapter_names(model) == ["language", "task"]
    assert any("below" in path for path, _ in model.named_parameters())
    with lit_peft.disable_adapter(model):
        assert torch.equal(logits(model, name), before)
        assert [path for path, _ in model.named_modules()] == [path for path, _ in base.named_modules()]
    assert torch.equal(logits(model, name), inside)
    lit_peft.set_adapter(model, "language")
    assert not any("below" in path for path, _ in model.named_parameters())
    lit_peft.set_adapter(model, SEQUENCE)
    lit_peft.detach(model)
    assert torch.equal(logits(model, name), before)
    assert lit_peft.active_adapter(model) is None and lit_peft.adapter_names(model) == ["language"]
    assert [path for path, _ in model.named_modules()] == [path for path, _ in base.named_modules()]


def test_the_lower_adapter_is_frozen_as_long_as_the_stack_is_active() -> None:
    model = stacked("bert", AdapterHSettings(reduction_factor=4, train_layer_norms=True))
    lower = {path: value.clone() for path, value in model.named_parameters() if not value.requires_grad}
    assert sum("below" in path for path in lower) == 16
    assert all(".ffn_adapter." in path for path in trained_of(model))
    optimizer = torch.optim.SGD(trained_of(model).values(), lr=0.1)
    model.train()
    model(**batch("bert")).loss.backward()
    optimizer.step()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[path], value) and now[path].grad is None for path, value in lower.items())
    lit_peft.set_adapter(model, "language")
    trained = trained_of(model)
    assert sum("_adapter." in path for path in trained) == 16 and sum("LayerNorm" in path for path in trained) > 8


def test_three_adapters_and_any_order() -> None:
    model = stacked("bert")
    lit_peft.add_adapter(model, "third", AdapterHSettings(reduction_factor=8))
    scramble(model)
    found = {}
    for names in (("language", "task", "third"), ("third", "task", "language"), ("language", "third")):
        lit_peft.set_adapter(model, Stack(*names))
        found[names] = logits(model, "bert")
        assert {path.split("_below_")[1][0] for path, _ in model.named_parameters() if "_below_" in path} == set(
            map(str, range(len(names) - 1))
        )
    values = list(found.values())
    assert not torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    lit_peft.set_adapter(model, Stack("language", "task", "third"))
    assert torch.equal(logits(model, "bert"), values[0])


def test_a_copy_of_a_stacked_model_is_its_own() -> None:
    model = stacked("bert")
    before = logits(model, "bert")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, "bert"), before)
        lit_peft.set_adapter(twin, "task")
        scramble(twin)
        lit_peft.set_adapter(twin, SEQUENCE)
        assert not torch.equal(logits(twin, "bert"), before)
        assert torch.equal(logits(model, "bert"), before)


def test_stacked_adapters_follow_the_base() -> None:
    model = stacked("bert")
    before = logits(model, "bert")
    lit_peft.set_adapter(model, None)
    model.to(torch.float64)
    lit_peft.set_adapter(model, SEQUENCE)
    close(logits(model, "bert").float(), before)
    model.to(torch.bfloat16)
    assert (logits(model, "bert").float() - before).abs().max() < 0.1


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_checkpointing_changes_nothing_in_a_stack(name: str) -> None:
    checkpointing_changes_nothing(stacked(name), batch(name))


def test_each_adapter_is_saved_and_loaded_apart(tmp_path: Path) -> None:
    model = stacked("bert", AdapterHSettings(reduction_factor=4))
    together = logits(model, "bert")
    lit_peft.save_adapter(model, tmp_path / "task")
    with lit_peft.use_adapter(model, "language"):
        lit_peft.save_adapter(model, tmp_path / "language")
    assert not any("below" in name for name in load_file(tmp_path / "task" / "adapter.safetensors"))
    assert json.loads((tmp_path / "task" / "lit_peft.json").read_text())["stacked_on"] == ["language"]
    assert "stacked on `language`" in (tmp_path / "task" / "README.md").read_text()
    assert "stacked_on" not in (tmp_path / "language" / "lit_peft.json").read_text()
    fresh = make("bert")
    for name in ("language", "task"):
        lit_peft.load_adapter(fresh, tmp_path / name, name=name)
    assert torch.equal(logits(lit_peft.set_adapter(fresh, SEQUENCE), "bert"), together)
    with pytest.warns(UserWarning, match=r"was trained stacked on \['language'\], which this model does not have"):
        lit_peft.load_adapter(make("bert"), tmp_path / "task")


def test_adapterdrop_drops_all_adapters_of_a_layer() -> None:
    model = stacked("bert")
    before = logits(model, "bert")
    assert torch.equal(logits(lit_peft.drop_adapters(model, 2), "bert"), logits(make("bert"), "bert"))
    assert torch.equal(logits(lit_peft.drop_adapters(model, 0), "bert"), before)


def test_what_cannot_be_stacked_is_refused() -> None:
    model = stacked("bert")
    before = logits(model, "bert")
    with pytest.raises(LitPeftError, match="two or more different adapters"):
        Stack("task")
    with pytest.raises(LitPeftError, match="two or more different adapters"):
        Stack("task", "task")
    with pytest.raises(LitPeftError, match="no adapter 'tsak'"):
        lit_peft.set_adapter(model, Stack("language", "tsak"))
    with pytest.raises(LitPeftError, match="weight update"):
        lit_peft.merge(model)
    with pytest.raises(LitPeftError, match="nothing to merge"):
        lit_peft.merge_adapter(model)
    with pytest.raises(LitPeftError, match="the name of one adapter"), lit_peft.row_adapters(model, [SEQUENCE, None]):  # type: ignore[list-item]
        pass
    assert lit_peft.active_adapter(model) == SEQUENCE and torch.equal(logits(model, "bert"), before)
    lit_peft.add_adapter(model, "lora", LoRASettings())
    lit_peft.add_adapter(model, "last", AdapterPSettings(original_ln_after=False))
    lit_peft.add_adapter(model, "tokens", AdapterPSettings(trainable_token_indices=[3]))
    for stack, problem in {
        Stack("language", "lora"): "'lora' \\(lora\\) cannot be in a stack",
        Stack("last", "task"): "original_ln_after=False",
        Stack("tokens", "task"): "has tokens of its own",
    }.items():
        with pytest.raises(LitPeftError, match=problem):
            lit_peft.set_adapter(model, stack)
        assert lit_peft.active_adapter(model) == "tokens"
    logits(lit_peft.set_adapter(model, Stack("task", "last")), "bert")


def test_deleting_an_adapter_of_the_stack_ends_it() -> None:
    model = stacked("bert")
    lit_peft.delete_adapter(model, "language")
    assert lit_peft.active_adapter(model) is None and lit_peft.adapter_names(model) == ["task"]
    assert torch.equal(logits(model, "bert"), logits(make("bert"), "bert"))


def test_a_folder_without_its_head(tmp_path: Path) -> None:
    """The adapter of a masked LM goes into a classifier, which has no such head."""
    module = lit_peft.AdapterH(base=str(save_base(tmp_path / "base", with_head=False)), task="masked_lm")
    module.configure_model()
    module.save_adapter(tmp_path / "language")
    assert (tmp_path / "language" / "model_head.safetensors").exists()
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    with pytest.raises(LitPeftError, match="'cls"):
        lit_peft.load_adapter(classifier, tmp_path / "language", check_base=False)
    other = transformers.AutoModelForSequenceClassification.from_config(classifier.config)
    with pytest.raises(LitPeftError, match="its weights have other values"):
        lit_peft.load_adapter(other, tmp_path / "language", with_head=False)
    lit_peft.load_adapter(classifier, tmp_path / "language", name="language", with_head=False)
    assert all("_adapter." in name for name in trained_of(classifier))
    lora = lit_peft.attach(make("bert"), LoRASettings())
    lit_peft.save_adapter(lora, tmp_path / "lora")
    with pytest.raises(LitPeftError, match="with_head=False needs a folder in AdapterHub's format"):
        lit_peft.load_adapter(make("bert"), tmp_path / "lora", with_head=False)


# ------------------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and the adapters of two languages."""
    folder = tmp_path_factory.mktemp("stack")
    save_base(folder / "base")
    for seed, language in enumerate(("english", "german")):
        torch.manual_seed(seed)
        module = lit_peft.AdapterH(base=str(folder / "base"), task="masked_lm", reduction_factor=4)
        module.configure_model()
        with torch.no_grad():
            for parameter in trained_of(module.model).values():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        module.save_adapter(folder / language)
    return folder


def module_on(folders: Path, **settings: Any) -> Any:
    module = lit_peft.AdapterP(
        base=str(folders / "base"), task="sequence_classification", labels=["neg", "pos"], **settings
    )
    module.configure_model()
    return module


def test_a_module_is_stacked_by_its_setting(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = module_on(folders, stack=str(folders / "english"))
    assert "on" in capsys.readouterr().out
    assert lit_peft.active_adapter(module.model) == Stack("english", "default")
    inputs = {"input_ids": torch.tensor([[2, 9, 8, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folders / "base", num_labels=2)
    model.classifier.load_state_dict(module.model.classifier.state_dict())
    model.bert.pooler.load_state_dict(module.model.bert.pooler.state_dict())
    lit_peft.load_adapter(model, folders / "english", with_head=False).eval()
    module.eval()
    with torch.no_grad():  # the new adapter does nothing yet
        close(module(**inputs).logits, model(**inputs).logits)
    state = module.state_dict()
    assert state and not any("below" in name for name in state)
    twice = module_on(folders, stack=[str(folders / "english"), str(folders / "german")])
    assert lit_peft.active_adapter(twice.model) == Stack("english", "german", "default")
    with twice.disable_adapter():
        assert lit_peft.active_adapter(twice.model) is None


def test_a_method_that_cannot_be_stacked_is_refused_before_anything_is_loaded(folders: Path) -> None:
    module = lit_peft.LoRA(base=str(folders / "base"), task="sequence_classification", stack=str(folders / "english"))
    with pytest.raises(LitPeftError, match="an adapter of LoRA cannot be stacked on another one"):
        module.check()
    with pytest.raises(LitPeftError, match=r"nowhere has no adapter_config\.json"):
        module_on(folders, stack="nowhere")


def write_config(folder: Path, folders: Path, reviews: Path, **trainer: Any) -> str:
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "AdapterP",
            "init_args": {
                "base": str(folders / "base"),
                "task": "sequence_classification",
                "stack": str(folders / "english"),
                "learning_rate": 1e-2,
                "dropout": 0.1,
                "lr_scheduler": "constant",
                "warmup_steps": 0,
            },
        },
        "data": {
            "class_path": "TextClassificationData",
            "init_args": {"train": str(reviews), "test_fraction": 0.2, "batch_size": 16, "max_length": 16},
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, **trainer},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "config.yaml")


def test_a_run_on_a_stack_resumes_is_tested_and_exported(
    folders: Path,
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    config = write_config(tmp_path, folders, reviews)
    whole, half = (["--trainer.default_root_dir", name] for name in ("whole", "half"))
    assert main(["fit", "--config", config, *whole]) == 0
    printed = capsys.readouterr().out
    assert f"stack:     on {folders / 'english'}, frozen (" in printed and "without its head" in printed
    run = tmp_path / "whole" / "version_0"
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert not any("below" in name for name in state["state_dict"])

    # Stopped after one epoch and resumed: the same, bit for bit.
    assert main(["fit", "--config", config, *half, "--trainer.max_epochs", "1"]) == 0
    stopped = tmp_path / "half" / "version_0" / "checkpoints" / "last.ckpt"
    before = str(shutil.copy(stopped, tmp_path / "stopped.ckpt"))
    assert main(["fit", "--config", config, *half, "--ckpt_path", before]) == 0
    (resumed,) = (path for path in (tmp_path / "half").glob("version_*/checkpoints/last.ckpt") if path != stopped)
    again = torch.load(resumed, weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in state["state_dict"].items())

    # Another language under the same task: to test, but not to train further.
    other = ["--model.stack", str(folders / "german")]
    capsys.readouterr()
    assert main(["test", "--config", config, *whole, "--ckpt_path", checkpoint, *other]) == 0
    assert "stack:     trained on english, and used on german now" in capsys.readouterr().out
    assert main(["fit", "--config", config, *half, "--ckpt_path", before, *other]) == 2
    assert (
        "was trained on a stack of other adapters: on english, and model.stack gives german" in capsys.readouterr().err
    )
    assert main(["test", "--config", config, *whole, "--ckpt_path", checkpoint, "--model.stack", "null"]) == 2
    assert "model.stack gives nothing now" in capsys.readouterr().err

    # The adapter's folder is the task's alone, from the run as from the checkpoint.
    assert main(["export", "--ckpt_path", checkpoint, "--output", "exported"]) == 0
    assert "stacked on: english" in capsys.readouterr().out
    for folder in (run / "adapter", tmp_path / "exported"):
        assert json.loads((folder / "lit_peft.json").read_text())["stacked_on"] == ["english"]
        names = load_file(folder / "adapter.safetensors")
        assert names and all(".adapters.default." in name for name in names)
    assert main(["info", "exported"]) == 0
    assert re.search(r"stacked on: +\['english'\]", capsys.readouterr().out)
    loaded = lit_peft.BaseLM.load_from_checkpoint(checkpoint)
    assert lit_peft.active_adapter(loaded.model) == Stack("english", "default")
    loaded.load_adapter(folders / "german", "german", with_head=False)
    loaded.set_adapter(Stack("german", "default"))
