"""Masked language modeling: which tokens are masked, the loss at the masks, and runs of the task."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
import yaml
from masked_base import save_base, tokenizer
from models import ENCODERS, QUIET, STEP, close, trained_of
from test_tasks import METHODS, saved
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import lit_peft
from lit_peft import LitPeftError, MaskedLMData
from lit_peft.cli import main
from lit_peft.data.masking import Masking, word_numbers
from lit_peft.data.streaming import BATCHES_PER_BLOCK

MASK = 4
TEXT = "the unwatchable film was a weak story. this good acting is wonderful, it was unwatchly awful."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 short texts, no two of them equal."""
    words = "film story acting it this the was is good bad weak wonderful unwatchable awful".split()  # noqa: SIM905
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    rows = [
        f"{a} {b} was {words[(i * 7 + j) % 14]} {words[i % 14]} ."
        for i, a in enumerate(words)
        for j, b in enumerate(words)
    ]
    file.write_text("\n".join(dict.fromkeys(rows)) + "\n")
    return file


def data(base: Path, file: Path, **settings: Any) -> MaskedLMData:
    return MaskedLMData(**{"base": str(base), "train": str(file), "max_length": 16, "batch_size": 8, **settings})


def rows_of(loader: Any) -> list[tuple[list[int], list[int]]]:
    return [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for batch in loader
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]


# --------------------------------------------------------------------------------------------- what is masked


def shares(ids: torch.Tensor, labels: torch.Tensor, special: torch.Tensor) -> dict[str, float]:
    """The share of masked tokens, and of these the shares that became the mask token and that stayed."""
    masked = labels != -100
    return {
        "masked": masked.sum().item() / (~special).sum().item(),
        "mask": (ids[masked] == MASK).float().mean().item(),
        "kept": (ids[masked] == labels[masked]).float().mean().item(),
    }


@pytest.mark.parametrize("unit", ["token", "whole_word"])
def test_masks_are_distributed_as_in_transformers(unit: Any) -> None:
    """Of 60,000 tokens: 0.01 is more than four standard deviations of each share."""
    encoded = tokenizer()(TEXT, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, count = encoded["input_ids"], 3000
    special = torch.tensor(encoded["special_tokens_mask"], dtype=torch.bool).repeat(count, 1)
    numbers = word_numbers(TEXT, encoded["offset_mapping"], encoded.word_ids())
    words = None if unit == "token" else [-1 if s else n for s, n in zip(special[0].tolist(), numbers, strict=True)]
    # transformers replaces whole words by the mask token only.
    replaced, drawn = (0.8, 0.1) if unit == "token" else (1.0, 0.0)
    masks = Masking(unit, 0.15, replaced, drawn, MASK, len(tokenizer()), tuple(tokenizer().all_special_ids))
    found = [masks(ids, words, str(key)) for key in range(count)]
    ours, labels = (torch.stack(part) for part in zip(*found, strict=True))
    collator = transformers.DataCollatorForLanguageModeling(tokenizer(), whole_word_mask=unit == "whole_word", seed=0)
    example = {"input_ids": ids, "special_tokens_mask": encoded["special_tokens_mask"]}
    if unit == "whole_word":
        example["offset_mapping"] = encoded["offset_mapping"]
    theirs = collator([dict(example) for _ in range(count)])
    expected = shares(theirs["input_ids"], theirs["labels"], special)
    got = shares(ours, labels, special)
    for name, value in expected.items():
        assert abs(got[name] - value) < (0.02 if unit == "whole_word" and name == "masked" else 0.01), (
            name,
            got,
            expected,
        )
    assert abs(got["masked"] - 0.15) < 0.01 and abs(got["mask"] - replaced) < 0.015
    assert not (labels[special] != -100).any()
    # Each token as often as in transformers, also the parts of words.
    per_token = [(part != -100).float().mean(0) for part in (labels, theirs["labels"])]
    assert (per_token[0] - per_token[1]).abs().max() < 0.04
    if words is not None:  # all tokens of a word, or none
        chosen = labels != -100
        for word in set(words) - {-1}:
            own = chosen[:, torch.tensor(words) == word]
            assert (own.all(1) == own.any(1)).all()


def test_spans_are_spanberts() -> None:
    """Whole words, geometric lengths of a mean of 3.8, the share of the tokens, one kind of replacement for a span."""
    words = [n // 2 for n in range(400)]  # 200 words of two tokens
    ids = [10 + n % 20 for n in range(400)]
    masks = Masking("span", 0.15, 0.8, 0.1, MASK, 40)
    lengths: Counter[int] = Counter()
    share = []
    for key in range(300):
        masked, labels = masks(ids, words, str(key))
        chosen = (labels != -100).tolist()
        assert chosen[::2] == chosen[1::2]
        share.append(sum(chosen) / 400)
        start = None
        for at in range(401):
            if at < 400 and chosen[at]:
                start = at if start is None else start
            elif start is not None:
                lengths[(at - start) // 2] += 1
                start = None
    assert abs(sum(share) / 300 - 0.15) < 0.005
    mean = sum(length * count for length, count in lengths.items()) / lengths.total()
    assert 3.5 < mean < 4.6  # spans that touch are one here
    kinds = Masking("span", 0.15, 0.5, 0.0, MASK, 40)
    masked, labels = kinds(ids[:40], words[:40], "5")
    at = (labels != -100).nonzero().flatten().tolist()
    runs = torch.tensor(at).diff().ne(1).sum().item() + 1
    changes = (masked[at] == MASK).diff().ne(0).sum().item()
    assert changes <= runs - 1


def test_lengths_of_spans_are_geometric() -> None:
    """One span of a long text each time: its length is that of SpanBERT's distribution, clipped at 10."""
    masks = Masking("span", 0.01, 1.0, 0.0, MASK, 40)
    found = Counter(int((masks([9] * 1000, list(range(1000)), str(key))[1] != -100).sum()) for key in range(400))
    # A budget of 10 tokens: several spans, the sum of which is exactly the budget.
    assert set(found) == {10}


def test_short_texts_have_their_share() -> None:
    for unit in ("token", "whole_word", "span"):
        masks = Masking(unit, 0.15, 0.8, 0.1, MASK, 40)  # type: ignore[arg-type]
        words = None if unit == "token" else [0, 1, 2]
        count = sum(int((masks([9, 9, 9], words, str(key))[1] != -100).sum()) for key in range(3000))
        assert abs(count / 9000 - 0.15) < 0.02, unit


def byte_level() -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<mask>"], initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT[:40]], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>")


def metaspace(split: bool) -> Any:
    backend = Tokenizer(
        models.Unigram([("<mask>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in sorted(set(TEXT)))])
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>")


@pytest.mark.parametrize("kind", ["WordPiece", "byte-level BPE", "SentencePiece", "SentencePiece without splitting"])
def test_words_are_known_with_every_kind_of_tokenizer(kind: str) -> None:
    if kind == "WordPiece":
        found = tokenizer()
    else:
        found = byte_level() if kind == "byte-level BPE" else metaspace(split="without" not in kind)
    encoded = found(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    numbers = word_numbers(TEXT, encoded["offset_mapping"], encoded.word_ids())
    places: dict[int, set[int]] = {}
    for number, (start, end) in zip(numbers, encoded["offset_mapping"], strict=True):
        places.setdefault(number, set()).update(range(start, end))
    words = ["".join(TEXT[place] for place in sorted(own)).strip() for own in places.values()]
    assert len(numbers) > len(words)
    joined = " ".join(words)
    # Punctuation is a word of its own, or a part of the one before it.
    assert joined.replace(" .", ".").replace(" ,", ",") == TEXT


# ------------------------------------------------------------------------------------------------- the data


def test_nothing_is_lost_when_texts_are_joined(base: Path, texts: Path) -> None:
    module = data(base, texts, validation_fraction=0.0)
    examples = module.examples("train")
    assert all(ids[0] == 2 and ids[-1] == 3 for ids in examples["input_ids"])
    assert [len(ids) for ids in examples["input_ids"]][:-1] == [16] * (len(examples) - 1)
    inner = [token for ids in examples["input_ids"] for token in ids[1:-1]]
    # Between texts, and nowhere else, there is a separator, unless an example ends there.
    assert 0 < inner.count(3) < len(texts.read_text().splitlines())
    expected = tokenizer()(texts.read_text().splitlines(), add_special_tokens=False)["input_ids"]
    assert [token for token in inner if token != 3] == [token for ids in expected for token in ids]


def test_texts_of_their_own_are_cut(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(f"{TEXT}\nthe film\n")
    module = data(base, file, join_texts=False, masking="whole_word", validation_fraction=0.0, max_length=12)
    examples = module.examples("train")
    tokens = tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    assert [token for ids in examples["input_ids"][:-1] for token in ids[1:-1]] == tokens
    assert examples["input_ids"][-1] == [2, *tokenizer()("the film", add_special_tokens=False)["input_ids"], 3]
    assert all(words[0] == -1 == words[-1] and min(words[1:-1]) >= 0 for words in examples["words"])


def test_validation_has_the_same_masks_always(base: Path, texts: Path) -> None:
    expected = rows_of(data(base, texts).val_dataloader())
    assert any(label != -100 for _, labels in expected for label in labels)
    for settings in ({"batch_size": 3}, {"num_workers": 2}):
        assert rows_of(data(base, texts, **settings).val_dataloader()) == expected
    assert rows_of(data(base, texts, mlm_probability=0.3).val_dataloader()) != expected


@pytest.mark.parametrize("settings", [{}, {"num_workers": 2}, {"group_by_length": True}, {"masking": "span"}])
def test_training_masks_are_new_in_each_epoch_and_the_same_again(base: Path, texts: Path, settings: Any) -> None:
    def epochs() -> list[list[tuple[list[int], list[int]]]]:
        loader = data(base, texts, **settings).train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            found.append(rows_of(loader))
        return found

    one, other = epochs(), epochs()
    assert one == other

    def original(rows: Any) -> list[list[int]]:
        return sorted([b if b != -100 else a for a, b in zip(*row, strict=True)] for row in rows)

    assert original(one[0]) == original(one[1])
    masks = [{tuple(original([row])[0]): [b != -100 for b in row[1]] for row in rows} for rows in one]
    assert sum(masks[0][key] != masks[1][key] for key in masks[0]) > len(masks[0]) * 0.8


def test_processes_share_the_masks_of_one(base: Path, texts: Path) -> None:
    whole = rows_of(data(base, texts).train_dataloader())
    parts = []
    for rank in range(2):
        loader = data(base, texts, batch_size=4).train_dataloader()
        sampler = loader.sampler
        sampler.num_replicas, sampler.rank = 2, rank
        sampler.num_samples = -(-sampler.count // 2)
        sampler.total_size = sampler.num_samples * 2
        parts.append(rows_of(loader))
    together = [row for pair in zip(*parts, strict=True) for row in pair]
    assert together[: len(whole)] == whole


def test_a_stream_has_masks_of_its_own_for_each_epoch(base: Path, texts: Path) -> None:
    def read(epoch: int) -> list[tuple[list[int], list[int]]]:
        loader = data(base, texts, streaming=True, masking="whole_word").train_dataloader()
        loader.epoch = lambda: epoch
        return rows_of(loader)

    assert BATCHES_PER_BLOCK * 8 > 240
    assert read(0) == read(0) and len(read(0)) == len(read(1))
    masks = [[[label != -100 for label in labels] for _, labels in read(epoch)] for epoch in range(2)]
    assert masks[0] != masks[1] and 0.1 < sum(map(sum, masks[0])) / sum(map(len, masks[0])) < 0.2


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"mlm_probability": 0.0}, "data.mlm_probability is 0.0"),
        ({"masking": "word"}, "data.masking 'word' is not known"),
        ({"mask_replace_prob": 0.8, "random_replace_prob": 0.3}, "more than 1 together"),
        ({"mask_replace_prob": -0.1}, "data.mask_replace_prob is -0.1"),
        ({"text_unit": "page"}, "data.text_unit 'page' is not known"),
        ({"truncation_side": "left"}, "data.truncation_side is 'left'"),
    ],
)
def test_wrong_settings_of_the_data(base: Path, texts: Path, settings: Any, problem: str) -> None:
    with pytest.raises(LitPeftError, match=problem):
        data(base, texts, **settings)


def test_a_tokenizer_without_a_mask_is_refused(encoder: Path, texts: Path) -> None:
    with pytest.raises(LitPeftError, match="has no mask token"):
        data(encoder, texts).examples("train")


# ------------------------------------------------------------------------------------------------- the loss

IDS = torch.randint(5, 22, (4, 9), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.3, IDS, -100)
BATCH = {"input_ids": IDS.masked_fill(LABELS != -100, MASK), "attention_mask": torch.ones_like(IDS), "labels": LABELS}


def module_of(base: Any, method: str = "AdapterP", **settings: Any) -> Any:
    torch.manual_seed(0)
    module = getattr(lit_peft, method)(base=str(base), task="masked_lm", **settings)
    module.configure_model()
    return module


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_masked_tokens(method: str, base: Path) -> None:
    module = module_of(base, method, learning_rate=1e-2 * STEP.get(method, 1))
    if method == "HeadOnly":
        pytest.skip("the head is the base's, and there is nothing else to train")
    frozen = {name: value.clone() for name, value in module.named_parameters() if not value.requires_grad}
    optimizer = module.configure_optimizers()
    module.eval()
    losses = []
    for _ in range(8):
        loss = module.training_step(BATCH, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(dict(module.named_parameters())[name], value) for name, value in frozen.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", ENCODERS)
def test_loss_and_gradients_are_the_models_own(name: str, folder: Path) -> None:
    module = module_of(saved(name, folder), "AdapterH", reduction_factor=4).eval()
    sizes = []
    head = module.model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, out: sizes.append(out[..., 0].numel()))
    for _ in range(2):  # the first call finds out what the model does with its logits
        module.zero_grad()
        loss = module.training_step(BATCH, 0)
        loss.backward()
        found = {path: p.grad.clone() for path, p in trained_of(module).items() if p.grad is not None}
        module.zero_grad()
        own = module.model(**BATCH).loss
        own.backward()
        close(loss, own)
        assert found and found.keys() == {path for path, p in trained_of(module).items() if p.grad is not None}
        for path, gradient in found.items():
            expected = trained_of(module)[path].grad
            assert expected is not None
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    masked = int((LABELS != -100).sum())
    # Only the masked rows have logits, and in later calls of a frozen head not even they.
    assert sizes == [masked, IDS.numel(), 1, IDS.numel()]


def test_a_head_that_is_trained_sees_the_masked_rows_only(tmp_path: Path) -> None:
    module = module_of(save_base(tmp_path / "base", with_head=False))
    head = [path for path in trained_of(module.model) if "_adapter" not in path]
    # Its bias has two names, of which the layer computes with one; the matrix is that of the embeddings.
    assert sorted(path.removeprefix("cls.predictions.") for path in head) == [
        *("decoder.bias", "transform.LayerNorm.bias", "transform.LayerNorm.weight"),
        *("transform.dense.bias", "transform.dense.weight"),
    ]
    sizes: list[int] = []
    module.model.get_output_embeddings().register_forward_hook(lambda _, args, out: sizes.append(out[..., 0].numel()))
    module.training_step(BATCH, 0).backward()
    assert sizes == [int((LABELS != -100).sum())]
    assert all(p.grad is not None for p in trained_of(module).values())


def test_nothing_masked_is_no_loss(base: Path) -> None:
    module = module_of(base)
    for _ in range(2):
        loss = module.training_step({**BATCH, "labels": torch.full_like(LABELS, -100)}, 0)
        loss.backward()
        assert loss.item() == 0 and all((p.grad == 0).all() for p in trained_of(module).values() if p.grad is not None)
        module.training_step(BATCH, 0)


@pytest.mark.parametrize("supervised_loss", [True, False])
def test_metrics_are_those_of_the_masked_tokens(supervised_loss: bool, base: Path) -> None:
    module = module_of(base, supervised_loss=supervised_loss).eval()
    with torch.no_grad():
        for part in (slice(0, 3), slice(3, 4)):
            module.validation_step({name: value[part] for name, value in BATCH.items()}, 0)
        logits = module.model(input_ids=BATCH["input_ids"]).logits[LABELS != -100]
    targets = LABELS[LABELS != -100]
    loss = torch.nn.functional.cross_entropy(logits, targets)
    found = {name: metric.compute() for name, metric in module.val_metrics.items()}
    close(found["loss"], loss)
    close(found["perplexity"], loss.exp())
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == targets).float().mean().item())
    module.val_metrics["accuracy"].reset()
    module.validation_step(BATCH, 0)  # outside of a Trainer, with gradients
    close(module.val_metrics["accuracy"].compute(), found["accuracy"])
    with torch.no_grad():
        next(iter(trained_of(module).values())).fill_(torch.nan)
        module.validation_step(BATCH, 0)
    assert all(metric.compute().isnan() for metric in module.val_metrics.values())


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_models_without_an_encoder_alone_are_refused(name: str, folder: Path) -> None:
    with pytest.raises(LitPeftError, match="task='causal_lm'" if name == "llama" else "task='seq2seq'"):
        module_of(saved(name, folder))


def test_wrong_settings_of_the_task(base: Path) -> None:
    with pytest.raises(LitPeftError, match="top_k=0"):
        lit_peft.AdapterP(base=str(base), task="masked_lm", task_args={"top_k": 0})


# ------------------------------------------------------------------------------------------------ prediction


def test_masks_are_filled_as_by_transformers(base: Path, tmp_path: Path) -> None:
    module = module_of(base, task_args={"top_k": 3}).eval()
    file = tmp_path / "masks.txt"
    file.write_text("the film is [MASK] .\n[MASK] story was so [MASK] that it is poor\n")
    predict = data(base, file, predict=str(file), train=None, max_length=32)
    (batch,) = predict.predict_dataloader()
    sizes: list[int] = []
    head = module.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, out: sizes.append(out[..., 0].numel()))
    with torch.no_grad():
        rows = module.predict_step(batch, 0)
    hook.remove()
    assert sizes == [3]  # logits of the masks alone
    pipeline = transformers.pipeline("fill-mask", model=module.model, tokenizer=tokenizer(), top_k=3)
    for row, text in zip(rows, file.read_text().splitlines(), strict=True):
        expected = pipeline(text)
        expected = expected if isinstance(expected[0], list) else [expected]
        assert row["text"] == text and len(row["masks"]) == text.count("[MASK]")
        for found, wanted in zip(row["masks"], expected, strict=True):
            assert found["tokens"] == [entry["token_str"] for entry in wanted]
            assert found["probabilities"] == pytest.approx([entry["score"] for entry in wanted], abs=1e-5)
    assert rows[0]["filled"].startswith("the film is") and "[" not in rows[0]["filled"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("the film is good", r"row 2: there is nothing to fill in; write \[MASK\]"),
        ("[MASK] " * 40, "row 2: the text has 42 tokens"),
    ],
)
def test_a_text_that_has_nothing_to_fill_in_is_refused(text: str, problem: str, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "masks.txt"
    file.write_text(f"the [MASK]\n{text}\n")
    with pytest.raises(LitPeftError, match=problem):
        data(base, file, predict=str(file), train=None, max_length=32).examples("predict")


# ------------------------------------------------------------------------------------------------------ runs


def write_config(folder: Path, base: Path, texts: Path, **settings: Any) -> list[str]:
    model = {
        "base": str(base),
        "task": "masked_lm",
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
    }
    config = {
        "seed_everything": 0,
        "model": {"class_path": "AdapterP", "init_args": {**model, "dropout": 0.1, "reduction_factor": 2}},
        "data": {
            "class_path": "MaskedLMData",
            "init_args": {
                "train": str(texts),
                "test_fraction": 0.1,
                "max_length": 16,
                "masking": "whole_word",
                **settings,
            },
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 2, "log_every_n_steps": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(folder / "config.yaml"), "--trainer.default_root_dir"]


def test_fit_resume_test_and_predict_from_yaml(
    base: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    config = write_config(tmp_path, base, texts)
    assert main(["fit", *config, "whole"]) == 0
    printed = capsys.readouterr().out
    assert "val_accuracy" in printed and "val_perplexity" in printed
    whole = Path("whole/version_0/checkpoints/last.ckpt")
    assert main(["fit", *config, "half", "--trainer.max_epochs", "1"]) == 0
    stopped = str(Path("half/version_0/checkpoints/last.ckpt").rename("stopped.ckpt"))
    assert main(["fit", *config, "half", "--ckpt_path", stopped]) == 0
    (resumed,) = Path("half").glob("version_*/checkpoints/last.ckpt")
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    capsys.readouterr()
    assert main(["fit", *config, "half", "--ckpt_path", stopped, "--data.mlm_probability", "0.3"]) == 2
    assert "data.mlm_probability was 0.15 and is 0.3 now" in capsys.readouterr().err
    assert main(["test", *config, "whole", "--ckpt_path", str(whole)]) == 0
    assert "test_accuracy" in capsys.readouterr().out
    Path("masks.txt").write_text("the film was [MASK] .\n")
    options = ["--ckpt_path", str(whole), "--data.predict", "masks.txt"]
    assert main(["predict", *config, "whole", *options]) == 0
    (written,) = Path().rglob("predictions*.jsonl")
    (row,) = map(json.loads, written.read_text().splitlines())
    assert row["text"] == "the film was [MASK] ." and len(row["masks"][0]["tokens"]) == 5


def fit(base: Path, texts: Path, precision: str = "32-true", steps: int = 40, **settings: Any) -> Any:
    pl.seed_everything(0)
    module = lit_peft.AdapterP(base=str(base), task="masked_lm", reduction_factor=2, learning_rate=1e-2)
    trainer = pl.Trainer(max_steps=steps, precision=precision, **{**QUIET, "enable_checkpointing": False})  # type: ignore[arg-type]
    trainer.fit(module, data(base, texts, **settings))
    (found,) = trainer.validate(module, data(base, texts, **settings), verbose=False)
    return found


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_run_learns_in_every_precision(precision: str, base: Path, texts: Path) -> None:
    before = fit(base, texts, precision, steps=1)
    after = fit(base, texts, precision)
    assert after["val_loss"] < before["val_loss"] - 0.5 and after["val_accuracy"] > before["val_accuracy"]


def test_a_stream_is_learned(base: Path, texts: Path) -> None:
    settings = {"streaming": True, "validation": str(texts), "masking": "span"}
    assert fit(base, texts, **settings)["val_loss"] < fit(base, texts, steps=1, **settings)["val_loss"] - 0.5


def test_the_data_command_shows_the_masks(
    base: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    options = [
        "--data",
        "MaskedLMData",
        "--data.base",
        str(base),
        "--data.train",
        str(texts),
        "--data.max_length",
        "32",
    ]
    assert main(["data", *options, "--examples", "2", "--data.masking", "span"]) == 0
    shown = capsys.readouterr().out.partition("What is learned")[0]
    assert "[[ [MASK]/" in shown and shown.count("[CLS]") == 2


@pytest.mark.heavy
def test_two_processes_train_what_one_trains(texts: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    file = base / "config.json"  # the processes draw dropout of their own
    file.write_text(re.sub(r'(dropout_prob": )0\.1', r"\g<1>0.0", file.read_text()))
    config = write_config(tmp_path, base, texts)[:2]
    options = ["--model.dropout", "0.0", "--trainer.max_epochs", "1"]
    found = []
    for processes in (1, 2):
        run = ["--trainer.default_root_dir", str(tmp_path / str(processes)), "--data.batch_size", str(16 // processes)]
        strategy = ["--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto"]
        command = [str(Path(sys.executable).with_name("lit-peft")), "fit", *config, *options, *run, *strategy]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        with (tmp_path / str(processes) / "version_0" / "metrics.csv").open() as opened:
            found.append([{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(opened)])
    # The last batch may have an example more, which makes the shares even.
    assert len(found[0]) == len(found[1]) > 5
    for one, other in zip(found[0][:-2], found[1][:-2], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
