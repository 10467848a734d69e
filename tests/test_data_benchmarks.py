"""GLUE and SuperGLUE by name, read from folders made here as `datasets` reads them from the hub; regression."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import WORDS
from datasets import ClassLabel, Dataset, Features, Value
from models import QUIET

import lit_peft
from lit_peft import LitPeftError, MultipleChoiceData, TextClassificationData
from lit_peft.data.benchmarks import BENCHMARKS, CHOICE_BENCHMARKS
from lit_peft.tasks import find_task
from lit_peft.tasks.sequence_classification import QuestionsRight

pytestmark = pytest.mark.usefixtures("new_cache")
TEXTS = ("the film is good", "this film is bad", "it was a great story", "it was a poor story")


def written(file: Path, rows: list[dict[str, Any]]) -> str:
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text(json.dumps(rows) if file.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def hub(folder: Path, name: str) -> str:
    """A dataset folder with that benchmark's columns and splits, and unknown labels in the test split."""
    known = BENCHMARKS[name]
    template = known.text + (known.text_pair or "")
    columns = [part.partition("}")[0] for part in template.split("{")[1:]]
    label = Value("float32") if known.regression else ClassLabel(names=["no", "yes"])
    idx = {part: Value("int32") for part in ("paragraph", "question", "answer")} if known.question else Value("int32")
    features = Features({**{column: Value("string") for column in columns}, "label": label, "idx": idx})
    lines = ["---", "configs:", f"- config_name: {known.config}", "  data_files:"]
    for split, count in (("train", 16), (known.validation, 4), ("test", 4)):
        rows: dict[str, list[Any]] = {
            column: [f"{TEXTS[at % 4]} {column}" for at in range(count)] for column in columns
        }
        value = [at / 4 for at in range(count)] if known.regression else [at % 2 for at in range(count)]
        rows["label"], rows["idx"] = [-1] * count if split == "test" else value, [*range(count)]
        if known.question:
            rows["idx"] = [{"paragraph": at // 4, "question": at // 2, "answer": at} for at in range(count)]
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
        lines += [f"  - split: {split}", f"    path: {split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_read(name: str, encoder: Path, tmp_path: Path) -> None:
    data = TextClassificationData(base=str(encoder), benchmark=name, dataset=hub(tmp_path, name), batch_size=4)
    data.setup("fit")
    data.setup("test")
    known = BENCHMARKS[name]
    assert len(data.examples("train")) == 16 and len(data.examples("validation")) == len(data.examples("test")) == 4
    assert data.label_names == (None if known.regression else ["no", "yes"])
    assert data.num_labels == (1 if known.regression else 2)
    batch = next(iter(data.test_dataloader()))
    expected = [0, 0.25, 0.5, 0.75] if known.regression else [0, 1, 0, 1]
    assert batch["labels"].tolist() == expected and batch["labels"].is_floating_point() == known.regression
    cells = {column: f"{TEXTS[0]} {column}" for column in data.rows["test"].table.column_names}
    parts = [text.format(**cells) for text in (known.text, known.text_pair) if text]
    assert batch["input_ids"][0][batch["attention_mask"][0] == 1].tolist() == data.tokenizer(*parts)["input_ids"]


@pytest.mark.parametrize("name", ["glue/stsb", "glue/cola"])
def test_a_benchmark_trains_and_tells_its_metric(name: str, encoder: Path, tmp_path: Path) -> None:
    data = TextClassificationData(base=str(encoder), benchmark=name, dataset=hub(tmp_path, name), batch_size=4)
    module = lit_peft.HeadOnly(base=str(encoder), task="sequence_classification")
    trainer = pl.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data)
    assert module.task.monitor == (BENCHMARKS[name].monitor, "max")
    assert BENCHMARKS[name].monitor in trainer.callback_metrics
    rows = module.eval().predict_step(next(iter(data.test_dataloader())), 0)
    assert set(rows[0]) == ({"value"} if name == "glue/stsb" else {"label", "score", "probabilities"})


def multirc(paragraph: int, question: int, answers: str) -> list[dict[str, Any]]:
    """A question's answers as rows of the hub's columns; "10" is a right one and a wrong one."""
    return [
        {
            "paragraph": TEXTS[paragraph],
            "question": f"what is {WORDS[question]}",
            "answer": WORDS[at],
            "idx": {"paragraph": paragraph, "question": question, "answer": at},
            "label": int(label),
        }
        for at, label in enumerate(answers)
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_multirc_is_judged_by_question_and_by_answer(suffix: str, encoder: Path, tmp_path: Path) -> None:
    """F1a and exact match by their definitions, over answers that are spread over several batches, out of order."""
    rows = [*multirc(0, 0, "101"), *multirc(0, 1, "0"), *multirc(1, 0, "11"), *multirc(1, 1, "0100")]
    rows = rows[::2] + rows[1::2]
    file = written(tmp_path / f"a.{suffix}", rows)
    settings: dict[str, Any] = {"base": str(encoder), "batch_size": 3, "benchmark": "super_glue/multirc"}
    data = TextClassificationData(train=file, validation=file, test=file, **settings)
    module = lit_peft.HeadOnly(base=str(encoder), task="sequence_classification")
    pl.seed_everything(1)
    trainer = pl.Trainer(enable_checkpointing=False, **QUIET)
    [found] = trainer.test(module, data, verbose=False)
    module.eval()
    batches = [*data.test_dataloader()]
    with torch.no_grad():
        got = [int(label) for batch in batches for label in module(**batch).logits.argmax(-1)]
    gold = [row["label"] for row in rows]
    assert len(set(got)) == 2
    same = {(row["idx"]["paragraph"], row["idx"]["question"]): [] for row in rows}  # type: ignore[var-annotated]
    for row, label in zip(rows, got, strict=True):
        same[row["idx"]["paragraph"], row["idx"]["question"]].append(label == row["label"])
    assert found["test_exact_match"] == pytest.approx(sum(map(all, same.values())) / 4)
    both = sum(one and other for one, other in zip(gold, got, strict=True))
    assert found["test_binary_f1"] == pytest.approx(2 * both / (sum(gold) + sum(got)))
    assert data.monitor == ("val_binary_f1", "max")
    # Validation and training share no paragraph.
    held = TextClassificationData(train=file, validation_fraction=0.5, **settings)
    held.setup("fit")
    parts = [{rows[at]["paragraph"] for at in held.rows[split].indices} for split in ("train", "validation")]
    assert all(parts) and not parts[0] & parts[1]


def test_questions_right_at_any_precision() -> None:
    """Numbers of questions stay apart on devices without float64, and while modules are made in half precision."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        metric = QuestionsRight()
        metric.update(torch.tensor([True, False, True]), [300, 301, 2**24 - 1])
        assert metric.dtype == metric.compute().dtype == torch.float32
        assert metric.compute().item() == pytest.approx(2 / 3)
    finally:
        torch.set_default_dtype(torch.float32)


def test_questions_right_by_counting() -> None:
    draw = random.Random(0)
    for _ in range(50):
        rows = [(draw.randrange(5), draw.random() < 0.7) for _ in range(draw.randint(1, 20))]
        metric = QuestionsRight()
        for part in (rows[::3], rows[1::3], rows[2::3]):
            metric.update(torch.tensor([right for _, right in part]), [number for number, _ in part])
        numbers = {number for number, _ in rows}
        whole = [all(right for at, right in rows if at == number) for number in numbers]
        assert metric.compute().item() == pytest.approx(sum(whole) / len(numbers))


RECORD = [
    {
        "passage": "the film of Ann was good\n@highlight\nBob was bad",
        "query": "it was @placeholder who was great",
        "entities": entities,
        "entity_spans": {"text": ["Ann"], "start": [12], "end": [15]},
        "answers": answers,
        "idx": {"passage": 0, "query": at},
    }
    for at, (entities, answers) in enumerate(
        [
            (["good", "bad"], ["bad"]),
            (["the good film", "bad", "story"], ["Good film!", "good"]),
            (["weak story", "a poor story", "great acting"], ["weak story", "poor story"]),
            (["film"], ["film"]),
        ]
    )
]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_record_is_judged_by_the_chosen_entity(suffix: str, encoder: Path, tmp_path: Path) -> None:
    file = written(tmp_path / f"a.{suffix}", RECORD)
    settings: dict[str, Any] = {"base": str(encoder), "batch_size": 3, "benchmark": "super_glue/record"}
    data = MultipleChoiceData(train=file, validation=file, test=file, predict=file, **settings)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert batch["choices"].tolist() == [2, 3, 3]
    assert batch["labels"].tolist() == [[False, True, False], [True, False, False], [True, True, False]]
    ids = batch["input_ids"][3][batch["attention_mask"][3] == 1].tolist()
    assert ids == data.tokenizer(RECORD[0]["passage"], "it was bad who was great")["input_ids"]
    task = find_task("multiple_choice")
    metrics = task.metrics(None)
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 2.0, 1.0], [1.0, 0.5, 2.0]])
    # bad: right; bad: neither word of "good film"; great acting: no word of any.
    output = SimpleNamespace(logits=logits, loss=torch.tensor(1.0))
    task.update(metrics, output, batch)
    assert [metrics[name].compute().item() for name in ("exact_match", "f1")] == pytest.approx([1 / 3, 1 / 3])
    # The good film: all of "good film"; a poor story: right, though it is the second gold.
    output.logits = torch.tensor([[1.0, 0.0, -torch.inf], [1.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
    task.update(metrics, output, batch)
    assert [metrics[name].compute().item() for name in ("exact_match", "f1", "accuracy")] == pytest.approx([0.5] * 3)
    output.logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    batch["answers"][2], before = ["acting"], metrics["f1"].compute().item() * 6
    task.update(metrics, output, batch)
    # "great acting" against "acting": one word of two, and of one.
    assert metrics["f1"].compute().item() * 9 == pytest.approx(before + 1 + 0 + 2 / 3)
    assert metrics["exact_match"].compute().item() * 9 == pytest.approx(3 + 1)


def test_the_loss_is_that_of_any_right_choice(encoder: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", RECORD)
    data = MultipleChoiceData(base=str(encoder), train=file, validation=file, benchmark="super_glue/record")
    data.setup("fit")
    module = lit_peft.HeadOnly(base=str(encoder), task="multiple_choice")
    module.configure_model()
    batch = data.collator("validation")([*data.examples("validation")])
    output = module.eval()(**batch)
    terms = []
    for scores, right in zip(output.logits.tolist(), ([1], [0], [0, 1], [0]), strict=True):
        powers = [math.exp(score) for score in scores]
        terms.append(-math.log(sum(powers[at] for at in right) / sum(powers)))
    assert output.loss.item() == pytest.approx(sum(terms) / 4, abs=1e-5)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", CHOICE_BENCHMARKS)
def test_a_choice_benchmark_trains_tests_and_predicts(name: str, encoder: Path, tmp_path: Path) -> None:
    copa = [
        {"premise": t, "choice1": "good", "choice2": "bad", "question": "cause", "idx": 0, "label": 1} for t in TEXTS
    ]
    rows = RECORD if name.endswith("record") else copa
    known = CHOICE_BENCHMARKS[name]
    lines = ["---", "configs:", f"- config_name: {known.config}", "  data_files:"]
    for split in ("train", "validation", "test"):
        written(tmp_path / f"{split}.parquet", rows)
        lines += [f"  - split: {split}", f"    path: {split}.parquet"]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", ""]))
    file = written(tmp_path / "a.jsonl", [{k: v for k, v in r.items() if k not in ("label", "answers")} for r in rows])
    data = MultipleChoiceData(base=str(encoder), benchmark=name, dataset=str(tmp_path), predict=file, batch_size=3)
    module = lit_peft.HeadOnly(base=str(encoder), task="multiple_choice")
    trainer = pl.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data)
    assert module.task.monitor[0] == known.monitor in trainer.callback_metrics
    metrics = {"test_loss", "test_accuracy", *(["test_exact_match", "test_f1"] if name.endswith("record") else [])}
    assert set(trainer.test(module, data, verbose=False)[0]) == metrics
    predicted = [row for batch in trainer.predict(module, data) or () for row in batch]
    choices = [row.get("entities", ["good", "bad"]) for row in rows]
    assert [row["text"] for row in predicted] == [c[row["choice"]] for c, row in zip(choices, predicted, strict=True)]
    assert len(predicted) == len(rows)


def test_wrong_cloze_rows_are_reported(encoder: Path, tmp_path: Path) -> None:
    wrong = {
        "row 2: column 'query' has no '@placeholder'": {"query": "it was good"},
        "row 2: none of the answers .'Eve'. in column 'answers' is one of the 3 choices": {"answers": ["Eve"]},
        "row 2 has 0 choice": {"entities": []},
        "row 2: none of the answers .. in column": {"answers": []},
        "row 2: column 'answers' is 'good', but other rows have lists": {"answers": "good"},
        "row 2: column 'answers' is None, but other rows have lists": {"answers": None},
    }
    for said, changed in wrong.items():
        file = written(tmp_path / "a.jsonl", [RECORD[0], {**RECORD[1], **changed}])
        data = MultipleChoiceData(base=str(encoder), test=file, benchmark="super_glue/record")
        with pytest.raises(LitPeftError, match=said):
            data.setup("test")
    with pytest.raises(LitPeftError, match="'super_glue/copa' is for MultipleChoiceData"):
        TextClassificationData(base=str(encoder), benchmark="super_glue/copa")
    with pytest.raises(LitPeftError, match="'super_glue/cb' is for TextClassificationData"):
        MultipleChoiceData(base=str(encoder), benchmark="super_glue/cb")


# Configuration -> the lines of GLUE's own tsv file, and its texts and labels. Quotes are a part of the text.
GLUE_FILES: dict[str, tuple[list[str], list[tuple[Any, ...]]]] = {
    "cola": (
        ["gj04|1||the film is good", 'gj04|0|*|"the film bad is'],
        [("the film is good", 1), ('"the film bad is', 0)],
    ),
    "sst2": (["sentence|label", '"a good film |1', "a bad film |0"], [('"a good film ', 1), ("a bad film ", 0)]),
    "mrpc": (
        ["\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String", '1|7|8|"it was good|it is good', "0|7|8|good|bad"],
        [('"it was good', "it is good", 1), ("good", "bad", 0)],
    ),
    "stsb": (
        [
            "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
            "0|g|f|y|1|s|s|good|great|4.5",
        ],
        [("good", "great", 4.5)],
    ),
    "qqp": (
        ["id|qid1|qid2|question1|question2|is_duplicate", "0|1|2|good|great|1", "1|3|4|good", "2|5|6|good|bad|0"],
        [("good", "great", 1), ("good", "bad", 0)],
    ),
    "mnli": (
        [
            "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse|"
            "sentence1|sentence2|label1|gold_label",
            "0|1|2|g|( a )|( b )|(R a)|(R b)|it is good|it is bad|neutral|contradiction",
            "1|1|2|g|( a )|( b )|(R a)|(R b)|it is good|it is great|neutral|neutral",
        ],
        [("it is good", "it is bad", "contradiction"), ("it is good", "it is great", "neutral")],
    ),
    "qnli": (
        ["index|question|sentence|label", '0|is it|"it is|entailment', "1|is it|good|not_entailment"],
        [("is it", '"it is', "entailment"), ("is it", "good", "not_entailment")],
    ),
    "rte": (
        ["index|sentence1|sentence2|label", "0|good|great|entailment", "1|good|bad|not_entailment"],
        [("good", "great", "entailment"), ("good", "bad", "not_entailment")],
    ),
    "wnli": (
        ["index|sentence1|sentence2|label", "0|good|great|1", "1|good|bad|0"],
        [("good", "great", 1), ("good", "bad", 0)],
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("config", GLUE_FILES)
def test_glues_own_files_are_read(config: str, streaming: bool, encoder: Path, tmp_path: Path) -> None:
    lines, rows = GLUE_FILES[config]
    file = tmp_path / "train.tsv"
    file.write_text("".join(line.replace("|", "\t") + "\n" for line in lines))
    settings: dict[str, Any] = {"benchmark": f"glue/{config}", "train": str(file), "batch_size": 4}
    labels = sorted({row[-1] for row in rows})
    if streaming:
        settings |= {
            "streaming": True,
            "shuffle_buffer": 1,
            **({} if config == "stsb" else {"labels": [*map(str, labels)]}),
        }
    data = TextClassificationData(base=str(encoder), validation_fraction=0, **settings)
    batch = next(iter(data.train_dataloader()))
    got = sorted(
        (ids[mask == 1].tolist(), label)
        for ids, mask, label in zip(
            *(batch[key] for key in ("input_ids", "attention_mask")), batch["labels"].tolist(), strict=True
        )
    )
    numbers = [row[-1] if config == "stsb" else labels.index(row[-1]) for row in rows]
    assert got == sorted(
        (data.tokenizer(*row[:-1])["input_ids"], number) for row, number in zip(rows, numbers, strict=True)
    )
    # The test files have no labels.
    if config not in ("cola", "stsb"):
        bare = [line.rpartition("|")[0] for line in lines]
        file.write_text("".join(line.replace("|", "\t") + "\n" for line in bare))
        other = TextClassificationData(base=str(encoder), benchmark=f"glue/{config}", test=str(file), labels=["0", "1"])
        if config != "mrpc":
            with pytest.raises(LitPeftError, match=r"has no column 'label'.*test files come without labels"):
                other.setup("test")


SPAN = {"span1_index": 0, "span2_index": 2, "span1_text": "film", "span2_text": "it"}
PASSAGE = "the film of Ann was good\n@highlight\nBob was bad"
# Benchmark -> a line of SuperGLUE's own file, and the rows that the hub has of it.
SUPER_GLUE_FILES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "boolq": (
        {"question": "is it", "passage": "it is good", "idx": 0, "label": True},
        [{"question": "is it", "passage": "it is good", "label": True}],
    ),
    "cb": (
        {"premise": "good", "hypothesis": "bad", "label": "contradiction", "idx": 0},
        [{"premise": "good", "hypothesis": "bad", "label": "contradiction"}],
    ),
    "rte": (
        {"premise": "good", "hypothesis": "great", "label": "entailment", "idx": 0},
        [{"premise": "good", "hypothesis": "great", "label": "entailment"}],
    ),
    "wic": (
        {
            "word": "film",
            "sentence1": "a film",
            "sentence2": "the film",
            "idx": 0,
            "label": False,
            "start1": 2,
            "end1": 6,
            "version": 1.1,
        },
        [{"word": "film", "sentence1": "a film", "sentence2": "the film", "label": False}],
    ),
    "wsc": (
        {"text": "film is it", "target": SPAN, "idx": 0, "label": True},
        [{"text": "film is it", "span1_text": "film", "span2_text": "it", "label": True}],
    ),
    "copa": (
        {"premise": "it was", "choice1": "good", "choice2": "bad", "question": "cause", "label": 1, "idx": 0},
        [{"premise": "it was", "choice1": "good", "choice2": "bad", "question": "cause", "label": 1}],
    ),
    "multirc": (
        {
            "idx": 5,
            "version": 1.1,
            "passage": {
                "text": "a good film",
                "questions": [
                    {
                        "idx": 7,
                        "question": "is it",
                        "answers": [{"idx": 1, "text": "good", "label": 1}, {"idx": 2, "text": "bad", "label": 0}],
                    },
                    {"idx": 8, "question": "was it", "answers": [{"idx": 3, "text": "poor", "label": 0}]},
                ],
            },
        },
        [
            {
                "paragraph": "a good film",
                "question": q,
                "answer": a,
                "label": right,
                "idx": {"paragraph": 5, "question": n, "answer": m},
            }
            for q, a, right, n, m in (
                ("is it", "good", 1, 7, 1),
                ("is it", "bad", 0, 7, 2),
                ("was it", "poor", 0, 8, 3),
            )
        ],
    ),
    "record": (
        {
            "source": "CNN",
            "passage": {
                "text": PASSAGE,
                "entities": [{"start": 36, "end": 38}, {"start": 12, "end": 14}, {"start": 12, "end": 14}],
            },
            "idx": 0,
            "qas": [
                {
                    "idx": 0,
                    "query": "it was @placeholder",
                    "answers": [{"start": 12, "end": 14, "text": "Ann"}, {"start": 12, "end": 14, "text": "Ann"}],
                },
                {"idx": 1, "query": "@placeholder was bad", "answers": [{"start": 36, "end": 38, "text": "Bob"}]},
            ],
        },
        [
            {"passage": PASSAGE, "query": "it was @placeholder", "entities": ["Ann", "Bob"], "answers": ["Ann"]},
            {"passage": PASSAGE, "query": "@placeholder was bad", "entities": ["Ann", "Bob"], "answers": ["Bob"]},
        ],
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", SUPER_GLUE_FILES)
def test_super_glues_own_files_are_read(name: str, streaming: bool, encoder: Path, tmp_path: Path) -> None:
    line, rows = SUPER_GLUE_FILES[name]
    known = f"super_glue/{name}"
    kind = MultipleChoiceData if known in CHOICE_BENCHMARKS else TextClassificationData
    settings: dict[str, Any] = {"base": str(encoder), "benchmark": known, "max_length": 64, "batch_size": 8}
    if kind is TextClassificationData:
        settings["labels"] = (
            ["false", "true"]
            if name in ("boolq", "wic", "wsc")
            else ["0", "1"]
            if name == "multirc"
            else ["contradiction", "entailment"]
        )
    streamed = {"streaming": True, "shuffle_buffer": 1} if streaming else {"validation_fraction": 0}

    def batches(file: str) -> list[Any]:
        data = kind(train=file, validation=file, **settings, **streamed)
        return [next(iter(loader)) for loader in (data.train_dataloader(), data.val_dataloader())]

    own, hubs = (batches(written(tmp_path / f"{at}.jsonl", given)) for at, given in enumerate(([line], rows)))
    order = [batch["input_ids"].tolist() for batch in hubs]
    for mine, wanted, ids in zip(own, hubs, order, strict=True):
        assert set(mine) == set(wanted) and sorted(mine["input_ids"].tolist()) == sorted(ids)
    for key, value in hubs[1].items():
        assert torch.equal(own[1][key], value) if isinstance(value, torch.Tensor) else own[1][key] == value, key
    # Its test file has no labels: testing refuses it, prediction reads it.
    text = json.dumps(line).replace('"label"', '"other"').replace('"answers": [{"start"', '"others": [{"start"')
    bare = written(tmp_path / "test.jsonl", [json.loads(text)])
    with pytest.raises(LitPeftError, match="test files come without labels"):
        kind(test=bare, **settings).setup("test")
    # Neither the hub's training split nor a file is read for that.
    assert len(kind(predict=bare, **settings).examples("predict")) == len(rows)


def test_broken_files_of_super_glue_are_reported(encoder: Path, tmp_path: Path) -> None:
    for name in ("multirc", "record", "wsc"):
        line = json.loads(json.dumps(SUPER_GLUE_FILES[name][0]))
        nested = line["target" if name == "wsc" else "passage"]
        del nested["span1_text" if name == "wsc" else "text"]
        kind = MultipleChoiceData if name == "record" else TextClassificationData
        data = kind(base=str(encoder), test=written(tmp_path / f"{name}.jsonl", [line]), benchmark=f"super_glue/{name}")
        with pytest.raises(LitPeftError, match=r"the benchmark's own files: '(text|span1_text)' is None"):
            data.setup("test")


def test_wrong_names_and_numbers_are_reported(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(LitPeftError, match="'glue/mrpc'"):
        TextClassificationData(base=str(encoder), benchmark="glue/mrcp")
    file = tmp_path / "a.csv"
    file.write_text("text,label\ngood film,1.5\nbad film,much\n")
    data = TextClassificationData(base=str(encoder), train=str(file), regression=True, validation_fraction=0)
    with pytest.raises(LitPeftError, match="row 2 has no number in column 'label'"):
        data.setup("fit")
