"""Batches, texts and models that training meets once and should survive, or refuse with a word of why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from models import SHAPE, batch, close, make, scramble
from torchmetrics import MeanMetric

import lit_peft
from lit_peft import LitPeftError
from lit_peft.data.even_shards import EvenShards
from lit_peft.data.sampling import SeededBatches


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        **{"max_steps": 2, "enable_checkpointing": False, "default_root_dir": folder, "accelerator": "cpu", **quiet}
        | settings
    )


def save(model: Any, folder: Path, tokenizer: Path) -> Path:
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


# -------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("supervised_loss", [True, False])
@pytest.mark.parametrize(
    ("name", "task"), [("llama", "causal_lm"), ("t5", "seq2seq"), ("bert", "token_classification")]
)
def test_a_batch_that_supervises_nothing_changes_nothing(
    name: str, task: str, supervised_loss: bool, tokenizer_folder: Path, tmp_path: Path
) -> None:
    base = save(make(name), tmp_path / "base", tokenizer_folder)
    labels = {"num_labels": 2} if name == "bert" else {}
    module = lit_peft.LoRA(base=str(base), task=task, supervised_loss=supervised_loss, **labels)
    module.configure_model()
    inputs = batch(name)
    inputs["labels"] = torch.full(inputs["labels"].shape if task != "token_classification" else (2, 7), -100)
    for _ in range(2):  # the supervised loss learns the head's form in its first call
        loss = module.training_step(inputs, 0)
        loss.backward()
        assert float(loss.detach()) == 0
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    module.eval()
    module.validation_step(inputs, 0)
    metric = module.val_metrics["loss"]
    assert isinstance(metric, MeanMetric) and float(metric.mean_value) == 0 == float(metric.weight)


def test_a_nan_loss_is_not_left_out_of_the_mean(decoder: Path) -> None:
    module = lit_peft.LoRA(base=str(decoder))
    module.configure_model()
    with torch.no_grad():
        next(p for n, p in module.named_parameters() if n.endswith("v_proj.lora_B")).fill_(torch.nan)
    module.eval()
    module.validation_step({"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}, 0)
    assert module.val_metrics["loss"].compute().isnan() and module.val_metrics["perplexity"].compute().isnan()


def test_a_run_whose_weights_are_nan_ends(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    class Spoilt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                with torch.no_grad():
                    next(p for p in module.parameters() if p.requires_grad)[0] = torch.inf

    data = lit_peft.CausalLMData(base=str(decoder), train=str(reviews), batch_size=8)
    module = lit_peft.LoRA(base=str(decoder))
    with pytest.raises(LitPeftError, match=r"step 4 .* lower learning_rate"):
        trainer(tmp_path, max_steps=20, log_every_n_steps=2, callbacks=[Spoilt()]).fit(module, data)


def test_a_nan_target_is_an_error_of_its_row(encoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good film", "label": 1.5}\n{"text": "bad film", "label": NaN}\n')
    data = lit_peft.TextClassificationData(base=str(encoder), train=str(file), regression=True, validation_fraction=0.0)
    with pytest.raises(LitPeftError, match=r"data\.train"):
        data.setup("fit")


# ------------------------------------------------------------------------------------------ few or empty rows


def test_fewer_rows_than_processes() -> None:
    rows = [{"input_ids": [at]} for at in range(2)]
    shares = [list(SeededBatches(2, 1, 0, num_replicas=5, rank=rank)) for rank in range(5)]
    assert all(len(share) == 1 for share in shares)
    evened = EvenShards(rows, 5)
    assert len(evened) == 5 and sum("surplus" not in evened[at] for at in range(5)) == 2


def test_an_empty_prompt_goes_on_from_the_end_of_text(decoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "", "completion": "good film"}\n{"prompt": "the film", "completion": "is good"}\n')
    data = lit_peft.CausalLMData(
        base=str(decoder), train=str(file), predict=str(file), completion_column="completion", validation_fraction=0.0
    )
    module = lit_peft.LoRA(base=str(decoder), generation={"max_new_tokens": 2})
    trainer(tmp_path).fit(module, data)
    rows = trainer(tmp_path).predict(module, data)
    assert rows is not None and len(rows[0]) == 2


@pytest.mark.parametrize("split", ["train", "predict"])
def test_a_text_without_tokens_is_an_error_of_its_row(split: str, encoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    texts = [f"good film {number}" for number in range(8)] + ["\u200b"]
    file.write_text("\n".join(json.dumps({"text": text, "label": at % 2}) for at, text in enumerate(texts)))
    settings: dict[str, Any] = {"labels": ["0", "1"], "validation_fraction": 0.0, split: str(file)}
    data = lit_peft.TextClassificationData(base=str(encoder), **settings)
    tokenizer = data.tokenizer
    if tokenizer("\u200b")["input_ids"]:
        tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("\u200b", "")
    with pytest.raises(LitPeftError, match=r"row 9 has no tokens"):
        data.setup("fit" if split == "train" else "predict")


# ------------------------------------------------------------------------------- positions and vocabularies


def long_texts(folder: Path) -> str:
    file = folder / "long.jsonl"
    file.write_text(
        "\n".join(json.dumps({"text": " ".join(["film"] * 40) + f" {n}", "label": n % 2}) for n in range(8))
    )
    return str(file)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_rows_longer_than_the_positions_are_refused_before_the_first_step(
    name: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    config = make(name).config
    config.max_position_embeddings = 16
    base = save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "base", tokenizer_folder)
    data = lit_peft.CausalLMData(base=str(base), train=long_texts(tmp_path), validation_fraction=0.0, max_length=32)
    with pytest.raises(
        LitPeftError, match=r"data\.train has rows of 32 tokens.*16 positions.*data\.max_length to at most 16"
    ):
        trainer(tmp_path).fit(lit_peft.LoRA(base=str(base)), data)
    data = lit_peft.CausalLMData(base=str(base), train=long_texts(tmp_path), validation_fraction=0.0, max_length=16)
    trainer(tmp_path).fit(lit_peft.LoRA(base=str(base)), data)
    module = lit_peft.LoRA(base=str(base))
    module.configure_model()
    with pytest.raises(LitPeftError, match="A batch has rows of 17 tokens"):
        module.training_step({"input_ids": torch.ones(1, 17).long(), "labels": torch.ones(1, 17).long()}, 0)


@pytest.mark.parametrize("settings", [lit_peft.PrefixTuningSettings, lit_peft.PromptTuningSettings])
@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_virtual_tokens_take_positions(name: str, settings: Any) -> None:
    model = lit_peft.attach(make(name), settings(num_virtual_tokens=8))
    for length in (56, 57):
        ids = torch.randint(3, 61, (2, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if length <= 56:
            model(**inputs)
        else:
            with pytest.raises(LitPeftError, match=r"more than the 64 positions.*56 tokens"):
                model(**inputs)
    with pytest.raises(LitPeftError, match="leaves no room"):
        lit_peft.attach(make(name), settings(num_virtual_tokens=64))


def test_a_token_outside_of_the_vocabulary_is_refused_before_the_first_step(
    tokenizer_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(vocab_size=12, **{**SHAPE, "num_key_value_heads": 2})
    base = save(transformers.LlamaForCausalLM(config), tmp_path / "base", tokenizer_folder)
    data = lit_peft.CausalLMData(base=str(base), train=str(reviews))
    with pytest.raises(LitPeftError, match=r"data\.train has the token \d+.*only 12 embeddings.*resize"):
        trainer(tmp_path).fit(lit_peft.LoRA(base=str(base)), data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_are_trained_and_saved(tied: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    def base() -> Any:
        model = make("llama")
        torch.manual_seed(3)
        model.config.tie_word_embeddings = tied
        model.tie_weights()
        model.resize_token_embeddings(70)
        return model.eval()

    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    model = lit_peft.attach(base(), lit_peft.LoRASettings(r=2, modules_to_save=names))
    scramble(model)
    ids = torch.tensor([[5, 65, 69]])
    folder = lit_peft.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        close(lit_peft.load_adapter(base(), folder).eval()(input_ids=ids).logits, expected)
        if not tied:
            close(PeftModel.from_pretrained(base(), str(folder)).eval()(input_ids=ids).logits, expected)
    with pytest.raises(LitPeftError, match="has shape"):
        lit_peft.load_adapter(make("llama"), folder)


# --------------------------------------------------------------------------------------- padding, tied weights


def test_a_decoder_classifies_the_last_token_that_is_no_padding(tokenizer_folder: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=40, **{**SHAPE, "num_key_value_heads": 2}, pad_token_id=None)
    config.eos_token_id = 4
    base = save(transformers.LlamaModel(config), tmp_path / "base", tokenizer_folder)
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "good film", "label": 0}, {"text": "the film was awful", "label": 1}] * 8
    file.write_text("\n".join(json.dumps({**row, "text": f"{row['text']} {at}"}) for at, row in enumerate(rows)))
    answers = []
    for size in (1, 4):
        torch.manual_seed(0)
        data = lit_peft.TextClassificationData(
            base=str(base), predict=str(file), train=str(file), validation_fraction=0.0, batch_size=size
        )
        module = lit_peft.LoRA(base=str(base), task="sequence_classification")
        pages = trainer(tmp_path).predict(module, data)
        assert pages is not None
        answers.append(torch.tensor([row["score"] for page in pages for row in page]))
    torch.testing.assert_close(*answers)


@pytest.mark.parametrize("base", ["gpt2", "opt"])
def test_adapters_on_tied_embeddings(base: str, tmp_path: Path) -> None:
    model = make(base)
    name = "wte" if base == "gpt2" else "embed_tokens"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = batch(base)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    lit_peft.attach(model, lit_peft.LoRASettings(r=2, target_modules=[name]))
    before = model.get_output_embeddings().weight.clone()
    model(**batch(base)).loss.backward()
    scramble(model)
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
        assert (trained - expected).abs().max() > 1e-3
        # The update is the input's alone: the head stays the base's.
        assert torch.equal(model.get_output_embeddings().weight, before)
        folder = lit_peft.save_adapter(model, tmp_path / "adapter")
        close(lit_peft.load_adapter(make(base), folder).eval()(input_ids=ids).logits, trained)
        merged = lit_peft.merge(lit_peft.load_adapter(make(base), folder)).eval()
        merged.save_pretrained(tmp_path / "merged")
        close(type(merged).from_pretrained(tmp_path / "merged").eval()(input_ids=ids).logits, trained)
        lit_peft.detach(model)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert torch.equal(model(input_ids=ids).logits, expected)
