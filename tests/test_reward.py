"""The task `reward` and its data: against TRL's trainer, on all architectures, with all methods, and as a user."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from datasets import Dataset
from models import ALL, ENCODERS, QUIET, scramble, trained_of
from torch.nn.functional import logsigmoid

import lit_peft
from lit_peft import LitPeftError
from lit_peft.cli import main
from lit_peft.data import RewardData
from lit_peft.data.preference_encoding import prompt_text, without_input
from lit_peft.data.preference_forms import read_preference, write_dialogue
from lit_peft.tasks import find_task

PROMPTS = ["PrefixTuning", "PTuningV2", "PTuning", "PromptTuning"]
METHODS = ["LoRA", "IA3", "AdapterH", "AdapterP", "Parallel", "FullFineTuning", "HeadOnly", *PROMPTS]
GOOD, BAD = ("good", "great", "wonderful"), ("bad", "poor", "awful")
USER, OTHER = {"role": "user", "content": "how is it"}, {"role": "assistant", "content": "it was"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [
        {"prompt": f"the {thing} {verb} was", "chosen": good, "rejected": bad, "margin": 0.5 * (good == "great")}
        for thing in ("film", "story", "acting", "it")
        for verb in ("is", "was", "this")
        for good, bad in zip(GOOD, BAD, strict=True)
    ]
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def make(method: str, base: Path | str, **settings: Any) -> Any:
    module = getattr(lit_peft, method)(base=str(base), task="reward", **settings)
    module.configure_model()
    return module


IDS = torch.randint(5, 40, (4, 7), generator=torch.Generator().manual_seed(0))
IDS[:, -1] = 1  # the end, by which T5 and BART find the sequence's vector


@pytest.mark.parametrize("center", [None, 0.1])
@pytest.mark.parametrize("margin", [False, True])
def test_loss_gradients_and_metrics_equal_those_of_trl(
    margin: bool, center: float | None, decoder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from trl import RewardConfig, RewardTrainer

    module = make("LoRA", decoder, r=4, task_args={"center_rewards_coefficient": center})
    module.eval()
    scramble(module.model)
    lit_peft.save_adapter(module.model, tmp_path / "adapter")
    rows = [
        {"chosen_ids": [5, 9, 12, 4], "rejected_ids": [5, 9, 4]},
        {"chosen_ids": [7, 4], "rejected_ids": [8, 11, 13, 6, 4]},
        {"chosen_ids": [7, 6, 4], "rejected_ids": [10, 4]},
    ]
    for row, value in zip(rows, (0.0, 1.5, -0.3), strict=True):
        row.update({"margin": value} if margin else {})  # type: ignore[dict-item]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(decoder, num_labels=1)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    config = RewardConfig(
        str(tmp_path / "trl"),
        center_rewards_coefficient=center,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    trainer = RewardTrainer(theirs, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    # Parameters of an adapter that TRL was given are loaded frozen or not, depending on its version.
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    theirs.eval()
    inputs = trainer.data_collator(rows)
    batch = {name: value.clone() for name, value in inputs.items()}
    expected = trainer.compute_loss(theirs, dict(inputs))
    expected.backward()
    loss = module.training_step(batch, 0)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    named = dict(theirs.named_parameters())
    found = 0
    for name, parameter in trained_of(module.model).items():
        other = f"{name}.default.weight" if "lora_" in name else "score.modules_to_save.default.weight"
        torch.testing.assert_close(parameter.grad, named[f"base_model.model.{other}"].grad, atol=1e-5, rtol=1e-5)
        found += 1
    assert found == 2 * 2 * 2 + 1  # two matrices of q and v in two layers, and the head
    module.validation_step(batch, 0)
    ours = {name: metric.compute().item() for name, metric in module.val_metrics.items()}
    (metrics,) = trainer._metrics.values() if len(trainer._metrics) == 1 else [trainer._metrics["eval"]]
    metrics = {name: values[-1] for name, values in metrics.items()}
    assert ours["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert ours["accuracy"] == metrics["accuracy"]
    assert ours["margin"] == pytest.approx(metrics["margin"], abs=1e-5)
    assert ours["reward_mean"] == pytest.approx(metrics["mean_reward"], abs=1e-5)
    with torch.no_grad():
        rewards = theirs(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    assert ours["reward_std"] == pytest.approx(rewards.std(correction=0).item(), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_it(method: str, encoder: Path) -> None:
    module = make(method, encoder, learning_rate=1e-2, task_args={"center_rewards_coefficient": 0.01})
    module.eval()
    batch = {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}
    frozen = {name: value.clone() for name, value in module.named_parameters() if not value.requires_grad}
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(8):
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(dict(module.named_parameters())[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt", "roberta", "modernbert", "t5", "bart"])
def test_it_trains_the_head_of_each_architecture(name: str, tmp_path: Path) -> None:
    """And the loss is the formula's, of the scores that the model gives the two halves."""
    shape = {"vocab_size": 61, "max_position_embeddings": 64, "eos_token_id": 1, "pad_token_id": 0, **ALL[name]}
    shape["pad_token_id"] = 0 if shape["pad_token_id"] == 1 else shape["pad_token_id"]
    config = transformers.AutoConfig.for_model(name, **shape)
    auto = transformers.AutoModelForMaskedLM if name in ENCODERS else transformers.AutoModel
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(tmp_path / "base")
    module = make("LoRA", tmp_path / "base", r=2)
    module.eval()
    scramble(module.model)
    inputs = {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}
    margin = torch.tensor([0.3, -0.2])
    loss = module.training_step({**inputs, "margin": margin}, 0)
    loss.backward()
    rewards = module.model(**inputs).logits.flatten()
    torch.testing.assert_close(loss, -logsigmoid(rewards[:2] - rewards[2:] - margin).mean())
    head = [name for name, _ in trained_of(module.model).items() if "lora_" not in name]
    assert head and all(parameter.grad is not None for parameter in trained_of(module.model).values())


def test_padding_of_a_decoder_does_not_change_a_reward(decoder: Path) -> None:
    module = make("LoRA", decoder, r=2)
    module.eval()
    scramble(module.model)
    alone = {"input_ids": torch.tensor([[5, 6, 4]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    ids = torch.tensor([[5, 6, 4, 0, 0], [7, 8, 9, 10, 4]])
    together = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    one, both = (module.predict_step(batch, 0) for batch in (alone, together))
    assert both[0]["reward"] == pytest.approx(one[0]["reward"], abs=1e-6)


def test_the_folder_is_a_reward_model_for_peft(decoder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    module = make("LoRA", decoder, r=4)
    module.eval()
    scramble(module.model)
    lit_peft.save_adapter(module.model, tmp_path / "adapter")
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    ours = [row["reward"] for row in module.predict_step(inputs, 0)]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(decoder, num_labels=1)
    base.config.pad_token_id = module.model.config.pad_token_id
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        rewards = theirs(**inputs).logits.squeeze(-1)
    torch.testing.assert_close(torch.tensor(ours), rewards, atol=1e-6, rtol=1e-6)


def test_the_loss_is_computed_in_float32_in_half_precision(encoder: Path) -> None:
    module = make("LoRA", encoder, r=2, dtype="bfloat16")
    loss = module.training_step({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, 0)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_settings_out_of_range_are_refused() -> None:
    for value in (0.0, -1.0):
        with pytest.raises(LitPeftError, match="center_rewards_coefficient"):
            find_task("reward", {"center_rewards_coefficient": value})


# ------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "how is it", "chosen": "a", "rejected": "b"}, [USER], [answer("a")], [answer("b")]),
        ({"chosen": "a", "rejected": "b"}, [], [answer("a")], [answer("b")]),
        (
            {"instruction": "how", "input": "is it", "chosen": "a", "rejected": "b"},
            [{"role": "user", "content": "how\nis it"}],
            [answer("a")],
            [answer("b")],
        ),
        ({"prompt": [USER], "chosen": [answer("a")], "rejected": [answer("b")]}, [USER], [answer("a")], [answer("b")]),
        ({"chosen": [USER, answer("a")], "rejected": [USER, answer("b")]}, [USER], [answer("a")], [answer("b")]),
        (
            {"prompt": "how is it", "chosen": [USER, answer("a")], "rejected": [USER, answer("b")]},
            [USER],
            [answer("a")],
            [answer("b")],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "how is it"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
                "system": "s",
            },
            [{"role": "system", "content": "s"}, USER],
            [answer("a")],
            [answer("b")],
        ),
        (
            {
                "chosen": "\n\nHuman: how is it\n\nAssistant: it was\n\nHuman: how is it\n\nAssistant: a",
                "rejected": "\n\nHuman: how is it\n\nAssistant: it was\n\nHuman: how is it\n\nAssistant: b",
            },
            [USER, OTHER, USER],
            [answer("a")],
            [answer("b")],
        ),
        (
            {"prompt": "\n\nHuman: how is it\n\nAssistant:", "chosen": "a", "rejected": "b"},
            [USER],
            [answer("a")],
            [answer("b")],
        ),
    ],
    ids=["text", "no prompt", "instruction", "messages", "implicit", "repeated", "ShareGPT", "hh-rlhf", "hh prompt"],
)
def test_every_form_of_a_pair_is_read(row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any) -> None:
    form = RewardData().form_of(Dataset.from_list([row]))
    assert read_preference(row, form) == (prompt, [chosen, rejected])


def test_an_instruction_without_a_chat_template_is_in_the_form_of_alpaca(encoder: Path) -> None:
    row = {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"}
    data = RewardData(base=str(encoder))
    form = data.form_of(Dataset.from_list([row]))
    style = data.style(form)
    form, column = without_input(form, style)
    assert prompt_text(read_preference(row, form)[0], style, row[str(column)]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write "
        "a response that appropriately completes the request.\n\n### Instruction:\nq\n\n### Input:\ni\n\n"
        "### Response:\n"
    )


def test_a_dialogue_is_written_as_it_was_read() -> None:
    text = "\n\nSystem: well\n\nHuman: how is it\n\nAssistant: it was"
    row = {"chosen": text, "rejected": "\n\nSystem: well\n\nHuman: how is it\n\nAssistant: x"}
    prompt, (chosen, rejected) = read_preference(row, RewardData().form_of(Dataset.from_list([row])))
    assert prompt == [{"role": "system", "content": "well"}, USER] and rejected == [answer("x")]
    assert write_dialogue([*prompt, *chosen]) == text


def test_batches_have_the_chosen_texts_first_and_margins(pairs: str, encoder: Path) -> None:
    data = RewardData(train=pairs, base=str(encoder), batch_size=3, validation_fraction=0.2, max_length=16)
    data.setup("fit")
    tokenizer = data.tokenizer
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        count = len(batch["margin"])
        assert len(texts) == 2 * count
        for chosen, rejected, margin in zip(texts[:count], texts[count:], batch["margin"].tolist(), strict=True):
            assert chosen.split()[-1] in GOOD and rejected.split()[-1] in BAD
            assert chosen.split()[:-1] == rejected.split()[:-1]
            assert margin == (0.5 if chosen.endswith("great") else 0.0)
        # Each text ends with the end token, which the tokenizer does not add.
        ends = batch["attention_mask"].sum(-1) - 1
        assert set(batch["input_ids"].gather(1, ends[:, None]).flatten().tolist()) == {tokenizer.eos_token_id}
    assert any("pairs with prompts in column 'prompt', margins in 'margin', joined as text" in x for x in data.report())
    # A prompt is in one split only.
    prompts = [{tuple(ids[0][:-2]) for ids in data.examples(split)["input_ids"]} for split in ("train", "validation")]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_a_chat_template_renders_prompts_with_their_answers(pairs: str, encoder: Path) -> None:
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    data = RewardData(train=pairs, base=str(encoder), chat_template=template, max_length=32)
    data.setup("fit")
    ids = data.examples("train")[0]["input_ids"][0]
    assert len(ids) == len(["user", "the", "film", "is", "was", "assistant", "good"])
    assert any("rendered by the tokenizer's chat template" in line for line in data.report())


def test_the_side_that_is_cut_is_a_setting(encoder: Path, tmp_path: Path) -> None:
    rows = [{"chosen": f"{word} the film is was good", "rejected": f"{word} the film is was bad"} for word in GOOD]
    file = write(tmp_path / "a.jsonl", rows)
    settings: dict[str, Any] = {"train": file, "base": str(encoder), "max_length": 4, "validation_fraction": 0}
    with pytest.raises(LitPeftError, match=r"no pair of data\.train differs"):
        RewardData(**settings).setup("fit")
    data = RewardData(**settings, truncation_side="left")
    data.setup("fit")
    texts = [data.tokenizer.decode(ids) for example in data.examples("train") for ids in example["input_ids"]]
    assert set(texts) == {"is was good</s>", "is was bad</s>"} or set(texts) == {"is was good </s>", "is was bad </s>"}
    with pytest.raises(LitPeftError, match="every example has more"):
        RewardData(**settings, truncation_side="drop").setup("fit")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "a", "rejected": ""}, "row 2: column 'rejected' is empty"),
        ({"chosen": "the", "rejected": "film", "margin": "much"}, "row 2: column 'margin' has 'much'"),
        ({"chosen": [{"content": "the"}], "rejected": "film"}, "with a role and a content"),
        ({"chosen": [USER], "rejected": [USER], "prompt": [USER]}, "nothing after the prompt"),
        ({"chosen": [answer("a"), {"content": "b"}], "rejected": [answer("c")]}, "message 2 lacks its role"),
    ],
    ids=["empty", "margin", "message", "no answer", "second message"],
)
def test_a_wrong_row_is_named(row: dict[str, Any], problem: str, encoder: Path, tmp_path: Path) -> None:
    first = {**dict.fromkeys(row, "good"), "chosen": "good", "rejected": "bad"}
    first["margin"] = "0" if "margin" in row else first.get("margin", "")
    first = {name: value for name, value in first.items() if value != ""}
    file = write(tmp_path / "a.jsonl", [first, row])
    with pytest.raises(LitPeftError, match=problem):
        RewardData(train=file, base=str(encoder), validation_fraction=0).setup("fit")


def test_equal_answers_are_skipped_with_a_note(encoder: Path, tmp_path: Path) -> None:
    rows = [{"chosen": "good", "rejected": "bad"}, {"chosen": "film", "rejected": "film"}]
    data = RewardData(train=write(tmp_path / "a.jsonl", rows), base=str(encoder), validation_fraction=0)
    data.setup("fit")
    assert len(data.examples("train")) == 1
    assert any("1 of 2 pairs (50.0 %) skipped" in line for line in data.report())


def test_a_stream_gives_the_same_pairs(pairs: str, encoder: Path) -> None:
    settings: dict[str, Any] = {"train": pairs, "base": str(encoder), "batch_size": 4, "max_length": 16}
    data = RewardData(**settings, streaming=True, validation=pairs)
    data.setup("fit")
    whole = RewardData(**settings, validation_fraction=0)
    whole.setup("fit")

    def chosen(batches: Any) -> list[list[int]]:
        rows = [row for batch in batches for row in batch["input_ids"].tolist()]
        return sorted([token for token in row if token] for row in rows)

    assert chosen(data.train_dataloader()) == chosen(whole.train_dataloader())


# ------------------------------------------------------------------------------------------------- as a user


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    return main(list(arguments))


def test_it_fits_tests_and_predicts_from_yaml(
    pairs: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = f"""
model:
  class_path: LoRA
  init_args: {{base: {encoder}, task: reward, task_args: {{center_rewards_coefficient: 0.01}}, learning_rate: 1.0e-2}}
data:
  class_path: RewardData
  init_args: {{train: {pairs}, test_fraction: 0.2, batch_size: 4, max_length: 16}}
trainer: {{max_epochs: 12, enable_progress_bar: false, default_root_dir: runs}}
"""
    (tmp_path / "config.yaml").write_text(config)
    assert command(monkeypatch, "fit", "--config", "config.yaml") == 0
    assert "best val_accuracy" in capsys.readouterr().out
    run = Path("runs/version_0")
    best = str(next((run / "checkpoints").glob("best*.ckpt")))
    given = ["--config", str(run / "config.yaml"), "--ckpt_path", best]
    assert command(monkeypatch, "test", *given) == 0
    printed = capsys.readouterr().out
    assert all(f"test_{name}" in printed for name in ("accuracy", "margin", "reward_mean", "reward_std"))
    assert command(monkeypatch, "predict", *given, "--data.predict", pairs, "--output", "pairs.out.jsonl") == 0
    rows = [json.loads(line) for line in Path("pairs.out.jsonl").read_text().splitlines()]
    assert len(rows) == 36
    assert sum(row["chosen_reward"] > row["rejected_reward"] for row in rows) > 30
    singles = [{"text": "the film is was good"}, {"text": "the film is was bad"}]
    write(tmp_path / "texts.jsonl", singles)
    assert command(monkeypatch, "predict", *given, "--data.predict", "texts.jsonl", "--output", "texts.out.jsonl") == 0
    one, other = (json.loads(line)["reward"] for line in Path("texts.out.jsonl").read_text().splitlines())
    assert one > other
    # A prompt and its answer are the same text.
    write(tmp_path / "answers.jsonl", [{"prompt": "the film is was", "completion": word} for word in ("good", "bad")])
    output = ["--data.predict", "answers.jsonl", "--output", "answers.out.jsonl"]
    assert command(monkeypatch, "predict", *given, *output) == 0
    found = [json.loads(line)["reward"] for line in Path("answers.out.jsonl").read_text().splitlines()]
    assert found == pytest.approx([one, other], abs=1e-5)
    # The saved adapter scores as the checkpoint does.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1).eval()
    lit_peft.load_adapter(model, run / "adapter")
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    ids = [*tokenizer("the film is was good")["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        score = model(input_ids=torch.tensor([ids])).logits.item()
    assert score == pytest.approx(one, abs=1e-5)


def test_a_resumed_run_ends_as_one_without_a_break(pairs: str, encoder: Path, tmp_path: Path) -> None:
    def fit(folder: str, epochs: int, checkpoint: str | None = None) -> Any:
        pl.seed_everything(0)
        plan = {"lr_scheduler": "constant", "warmup_steps": 0}
        module = lit_peft.LoRA(base=str(encoder), task="reward", r=2, **plan)
        data = RewardData(train=pairs, base=str(encoder), batch_size=8, max_length=16)
        trainer = pl.Trainer(**QUIET, max_epochs=epochs, default_root_dir=tmp_path / folder)
        trainer.fit(module, data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / folder / "end.ckpt")
        return module

    whole = fit("whole", 2)
    fit("half", 1)
    resumed = fit("resumed", 2, str(tmp_path / "half" / "end.ckpt"))
    for name, parameter in trained_of(whole.model).items():
        assert torch.equal(parameter, trained_of(resumed.model)[name]), name


def test_accumulated_batches_give_the_gradient_of_all_pairs(encoder: Path) -> None:
    module = make("LoRA", encoder, r=2)
    module.eval()
    assert module.task.weight({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}) == 2


def test_a_configuration_is_written_for_it(
    pairs: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--base", str(encoder), "--method", "LoRA", "--data", pairs]
    assert command(monkeypatch, "init", "--task", "reward", *options) == 0
    limits = ["--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false", "--data.max_length", "16"]
    assert command(monkeypatch, "fit", "--config", "config.yaml", *limits) == 0


def test_truth_values_are_margins_and_padding_with_the_end_of_text_is_said(decoder: Path, tmp_path: Path) -> None:
    rows = [{"chosen": f"good {at}", "rejected": f"bad {at}", "margin": bool(at % 2)} for at in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = RewardData(base=str(decoder), train=str(tmp_path / "pairs.jsonl"), batch_size=4)
    data.tokenizer.pad_token = data.tokenizer.eos_token
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["margin"].dtype == torch.float32
    assert any("pads with its end-of-text token" in line for line in data.notes.lines())
