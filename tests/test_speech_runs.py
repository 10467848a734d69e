"""Speech from YAML: the ready configuration through every command, resuming, several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_peft.callbacks import SampleGenerations
from models import QUIET
from speech_example import save_recordings, save_whisper, tokenizer

import lit_peft
from lit_peft import LitPeftError
from lit_peft.cli import main
from lit_peft.data import SpeechData

CONFIG = Path(__file__).parents[1] / "configs" / "speech.yaml"
QUICK = ["--trainer.enable_progress_bar", "false", "--trainer.check_val_every_n_epoch", "1"]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tools/speech_example.py writes, smaller."""
    folder = tmp_path_factory.mktemp("example")
    save_recordings(folder / "speech_example", 20)
    save_whisper(folder / "speech_example" / "whisper", width=16)
    return folder


def run(*arguments: Any) -> None:
    assert main([*map(str, arguments)]) == 0


def test_the_configuration_runs_through_every_command(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(example)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    run("fit", "--config", CONFIG, *QUICK, "--trainer.max_steps", 2)
    printed = capsys.readouterr().out
    assert "seconds of audio in 16 recordings" in printed and "resampled to 16000 Hz from 8000 Hz" in printed
    assert "best val_wer" in printed
    folder = next(Path("lit_peft_runs/speech").iterdir())
    checkpoint = next((folder / "checkpoints").glob("best*"))
    run("test", "--config", folder / "config.yaml", "--ckpt_path", checkpoint, *QUICK[:2])
    assert "test_wer" in capsys.readouterr().out
    given = ["--data.predict", "speech_example/000*.wav", "--output", "written.jsonl"]
    run("predict", "--config", folder / "config.yaml", "--ckpt_path", checkpoint, *QUICK[:2], *given)
    written = [json.loads(line) for line in Path("written.jsonl").read_text().splitlines()]
    assert [row["audio"] for row in written] == [f"speech_example/000{row}.wav" for row in range(10)]
    run("export", "--ckpt_path", checkpoint, "--output", "exported")
    run("merge", "--base", "speech_example/whisper", "--adapter", "exported", "--output", "merged")
    # The merged folder is a model of its own, with its processor.
    merged = transformers.WhisperForConditionalGeneration.from_pretrained("merged").eval()
    rows = SpeechData(base="merged", language="en", predict="speech_example/0000.wav")
    rows.setup("predict")
    batch = next(iter(rows.predict_dataloader()))
    out = merged.generate(batch["input_features"], language="en", task="transcribe", max_new_tokens=32, max_length=None)
    assert rows.tokenizer.decode(out[0], skip_special_tokens=True).strip() == written[0]["text"]
    capsys.readouterr()
    assert main(["generate", "--base", "merged", "--prompt", "hello"]) != 0
    assert "takes audio, not a prompt" in capsys.readouterr().err
    run("data", "--config", CONFIG)
    assert "<|en|><|transcribe|><|notimestamps|>" in capsys.readouterr().out


def test_init_writes_a_configuration_that_is_read(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(example)
    given = ["--task", "speech_seq2seq", "--base", "speech_example/whisper", "--method", "AdapterP"]
    run("init", *given, "--data", "speech_example/train.jsonl", "--output", "made.yaml")
    made = yaml.safe_load(Path("made.yaml").read_text())
    assert made["data"]["class_path"] == "SpeechData" and made["model"]["init_args"]["task"] == "speech_seq2seq"
    run("fit", "--config", "made.yaml", *QUICK, "--trainer.max_steps", 1, "--data.max_length", 64,
        "--model.generation", '{"max_new_tokens": 3}')  # fmt: skip


def fit(example: Path, steps: int, out: Path, resume: Path | None = None) -> Any:
    torch.manual_seed(0)
    folder = example / "speech_example"
    settings = {"base": str(folder / "whisper"), "task": "speech_seq2seq", "r": 4, "generation": {"max_new_tokens": 3}}
    module = lit_peft.LoRA(**settings, lr_scheduler="constant", warmup_steps=0)
    rows = SpeechData(base=settings["base"], train=str(folder / "train.jsonl"), language="en", batch_size=4)
    saver = ModelCheckpoint(out, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = pl.Trainer(**QUIET, max_steps=steps, default_root_dir=out, callbacks=[saver])
    trainer.fit(module, rows, ckpt_path=resume, weights_only=False)
    return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}


def test_a_resumed_run_ends_as_an_uninterrupted_one(example: Path, tmp_path: Path) -> None:
    whole = fit(example, 4, tmp_path / "whole")
    fit(example, 2, tmp_path / "parts")
    resumed = fit(example, 4, tmp_path / "parts", tmp_path / "parts" / "step=2.ckpt")
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.heavy
def test_two_processes_train_as_one(example: Path, tmp_path: Path) -> None:
    settings = {"strategy": "ddp_spawn", "devices": 2}
    torch.manual_seed(0)
    folder = example / "speech_example"
    given = {"base": str(folder / "whisper"), "task": "speech_seq2seq", "r": 4, "lr_scheduler": "constant"}
    found = []
    for batch_size, more in ((4, {}), (2, settings)):
        torch.manual_seed(0)
        module = lit_peft.LoRA(**given, warmup_steps=0, optimizer="SGD", learning_rate=1.0)
        rows = SpeechData(base=given["base"], train=str(folder / "train.jsonl"), language="en", batch_size=batch_size)
        trainer = pl.Trainer(**QUIET, max_steps=2, enable_checkpointing=False, limit_val_batches=0, **more)
        trainer.fit(module, rows)
        path = tmp_path / f"{batch_size}.ckpt"
        trainer.save_checkpoint(path)
        found.append(torch.load(path, weights_only=False)["state_dict"])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["HeadOnly", "FullFineTuning"])
def test_the_baselines_train(example: Path, method: str) -> None:
    folder = example / "speech_example"
    settings = {"base": str(folder / "whisper"), "task": "speech_seq2seq", "generation": {"max_new_tokens": 3}}
    if method == "HeadOnly":
        settings["modules_to_save"] = ["proj_out"]
    module = getattr(lit_peft, method)(**settings)
    rows = SpeechData(base=settings["base"], train=str(folder / "train.jsonl"), language="en")
    trainer = pl.Trainer(**QUIET, max_steps=1, limit_train_batches=1, enable_checkpointing=False)
    trainer.fit(module, rows)
    assert torch.isfinite(trainer.callback_metrics["val_loss"])


def test_gradients_are_the_same_with_activations_computed_again(example: Path) -> None:
    folder = example / "speech_example"
    rows = SpeechData(base=str(folder / "whisper"), train=str(folder / "train.jsonl"), language="en", batch_size=2)
    rows.setup("fit")
    batch = next(iter(rows.train_dataloader()))
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = lit_peft.LoRA(
            base=str(folder / "whisper"), task="speech_seq2seq", r=4, gradient_checkpointing=checkpointing
        )
        module.configure_model()
        module.training_step(batch, 0).backward()
        found.append([value.grad for value in module.parameters() if value.requires_grad])
    assert len(found[0]) == len(found[1]) > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_speech2text_trains_on_its_own_features(example: Path, tmp_path: Path) -> None:
    words = tokenizer()
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|nospeech|>"
    )
    ids = {"pad_token_id": plain.pad_token_id, "eos_token_id": 256, "bos_token_id": 257, "decoder_start_token_id": 256}
    parts = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = transformers.Speech2TextConfig(
        vocab_size=len(plain), d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, conv_channels=16,
        input_feat_per_channel=40, max_source_positions=400, max_target_positions=400, **parts, **ids,
    )  # fmt: skip
    base = tmp_path / "speech2text"
    transformers.Speech2TextForConditionalGeneration(config).save_pretrained(base)
    rows = SpeechData(base=str(base), train=str(example / "speech_example" / "train.jsonl"))
    extractor = transformers.Speech2TextFeatureExtractor(feature_size=40, num_mel_bins=40)
    rows.processor = SimpleNamespace(tokenizer=plain, feature_extractor=extractor, chat_template=None)
    module = lit_peft.LoRA(base=str(base), task="speech_seq2seq", r=4, generation={"max_new_tokens": 3})
    trainer = pl.Trainer(**QUIET, max_epochs=1, limit_train_batches=2, enable_checkpointing=False)
    trainer.fit(module, rows)
    batch = next(iter(rows.val_dataloader()))
    assert batch["input_features"].shape[2] == 40 and batch["attention_mask"].shape == batch["input_features"].shape[:2]
    assert torch.isfinite(trainer.callback_metrics["val_loss"])


def test_samples_of_texts_are_refused(example: Path) -> None:
    folder = example / "speech_example"
    module = lit_peft.LoRA(base=str(folder / "whisper"), task="speech_seq2seq")
    rows = SpeechData(base=str(folder / "whisper"), train=str(folder / "train.jsonl"), language="en")
    trainer = pl.Trainer(**QUIET, max_steps=1, enable_checkpointing=False, callbacks=[SampleGenerations(["hello"])])
    with pytest.raises(LitPeftError, match="the model takes audio"):
        trainer.fit(module, rows)
