"""The LightningModules: without a Trainer, through a checkpoint, and their published sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_peft.callbacks import PredictionWriter
from models import STEP, scramble
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

import lit_peft
from lit_peft import CausalLMData, LitPeftError, LoRASettings
from lit_peft.methods.attachment import attachment_of
from lit_peft.tasks.sequence_classification import SequenceClassification


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@pytest.mark.parametrize(
    "kind",
    [
        "LoRA",
        "IA3",
        "AdapterH",
        "AdapterP",
        "Parallel",
        "PTuning",
        "PTuningV2",
        "PrefixTuning",
        "PromptTuning",
        "FullFineTuning",
        "HeadOnly",
    ],
)
def test_trains_without_a_trainer(kind: str, decoder: Path) -> None:
    rate = 1e-2 * STEP.get(kind, 1)
    module = getattr(lit_peft, kind)(base=str(decoder), task="causal_lm", learning_rate=rate)
    module.configure_model()
    frozen = {name: value.clone() for name, value in module.named_parameters() if not value.requires_grad}
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(8):
        loss = module.training_step(batch(), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    after = dict(module.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


class Scaled(BertForSequenceClassification):
    """A head that is a parameter of the model itself, and one in the midst of the backbone's own."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.temperature = nn.Parameter(torch.ones(1))
        self.bert.embeddings.shift = nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.temperature + self.bert.embeddings.shift
        return output


@pytest.mark.parametrize("kind", ["LoRA", "AdapterH", "PTuningV2", "PromptTuning", "HeadOnly"])
def test_a_head_that_is_a_bare_parameter(
    kind: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is trained, and nothing of the backbone with it; folders have a place for it."""
    monkeypatch.setattr(SequenceClassification, "model_class", lambda *_: Scaled)
    module = getattr(lit_peft, kind)(base=str(encoder), task="sequence_classification", num_labels=2)
    module.configure_model()
    with torch.no_grad():  # transformers leaves what the folder lacks as the memory was, which may be NaN
        module.model.temperature.fill_(1)
        module.model.bert.embeddings.shift.zero_()
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    added = tuple(attachment_of(module.model).adapted)
    new = {"classifier.weight", "classifier.bias", "temperature", "bert.embeddings.shift"}
    assert {name for name in trained if not name.startswith(added)} == new
    if kind == "HeadOnly":
        return
    scramble(module.model)
    folder = module.save_adapter(tmp_path / "adapter")
    again = Scaled.from_pretrained(str(encoder), num_labels=2)
    lit_peft.load_adapter(again, folder).eval()
    inputs = {"input_ids": batch()["input_ids"]}
    torch.testing.assert_close(again(**inputs).logits, module.model.eval()(**inputs).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("made_to_decode", ["", "bert", "roberta"])
@pytest.mark.parametrize("kind", ["LoRA", "PrefixTuning"])
def test_left_padding_changes_nothing(kind: str, made_to_decode: str, decoder: Path, tmp_path: Path) -> None:
    if made_to_decode:
        torch.manual_seed(0)
        shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        settings = {"num_attention_heads": 4, "is_decoder": True, "initializer_range": 0.3, "pad_token_id": 0}
        config = AutoConfig.for_model(made_to_decode, **shape, **settings)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    module = getattr(lit_peft, kind)(base=str(tmp_path if made_to_decode else decoder))
    module.configure_model()
    module.eval()
    plain = batch()
    padded = {
        "input_ids": torch.nn.functional.pad(plain["input_ids"], (3, 0)),
        "attention_mask": torch.nn.functional.pad(plain["attention_mask"], (3, 0)),
    }
    del plain["labels"]
    torch.testing.assert_close(module(**padded).logits[:, 3:], module(**plain).logits, atol=1e-5, rtol=0)


def test_checkpoint_holds_the_trained_tensors_alone_and_comes_back(
    decoder: Path, reviews: Path, tmp_path: Path
) -> None:
    data = CausalLMData(base=str(decoder), train=str(reviews), batch_size=8)
    module = lit_peft.LoRA(base=str(decoder), r=4)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=4, default_root_dir=tmp_path, enable_checkpointing=False, **options)
    trainer.fit(module, data)
    file = tmp_path / "x.ckpt"
    trainer.save_checkpoint(file)
    stored = torch.load(file, weights_only=True)
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    assert set(stored["state_dict"]) == set(trained)
    moments = [v for state in stored["optimizer_states"][0]["state"].values() for v in state.values()]
    tensors = [*stored["state_dict"].values(), *(v for v in moments if isinstance(v, torch.Tensor))]
    assert sum(t.nbytes for t in tensors) <= 3.2 * sum(p.nbytes for p in trained.values())
    again = lit_peft.LoRA.load_from_checkpoint(file)
    assert again.hparams.r == 4
    assert all(torch.equal(dict(again.named_parameters())[name], value) for name, value in trained.items())
    with pytest.raises(LitPeftError, match="shape"):
        lit_peft.LoRA.load_from_checkpoint(file, r=2)
    stored["state_dict"].popitem()
    with pytest.raises(LitPeftError, match="lacks"):
        again.load_state_dict(stored["state_dict"])


def test_resuming_equals_training_through(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    def train(epochs: int, name: str, resume: Path | None = None) -> dict[str, torch.Tensor]:
        pl.seed_everything(0)
        data = CausalLMData(base=str(decoder), train=str(reviews), batch_size=8)
        module = lit_peft.LoRA(base=str(decoder), r=4, lr_scheduler="constant", warmup_steps=2)
        trainer = pl.Trainer(
            max_epochs=epochs,
            enable_checkpointing=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, data, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / name)
        return module.state_dict()

    whole = train(2, "whole.ckpt")
    train(1, "half.ckpt")
    resumed = train(2, "resumed.ckpt", tmp_path / "half.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("config", "auto", "settings", "expected"),
    [
        (RobertaConfig(vocab_size=50265), AutoModelForMaskedLM, LoRASettings(r=8), 294_912),
        (
            GPT2Config(n_embd=1024, n_layer=24, n_head=16),
            AutoModelForCausalLM,
            LoRASettings(r=4),
            24 * 4 * (1024 + 3 * 1024),
        ),
        (
            LlamaConfig(vocab_size=32000, intermediate_size=11008),
            AutoModelForCausalLM,
            LoRASettings(r=32, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]),
            56_098_816,  # 0.83 % of base + added, as LLM-Adapters reports
        ),
    ],
    ids=["roberta-base", "gpt2-medium", "llama-7b"],
)
def test_published_counts(config: object, auto: type, settings: LoRASettings, expected: int) -> None:
    with torch.device("meta"):
        model = auto.from_config(config)  # type: ignore[attr-defined]
    lit_peft.attach(model, settings)
    assert lit_peft.trainable_parameters(model) == expected


def test_completions_alone_are_supervised(decoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "the film", "a": "was good"}\n{"q": "this story is a film of the", "a": "bad acting"}\n')
    data = CausalLMData(
        base=str(decoder),
        train=str(file),
        prompt_column="q",
        completion_column="a",
        max_length=6,
        validation_fraction=0,
    )
    data.setup("fit")
    examples = data.examples("train")
    # The second prompt fills max_length: no room for its answer, so it is dropped.
    assert len(examples) == 1
    assert [label == -100 for label in examples[0]["labels"]] == [True, True, False, False, False]
    assert examples[0]["input_ids"][-1] == data.tokenizer.eos_token_id


class Smoothed(lit_peft.LoRA):  # type: ignore[name-defined, misc]
    """A user's subclass with arguments of its own."""

    def __init__(
        self, *args: Any, smoothing: float = 0.0, words: tuple[str, ...] = (), thing: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.smoothing, self.words = smoothing, words


class Named(Smoothed):
    def __init__(self, base: str, name: str = "none", r: int = 2) -> None:
        super().__init__(base, smoothing=0.5, r=r)
        self.name = name


def saved_checkpoint(module: Any, file: Path) -> Path:
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=0, enable_checkpointing=False, **options)
    trainer.fit(module, DataLoader([batch()], batch_size=None))
    trainer.save_checkpoint(file)
    return file


def test_arguments_of_a_subclass_survive_a_checkpoint(decoder: Path, tmp_path: Path) -> None:
    module = Smoothed(str(decoder), smoothing=0.25, words=("a", "b"), thing=object(), r=2)
    file = saved_checkpoint(module, tmp_path / "a.ckpt")
    for again in (Smoothed.load_from_checkpoint(file), lit_peft.BaseLM.load_from_checkpoint(file)):
        assert type(again) is Smoothed and again.smoothing == 0.25 and tuple(again.words) == ("a", "b")
        assert again.hparams.r == again.settings.r == 2
    assert Smoothed.load_from_checkpoint(file, smoothing=0.75).smoothing == 0.75
    again = Named.load_from_checkpoint(saved_checkpoint(Named(str(decoder), "x", r=4), tmp_path / "b.ckpt"))
    assert (again.name, again.smoothing, again.settings.r) == ("x", 0.5, 4)


def test_the_base_class_loads_any_run(decoder: Path, tmp_path: Path) -> None:
    module = lit_peft.PrefixTuning(base=str(decoder), num_virtual_tokens=3)
    file = saved_checkpoint(module, tmp_path / "a.ckpt")
    again = lit_peft.BaseLM.load_from_checkpoint(file)
    assert type(again) is lit_peft.PrefixTuning
    inputs = {"input_ids": batch()["input_ids"]}
    assert torch.equal(again.eval()(**inputs).logits, module.eval()(**inputs).logits)
    stored = torch.load(file, weights_only=True)
    torch.save({**stored, "module_class": "os.system"}, tmp_path / "b.ckpt")
    with pytest.raises(LitPeftError, match=r"os\.system, which is not imported"):
        lit_peft.BaseLM.load_from_checkpoint(tmp_path / "b.ckpt")
    del stored["module_class"]
    torch.save(stored, tmp_path / "c.ckpt")
    with pytest.raises(LitPeftError, match="does not name its class"):
        lit_peft.BaseLM.load_from_checkpoint(tmp_path / "c.ckpt")
    assert lit_peft.PrefixTuning.load_from_checkpoint(tmp_path / "c.ckpt").settings.num_virtual_tokens == 3


def test_several_validation_and_test_loaders_have_metrics_of_their_own(decoder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    other = {**batch(), "input_ids": torch.randint(5, 20, (3, 7), generator=generator)}
    other["labels"] = other["input_ids"]
    loaders = [DataLoader([rows] * 2, batch_size=None) for rows in (batch(), other)]
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    module = lit_peft.LoRA(base=str(decoder), learning_rate=1e-2)
    keep = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = pl.Trainer(max_epochs=2, callbacks=[keep], **options)
    trainer.fit(module, DataLoader([batch()] * 2, batch_size=None), loaders)
    module.eval()
    with torch.no_grad():
        losses = [float(module(**rows).loss) for rows in (batch(), other)]
    assert abs(losses[0] - losses[1]) > 1e-3
    names = ("val_loss", "val_loss/dataloader_idx_1")
    assert [float(trainer.callback_metrics[name]) for name in names] == pytest.approx(losses, abs=1e-5)
    assert float(keep.best_model_score or 0) == pytest.approx(losses[0], abs=1e-5)
    first, second = trainer.test(module, loaders, verbose=False)
    assert first["test_loss"] == pytest.approx(losses[0], abs=1e-5)
    assert second["test_loss/dataloader_idx_1"] == pytest.approx(losses[1], abs=1e-5)
    # Once more with one loader: nothing is left of the second.
    (only,) = trainer.validate(module, loaders[1], verbose=False)
    assert only["val_loss"] == pytest.approx(losses[1], abs=1e-5) and "val_loss/dataloader_idx_1" not in only


def test_predictions_of_several_loaders_are_not_written_over_each_other(decoder: Path, tmp_path: Path) -> None:
    prompts = {name: value for name, value in batch().items() if name != "labels"}
    loaders = [DataLoader([prompts], batch_size=None)] * 2
    module = lit_peft.LoRA(base=str(decoder), generation={"max_new_tokens": 2})
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    rows = pl.Trainer(**options).predict(module, loaders)
    assert rows is not None and len(rows) == 2
    with pytest.raises(LitPeftError, match="single loader"):
        pl.Trainer(callbacks=[PredictionWriter(str(tmp_path / "a.jsonl"))], **options).predict(module, loaders)
