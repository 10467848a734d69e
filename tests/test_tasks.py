"""The tasks: their heads on every architecture, their training with every method, and their metrics by formulas."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import ALL, AUTO, ENCODERS, STEP

import lit_peft
from lit_peft import LitPeftError
from lit_peft.tasks import find_task
from lit_peft.tasks.squad import best_over, exact_match, find_answer, token_f1
from lit_peft.tasks.tag_spans import SpanScore, count_spans, tag_spans

PROMPTS = ["PrefixTuning", "PTuningV2", "PTuning", "PromptTuning"]
METHODS = ["LoRA", "IA3", "AdapterH", "AdapterP", "Parallel", "FullFineTuning", "HeadOnly", *PROMPTS]
IDS = torch.randint(5, 40, (4, 9), generator=torch.Generator().manual_seed(0))
IDS[:, -1] = 1  # the end, by which T5 and BART find the sequence's vector
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
BATCHES: dict[str, dict[str, torch.Tensor]] = {
    "sequence_classification": {**INPUTS, "labels": torch.tensor([0, 1, 2, 0])},
    "token_classification": {**INPUTS, "labels": IDS % 3},
    "multiple_choice": {**INPUTS, "choices": torch.tensor([3, 1]), "labels": torch.tensor([2, 0])},
    "question_answering": {
        **INPUTS,
        "start_positions": torch.tensor([1, 2, 3, 4]),
        "end_positions": torch.tensor([2, 4, 3, 8]),
    },
    "seq2seq": {**INPUTS, "labels": torch.tensor([[5, 6, 1], [7, 1, -100], [8, 9, 1], [10, 1, -100]])},
}


@cache
def saved(name: str, folder: Path) -> str:
    """A folder with a tiny pre-trained-like model of that architecture, without a task's head."""
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "max_position_embeddings": 64, "eos_token_id": 1, "initializer_range": 0.2, **ALL[name]}
    config = transformers.AutoConfig.for_model(name.split()[0], **shape)
    auto = transformers.AutoModelForMaskedLM if name in ENCODERS else AUTO[name]
    auto.from_config(config).save_pretrained(folder / name)
    return str(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def built(method: str, task: str, base: str, **settings: Any) -> Any:
    labels = {"labels": ["O", "B-X", "I-X"]} if task.endswith("classification") else {}
    module = getattr(lit_peft, method)(base=base, task=task, **labels, **settings)
    module.configure_model()
    return module


@pytest.mark.parametrize("task", BATCHES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_task(method: str, task: str, folder: Path) -> None:
    base = saved("t5" if task == "seq2seq" else "bert", folder)
    module = built(method, task, base, learning_rate=1e-2 * STEP.get(method, 1))
    frozen = {name: value.clone() for name, value in module.named_parameters() if not value.requires_grad}
    optimizer = module.configure_optimizers()
    module.eval()
    losses = []
    for _ in range(8):
        loss = module.training_step(BATCHES[task], 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(dict(module.named_parameters())[name], value) for name, value in frozen.items())


NONE = {
    "token_classification": {"gptj", "opt", "opt post-LN", "bart", "mbart", "marian"},
    "multiple_choice": {"marian"},
    "question_answering": {"gemma", "phi", "phi3", "marian"},
}


@pytest.mark.parametrize("task", NONE)
@pytest.mark.parametrize("name", ALL)
def test_the_head_alone_is_new_on_every_architecture(name: str, task: str, folder: Path) -> None:
    base = saved(name, folder)
    if name in NONE[task]:
        with pytest.raises(LitPeftError, match="transformers has none"):
            built("HeadOnly", task, base)
        return
    module = built("HeadOnly", task, base)
    reference = AUTO[name] if name not in ENCODERS else transformers.AutoModelForMaskedLM
    pretrained = {value.sum().item() for value in reference.from_pretrained(base).state_dict().values()}
    for path, value in module.model.named_parameters():
        # Every weight comes from the base, but those of the head, which are trained.
        assert value.requires_grad or value.sum().item() in pretrained, path
    with torch.no_grad():
        loss = module.training_step({**BATCHES[task]}, 0)
    assert loss.isfinite() and lit_peft.trainable_parameters(module.model) > 0
    trained = {path for path, value in module.named_parameters() if value.requires_grad}
    heads = (*module.task.heads, "dense")
    assert all(any(f".{head}." in f".{path}" for head in heads) for path in trained)


@pytest.mark.parametrize("name", ["gpt2", "llama", "modernbert"])
def test_padding_changes_no_head(name: str, folder: Path) -> None:
    module = built("HeadOnly", "token_classification", saved(name, folder)).eval()
    plain = module(**INPUTS).logits
    for left, right in ((0, 3), (3, 0)):
        if left and name in ENCODERS:
            continue
        padded = {key: torch.nn.functional.pad(value, (left, right)) for key, value in INPUTS.items()}
        torch.testing.assert_close(module(**padded).logits[:, left : left + 9], plain, atol=1e-5, rtol=0)


def test_choices_in_rows_equal_choices_in_a_block(folder: Path) -> None:
    for name in ("bert", "llama"):
        module = built("HeadOnly", "multiple_choice", saved(name, folder)).eval()
        labels = torch.tensor([1, 0])
        block = {key: value.view(2, 2, 9) for key, value in INPUTS.items()}
        rows = {**INPUTS, "choices": torch.tensor([2, 2])}
        one, other = module(**block, labels=labels), module(**rows, labels=labels)
        assert torch.equal(one.logits, other.logits)
        if name == "bert":
            expected = module.model(**block, labels=labels)
            torch.testing.assert_close(one.logits, expected.logits)
            torch.testing.assert_close(one.loss, expected.loss)


def test_spans_are_seqevals() -> None:
    written = json.loads(Path(__file__).with_name("seqeval_spans.json").read_text())
    gold = [pair["gold"].split() for pair in written["pairs"]]
    got = [pair["got"].split() for pair in written["pairs"]]
    for tags, pair in zip(gold, written["pairs"], strict=True):
        assert sorted(tag_spans(tags)) == sorted(map(tuple, pair["spans"]))
    counts = count_spans(gold, got)
    for kind, expected in written["scores"].items():
        score = SpanScore(kind)
        score.update(*counts)
        assert score.compute().item() == pytest.approx(expected, abs=1e-6)
    assert tag_spans(["B-X", "I-X", "L-X", "U-Y"]) == [("X", 0, 2), ("Y", 3, 3)]
    assert tag_spans(["NOUN", "NOUN", "O"]) == [("NOUN", 0, 0), ("NOUN", 1, 1)]


def test_squad_scores_by_hand() -> None:
    assert exact_match("The  Cat!", "cat") == 1 and exact_match("cat", "dog") == 0
    assert token_f1("the big cat", "cat sat") == pytest.approx(0.5)  # one of two words, one of two
    assert token_f1("", "") == 1 and token_f1("", "cat") == 0
    assert best_over(exact_match, "", []) == 1 and best_over(exact_match, "x", ["a", "x"]) == 1


def test_best_answer_equals_trying_every_span() -> None:
    torch.manual_seed(0)
    for _ in range(50):
        starts, ends = torch.randn(3, 8), torch.randn(3, 8)
        offsets = torch.stack([torch.arange(8) * 2, torch.arange(8) * 2 + 1], -1).repeat(3, 1, 1)
        offsets += 16 * torch.arange(3)[:, None, None]
        offsets[:, :3] = -1
        nulls = torch.zeros(3, dtype=torch.long)
        tried = {
            (int(offsets[w, i, 0]), int(offsets[w, j, 1])): float(starts[w, i] + ends[w, j])
            for w in range(3)
            for i in range(3, 8)
            for j in range(i, min(8, i + 3))
        }
        expected = max(tried, key=tried.__getitem__)
        found = find_answer(starts, ends, offsets, nulls, max_answer_length=3)
        assert (found.start, found.end) == expected and found.score == pytest.approx(tried[expected])
        null = float((starts[:, 0] + ends[:, 0]).min())
        found = find_answer(starts, ends, offsets, nulls, max_answer_length=3, null_answers=True)
        assert (found.end == 0) == (null > tried[expected])


def test_classification_metrics_by_formulas() -> None:
    from scipy.stats import pearsonr, spearmanr

    task = find_task("sequence_classification")
    logits, labels = torch.randn(40, 2), torch.randint(0, 2, (40,))
    metrics = task.metrics(SimpleNamespace(num_labels=2))
    for part in (slice(0, 33), slice(33, 40)):
        output = SimpleNamespace(logits=logits[part], loss=torch.tensor(1.0))
        task.update(metrics, output, {"labels": labels[part]})
    got = logits.argmax(-1)
    tp, tn = int(((got == 1) & (labels == 1)).sum()), int(((got == 0) & (labels == 0)).sum())
    fp, fn = int(((got == 1) & (labels == 0)).sum()), int(((got == 0) & (labels == 1)).sum())
    assert metrics["accuracy"].compute().item() == pytest.approx((tp + tn) / 40)
    assert metrics["binary_f1"].compute().item() == pytest.approx(2 * tp / (2 * tp + fp + fn))
    mcc = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert metrics["mcc"].compute().item() == pytest.approx(mcc, abs=1e-5)
    metrics = task.metrics(SimpleNamespace(num_labels=1))
    values, wanted = torch.randn(40, 1), torch.rand(40) * 5
    for part in (slice(0, 33), slice(33, 40)):
        output = SimpleNamespace(logits=values[part], loss=torch.tensor(1.0))
        task.update(metrics, output, {"labels": wanted[part]})
    assert metrics["pearson"].compute().item() == pytest.approx(pearsonr(values[:, 0], wanted)[0], abs=1e-5)
    assert metrics["spearman"].compute().item() == pytest.approx(spearmanr(values[:, 0], wanted)[0], abs=1e-5)


def test_regression(folder: Path) -> None:
    """Regression: one output and float labels."""
    module = lit_peft.LoRA(base=saved("bert", folder), task="sequence_classification", num_labels=1)
    module.configure_model()
    labels = torch.tensor([0.5, 1.5, 2.5, 3.5])
    output = module(**INPUTS, labels=labels)
    torch.testing.assert_close(output.loss, ((output.logits.squeeze(-1) - labels) ** 2).mean())
    assert module.model.num_labels == 1
