"""GLUE and SuperGLUE by name: where each is on the hub, its columns, and the metric it is judged by."""

from __future__ import annotations

from dataclasses import dataclass

from lit_peft.errors import LitPeftError, closest

GLUE, SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"


@dataclass(frozen=True)
class Benchmark:
    """One dataset of a benchmark.

    Attributes:
        dataset: its hub id.
        config: its configuration there.
        text: the text, as a template of columns.
        text_pair: the second text, in the same way.
        validation: the split to validate and test on; the labels of the test split are hidden.
        monitor: the metric that tells the best checkpoint.
        regression: whether labels are numbers to predict.
    """

    dataset: str
    config: str
    text: str
    text_pair: str | None = None
    validation: str = "validation"
    monitor: str = "val_accuracy"
    regression: bool = False


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
        SUPER_GLUE, "multirc", "{paragraph}", "{question} {answer}", monitor="val_binary_f1"
    ),
}


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of this name.

    Raises:
        LitPeftError: there is none.
    """
    if name not in BENCHMARKS:
        raise LitPeftError(
            f"data.benchmark {name!r} is not known: the closest are {closest(name, BENCHMARKS)}. (COPA is for "
            "MultipleChoiceData, with dataset=aps/super_glue, dataset_config=copa, context_column=premise, "
            "choice_columns=[choice1, choice2], answer_column=label.)"
        )
    return BENCHMARKS[name]
