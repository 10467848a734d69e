"""The tasks of GLUE and SuperGLUE by name: their hub datasets, columns and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_peft.data.files import is_file
from lit_peft.util.errors import LitPeftError, closest

GLUE, SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"


@dataclass(frozen=True)
class Benchmark:
    """A task of a benchmark that classifies texts.

    Attributes:
        dataset: its hub id.
        config: its configuration there.
        text: the text, as a template of columns.
        text_pair: the second text, as a template of columns.
        validation: the split to validate and test on; the labels of the test split are hidden.
        monitor: the metric that selects the best checkpoint.
        regression: labels are numbers to predict.
        question: the columns that identify a question, if the answers to a question are also scored together; else ().
    """

    dataset: str
    config: str
    text: str
    text_pair: str | None = None
    validation: str = "validation"
    monitor: str = "val_accuracy"
    regression: bool = False
    question: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChoiceBenchmark:
    """A task of a benchmark with several choices for an answer.

    Attributes:
        dataset: its hub id.
        config: its configuration there.
        columns: settings of `MultipleChoiceData` -> their values.
        monitor: the metric that selects the best checkpoint.
    """

    dataset: str
    config: str
    columns: dict[str, Any]
    monitor: str = "val_accuracy"


def _glue(config: str, text: str, text_pair: str | None = None, **rest: str) -> Benchmark:
    return Benchmark(GLUE, config, text, text_pair, **rest)  # type: ignore[arg-type]


_SENTENCES = ("{sentence1}", "{sentence2}")
_PREMISE = ("{premise}", "{hypothesis}")

BENCHMARKS: dict[str, Benchmark] = {
    "glue/cola": _glue("cola", "{sentence}", monitor="val_mcc"),
    "glue/sst2": _glue("sst2", "{sentence}"),
    "glue/mrpc": _glue("mrpc", *_SENTENCES, monitor="val_binary_f1"),
    "glue/qqp": _glue("qqp", "{question1}", "{question2}", monitor="val_binary_f1"),
    "glue/stsb": Benchmark(GLUE, "stsb", *_SENTENCES, monitor="val_pearson", regression=True),
    "glue/mnli": _glue("mnli", *_PREMISE, validation="validation_matched"),
    "glue/mnli_mismatched": _glue("mnli", *_PREMISE, validation="validation_mismatched"),
    "glue/qnli": _glue("qnli", "{question}", "{sentence}"),
    "glue/rte": _glue("rte", *_SENTENCES),
    "glue/wnli": _glue("wnli", *_SENTENCES),
    "super_glue/boolq": Benchmark(SUPER_GLUE, "boolq", "{question}", "{passage}"),
    "super_glue/cb": Benchmark(SUPER_GLUE, "cb", *_PREMISE, monitor="val_f1"),
    "super_glue/rte": Benchmark(SUPER_GLUE, "rte", *_PREMISE),
    "super_glue/wic": Benchmark(SUPER_GLUE, "wic", "{word}: {sentence1}", "{sentence2}"),
    "super_glue/wsc": Benchmark(SUPER_GLUE, "wsc.fixed", "{text}", "{span2_text}: {span1_text}"),
    "super_glue/multirc": Benchmark(
        SUPER_GLUE,
        "multirc",
        "{paragraph}",
        "{question} {answer}",
        monitor="val_binary_f1",
        question=("paragraph", "question"),
    ),
}

CHOICE_BENCHMARKS: dict[str, ChoiceBenchmark] = {
    "super_glue/copa": ChoiceBenchmark(
        SUPER_GLUE,
        "copa",
        {"context_column": "premise", "choice_columns": ["choice1", "choice2"], "answer_column": "label"},
    ),
    "super_glue/record": ChoiceBenchmark(
        SUPER_GLUE,
        "record",
        {
            "context_column": "passage",
            "question_column": "query",
            "placeholder": "@placeholder",
            "choices_column": "entities",
            "answer_column": "answers",
        },
        monitor="val_f1",
    ),
}


def find_benchmark(name: str) -> Benchmark:
    """Return the text classification task of this name.

    Raises:
        LitPeftError: there is none.
    """
    return _look_up(name, BENCHMARKS, CHOICE_BENCHMARKS, "MultipleChoiceData")


def find_choice_benchmark(name: str) -> ChoiceBenchmark:
    """Return the multiple choice task of this name.

    Raises:
        LitPeftError: there is none.
    """
    return _look_up(name, CHOICE_BENCHMARKS, BENCHMARKS, "TextClassificationData")


def _look_up(name: str, known: dict[str, Any], others: dict[str, Any], module: str) -> Any:
    if name in others:
        raise LitPeftError(f"data.benchmark {name!r} is for {module}; use that data module.")
    if name not in known:
        raise LitPeftError(
            f"data.benchmark {name!r} is not known: the closest are {closest(name, {**known, **others})}."
        )
    return known[name]


def apply_benchmark(
    benchmark: Benchmark | ChoiceBenchmark, common: dict[str, Any], validation: str = "validation"
) -> None:
    """Add a benchmark's dataset and splits to a data module's settings, unless these name files.

    Args:
        benchmark: the benchmark.
        common: the settings, which are changed.
        validation: the split to validate and test on.
    """
    given = [common[split] for split in ("train", "validation", "test") if common.get(split)]
    if common.get("dataset") is None and any(map(is_file, given)):
        return
    splits = {"validation": validation, "test": validation}
    for name, value in {"dataset": benchmark.dataset, "dataset_config": benchmark.config, **splits}.items():
        if common.get(name) is None:
            common[name] = value
