"""GLUE and SuperGLUE by name, read from folders made here as `datasets` reads them from the hub; regression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from datasets import ClassLabel, Dataset, Features, Value

import lit_peft
from lit_peft import LitPeftError, TextClassificationData
from lit_peft.data.benchmarks import BENCHMARKS

TEXTS = ("the film is good", "this film is bad", "it was a great story", "it was a poor story")


def hub(folder: Path, name: str) -> str:
    """A dataset folder with that benchmark's columns and splits, and unknown labels in the test split."""
    known = BENCHMARKS[name]
    template = known.text + (known.text_pair or "")
    columns = [part.partition("}")[0] for part in template.split("{")[1:]]
    label = Value("float32") if known.regression else ClassLabel(names=["no", "yes"])
    features = Features({**{column: Value("string") for column in columns}, "label": label, "idx": Value("int32")})
    lines = ["---", "configs:", f"- config_name: {known.config}", "  data_files:"]
    for split, count in (("train", 16), (known.validation, 4), ("test", 4)):
        rows: dict[str, list[Any]] = {
            column: [f"{TEXTS[at % 4]} {column}" for at in range(count)] for column in columns
        }
        value = [at / 4 for at in range(count)] if known.regression else [at % 2 for at in range(count)]
        rows["label"], rows["idx"] = [-1] * count if split == "test" else value, [*range(count)]
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
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    assert module.task.monitor == (BENCHMARKS[name].monitor, "max")
    assert BENCHMARKS[name].monitor in trainer.callback_metrics
    rows = module.eval().predict_step(next(iter(data.test_dataloader())), 0)
    assert set(rows[0]) == ({"value"} if name == "glue/stsb" else {"label", "score", "probabilities"})


def test_wrong_names_and_numbers_are_told(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(LitPeftError, match="'glue/mrpc'"):
        TextClassificationData(base=str(encoder), benchmark="glue/mrcp")
    file = tmp_path / "a.csv"
    file.write_text("text,label\ngood film,1.5\nbad film,much\n")
    data = TextClassificationData(base=str(encoder), train=str(file), regression=True, validation_fraction=0)
    with pytest.raises(LitPeftError, match="row 2 has no number in column 'label'"):
        data.setup("fit")
