"""Speech recognition: batches, losses and gradients beside peft's, error rates, methods, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import peft
import pytest
import torch
import transformers
from datasets import Audio, Dataset, Features, Value
from lit_peft.callbacks import PredictionWriter
from models import METHODS, QUIET
from scipy.signal import resample_poly
from speech_example import RATE, save_recordings, save_whisper, speak, tokenizer, write_wav

import lit_peft
from lit_peft import LitPeftError
from lit_peft.data import SpeechData
from lit_peft.tasks import find_task
from lit_peft.tasks.base import Generation
from lit_peft.tasks.speech import basic_form

ADAPTING = ["LoRA", "IA3", "AdapterH", "AdapterP", "Parallel", "PrefixTuning", "PTuningV2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("whisper"), width=16)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_recordings(tmp_path_factory.mktemp("recordings"), 8)


def data(base: Path, table: Any, **settings: Any) -> Any:
    table = None if table is None else str(table)
    given = {"train": table, "validation": table, "test": table, "batch_size": 4, "language": "de", **settings}
    found = SpeechData(base=str(base), **given)
    found.drops_overlap = False  # the splits are the same file
    return found


def make(base: Path, method: str = "LoRA", **settings: Any) -> Any:
    torch.manual_seed(0)
    return getattr(lit_peft, method)(base=str(base), task="speech_seq2seq", **{**METHODS[method], **settings})


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def first_batch(module: Any, split: str = "train") -> Any:
    module.setup({"train": "fit", "validation": "validate"}.get(split, split))
    return next(iter(module.train_dataloader() if split == "train" else module.val_dataloader()))


def test_a_batch_has_whispers_features_and_labels_without_the_start(base: Path, table: Path) -> None:
    batch = first_batch(data(base, table), "validation")
    rows = [json.loads(line) for line in table.read_text().splitlines()][:4]
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(base)
    words = tokenizer()
    words.set_prefix_tokens(language="german", task="transcribe")
    for index, row in enumerate(rows):
        ids = words(row["text"]).input_ids
        labels = [label for label in batch["labels"][index].tolist() if label != -100]
        assert ids[0] == words.convert_tokens_to_ids("<|startoftranscript|>")
        assert labels == ids[1:]
        assert batch["decoder_prompt"][index].tolist() == words.prefix_tokens
        samples = speak(row["text"], index)
        theirs = resample_poly(samples, 2, 1, window=("kaiser", 12.0)).astype(np.float32)
        expected = extractor(theirs, sampling_rate=16000, return_tensors="np").input_features[0]
        # The two filters differ near half of the recording's rate, where there is only noise.
        assert np.abs(batch["input_features"][index].numpy() - expected)[:40].max() < 0.1
    assert batch["references"] == [row["text"] for row in rows]
    assert batch["input_features"].shape == (4, 80, 200) and batch["attention_mask"].shape == (4, 200)


def test_recordings_at_the_models_rate_give_exactly_the_extractors_features(base: Path, tmp_path: Path) -> None:
    samples = (np.random.default_rng(0).normal(0, 0.1, 20_000) * 32767).astype("<i2") / 2**15
    rows = [{"audio": {"array": samples.tolist(), "sampling_rate": 16000}, "text": "yes"}]
    batch = first_batch(data(base, write(tmp_path / "a.jsonl", rows), validation=None, validation_fraction=0.0))
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(base)
    expected = extractor(samples.astype(np.float32), sampling_rate=16000, return_tensors="pt").input_features
    assert torch.equal(batch["input_features"], expected)
    assert "references" not in batch and "decoder_prompt" not in batch


def test_loss_and_gradients_of_lora_equal_pefts(base: Path, table: Path) -> None:
    module = make(base, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian", lora_alpha=8)
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    batch = first_batch(data(base, table), "validation")
    loss = module.training_step(batch, 0)
    loss.backward()
    plain = transformers.WhisperForConditionalGeneration.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(plain, config)
    own = {name.removeprefix("model."): value for name, value in module.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
                parameter.copy_(own[key])
    expected = theirs(input_features=batch["input_features"], labels=batch["labels"]).loss
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-6
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            torch.testing.assert_close(own[key].grad, parameter.grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == len(own) == 24


def test_the_folder_is_read_by_peft(base: Path, table: Path, tmp_path: Path) -> None:
    module = make(base)
    module.configure_model()
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, module.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    lit_peft.save_adapter(module.model, tmp_path / "adapter")
    batch = first_batch(data(base, table))
    plain = transformers.WhisperForConditionalGeneration.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    module.eval()
    with torch.no_grad():
        given = {"input_features": batch["input_features"], "labels": batch["labels"]}
        torch.testing.assert_close(theirs(**given).logits, module(**batch).logits, rtol=1e-5, atol=1e-5)
        merged = lit_peft.merge(copy.deepcopy(module.model))
        torch.testing.assert_close(merged(**given).logits, module(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ADAPTING)
def test_every_method_trains_and_its_folder_gives_the_same_transcripts(
    base: Path, table: Path, tmp_path: Path, method: str
) -> None:
    module, rows = make(base, method, learning_rate=0.05), data(base, table)
    trainer = pl.Trainer(**QUIET, max_steps=2, default_root_dir=tmp_path, enable_checkpointing=False)
    trainer.fit(module, rows)
    assert {"val_loss", "val_wer", "val_cer"} <= set(trainer.callback_metrics)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained and not any("conv" in name for name in trained)
    lit_peft.save_adapter(module.model, tmp_path / "adapter")
    plain = transformers.WhisperForConditionalGeneration.from_pretrained(base)
    loaded = lit_peft.load_adapter(plain, tmp_path / "adapter").eval()
    batch = first_batch(rows, "validation")
    module.eval()
    with torch.no_grad():
        given = {"input_features": batch["input_features"], "labels": batch["labels"]}
        torch.testing.assert_close(loaded(**given).loss, module(**batch).loss)
    settings = Generation(lambda: rows.tokenizer, {"max_new_tokens": 5})
    assert module.task.generate(loaded, batch, settings) == module.task.generate(module.model, batch, settings)


@pytest.mark.parametrize("method", ["PromptTuning", "PTuning"])
def test_virtual_tokens_are_refused_before_anything_is_loaded(method: str) -> None:
    with pytest.raises(LitPeftError, match=r"takes audio and has none: use PrefixTuning"):
        make(Path("nowhere"), method)


def distance(one: Any, other: Any) -> int:
    """The edit distance of two sequences."""
    row = list(range(len(other) + 1))
    for left in one:
        before, row[0] = row[0], row[0] + 1
        for at, right in enumerate(other, start=1):
            before, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, before + (left != right))
    return row[-1]


def test_error_rates_are_those_of_the_written_transcripts(base: Path, table: Path, tmp_path: Path) -> None:
    module, rows = make(base, task_args={"normalizer": "basic"}, generation={"max_new_tokens": 12}), data(base, table)
    trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[PredictionWriter()])
    (found,) = trainer.test(module, rows)
    written = [json.loads(line) for line in next(tmp_path.rglob("test_predictions.jsonl")).read_text().splitlines()]
    assert len(written) == 8
    pairs = [(basic_form(row["text"]), row["reference"]) for row in written]
    words = [(text.split(), reference.split()) for text, reference in pairs]
    for name, texts in (("test_wer", words), ("test_cer", pairs)):
        errors = sum(distance(text, reference) for text, reference in texts)
        assert found[name] == pytest.approx(errors / sum(len(reference) for _, reference in texts))


def test_error_rates_of_a_case_computed_by_hand() -> None:
    metrics = find_task("speech_seq2seq").metrics(None)
    # One of three words is another and one is missing; two of five letters are missing.
    metrics["wer"].update(["a x", "the cat"], ["a b c", "the cat"])
    assert metrics["wer"].compute().item() == pytest.approx(2 / 5)
    metrics["cer"].update(["abc"], ["abcde"])
    assert metrics["cer"].compute().item() == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("  Don’t   STOP — now. ", "don't stop now"),
        ("'Quoted' rock 'n' roll", "quoted rock n roll"),
        ("5 % of €3", "5 of 3"),
        ("नमस्ते।", "नमस्ते"),
    ],
)
def test_the_basic_form_of_a_text(text: str, expected: str) -> None:
    assert basic_form(text) == expected


def test_generation_starts_with_the_datas_language(base: Path, table: Path) -> None:
    module = make(base)
    rows = data(base, table, language="french", speech_task="translate")
    module.task.check_data(rows)
    module.configure_model()
    module.eval()
    batch = first_batch(rows, "validation")
    start = rows.tokenizer.convert_ids_to_tokens(batch["decoder_prompt"][0].tolist())
    assert start == ["<|startoftranscript|>", "<|fr|>", "<|translate|>", "<|notimestamps|>"]
    texts = module.task.generate(module.model, batch, Generation(lambda: rows.tokenizer, {"max_new_tokens": 8}))
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(base).eval()
    out = theirs.generate(batch["input_features"], language="fr", task="translate", max_new_tokens=8)
    assert texts == [text.strip() for text in rows.tokenizer.batch_decode(out, skip_special_tokens=True)]
    with pytest.raises(LitPeftError, match=r"model\.generation has language"):
        module.task.generate(module.model, batch, Generation(lambda: rows.tokenizer, {"language": "de"}))


def test_an_english_only_base_refuses_a_language(base: Path, table: Path, tmp_path: Path) -> None:
    model = transformers.WhisperForConditionalGeneration.from_pretrained(base)
    model.generation_config.is_multilingual = False
    del model.generation_config.lang_to_id, model.generation_config.task_to_id
    model.save_pretrained(tmp_path / "english")
    transformers.AutoProcessor.from_pretrained(base).save_pretrained(tmp_path / "english")
    module = make(tmp_path / "english")
    with pytest.raises(LitPeftError, match="the base is for English only"):
        pl.Trainer(**QUIET, max_steps=1, enable_checkpointing=False).fit(module, data(tmp_path / "english", table))
    rows = data(tmp_path / "english", table, language=None)
    module = make(tmp_path / "english", generation={"max_new_tokens": 4})
    pl.Trainer(**QUIET, max_steps=1, enable_checkpointing=False).fit(module, rows)
    assert any("data.language is not set" in line for line in rows.report())


def test_wrong_languages_are_named(base: Path, table: Path) -> None:
    with pytest.raises(LitPeftError, match=r"data\.language is 'klingon': Unsupported language"):
        _ = data(base, table, language="klingon").tokenizer
    with pytest.raises(LitPeftError, match=r"data\.speech_task is set but has no effect without data\.language"):
        data(base, table, language=None, speech_task="translate")
    with pytest.raises(LitPeftError, match=r"data\.streaming is set but has no effect for speech"):
        data(base, table, streaming=True)


@pytest.fixture
def long_table(tmp_path: Path) -> Path:
    for name, seconds in (("a", 1.0), ("b", 3.0), ("c", 0.5)):
        write_wav(tmp_path / f"{name}.wav", np.zeros(int(seconds * RATE)) + 0.1)
    return write(tmp_path / "long.jsonl", [{"audio": f"{name}.wav", "text": "yes"} for name in "abc"])


def test_long_recordings_are_an_error_or_cut_or_left_out(base: Path, long_table: Path) -> None:
    with pytest.raises(LitPeftError, match=r"row 2 has 3\.0 seconds of audio, and at most 2 are taken"):
        data(base, long_table, validation=None, validation_fraction=0.0).setup("fit")
    cut = data(base, long_table, long_audio="truncate")
    with pytest.warns(UserWarning, match=r"1 of 3 recordings .* cut to 2 seconds; 1\.0 seconds not heard"):
        assert first_batch(cut, "validation")["input_features"].shape == (3, 80, 200)
    dropped = data(base, long_table, long_audio="drop")
    assert len(first_batch(dropped, "validation")["labels"]) == 2
    assert any("1 of 3 recordings (33.3 %) left out" in line for line in dropped.report())
    with pytest.raises(LitPeftError, match=r"set data\.long_audio to 'truncate'"):
        data(base, long_table, predict=str(long_table), long_audio="drop").setup("predict")
    with pytest.raises(LitPeftError, match=r"data\.max_seconds is 3, and the base takes 2 seconds"):
        data(base, long_table, max_seconds=3.0).setup("validate")


def test_long_transcripts_are_cut_with_their_end_kept_and_counted(base: Path, table: Path) -> None:
    rows = data(base, table, max_length=8)
    labels = first_batch(rows, "validation")["labels"]
    end = rows.tokenizer.eos_token_id
    assert labels.shape[1] == 8 and all(end in row.tolist() for row in labels)
    assert any("transcripts" in line and "cut to 8 tokens" in line for line in rows.report())
    assert data(base, table).max_length == 64  # the decoder's positions
    with pytest.raises(
        LitPeftError, match=r"max_length is 4, and every transcript begins and ends with 4 tokens of its"
    ):
        first_batch(data(base, table, max_length=4))


def test_a_text_that_is_no_path_is_named_shortly(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"audio": "UklGR" * 1000, "text": "yes"}])
    with pytest.raises(
        LitPeftError, match=r"row 1: column 'audio' has the file '(UklGR)+.*…, which does not exist"
    ) as error:
        first_batch(data(base, file))
    assert len(str(error.value)) < 700


def test_a_missing_file_is_named_with_its_row(base: Path, tmp_path: Path) -> None:
    rows = data(base, write(tmp_path / "a.jsonl", [{"audio": "b.wav", "text": "yes"}]))
    with pytest.raises(LitPeftError, match=r"row 1: column 'audio' has the file 'b\.wav', which does not exist"):
        rows.setup("validate")


def test_a_column_without_audio_is_named(base: Path, tmp_path: Path) -> None:
    rows = data(base, write(tmp_path / "a.jsonl", [{"audio": 17, "text": "yes"}, {"audio": 18, "text": "no"}]))
    with pytest.raises(LitPeftError, match=r"row 1: column 'audio' has 17, which is no audio"):
        rows.setup("fit")


def test_a_file_that_changed_is_measured_again(base: Path, long_table: Path) -> None:
    settings = {"long_audio": "drop"}
    assert len(data(base, long_table, **settings).examples("validation")) == 2
    write_wav(long_table.with_name("b.wav"), np.zeros(RATE))
    assert len(data(base, long_table, **settings).examples("validation")) == 3


def test_the_audio_column_of_datasets_is_read_without_its_decoder(base: Path, table: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    cells = [{"path": None, "bytes": (table.parent / row["audio"]).read_bytes()} for row in rows]
    # Encoding would need torchcodec, too.
    stored = Dataset.from_dict({"audio": cells, "text": [row["text"] for row in rows]})
    plain = stored.cast(Features({"audio": Audio(), "text": Value("string")}))
    plain.save_to_disk(tmp_path / "saved")
    plain.to_parquet(tmp_path / "rows.parquet")
    expected = first_batch(data(base, table), "validation")
    for source in (tmp_path / "saved", tmp_path / "rows.parquet"):
        batch = first_batch(data(base, source), "validation")
        assert torch.equal(batch["input_features"], expected["input_features"])
        assert torch.equal(batch["labels"], expected["labels"])


def test_audio_files_are_predicted_as_they_are(base: Path, table: Path, tmp_path: Path) -> None:
    rows = SpeechData(base=str(base), language="de", predict=str(table.parent / "000[0-2].wav"))
    module = make(base, generation={"max_new_tokens": 4})
    trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path)
    found = [row for batch in trainer.predict(module, rows) for row in batch]
    assert [Path(row["audio"]).name for row in found] == ["0000.wav", "0001.wav", "0002.wav"]
    assert all(isinstance(row["text"], str) for row in found)
    with pytest.raises(LitPeftError, match="an audio file without a transcript"):
        SpeechData(base=str(base), train=str(table.parent / "0000.wav")).setup("fit")


def test_the_same_recording_is_in_one_split_only(base: Path, table: Path) -> None:
    lines = table.read_text().splitlines()
    doubled = table.with_name("doubled.jsonl")
    doubled.write_text("\n".join(lines * 2))
    rows = data(base, doubled, validation=None, test=None, validation_fraction=0.25)
    heard = {split: {example["audio"] for example in rows.examples(split)} for split in ("train", "validation")}
    assert not heard["train"] & heard["validation"]
    assert heard["train"] | heard["validation"] == {str(table.parent / json.loads(line)["audio"]) for line in lines}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_trains_and_transcribes(base: Path, table: Path, precision: str) -> None:
    module = make(base, generation={"max_new_tokens": 3})
    trainer = pl.Trainer(**QUIET, precision=precision, max_steps=2, enable_checkpointing=False)
    trainer.fit(module, data(base, table))
    assert torch.isfinite(trainer.callback_metrics["val_loss"])


def test_a_bfloat16_base_takes_float32_features(base: Path, table: Path) -> None:
    module = make(base, dtype="bfloat16", generation={"max_new_tokens": 3})
    trainer = pl.Trainer(**QUIET, max_steps=1, enable_checkpointing=False)
    trainer.fit(module, data(base, table))
    assert module.model.dtype == torch.bfloat16


def test_accumulated_batches_weigh_their_tokens(base: Path, table: Path) -> None:
    def trained(batch_size: int, accumulated: int) -> dict[str, Any]:
        module = make(base, optimizer="SGD", learning_rate=1.0, lr_scheduler="constant", warmup_steps=0)
        trainer = pl.Trainer(
            **QUIET, max_steps=1, accumulate_grad_batches=accumulated, limit_val_batches=0, enable_checkpointing=False
        )
        trainer.fit(module, data(base, table, batch_size=batch_size))
        return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}

    whole, parts = trained(8, 1), trained(2, 4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


def moonshine(folder: Path) -> Path:
    words = tokenizer()
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer, bos_token="<|startoftranscript|>", eos_token="<|endoftext|>",
        pad_token="<|endoftext|>", unk_token="<|endoftext|>",
    )  # fmt: skip
    ids = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 256, "decoder_start_token_id": 257}
    torch.manual_seed(0)
    parts = {
        f"{part}_num_{name}": 2 for part in ("encoder", "decoder") for name in ("hidden_layers", "attention_heads")
    }
    config = transformers.MoonshineConfig(
        vocab_size=len(plain), hidden_size=16, intermediate_size=32, max_position_embeddings=64, **parts, **ids
    )
    transformers.MoonshineForConditionalGeneration(config).save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    transformers.Wav2Vec2Processor(extractor, plain).save_pretrained(folder)
    return folder


def test_moonshine_trains_on_samples_and_transcribes(table: Path, tmp_path: Path) -> None:
    base = moonshine(tmp_path / "moonshine")
    rows = data(base, table, language=None, predict=str(table))
    batch = first_batch(rows, "validation")
    assert batch["input_values"].ndim == 2 and batch["input_values"].shape == batch["attention_mask"].shape
    first = json.loads(table.read_text().splitlines()[0])["text"]
    assert batch["references"][0] == first
    labels = [label for label in batch["labels"][0].tolist() if label != -100]
    assert 257 not in labels and labels[-1] == 256 and rows.tokenizer.decode(labels, skip_special_tokens=True) == first
    module = make(base, generation={"max_new_tokens": 4})
    trainer = pl.Trainer(**QUIET, max_steps=2, enable_checkpointing=False)
    trainer.fit(module, rows)
    assert torch.isfinite(trainer.callback_metrics["val_loss"])
    found = [row for part in trainer.predict(module, rows) for row in part]
    assert len(found) == 8
    with pytest.raises(LitPeftError, match="do not begin with a language"):
        data(base, table).setup("validate")
