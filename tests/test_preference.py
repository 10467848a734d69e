"""Preference tuning against TRL's trainers, on the same model and batch; and as the task of a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import scramble
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lit_peft
from lit_peft import LoRASettings
from lit_peft.tasks import find_task

VOCABULARY = 61
PAD = VOCABULARY - 1
PAIR_LOSSES = [
    {"loss_type": "sigmoid", "beta": 0.3},
    {"loss_type": "hinge", "beta": 0.5},
    {"loss_type": "ipo", "beta": 0.2},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "exo_pair", "label_smoothing": 0.01},
    {"loss_type": "nca_pair"},
    {"loss_type": "sppo_hard", "beta": 0.4},
    {"loss_type": "apo_zero"},
    {"loss_type": "apo_down"},
    {"loss_type": "sigmoid_norm", "beta": 2.0},
    {"loss_type": "sigmoid", "rpo_alpha": 0.7},
]


def base_model() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, num_key_value_heads=2, **shape)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rows() -> dict[str, list[list[int]]]:
    """Prompts with their two answers."""
    generator = torch.Generator().manual_seed(1)
    lengths = {"prompt_ids": (3, 5, 4), "chosen_ids": (4, 6, 2), "rejected_ids": (5, 3, 7)}
    return {
        name: [torch.randint(1, PAD, (count,), generator=generator).tolist() for count in counts]
        for name, counts in lengths.items()
    }


def pair_batch() -> dict[str, Tensor]:
    found = rows()
    texts = [(found["prompt_ids"][i], found[name][i]) for name in ("chosen_ids", "rejected_ids") for i in range(3)]
    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids = torch.full((6, longest), PAD)
    labels = torch.full((6, longest), -100)
    for row, (prompt, answer) in enumerate(texts):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(texts):
        mask[row, : len(prompt) + len(answer)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(settings: Any = None) -> Any:
    model = lit_peft.attach(base_model(), settings or LoRASettings(r=4, target_modules=["q_proj", "v_proj"]))
    scramble(model)
    return model.train()


def metrics_of(task: Any, output: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    metrics = task.metrics(None)
    task.update(metrics, output, batch)
    return {name: float(metric.compute()) for name, metric in metrics.items() if metric.update_called}


# ----------------------------------------------------------------------------------------- against TRL's trainers


class _PlainLogProbs:
    """TRL's Triton kernel in plain torch, for machines without Triton. Its formulas and metrics stay TRL's own."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, *rest: Any) -> tuple[Any, ...]:
        logits = F.linear(hidden, weight, bias).float()
        log_probs = logits.log_softmax(-1)
        zero = log_probs.new_zeros(len(labels))
        found = log_probs.gather(1, labels[:, None]).squeeze(1)
        return found, zero, zero, logits.mean(-1).detach(), logits.argmax(-1) == labels


@pytest.fixture
def trl_models(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our model, peft's with the same base and adapter, the base alone, and a tokenizer for TRL's trainers."""
    pytest.importorskip("trl")
    import trl.trainer.utils
    from peft import PeftModel
    from transformers import AutoTokenizer

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", _PlainLogProbs)
    mine = adapted()
    lit_peft.save_adapter(mine, tmp_path / "adapter", format="peft")
    theirs = PeftModel.from_pretrained(base_model(), tmp_path / "adapter", is_trainable=True)
    return mine, theirs, base_model(), AutoTokenizer.from_pretrained(tokenizer_folder), tmp_path


def gradients(model: Any) -> dict[str, Tensor]:
    return {
        name.replace("base_model.model.", "").replace(".default.weight", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_equal_to_trl(
    mine: Any, theirs: Any, settings: dict[str, Any], batch: Any, loss: Tensor, logged: dict[str, float]
) -> None:
    task = find_task("preference", settings)
    task.prepare(mine)
    loss.backward()
    expected = gradients(theirs)
    assert len(expected) == 8
    for supervised in (True, True, False):  # the first call finds out how the head ends
        mine.zero_grad()
        if supervised:
            with task.loss_only(mine):
                output = task.forward(mine, batch)
        else:
            output = task.forward(mine, batch)
        output.loss.backward()
        torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients(mine).items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * scale)
    found = metrics_of(task, output, batch)
    for name, value in logged.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def logged_by(trainer: Any) -> dict[str, float]:
    found = trainer._metrics["train"]
    names = {
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "rewards/chosen": "rewards_chosen",
        "rewards/rejected": "rewards_rejected",
        "logps/chosen": "logps_chosen",
        "logps/rejected": "logps_rejected",
        "kl": "kl",
    }
    return {mine: found[theirs][-1] for theirs, mine in names.items() if theirs in found}


PAIR_TEXTS = {"prompt": ["a film"] * 4, "chosen": [" is good"] * 4, "rejected": [" is bad"] * 4}
LABELLED_TEXTS = {"prompt": ["a film"] * 4, "completion": [" is good"] * 4, "label": [True, False] * 2}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", PAIR_LOSSES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_losses_of_pairs_equal_trls(trl_models: Any, settings: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    mine, theirs, base, tokenizer, folder = trl_models
    values: dict[str, Any] = {**settings, "loss_type": [settings["loss_type"]]}
    alpha = values.pop("rpo_alpha", 0.0)
    if alpha:
        values.update(loss_type=[settings["loss_type"], "sft"], loss_weights=[1.0, alpha])
    arguments = DPOConfig(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, **values)
    data = Dataset.from_dict(PAIR_TEXTS)
    trainer = DPOTrainer(theirs, base, arguments, train_dataset=data, processing_class=tokenizer)
    batch = pair_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    loss = trainer.compute_loss(trainer.model, {**inputs, "completion_mask": (batch["labels"] != -100).long()})
    assert_equal_to_trl(mine, trainer.model, settings, batch, loss, logged_by(trainer))


def labelled_batch() -> dict[str, Tensor]:
    """Single answers with a label, and the same prompts with the answers to others."""
    batch = pair_batch()
    moved = pair_batch()
    found = rows()
    order = [1, 2, 0]
    for row in range(6):
        prompt, answer = found["prompt_ids"][row % 3], found["chosen_ids"][order[row % 3]]
        for name, value in {"input_ids": PAD, "attention_mask": 0, "labels": -100}.items():
            moved[name][row] = value
        end = len(prompt) + len(answer)
        moved["input_ids"][row, :end] = torch.tensor(prompt + answer)
        moved["labels"][row, len(prompt) : end] = torch.tensor(answer)
        moved["attention_mask"][row, :end] = 1
    other = {f"kl_{name}": value for name, value in moved.items()}
    return {**batch, **other, "desirable": torch.tensor([True, False, True, True, False, False])}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.4)])
def test_kto_equals_trls(trl_models: Any, weights: tuple[float, float]) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    mine, theirs, base, tokenizer, folder = trl_models
    settings = {"loss_type": "kto", "beta": 0.2, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    arguments = KTOConfig(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, **settings)
    data = Dataset.from_dict(LABELLED_TEXTS)
    trainer = KTOTrainer(theirs, base, arguments, train_dataset=data, processing_class=tokenizer)
    batch = labelled_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs.update(completion_mask=(batch["labels"] != -100).long(), label=batch["desirable"])
    inputs.update(KL_input_ids=batch["kl_input_ids"], KL_attention_mask=batch["kl_attention_mask"])
    loss = trainer.compute_loss(trainer.model, {**inputs, "KL_completion_mask": (batch["kl_labels"] != -100).long()})
    assert_equal_to_trl(mine, trainer.model, settings, batch, loss, logged_by(trainer))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["simpo", "simpo with smoothing", "simpo with likelihood", "orpo"])
def test_losses_without_a_reference_equal_trls(trl_models: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    mine, theirs, _, tokenizer, folder = trl_models
    settings: dict[str, Any] = {"loss_type": kind.split()[0], "beta": 0.6}
    common = {"output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, "beta": 0.6}
    data = Dataset.from_dict(PAIR_TEXTS)
    trainer: Any
    if kind == "orpo":
        settings["sft_on_prompt"] = True
        trainer = ORPOTrainer(theirs, ORPOConfig(**common), train_dataset=data, processing_class=tokenizer)
    else:
        settings["simpo_gamma"] = 0.4
        alpha, smoothing = 0.5 * ("likelihood" in kind), 0.1 * ("smoothing" in kind)
        settings.update({"rpo_alpha": alpha} if alpha else {}, **({"label_smoothing": smoothing} if smoothing else {}))
        arguments = CPOConfig(**common, loss_type="simpo", simpo_gamma=0.4, cpo_alpha=alpha, label_smoothing=smoothing)
        trainer = CPOTrainer(theirs, arguments, train_dataset=data, processing_class=tokenizer)
    batch = pair_batch()
    halves = {
        f"{side}_{name}": value[part]
        for side, part in {"chosen": slice(3), "rejected": slice(3, 6)}.items()
        for name, value in batch.items()
    }
    loss, logged = trainer.get_batch_loss_metrics(trainer.model.train(), halves)
    names = {"accuracies": "accuracy", "margins": "margin", "chosen": "rewards_chosen", "rejected": "rewards_rejected"}
    found = {mine: float(logged[f"rewards/{theirs}"]) for theirs, mine in names.items()}
    found.update({f"logps_{side}": float(logged[f"logps/{side}"]) for side in ("chosen", "rejected")})
    assert_equal_to_trl(mine, trainer.model, settings, batch, loss, found)
