"""The task `preference` in modules and runs: every method, the reference, precomputing, resuming, from YAML."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import WORDS
from models import METHODS, checkpointing, make, scramble
from test_preference import adapted, labelled_batch, pair_batch
from torch import Tensor

import lit_peft
from lit_peft import LitPeftError, LoRASettings
from lit_peft.cli import main
from lit_peft.data import PreferenceData
from lit_peft.nn.cross_entropy import head_cross_entropy, head_log_probs
from lit_peft.strategies import ShardedStrategy
from lit_peft.tasks import find_task

SETTINGS: dict[str, dict[str, Any]] = {
    **METHODS,
    "LoRA": {"r": 4, "target_modules": "all-linear"},
    "LoRA on the head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "LoRA with a trained head": {"r": 4, "modules_to_save": ["lm_head"], "lora_dropout": 0.2},
    "LoRA from PiSSA": {"r": 4, "init_lora_weights": "pissa", "target_modules": ["q_proj"]},
    "HeadOnly": {},
}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Counted:
    """What was seen, in order."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def add(self, value: Any) -> None:
        self.found.append(value)

    def keep(self, tensor: Tensor) -> Tensor:
        self.found.append(tensor)
        return tensor


def small(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch for the vocabulary of the fixture `decoder`."""
    return {name: value if value.dtype == torch.bool else value.clamp(max=39) for name, value in batch.items()}


def written(folder: Path, count: int = 24) -> str:
    file = folder / "pairs.jsonl"
    rows = [
        {"prompt": f"the {WORDS[i % 18]} {WORDS[i // 18]}", "chosen": f"great {WORDS[i % 5]}", "rejected": "bad it is"}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def plain_log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The log-probability of each label from all logits; 0 where there is none."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    found = logits.gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
    return torch.nn.functional.pad(torch.where(targets != -100, found, 0.0), (1, 0))


# -------------------------------------------------------------------------------------- the head, row by row


@pytest.mark.parametrize("finish", [(1.0, None), (0.5, 3.0)])
def test_log_probabilities_of_rows_and_their_gradients(finish: tuple[float, float | None]) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(600, 8, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(11, 8, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    targets, factors = torch.randint(11, (600,)), torch.randn(600, dtype=torch.float64)
    logits = (hidden @ weight.T + bias) * finish[0]
    logits = logits if finish[1] is None else finish[1] * torch.tanh(logits / finish[1])
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    found = head_log_probs(hidden, weight, targets, bias, *finish)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad((found * factors).sum(), hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * factors).sum(), hidden)[0])
    torch.testing.assert_close(head_cross_entropy(hidden, weight, targets, bias, *finish), -expected.sum())
    few = hidden.detach()[:4].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda h: head_log_probs(h, weight, targets[:4], bias, *finish), few)
    assert torch.autograd.gradcheck(lambda h: head_log_probs(h, weight, targets[:4], bias, *finish), few)


def test_no_logits_of_all_tokens_are_kept_and_the_head_computes_only_answers() -> None:
    batch, vocabulary = pair_batch(), 61
    answers = int((batch["labels"] != -100).sum())
    for loss_type, forwards in {"sigmoid": 2, "simpo": 1}.items():
        model, task = adapted(), find_task("preference", {"loss_type": loss_type})
        task.prepare(model)
        with task.loss_only(model):
            task.forward(model, batch)  # finds out how the head ends
        calls, head_rows, saved = Counted(), Counted(), Counted()
        model.model.register_forward_hook(lambda _, args, out, seen=calls: seen.add(1))
        model.lm_head.register_forward_hook(lambda _, args, out, seen=head_rows: seen.add(out[..., 0].numel()))

        with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor), task.loss_only(model):
            output = task.forward(model, batch)
        assert len(calls.found) == forwards and head_rows.found == [1] * forwards
        frozen = {parameter.data_ptr() for parameter in model.parameters()}
        large = [t.shape for t in saved.found if t.shape[-1:] == (vocabulary,) and t.data_ptr() not in frozen]
        assert not large
        # Of the head, one gradient for each token of an answer is kept.
        assert any(tensor.shape == (answers, 32) for tensor in saved.found)
        output.loss.backward()


def test_a_step_keeps_no_more_than_one_of_supervised_tuning() -> None:
    batch, kept = pair_batch(), {}
    for name in ("causal_lm", "preference"):
        model, task = adapted(), find_task(name)
        task.prepare(model)
        for _ in range(2):
            saved = Counted()
            with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor), task.loss_only(model):
                task.loss(task.forward(model, batch), batch)
        storages = [tensor.untyped_storage() for tensor in saved.found]
        kept[name] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    assert kept["preference"] <= 1.05 * kept["causal_lm"]


# ------------------------------------------------------------------------------------------------ every method


@pytest.mark.parametrize("name", SETTINGS)
def test_the_reference_of_every_method_is_the_base(name: str, decoder: Path) -> None:
    from transformers import AutoModelForCausalLM

    batch = small(pair_batch())
    base = AutoModelForCausalLM.from_pretrained(decoder).eval()
    expected = plain_log_probs(base, batch)
    module = getattr(lit_peft, name.split()[0])(base=str(decoder), task="preference", **SETTINGS[name])
    module.configure_model()
    module.train()
    scramble(module.model)
    trained = {key: value.clone() for key, value in module.state_dict().items()}
    for _ in range(2):
        with module.task.loss_only(module.model):
            output = module(**batch)
        torch.testing.assert_close(output.ref_log_probs, expected, rtol=1e-4, atol=1e-5)
    assert bool(((output.log_probs - output.ref_log_probs).abs() > 1e-3).any())
    output.loss.backward()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    assert all(torch.equal(value, trained[key]) for key, value in module.state_dict().items())
    assert all(part.training for part in module.model.modules())
    module.eval()
    with torch.no_grad():
        again = module(**batch)
        evaluated = plain_log_probs(module.model, batch) if "irtual" not in str(SETTINGS[name]) else again.log_probs
    torch.testing.assert_close(again.log_probs, evaluated, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_and_padding_on_the_left_change_nothing() -> None:
    task = find_task("preference")
    model, batch = adapted(), pair_batch()
    task.prepare(model)
    whole = task.forward(model, batch)
    lengths = batch["attention_mask"].sum(1)
    moved = {
        name: torch.stack([row.roll(row.numel() - int(length)) for row, length in zip(value, lengths, strict=True)])
        for name, value in batch.items()
    }
    torch.testing.assert_close(task.forward(model, moved).loss, whole.loss, rtol=1e-5, atol=1e-6)
    checkpointing(model, True)
    torch.testing.assert_close(task.forward(model, batch).loss, whole.loss, rtol=1e-5, atol=1e-6)


def test_half_precision_is_close() -> None:
    task, batch = find_task("preference"), pair_batch()
    model = adapted()
    task.prepare(model)
    exact = float(task.forward(model, batch).loss.detach())
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            model.zero_grad()
            with task.loss_only(model):
                output = task.forward(model, batch)
            output.loss.backward()
            assert output.loss.dtype == torch.float32 and float(output.loss.detach()) == pytest.approx(exact, abs=0.05)
            assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_an_encoder_decoder() -> None:
    model = lit_peft.attach(make("t5"), LoRASettings(r=4, target_modules=["q", "v"])).train()
    scramble(model)
    torch.manual_seed(3)
    ids, labels = torch.randint(3, 61, (4, 6)), torch.randint(3, 61, (4, 5))
    labels[1, 3:] = labels[2, 4:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    task = find_task("preference", {"beta": 0.3})
    task.prepare(model)
    with task.loss_only(model):
        output = task.forward(model, batch)

    def sums(model: Any) -> Tensor:
        logits = model(**batch).logits.log_softmax(-1)
        found = logits.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
        sums: Tensor = torch.where(labels != -100, found, 0.0).sum(1)
        return sums

    base = make("t5").eval()
    with torch.no_grad():
        ratios = sums(copy.deepcopy(model).eval()) - sums(base)
    model.eval()
    expected = -torch.nn.functional.logsigmoid(0.3 * (ratios[:2] - ratios[2:])).mean()
    torch.testing.assert_close(task.forward(model, batch).loss, expected, rtol=1e-5, atol=1e-6)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(LitPeftError, match="sft_on_prompt is set, but the decoder"):
        find_task("preference", {"loss_type": "orpo", "sft_on_prompt": True}).forward(model, batch)


# ------------------------------------------------------------------------------------------- settings and errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type='dpo' is not known"),
        ({"beta": 0.0}, "beta=0.0: give a positive number"),
        (
            {"loss_type": "robust", "label_smoothing": 0.5},
            "label_smoothing=0.5: give a number of at least 0 and below 0.5",
        ),
        ({"loss_type": "exo_pair"}, "exo_pair needs it above 0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect with loss_type='hinge'"),
        ({"simpo_gamma": 1.0}, "simpo_gamma=1.0 has no effect with loss_type='sigmoid'"),
        ({"loss_type": "kto", "rpo_alpha": 1.0}, "rpo_alpha=1.0 has no effect with loss_type='kto'"),
        ({"loss_type": "kto", "desirable_weight": -1.0}, "desirable_weight=-1.0: give a number of at least 0"),
        ({"loss_type": "orpo", "precompute_reference": True}, "loss_type='orpo' has no reference"),
        ({"gamma": 1.0}, "task_args has 'gamma', which task='preference' does not have"),
        ({"beta": "large"}, "beta"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LitPeftError, match=message):
        find_task("preference", settings)


def test_full_fine_tuning_needs_a_reference_from_before(decoder: Path) -> None:
    common = {"base": str(decoder), "task": "preference"}
    with pytest.raises(LitPeftError, match="compares the model with the base, which FullFineTuning changes"):
        lit_peft.FullFineTuning(**common)
    for settings in ({"loss_type": "simpo"}, {"loss_type": "orpo"}):
        module = lit_peft.FullFineTuning(**common, task_args=settings)
        module.configure_model()
        module.training_step(small(pair_batch()), 0).backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
    module = lit_peft.FullFineTuning(**common, task_args={"precompute_reference": True})
    module.configure_model()
    with pytest.raises(LitPeftError, match="the batch has no keys"):
        module.training_step(small(pair_batch()), 0)


def test_the_rows_must_suit_the_loss(decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(LitPeftError, match=r"needs single answers with a label, .* data.unpair: true"):
        find_task("preference", {"loss_type": "kto"}).forward(adapted(), pair_batch())
    with pytest.raises(LitPeftError, match="needs pairs of a chosen and a rejected answer"):
        find_task("preference").forward(adapted(), labelled_batch())
    data = PreferenceData(base=str(decoder), train=written(tmp_path), max_length=16)
    module = lit_peft.LoRA(base=str(decoder), task="preference", task_args={"loss_type": "kto"})
    with pytest.raises(LitPeftError, match=r"data.unpair: true"):
        pl.Trainer(max_steps=1, **QUIET).fit(module, data)


def test_a_metric_of_no_number_is_no_number() -> None:
    task, batch = find_task("preference"), pair_batch()
    model = adapted()
    task.prepare(model)
    output = task.forward(model, batch)
    output.rewards[1] = float("nan")
    metrics = task.metrics(None)
    task.update(metrics, output, batch)
    assert all(metrics[name].compute().isnan() for name in ("accuracy", "margin", "rewards_chosen"))


# ------------------------------------------------------------------------------------------------------- runs


def fit(
    decoder: Path, file: str, folder: Path, resume: str | None = None, **settings: Any
) -> tuple[Any, dict[str, float]]:
    method, epochs = settings.pop("method", "LoRA"), settings.pop("epochs", 2)
    data_settings = settings.pop("data", {})
    pl.seed_everything(0)
    module = getattr(lit_peft, method)(base=str(decoder), task="preference", learning_rate=1e-2, **settings)
    data = PreferenceData(
        base=str(decoder), train=file, max_length=16, batch_size=4, validation_fraction=0.25, **data_settings
    )
    quiet = {**QUIET, "enable_checkpointing": True, "default_root_dir": folder, "max_epochs": epochs}
    trainer = pl.Trainer(num_sanity_val_steps=0, **quiet)
    trainer.fit(module, data, ckpt_path=resume)
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pairs", "kto", "AdapterH", "PromptTuning"])
def test_precomputing_the_reference_changes_nothing(
    kind: str, decoder: Path, tmp_path: Path, new_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task_args: dict[str, Any] = {"loss_type": "kto"} if kind == "kto" else {"beta": 0.5}
    settings: dict[str, Any] = {"data": {"unpair": kind == "kto"}}
    settings["method"] = "LoRA" if kind in ("pairs", "kto") else kind
    settings.update(SETTINGS.get(kind, {}))
    file = written(tmp_path)
    once, expected = fit(decoder, file, tmp_path, task_args=task_args, **copy.deepcopy(settings))
    for said in ("are kept in", "are read from"):
        again, found = fit(
            decoder, file, tmp_path, task_args={**task_args, "precompute_reference": True}, **copy.deepcopy(settings)
        )
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert capsys.readouterr().out.count(said) == 2
        for name, value in once.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert len(list((new_cache / "reference").glob("*.safetensors"))) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pairs", "kto", "orpo", "precomputed"])
def test_joined_answers_give_the_same_run(kind: str, decoder: Path, tmp_path: Path, new_cache: Path) -> None:
    task_args: dict[str, Any] = {
        "pairs": {"loss_type": "sigmoid"},
        "kto": {"loss_type": "kto"},
        "orpo": {"loss_type": "orpo", "sft_on_prompt": True},
        "precomputed": {"precompute_reference": True},
    }[kind]
    file, runs = written(tmp_path), []
    for padding_free in (False, True):
        data = {"unpair": kind == "kto", "padding_free": padding_free, "pad_to_multiple_of": 8}
        runs.append(fit(decoder, file, tmp_path, task_args=dict(task_args), data=data))
    (padded, expected), (joined, found) = runs
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name, value in padded.state_dict().items():
        torch.testing.assert_close(joined.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_joined_answers_are_fewer_rows_without_padding(decoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": WORDS[i], "chosen": "great " * (1 + 10 * (i == 0)), "rejected": "bad"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"max_length": 24, "batch_size": 8, "validation_fraction": 0.0, "padding_free": True}
    data = PreferenceData(base=str(decoder), train=str(file), **settings)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    tokens = int(batch["attention_mask"].sum())
    assert batch["packed_index"].numel() < 0.6 * batch["input_ids"].numel()
    assert int((batch["packed_index"] >= 0).sum()) == tokens
    assert (batch["packed_positions"] == 0).sum() >= 16
    model, task, seen = adapted(), find_task("preference"), Counted()
    task.prepare(model)
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.add(out[..., 0].numel()))
    task.forward(model, batch)
    assert seen.found[-2:] == [batch["packed_index"].numel()] * 2


def test_answers_are_not_joined_where_they_cannot_be(decoder: Path, tmp_path: Path) -> None:
    file = written(tmp_path)
    with pytest.raises(LitPeftError, match=r"data.padding_free is set, but the virtual tokens of prompt_tuning"):
        fit(decoder, file, tmp_path, method="PromptTuning", data={"padding_free": True})
    make("t5").save_pretrained(tmp_path / "t5")
    data = PreferenceData(base=str(tmp_path / "t5"), train=file, max_length=16, padding_free=True)
    with pytest.raises(LitPeftError, match=r"data.padding_free is set, but .*t5' is an encoder-decoder"):
        data.collator("train")


@pytest.mark.filterwarnings("ignore")
def test_full_fine_tuning_with_the_base_loaded_for_the_reference(
    decoder: Path, tmp_path: Path, new_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"method": "FullFineTuning", "task_args": {"precompute_reference": True}}
    _, found = fit(decoder, written(tmp_path), tmp_path, epochs=1, **copy.deepcopy(settings))
    assert found["val_kl"] > 0 and "the base is loaded once more" in capsys.readouterr().out
    # A run that is resumed has trained weights, and still compares with the base.
    file = next(tmp_path.rglob("*.ckpt"))
    for name in (new_cache / "reference").glob("*"):
        name.unlink()
    _, resumed = fit(decoder, written(tmp_path), tmp_path, epochs=2, resume=str(file), **copy.deepcopy(settings))
    _, whole = fit(decoder, written(tmp_path), tmp_path / "whole", epochs=2, **copy.deepcopy(settings))
    assert "are read from" in capsys.readouterr().out
    assert resumed["val_kl"] == pytest.approx(whole["val_kl"], rel=0.5) and resumed["val_kl"] > found["val_kl"]


@pytest.mark.filterwarnings("ignore")
def test_a_stream_cannot_be_precomputed(decoder: Path, tmp_path: Path) -> None:
    data = PreferenceData(base=str(decoder), train=written(tmp_path), streaming=True, max_length=16, batch_size=4)
    module = lit_peft.LoRA(base=str(decoder), task="preference", task_args={"precompute_reference": True})
    with pytest.raises(LitPeftError, match=r"precompute_reference is set, but data.streaming"):
        pl.Trainer(max_steps=2, **QUIET).fit(module, data)
    module = lit_peft.LoRA(base=str(decoder), task="preference")
    trainer = pl.Trainer(max_steps=3, **QUIET)
    trainer.fit(module, data)
    assert trainer.global_step == 3 and trainer.callback_metrics["train_loss"].isfinite()


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_equals_a_whole_one(decoder: Path, tmp_path: Path) -> None:
    file = written(tmp_path)
    settings = {"lr_scheduler": "constant", "warmup_steps": 0, "lora_dropout": 0.1}
    whole, expected = fit(decoder, file, tmp_path / "whole", epochs=2, **settings)
    fit(decoder, file, tmp_path / "half", epochs=1, **settings)
    checkpoint = next((tmp_path / "half").rglob("*.ckpt"))
    resumed, found = fit(decoder, file, tmp_path / "rest", epochs=2, resume=str(checkpoint), **settings)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert found["val_loss"] == expected["val_loss"]


@pytest.mark.filterwarnings("ignore")
def test_fit_test_and_predict_from_yaml(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((Path(__file__).parents[1] / "configs" / "preference.yaml").read_text())
    config["model"]["init_args"].update(base=str(decoder), learning_rate=2e-2)
    written(tmp_path).replace("pairs", "preferences")
    (tmp_path / "pairs.jsonl").rename(tmp_path / "preferences.jsonl")
    config["data"]["init_args"].update(max_length=16, batch_size=4, test_fraction=0.3, predict="preferences.jsonl")
    config["trainer"].update(max_epochs=6, enable_progress_bar=False, accelerator="cpu")
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    assert main(["fit", "--config", "config.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "pairs of answers as text" in printed and "best val_accuracy" in printed
    checkpoint = str(next(Path("lit_peft_runs").rglob("last.ckpt")))
    assert main(["test", "--config", "config.yaml", "--ckpt_path", checkpoint]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"test_accuracy\D+(1\.0|0\.[89])", printed) and "test_margin" in printed and "test_kl" in printed
    assert main(["predict", "--config", "config.yaml", "--ckpt_path", checkpoint]) == 0
    file = next(Path("lit_peft_runs").rglob("predictions*.jsonl"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 24 and rows[0]["prompt"] == "the a a" and rows[0]["chosen"] == "great a"
    assert rows[0]["rejected"] == "bad it is" and sum(row["accurate"] for row in rows) >= 22
    assert rows[0]["margin"] == pytest.approx(rows[0]["reward_chosen"] - rows[0]["reward_rejected"], abs=1e-4)
    assert rows[0]["logp_chosen"] < 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss_type", ["kto", "simpo", "orpo", "ipo"])
def test_other_losses_learn(loss_type: str, decoder: Path, tmp_path: Path) -> None:
    task_args: dict[str, Any] = {"loss_type": loss_type}
    _, found = fit(
        decoder, written(tmp_path), tmp_path, epochs=4, task_args=task_args, data={"unpair": loss_type == "kto"}
    )
    assert found["val_accuracy"] >= 0.8 and found["val_margin"] > 0
    assert ("val_kl" in found) == (loss_type in ("kto", "ipo"))


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_two_processes_train_what_one_trains(loss_type: str, decoder: Path, tmp_path: Path) -> None:
    found = []
    for devices in (1, 2):
        pl.seed_everything(0)
        settings: dict[str, Any] = {"learning_rate": 1e-2, "task_args": {"loss_type": loss_type}}
        module = lit_peft.LoRA(base=str(decoder), task="preference", **settings)
        sizes: dict[str, Any] = {"batch_size": 8 // devices, "max_length": 16, "validation_fraction": 0.25}
        data = PreferenceData(base=str(decoder), train=written(tmp_path), unpair=loss_type == "kto", **sizes)
        strategy = "auto" if devices == 1 else "ddp_spawn"
        trainer = pl.Trainer(max_epochs=2, devices=devices, strategy=strategy, num_sanity_val_steps=0, **QUIET)
        trainer.fit(module, data)
        found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_sharded_parameters_of_the_base_are_refused_before_the_first_step(decoder: Path, tmp_path: Path) -> None:
    module = lit_peft.LoRA(base=str(decoder), task="preference", modules_to_save=["lm_head"])
    data = PreferenceData(base=str(decoder), train=written(tmp_path), max_length=16, batch_size=4)
    trainer = pl.Trainer(max_steps=1, strategy=ShardedStrategy(), num_sanity_val_steps=0, **QUIET)
    try:
        with pytest.raises(LitPeftError, match=r"The reference needs .*lm_head.* shards it"):
            trainer.fit(module, data)
    finally:
        torch.distributed.destroy_process_group()
    assert trainer.global_step == 0 and module.run is None


def test_adapters_below_are_no_part_of_the_reference_so_they_are_refused() -> None:
    with pytest.raises(LitPeftError, match="stack='folder' and task='preference' do not go together"):
        lit_peft.AdapterP(base="nowhere", task="preference", stack="folder")
    lit_peft.AdapterP(base="nowhere", task="preference", task_args={"loss_type": "orpo"}, stack="folder")


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
def test_methods_are_compared(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"train": written(tmp_path), "max_length": 16, "batch_size": 4}
    plan = {
        "base": str(decoder),
        "task": "preference",
        "data": {
            "class_path": "PreferenceData",
            "init_args": {**data, "validation_fraction": 0.25, "test_fraction": 0.25, "padding_free": True},
        },
        "methods": {"LoRA": {"learning_rate": 1e-2}, "AdapterP": {"learning_rate": 1e-2}},
        "trainer": {"accelerator": "cpu"},
        "steps": 12,
        "evaluations": 2,
        "trials": 1,
        "seeds": 1,
        "output": str(tmp_path / "compare"),
    }
    file = tmp_path / "compare.yaml"
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    file.write_text(yaml.safe_dump(plan))
    assert main(["compare", "--config", str(file)]) == 0
    printed = capsys.readouterr().out
    for method in plan["methods"]:
        assert re.search(rf"\| {method} \| (1\.0|0\.[89])\d* \|", printed)
