"""Several labels per row, class weights, and several numbers to predict: against transformers, scikit-learn, torch."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from models import ALL, ENCODERS, QUIET, scramble, trained_of
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import lit_peft
from lit_peft import LitPeftError
from lit_peft.cli import main
from lit_peft.data import TextClassificationData, TokenClassificationData
from lit_peft.tasks import find_task

PROMPTS = ["PrefixTuning", "PTuningV2", "PTuning", "PromptTuning"]
METHODS = ["LoRA", "IA3", "AdapterH", "AdapterP", "Parallel", "FullFineTuning", "HeadOnly", *PROMPTS]
TASK = "sequence_classification"
IDS = torch.randint(5, 40, (4, 7), generator=torch.Generator().manual_seed(0))
IDS[:, -1] = 1  # the end, by which T5 and BART find the sequence's vector
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SEVERAL = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
TARGETS = torch.tensor([[0.5, 2.0], [-1.0, 0.0], [3.0, 1.0], [0.1, -2.0]])
MOODS = {"good": ["kind"], "great": ["kind", "loud"], "bad": ["harsh"], "awful": ["harsh", "loud"], "well": []}


def make(method: str, base: Path | str, labels: int = 3, **task_args: Any) -> Any:
    names = ["a", "b", "c"][:labels] if labels > 1 else None
    counts = {"labels": names} if names else {"num_labels": 1}
    kind = getattr(lit_peft, method)
    module = kind(base=str(base), task=TASK, task_args=task_args, learning_rate=1e-2, **counts)
    module.configure_model()
    module.eval()
    return module


def text_of(at: int, word: str) -> str:
    return (
        f"the film {' '.join(['it'] * (at % 5))} {'is' if at % 2 else 'was'} {' '.join(['this'] * (at // 10))} {word}"
    )


ROWS = [{"text": text_of(at, word), "labels": labels} for at in range(20) for word, labels in MOODS.items()]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("lists") / "lists.jsonl", ROWS)


def read(file: str, base: Path, **settings: Any) -> TextClassificationData:
    values: dict[str, Any] = {"batch_size": 8, "max_length": 16, "validation_fraction": 0.2, **settings}
    data = TextClassificationData(train=file, base=str(base), **values)
    data.setup("fit")
    return data


# ------------------------------------------------------------------------------------------------- the losses


def test_the_loss_of_several_labels_is_that_of_transformers(encoder: Path) -> None:
    module = make("LoRA", encoder, problem_type="multi_label")
    assert module.model.config.problem_type == "multi_label_classification"
    scramble(module.model)
    expected = module.model(**INPUTS, labels=SEVERAL).loss
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trained_of(module.model).items()}
    module.zero_grad()
    loss = module.training_step({**INPUTS, "labels": SEVERAL}, 0)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in trained_of(module.model).items():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_the_loss_of_several_targets_is_that_of_transformers(encoder: Path) -> None:
    module = make("LoRA", encoder, labels=2, problem_type="regression")
    assert module.model.config.problem_type == "regression"
    expected = module.model(**INPUTS, labels=TARGETS).loss
    torch.testing.assert_close(module.training_step({**INPUTS, "labels": TARGETS}, 0), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 3.0], [0.0, 0.01, 0.5]])
def test_weights_and_smoothing_are_those_of_torch(weights: list[float] | None, smoothing: float, encoder: Path) -> None:
    module = make("LoRA", encoder, class_weights=weights, label_smoothing=smoothing)
    labels = torch.tensor([0, 2, 2, 1])
    logits = module.model(**INPUTS).logits
    tensor = None if weights is None else torch.tensor(weights)
    expected = cross_entropy(logits, labels, tensor, label_smoothing=smoothing)
    torch.testing.assert_close(module.training_step({**INPUTS, "labels": labels}, 0), expected)


def test_parts_of_a_batch_with_class_weights_count_by_their_weights(encoder: Path) -> None:
    """So accumulated batches, and those of several processes, have the gradient of one batch with all rows."""
    task = find_task(TASK, {"class_weights": [0.01, 0.5, 0.2]})
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 0, 1])

    def part(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        batch = {"input_ids": labels[rows, None], "labels": labels[rows]}
        return task.loss(transformers.utils.ModelOutput(logits=logits[rows]), batch), task.weight(batch)

    (one, first), (two, second) = part(slice(0, 2)), part(slice(2, 6))
    expected = cross_entropy(logits, labels, torch.tensor([0.01, 0.5, 0.2]))
    torch.testing.assert_close((one * first + two * second) / (first + second), expected)
    # What is below 1 would be taken for nothing.
    assert first >= 1 and second >= 1


def test_a_batch_whose_rows_have_no_weight_has_no_gradient(encoder: Path) -> None:
    module = make("LoRA", encoder, class_weights=[0.0, 1.0, 1.0])
    loss = module.training_step({**INPUTS, "labels": torch.zeros(4, dtype=torch.long)}, 0)
    loss.backward()
    assert loss == 0 and all(not parameter.grad.any() for parameter in trained_of(module.model).values())


def test_positive_weights_are_those_of_torch(encoder: Path) -> None:
    weights = [2.0, 0.5, 1.0]
    module = make("LoRA", encoder, problem_type="multi_label", pos_weight=weights)
    logits = module.model(**INPUTS).logits
    expected = binary_cross_entropy_with_logits(logits, SEVERAL, pos_weight=torch.tensor(weights))
    torch.testing.assert_close(module.training_step({**INPUTS, "labels": SEVERAL}, 0), expected)


def test_weights_of_tags_are_those_of_torch(encoder: Path) -> None:
    weights = [0.1, 2.0, 1.0]
    module = lit_peft.LoRA(
        base=str(encoder), task="token_classification", labels=["O", "B-X", "I-X"], task_args={"class_weights": weights}
    )
    module.configure_model()
    module.eval()
    labels = IDS % 3
    labels[0, :3] = -100
    logits = module.model(**INPUTS).logits
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), torch.tensor(weights))
    torch.testing.assert_close(module.training_step({**INPUTS, "labels": labels}, 0), expected)
    module.validation_step({**INPUTS, "labels": labels}, 0)
    torch.testing.assert_close(module.val_metrics["loss"].compute(), expected.detach())


@pytest.mark.parametrize("kind", ["multi_label", "regression", "weights"])
def test_the_loss_is_computed_in_float32_in_half_precision(kind: str, encoder: Path) -> None:
    args: dict[str, Any] = {"class_weights": [1.0, 2.0, 3.0]} if kind == "weights" else {"problem_type": kind}
    labels = {"multi_label": SEVERAL, "regression": SEVERAL, "weights": torch.tensor([0, 2, 2, 1])}[kind]
    module = lit_peft.LoRA(base=str(encoder), task=TASK, labels=["a", "b", "c"], task_args=args, dtype="bfloat16")
    module.configure_model()
    module.eval()
    loss = module.training_step({**INPUTS, "labels": labels}, 0)
    assert loss.dtype == torch.float32
    module.validation_step({**INPUTS, "labels": labels}, 0)
    torch.testing.assert_close(module.val_metrics["loss"].compute(), loss.detach())


# ------------------------------------------------------------------------------------------------- the metrics


def test_metrics_of_several_labels_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score

    torch.manual_seed(3)
    labels = (torch.rand(40, 5) < 0.3).float()
    logits = torch.randn(40, 5) + labels
    task = find_task(TASK, {"problem_type": "multi_label", "threshold": 0.4})
    metrics = task.metrics(transformers.BertConfig(num_labels=5))
    for start, end in ((0, 8), (8, 9), (9, 40)):
        output = transformers.utils.ModelOutput(logits=logits[start:end])
        task.update(metrics, output, {"input_ids": labels[start:end], "labels": labels[start:end]})
    found = {name: metric.compute().item() for name, metric in metrics.items()}
    probabilities = logits.sigmoid().numpy()
    chosen = probabilities > 0.4
    assert found.pop("loss") == pytest.approx(binary_cross_entropy_with_logits(logits, labels).item(), abs=1e-6)
    assert found == pytest.approx(
        {
            "micro_f1": f1_score(labels, chosen, average="micro"),
            "macro_f1": f1_score(labels, chosen, average="macro"),
            "exact_match": accuracy_score(labels, chosen),
            "map": average_precision_score(labels, probabilities, average="macro"),
        },
        abs=1e-6,
    )


def test_metrics_of_several_targets_are_those_of_scipy_and_scikit_learn() -> None:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_squared_error, r2_score

    torch.manual_seed(3)
    targets = torch.randn(30, 2)
    found_values = targets + 0.5 * torch.randn(30, 2)
    task = find_task(TASK, {"problem_type": "regression"})
    metrics = task.metrics(transformers.BertConfig(num_labels=2))
    for start, end in ((0, 8), (8, 9), (9, 30)):
        output = transformers.utils.ModelOutput(logits=found_values[start:end])
        task.update(metrics, output, {"input_ids": targets[start:end], "labels": targets[start:end]})
    found = {name: metric.compute().item() for name, metric in metrics.items()}
    columns = list(zip(found_values.T.numpy(), targets.T.numpy(), strict=True))
    expected = {
        "loss": mean_squared_error(targets, found_values),
        "pearson": sum(pearsonr(*pair)[0] for pair in columns) / 2,
        "spearman": sum(spearmanr(*pair)[0] for pair in columns) / 2,
        "r2": r2_score(targets, found_values),
    }
    assert found == pytest.approx(expected, abs=1e-5)


def test_one_row_has_no_r2(encoder: Path) -> None:
    task = find_task(TASK, {"problem_type": "regression"})
    metrics = task.metrics(transformers.BertConfig(num_labels=2))
    metrics["r2"].update(torch.ones(1, 2), torch.zeros(1, 2))
    assert metrics["r2"].compute().isnan()


@pytest.mark.parametrize("problem_type", ["multi_label", "regression"])
def test_a_process_without_a_row_has_states_of_the_same_dimensions(problem_type: str) -> None:
    task = find_task(TASK, {"problem_type": problem_type})
    with_rows, without = (task.metrics(transformers.BertConfig(num_labels=3)) for _ in range(2))
    output = transformers.utils.ModelOutput(logits=torch.randn(4, 3))
    task.update(with_rows, output, {"input_ids": IDS, "labels": SEVERAL})
    for name, metric in with_rows.items():
        for state, value in metric.metric_state.items():
            empty = without[name].metric_state[state]
            # torchmetrics gathers an empty tensor of one dimension for an empty list, in the type of the metric.
            empty = torch.tensor([], dtype=without[name].dtype) if empty == [] else empty
            value = torch.cat(value) if isinstance(value, list) else value
            assert (value.dim(), value.dtype) == (empty.dim(), empty.dtype), (name, state)


def test_a_threshold_of_zero_is_a_number() -> None:
    task = find_task(TASK, {"problem_type": "multi_label", "threshold": 0})
    metrics = task.metrics(transformers.BertConfig(num_labels=3))
    output = transformers.utils.ModelOutput(logits=torch.zeros(4, 3))
    task.update(metrics, output, {"input_ids": IDS, "labels": torch.ones(4, 3)})
    assert metrics["exact_match"].compute() == 1


# ------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_several_labels(method: str, encoder: Path) -> None:
    module = make(method, encoder, problem_type="multi_label")
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(8):
        loss = module.training_step({**INPUTS, "labels": SEVERAL}, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("kind", ["multi_label", "regression"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta", "modernbert", "t5", "bart"])
def test_every_architecture_has_them(name: str, kind: str, tmp_path: Path) -> None:
    shape = {"vocab_size": 61, "max_position_embeddings": 64, "eos_token_id": 1, **ALL[name], "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(name, **shape)
    auto = transformers.AutoModelForMaskedLM if name in ENCODERS else transformers.AutoModel
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(tmp_path / "base")
    module = make("LoRA", tmp_path / "base", problem_type=kind)
    loss = module.training_step({**INPUTS, "labels": SEVERAL}, 0)
    loss.backward()
    torch.testing.assert_close(loss, module.model(**INPUTS, labels=SEVERAL).loss, atol=1e-6, rtol=1e-5)
    assert all(parameter.grad is not None for parameter in trained_of(module.model).values())


def test_predictions_are_those_of_the_pipeline_of_transformers(encoder: Path, lists: str, tmp_path: Path) -> None:
    data = read(lists, encoder)
    module = lit_peft.LoRA(base=str(encoder), task=TASK)
    module.take_labels(data)
    module.configure_model()
    module.eval()
    scramble(module.model)
    data.sources["predict"] = lists
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    rows = module.predict_step(batch, 0)
    lit_peft.merge(module.model).save_pretrained(tmp_path / "merged")
    data.tokenizer.save_pretrained(tmp_path / "merged")
    pipeline = transformers.pipeline("text-classification", str(tmp_path / "merged"), device="cpu", top_k=None)
    for row, found in zip(rows, pipeline([row["text"] for row in ROWS[: len(rows)]]), strict=True):
        scores = {part["label"]: part["score"] for part in found}
        assert row["probabilities"] == pytest.approx(scores, abs=1e-5)
        assert row["labels"] == [name for name, value in row["probabilities"].items() if value > 0.5]


def test_a_base_for_several_labels_can_be_tuned_for_one(encoder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=3, problem_type="multi_label_classification"
    )
    model.save_pretrained(tmp_path / "several")
    module = make("LoRA", tmp_path / "several")
    labels = torch.tensor([0, 2, 2, 1])
    expected = cross_entropy(module.model(**INPUTS).logits, labels)
    torch.testing.assert_close(module.training_step({**INPUTS, "labels": labels}, 0), expected)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"problem_type": "several"}, "problem_type='several' is not known"),
        ({"class_weights": "even"}, "class_weights='even'"),
        ({"class_weights": [1.0, -1.0]}, "class_weights"),
        ({"pos_weight": [0.0, 0.0]}, "pos_weight"),
        ({"threshold": 1.0}, r"threshold=1\.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0\.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(LitPeftError, match=problem):
        find_task(TASK, settings)


@pytest.mark.parametrize(
    ("labels", "settings", "problem"),
    [
        (3, {"class_weights": [1.0, 2.0]}, "class_weights has 2 numbers, and there are 3 labels"),
        (3, {"pos_weight": [1.0, 2.0, 3.0]}, "pos_weight has no effect with problem_type 'single_label'"),
        (3, {"threshold": 0.3}, "threshold has no effect"),
        (3, {"problem_type": "multi_label", "class_weights": [1.0] * 3}, r"class_weights has no effect.*pos_weight"),
        (1, {"class_weights": [1.0]}, "class_weights has no effect with problem_type 'regression'"),
        (1, {"problem_type": "multi_label"}, "with one label"),
    ],
)
def test_settings_that_do_not_fit_the_labels_are_refused(
    labels: int, settings: dict[str, Any], problem: str, encoder: Path
) -> None:
    with pytest.raises(LitPeftError, match=problem):
        make("LoRA", encoder, labels, **settings)


# ------------------------------------------------------------------------------------------------- the data


def vectors(data: Any, split: str = "train") -> dict[str, list[str]]:
    """The labels of each text."""
    texts = data.tokenizer.batch_decode(list(data.examples(split)["input_ids"]))
    rows = data.examples(split)["labels"]
    names = data.label_names
    return {
        text: [name for name, value in zip(names, row, strict=True) if value]
        for text, row in zip(texts, rows, strict=True)
    }


@pytest.mark.parametrize("form", ["lists", "numbers", "columns", "separator", "json", "python", "declared"])
def test_every_form_of_several_labels_is_read(form: str, encoder: Path, tmp_path: Path) -> None:
    names = ["harsh", "kind", "loud"]
    settings: dict[str, Any] = {}
    rows: list[dict[str, Any]] = [dict(row) for row in ROWS]
    file = tmp_path / ("rows.jsonl" if form in ("lists", "numbers") else "rows.csv")
    if form == "numbers":
        rows = [{**row, "labels": [names.index(label) for label in row["labels"]]} for row in rows]
    elif form == "columns":
        rows = [{"text": r["text"], **{name: int(name in r["labels"]) for name in names}} for r in rows]
        settings["label_columns"] = names
    elif form == "separator":
        rows = [{"text": row["text"], "label": " ; ".join(row["labels"])} for row in rows]
        settings["label_separator"] = ";"
    elif form in ("json", "python"):
        dump = json.dumps if form == "json" else str
        rows = [{**row, "labels": dump(row["labels"])} for row in rows]
    given = str(file)
    if form == "declared":
        from datasets import ClassLabel, Dataset, Features, Sequence, Value

        features = Features({"text": Value("string"), "labels": Sequence(ClassLabel(names=names))})
        given = str(tmp_path / "saved")
        Dataset.from_list(rows, features=features).save_to_disk(given)
    else:
        write(file, rows)
    data = read(given, encoder, **settings)
    shown = ["0", "1", "2"] if form == "numbers" else names
    assert data.label_names == shown and data.problem_type == "multi_label" and data.num_labels == 3
    found = {**vectors(data), **vectors(data, "validation")}
    expected = {row["text"]: sorted(row["labels"]) for row in ROWS}
    if form == "numbers":
        expected = {text: [str(names.index(label)) for label in labels] for text, labels in expected.items()}
    assert {" ".join(text.split()): labels for text, labels in found.items()} == {
        " ".join(text.split()): labels for text, labels in expected.items()
    }
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].shape == (8, 3) and batch["labels"].dtype == torch.float32
    assert any("several labels per row" in line for line in data.report())
    assert any("of 3 labels per row" in line and "have none" in line for line in data.report())


@pytest.mark.parametrize(
    ("name", "cell", "settings", "problem"),
    [
        ("labels", "kind", {}, "row 2: column 'labels' has 'kind', which is not a list"),
        ("labels", None, {}, "row 2: column 'labels' has None"),
        ("labels", ["kind", -100], {}, "row 2: column 'labels' has the label -100"),
        ("labels", ["kind", 0.5], {}, "row 2: 0.5"),
        ("kind", 2, {"label_columns": ["kind", "loud"]}, "row 2: column 'kind' has 2"),
        ("kind", -1, {"label_columns": ["kind", "loud"]}, "row 2: column 'kind' has -1"),
        ("kind", "x", {"label_columns": ["kind", "loud"], "regression": True}, "row 2 has 'x' in column 'kind'"),
    ],
)
def test_a_wrong_cell_is_named(
    name: str, cell: Any, settings: dict[str, Any], problem: str, encoder: Path, tmp_path: Path
) -> None:
    first: dict[str, Any] = {"text": "good", "labels": ["kind", "loud"], "kind": 1, "loud": 0}
    rows = [first, {**first, "text": "bad", name: cell}]
    with pytest.raises(LitPeftError, match=problem):
        read(write(tmp_path / "rows.jsonl", rows), encoder, validation_fraction=0, **settings)


def test_a_label_that_training_lacks_is_named(encoder: Path, lists: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{"text": "poor", "labels": ["kind", "rude"]}])
    with pytest.raises(LitPeftError, match="row 1: label 'rude' does not occur in training"):
        read(lists, encoder, validation=other)


def test_columns_are_several_and_different(encoder: Path) -> None:
    for columns in (["kind"], ["kind", "kind"]):
        with pytest.raises(LitPeftError, match="at least two different columns"):
            TextClassificationData(base=str(encoder), train="a.csv", label_columns=columns)
    with pytest.raises(LitPeftError, match=r"data\.labels is set but has no effect with data\.label_columns"):
        TextClassificationData(base=str(encoder), train="a.csv", label_columns=["a", "b"], labels=["a", "b"])


def test_a_stream_gives_the_same_labels(encoder: Path, lists: str) -> None:
    names = ["harsh", "kind", "loud"]
    whole = read(lists, encoder, validation_fraction=0)
    stream = read(lists, encoder, streaming=True, labels=names, validation_fraction=0)
    assert stream.problem_type == "multi_label"

    def rows(data: Any) -> list[Any]:
        batches = [(b["input_ids"].tolist(), b["labels"].tolist()) for b in data.train_dataloader()]
        pairs = [pair for ids, labels in batches for pair in zip(ids, labels, strict=True)]
        return sorted(([token for token in ids if token], labels) for ids, labels in pairs)

    assert rows(stream) == rows(whole)
    module = lit_peft.LoRA(base=str(encoder), task=TASK, task_args={"pos_weight": "balanced"})
    with pytest.raises(LitPeftError, match=r"without data\.streaming"):
        module.take_labels(stream)


def test_prediction_with_named_labels_needs_no_training_file(encoder: Path, lists: str) -> None:
    names = ["harsh", "kind", "loud"]
    data = TextClassificationData(train="gone.jsonl", predict=lists, labels=names, base=str(encoder))
    data.setup("predict")
    assert data.problem_type is None and data.label_names == names
    module = lit_peft.LoRA(base=str(encoder), task=TASK, task_args={"problem_type": "multi_label"})
    module.take_labels(data)
    assert module.hparams.task_args == {"problem_type": "multi_label"} and module.hparams.labels == names


def test_balanced_weights_are_those_of_scikit_learn(encoder: Path, tmp_path: Path, lists: str) -> None:
    import numpy as np
    from sklearn.utils.class_weight import compute_class_weight

    rows = [{"text": text_of(at, "well"), "label": "ab"[at % 4 == 0]} for at in range(20)]
    data = read(write(tmp_path / "single.csv", rows), encoder, validation_fraction=0)
    module = lit_peft.LoRA(base=str(encoder), task=TASK, task_args={"class_weights": "balanced"})
    module.take_labels(data)
    labels = np.array(data.examples("train")["labels"])
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    assert module.hparams.task_args == {"class_weights": pytest.approx(list(expected))}
    assert any("balanced class_weights from data.train: 0.667, 2" in line for line in data.report())
    several = read(lists, encoder)
    module = lit_peft.LoRA(base=str(encoder), task=TASK, task_args={"pos_weight": "balanced"})
    module.take_labels(several)
    positive = np.array(several.examples("train")["labels"])
    assert module.hparams.task_args["pos_weight"] == pytest.approx(list((1 - positive).sum(0) / positive.sum(0)))
    assert module.hparams.task_args["problem_type"] == "multi_label"


@pytest.mark.parametrize(
    ("case", "problem"), [("everywhere", "every training row has"), ("nowhere", "no training row has")]
)
def test_balanced_weights_need_rows_with_a_label_and_rows_without(
    case: str, problem: str, encoder: Path, tmp_path: Path
) -> None:
    labels = [["a"], ["a", "b", "c"]] if case == "everywhere" else [[], ["a", "c"]]
    rows = [{"text": text_of(at, "well"), "labels": labels[at % 2]} for at in range(10)]
    data = read(write(tmp_path / "rows.jsonl", rows), encoder, validation_fraction=0, labels=["a", "b", "c"])
    module = lit_peft.LoRA(base=str(encoder), task=TASK, task_args={"pos_weight": "balanced"})
    with pytest.raises(LitPeftError, match=problem):
        module.take_labels(data)


def test_balanced_weights_of_tags_count_words(encoder: Path, tmp_path: Path) -> None:
    rows = [
        {"tokens": ["the", "film", "is", "good"], "tags": ["O", "B-X", "O", "O"]},
        {"tokens": ["it"], "tags": ["O"]},
    ]
    data = TokenClassificationData(train=write(tmp_path / "t.jsonl", rows), base=str(encoder), validation_fraction=0)
    data.setup("fit")
    settings = {"task": "token_classification", "task_args": {"class_weights": "balanced"}}
    module = lit_peft.LoRA(base=str(encoder), **settings)
    module.take_labels(data)
    assert module.hparams.task_args["class_weights"] == pytest.approx([5 / 8, 5 / 2])


def test_the_data_and_the_task_must_agree(encoder: Path, lists: str, reviews: Path) -> None:
    module = lit_peft.LoRA(base=str(encoder), task=TASK, task_args={"problem_type": "single_label"})
    with pytest.raises(LitPeftError, match="problem_type='single_label', but the data has the labels of 'multi_label'"):
        module.take_labels(read(lists, encoder))
    module = lit_peft.LoRA(base=str(encoder), task=TASK, task_args={"problem_type": "multi_label"})
    with pytest.raises(LitPeftError, match="'single_label'"):
        module.take_labels(read(str(reviews), encoder))


# ------------------------------------------------------------------------------------------------- as a user


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    return main(list(arguments))


def config(base: Path, file: str, epochs: int = 6, task_args: str = "{}", data: str = "") -> str:
    return f"""
model:
  class_path: LoRA
  init_args: {{base: {base}, task: sequence_classification, task_args: {task_args}, learning_rate: 1.0e-2, r: 4}}
data:
  class_path: TextClassificationData
  init_args: {{train: {file}, test_fraction: 0.2, batch_size: 8, max_length: 16{data}}}
trainer: {{max_epochs: {epochs}, enable_progress_bar: false, default_root_dir: runs}}
"""


def test_several_labels_fit_test_predict_and_export(
    lists: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(config(encoder, lists, 8, "{pos_weight: balanced}"))
    assert command(monkeypatch, "fit", "--config", "config.yaml") == 0
    printed = capsys.readouterr().out
    assert "several labels per row, from the lists in column 'labels'" in printed and "best val_micro_f1" in printed
    assert "balanced pos_weight from data.train" in printed
    best = next(Path("runs/version_0/checkpoints").glob("best*.ckpt"))
    given = ["--config", "runs/version_0/config.yaml", "--ckpt_path", str(best)]
    assert command(monkeypatch, "test", *given) == 0
    printed = capsys.readouterr().out
    assert all(f"test_{name}" in printed for name in ("micro_f1", "macro_f1", "exact_match", "map"))
    write(tmp_path / "new.jsonl", [{"text": row["text"]} for row in ROWS[:10]])
    predict = ["predict", *given, "--data.predict", "new.jsonl", "--output"]
    assert command(monkeypatch, *predict, "out.jsonl") == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["labels"] == [name for name, value in row["probabilities"].items() if value > 0.5]
    kinds: dict[bool, list[float]] = {True: [], False: []}
    for row, gold in zip(rows, ROWS, strict=False):
        for name, value in row["probabilities"].items():
            kinds[name in gold["labels"]].append(value)
    right, wrong = (sum(values) / len(values) for values in kinds.values())
    assert right > wrong + 0.15
    # The threshold may change after training, unlike what training depends on.
    assert command(monkeypatch, *predict, "all.jsonl", "--model.task_args.threshold", "0.0") == 0
    assert all(len(json.loads(line)["labels"]) == 3 for line in Path("all.jsonl").read_text().splitlines())
    assert command(monkeypatch, *predict, "x.jsonl", "--model.task_args", "{pos_weight: [1, 1, 1]}") == 2
    assert "trained with other settings" in capsys.readouterr().err
    # A checkpoint has what is needed to build the model again, without its data.
    module = lit_peft.LoRA.load_from_checkpoint(best)
    module.eval()
    assert module.task.problem_type == "multi_label" and module.model.config.problem_type.startswith("multi_label")
    assert command(monkeypatch, "export", "--ckpt_path", str(best), "--output", "exported") == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    lit_peft.load_adapter(model, "exported")
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([tokenizer(ROWS[0]["text"])["input_ids"]])).logits.sigmoid()[0]
    assert scores.tolist() == pytest.approx(list(rows[0]["probabilities"].values()), abs=1e-5)


def test_several_targets_fit_and_predict(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scores = {"good": (1, 0), "great": (2, 1), "bad": (-1, 0), "awful": (-2, 1), "well": (0, 0)}
    rows = [{"text": text_of(at, word), "mood": m, "noise": n} for at in range(20) for word, (m, n) in scores.items()]
    file = write(tmp_path / "rows.csv", rows)
    data = ", regression: true, label_columns: [mood, noise]"
    Path("config.yaml").write_text(config(encoder, file, 4, data=data))
    assert command(monkeypatch, "fit", "--config", "config.yaml") == 0
    assert "best val_pearson" in capsys.readouterr().out
    best = str(next(Path("runs/version_0/checkpoints").glob("best*.ckpt")))
    given = ["--config", "runs/version_0/config.yaml", "--ckpt_path", best]
    assert command(monkeypatch, "test", *given) == 0
    assert all(f"test_{name}" in capsys.readouterr().out for name in ("r2",))
    assert command(monkeypatch, "predict", *given, "--data.predict", file, "--output", "out.jsonl") == 0
    first = json.loads(Path("out.jsonl").read_text().splitlines()[0])
    assert set(first["values"]) == {"mood", "noise"}


def test_a_resumed_run_ends_as_one_without_a_break(lists: str, encoder: Path, tmp_path: Path) -> None:
    def fit(folder: str, epochs: int, checkpoint: str | None = None) -> Any:
        pl.seed_everything(0)
        args = {"pos_weight": "balanced"}
        module = lit_peft.LoRA(
            base=str(encoder), task=TASK, r=2, lr_scheduler="constant", warmup_steps=0, task_args=args
        )
        data = TextClassificationData(train=lists, base=str(encoder), batch_size=16, max_length=16)
        trainer = pl.Trainer(**QUIET, max_epochs=epochs, default_root_dir=tmp_path / folder)
        trainer.fit(module, data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / folder / "end.ckpt")
        return module

    whole = fit("whole", 2)
    fit("half", 1)
    resumed = fit("resumed", 2, str(tmp_path / "half" / "end.ckpt"))
    for name, parameter in trained_of(whole.model).items():
        assert torch.equal(parameter, trained_of(resumed.model)[name]), name
    # A module that was loaded from a checkpoint is given its settings, and is not another one.
    module = lit_peft.LoRA.load_from_checkpoint(tmp_path / "half" / "end.ckpt")
    data = TextClassificationData(train=lists, base=str(encoder), batch_size=16, max_length=16)
    trainer = pl.Trainer(**QUIET, max_epochs=2, default_root_dir=tmp_path / "again")
    trainer.fit(module, data, ckpt_path=str(tmp_path / "half" / "end.ckpt"))


def test_examples_and_figures_are_shown(
    lists: str, encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--data", "TextClassificationData", "--data.train", lists, "--data.max_length", "16"]
    assert command(monkeypatch, "data", "--base", str(encoder), *settings, "--examples", "5") == 0
    printed = capsys.readouterr().out
    assert "kind, loud" in printed and "labels: " in printed
    streamed = [*settings, "--data.streaming", "true", "--data.labels", "[harsh,kind,loud]"]
    assert command(monkeypatch, "data", "--base", str(encoder), *streamed, "--examples", "5") == 0
    assert "kind, loud" in capsys.readouterr().out


@pytest.mark.heavy
def test_methods_are_compared(
    lists: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("compare.yaml").write_text(
        f"""
base: {encoder}
task: sequence_classification
data: {{class_path: TextClassificationData, init_args: {{train: {lists}, max_length: 16}}}}
methods: {{LoRA: {{r: 2}}, HeadOnly: {{}}}}
model: {{task_args: {{pos_weight: balanced}}}}
steps: 4
evaluations: 1
seeds: 1
trials: 1
output: results
"""
    )
    assert command(monkeypatch, "compare", "--config", "compare.yaml") == 0
    assert "micro_f1" in capsys.readouterr().out


@pytest.mark.heavy
@pytest.mark.parametrize(
    "kind", ["multi_label", "regression", "reward", "multi_label:one", "regression:one", "reward:one"]
)
def test_metrics_of_two_processes_are_those_of_one(kind: str, encoder: Path, lists: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("objective_run.py")
    found = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        arguments = [str(script), kind, str(encoder), lists, str(out)]
        done = subprocess.run([*launch, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(out.read_text()))
    assert found[0].keys() == found[1].keys() and len(found[0]) >= 4
    assert found[1] == pytest.approx(found[0], abs=1e-4, nan_ok=True)  # one row has no correlation
