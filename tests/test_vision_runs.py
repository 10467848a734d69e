"""Runs on images: the ready configuration through every command, metrics, weights of parts of a batch, resuming."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import QUIET, close, scramble
from small_vision_model import write
from transformers import AutoModelForImageTextToText
from vision_models import FAMILIES, batch_of, chats, data_of, model_of, processor_of

import lit_peft
from lit_peft.cli import main
from lit_peft.data import VisionLanguageData
from lit_peft.modules import LoRA
from lit_peft.tasks.base import Generation
from lit_peft.tasks.image_text_to_text import ImageTextToText
from lit_peft.util.errors import LitPeftError

CONFIG = str(Path(__file__).parents[1] / "configs" / "vision_language.yaml")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write(folder / "small_vision", 30)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats(tmp_path_factory.mktemp("chats"))


def test_the_configuration_runs(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    quick = ["--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", CONFIG, *quick, "--trainer.default_root_dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "towers:    language (" in shown and "22 images in 22 examples" in shown


@pytest.mark.heavy
def test_the_configuration_goes_through_every_command(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", "runs"]
    assert main(["fit", "--config", CONFIG, "--trainer.max_epochs", "1", "--data.batch_size", "8", *quiet]) == 0
    run = work / "runs" / "version_0"
    checkpoint = next((run / "checkpoints").glob("best*.ckpt"))
    again = ["--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint), *quiet[:2]]
    assert main(["test", *again]) == 0
    assert "test_exact_match" in capsys.readouterr().out
    rows = [json.loads(line) for line in (work / "runs/version_1/test_predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and {"prompt", "text", "reference", "correct"} <= set(rows[0])
    assert main(["predict", *again, "--data.predict", "small_vision/test.jsonl"]) == 0
    predictions = [json.loads(line) for line in (work / "runs/version_2/predictions.jsonl").read_text().splitlines()]
    assert [row["text"] for row in predictions] == [row["text"] for row in rows]
    assert predictions[0]["prompt"].endswith("assistant\n") and "<image>" not in predictions[0]["prompt"]
    capsys.readouterr()
    assert main(["data", "--config", CONFIG]) == 0
    shown = capsys.readouterr().out
    assert "<image>Which colour does it have?" in shown and "packed" not in shown
    assert main(["export", "--ckpt_path", str(checkpoint), "--output", "exported"]) == 0
    assert main(["merge", "--base", "small_vision/base", "--adapter", "exported", "--output", "merged"]) == 0
    assert (work / "merged" / "processor_config.json").is_file()
    data = VisionLanguageData(base="merged", train="small_vision/train.jsonl", predict="small_vision/test.jsonl")
    model = AutoModelForImageTextToText.from_pretrained("merged")
    texts = [
        row["text"]
        for batch in data.predict_dataloader()
        for row in ImageTextToText().predict(model, batch, Generation(lambda: data.tokenizer, {}, None))
    ]
    assert texts == [row["text"] for row in rows]


def test_init_writes_a_configuration(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    given = ["--task", "image_text_to_text", "--base", "small_vision/base", "--method", "PromptTuning"]
    assert main(["init", *given, "--data", "small_vision/train.jsonl", "--output", "init.yaml"]) == 0
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    quick = ["--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", "init.yaml", *quick, "--trainer.default_root_dir", "init_runs"]) == 0


def module_of(base: Path, **settings: Any) -> LoRA:
    return LoRA(base=str(base), task="image_text_to_text", r=2, learning_rate=1e-2, **settings)


def test_resuming_gives_the_weights_of_the_whole_run(work: Path, tmp_path: Path) -> None:
    base = work / "small_vision" / "base"

    def trained(path: str | None = None) -> dict[str, torch.Tensor]:
        pl.seed_everything(0)
        data = VisionLanguageData(base=str(base), train=str(work / "small_vision/train.jsonl"), batch_size=4)
        module = module_of(base, target_modules="all")
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = pl.Trainer(max_steps=9, callbacks=[saver], default_root_dir=tmp_path, **QUIET)
        trainer.fit(module, data, ckpt_path=path)
        return {name: value.clone() for name, value in module.state_dict().items()}

    whole = trained()
    resumed = trained(str(tmp_path / "step=4.ckpt"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_supervised_rows_is_the_models_own(family: str, file: Path) -> None:
    batch = batch_of(family, file)
    results = []
    for supervised in (True, False):
        model = model_of(family)
        torch.manual_seed(0)
        lit_peft.attach(model, lit_peft.LoRASettings(r=2, target_modules="all"))
        scramble(model)
        task = ImageTextToText()
        task.prepare(model)
        if supervised:
            with task.loss_only(model):
                output = task.forward(model, batch)
            assert output.logits is None
        else:
            output = task.forward(model, batch)
            shifted, labels = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
            close(output.loss, torch.nn.functional.cross_entropy(shifted, labels))
        loss = task.loss(output, batch)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        results.append((loss.detach(), gradients))
    close(results[0][0], results[1][0])
    for ours, own in zip(results[0][1], results[1][1], strict=True):
        close(ours, own, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_halves_of_a_batch_weigh_as_the_whole(family: str, file: Path) -> None:
    whole = batch_of(family, file)
    parts = []
    for rows in (slice(0, 3), slice(3, 6)):
        data = data_of(family, file)
        examples = data.examples("train")
        parts.append(data.collator("train")([examples[at] for at in range(rows.start, rows.stop)]))
    task, model = ImageTextToText(), model_of(family)
    task.prepare(model)
    with torch.no_grad():
        losses = [task.loss(task.forward(model, part), part) * task.weight(part) for part in parts]
        close(sum(losses) / task.weight(whole), task.loss(task.forward(model, whole), whole))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_from_a_batch_is_that_of_each_row_alone(family: str, file: Path) -> None:
    data = data_of(family, file, predict=str(file))
    examples = data.examples("predict")
    model, task = model_of(family), ImageTextToText()
    unwanted = [[token] for token in range(260, len(data.tokenizer))]
    settings = {"max_new_tokens": 4, "bad_words_ids": unwanted}
    collate = data.collator("predict")
    generation = Generation(lambda: data.tokenizer, settings, None)
    together = task.predict(model, collate([examples[at] for at in range(6)]), generation)
    alone = [task.predict(model, collate([examples[at]]), generation)[0] for at in range(6)]
    assert together == alone


def test_exact_match_and_rouge_of_generated_answers() -> None:
    class Answers:
        def generate(self, input_ids: Any, **_: Any) -> Any:
            answers = [processor.tokenizer(text)["input_ids"] for text in ("a red", "a big", "none!")]
            return torch.cat([input_ids, torch.tensor(answers)], 1)

    processor = processor_of("llava")
    task = ImageTextToText()
    metrics = task.metrics(None)
    batch = {"input_ids": torch.zeros(3, 2, dtype=torch.long), "references": ["a red ", "a red", "a red"]}
    rows = task.evaluate(Answers(), metrics, batch, Generation(lambda: processor.tokenizer, {}, None))
    assert rows is not None and [row["correct"] for row in rows] == [True, False, False]
    close(metrics["exact_match"].compute(), torch.tensor(1 / 3))
    close(metrics["rougeL"].compute(), torch.tensor((1 + 0.5 + 0) / 3))  # one of two words is right in the second
    assert not metrics["loss"].update_called


def test_packed_rows_and_data_of_other_tasks_are_refused(work: Path, file: Path) -> None:
    base = work / "small_vision" / "base"
    module = module_of(base)
    with pytest.raises(LitPeftError, match="has no use for InstructionData, whose rows are for 'causal_lm'"):
        module.check_data(lit_peft.data.InstructionData(train=str(file)))
    with pytest.raises(LitPeftError, match="needs an ImageTextToText model"):
        shutil.copytree(base, work / "text", dirs_exist_ok=True)
        settings = json.loads((work / "text" / "config.json").read_text())
        (work / "text" / "config.json").write_text(json.dumps(settings["text_config"]))
        module_of(work / "text").check()


def test_the_activation_cache_is_refused(work: Path, tmp_path: Path) -> None:
    from lit_peft.callbacks import ActivationCache

    base = work / "small_vision" / "base"
    data = VisionLanguageData(base=str(base), train=str(work / "small_vision/train.jsonl"), batch_size=4)
    trainer = pl.Trainer(max_steps=1, callbacks=[ActivationCache()], default_root_dir=tmp_path, **QUIET)
    with pytest.raises(LitPeftError, match="ActivationCache finds rows by their tokens"):
        trainer.fit(module_of(base), data)
