"""`alora_invocation_tokens`: a LoRA that acts from its invocation tokens on, against peft's."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from models import checkpointing
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lit_peft
from lit_peft import LitPeftError, LoRASettings
from lit_peft.cli import main
from lit_peft.models.call_arguments import arguments
from lit_peft.models.quantization import quantize
from lit_peft.nn.invocation import Invocation

TOKENS = [7, 8]
TARGETS = ["q_proj", "v_proj", "up_proj"]
SETTINGS: dict[str, Any] = {"r": 2, "target_modules": TARGETS, "alora_invocation_tokens": TOKENS}
# Twice; not at all; at the end; half of it at the end.
ROWS = ([1, 7, 8, 4, 7, 8, 5, 6], [1, 2, 8, 7, 5, 6, 9, 9], [3, 4, 5, 6, 3, 4, 7, 8], [7, 8, 5, 1, 2, 3, 4, 7])
IDS = torch.tensor(ROWS)


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def randomize(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    """A model of peft, whose folder is `theirs` in `tmp_path`."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **SETTINGS))
    randomize(model).save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    return model.eval()


def grads(model: nn.Module) -> Tensor:
    found = [p.grad.norm() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return torch.stack(found).sort().values


def test_outputs_gradients_and_folders_are_pefts(theirs: Any, tmp_path: Path) -> None:
    model = lit_peft.load_adapter(llama(), tmp_path / "theirs")
    base = llama()(IDS).logits
    out, expected = model(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    # Nothing changes before the last invocation, and everything after it.
    differs = (out.logits - base).abs().amax(-1) > 1e-4
    starts = [4, 8, 6, 0]
    assert differs.tolist() == [[index >= start for index in range(8)] for start in starts]
    out.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(grads(model), grads(theirs), atol=1e-6, rtol=1e-4)
    again = peft.PeftModel.from_pretrained(llama(), lit_peft.save_adapter(model, tmp_path / "ours"))
    torch.testing.assert_close(again(input_ids=IDS).logits, expected.logits, atol=1e-5, rtol=1e-5)


def padded() -> dict[str, Any]:
    ids = torch.cat([torch.zeros(4, 2, dtype=torch.long), IDS], 1)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False}


def test_generation_with_a_cache_is_pefts(theirs: Any, tmp_path: Path) -> None:
    model = lit_peft.load_adapter(llama(), tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs.generate(**padded())
        assert torch.equal(model.generate(**padded()), expected)
        assert not torch.equal(llama().generate(**padded()), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_with_a_cache_are_those_without(options: dict[str, Any]) -> None:
    model = randomize(lit_peft.attach(llama(), LoRASettings(**SETTINGS)))
    with torch.no_grad():
        found = model.generate(**padded(), **options)  # type: ignore[operator]
        assert torch.equal(found, model.generate(**padded(), **options, use_cache=False))  # type: ignore[operator]


def cache_name() -> str:
    """transformers has renamed the argument."""
    return next(name for name in ("cache", "past_key_values") if name in arguments(llama()))


def test_a_cache_gives_what_the_whole_sequence_gives() -> None:
    model = randomize(lit_peft.attach(llama(), LoRASettings(**SETTINGS)))
    name, ids = cache_name(), IDS[1:]
    with torch.no_grad():
        whole = model(ids).logits
        # Also in the middle of an invocation, and token by token from an invocation on.
        for cut in (3, 7):
            out = model(ids[:, :cut], use_cache=True)
            rest = model(ids[:, cut:], **{name: out[name]}).logits
            row = slice(None) if cut == 3 else [0, 2]  # a single token cannot complete the invocation
            torch.testing.assert_close(rest[row], whole[row, cut:], atol=1e-5, rtol=1e-5)
        # The base's cache serves the adapter: the reason for this method.
        with lit_peft.disable_adapter(model):
            cached = model(ids[[1], :5], use_cache=True)[name]
        after = model(ids[[1], 5:], **{name: cached}).logits
        torch.testing.assert_close(after, whole[[1], 5:], atol=1e-5, rtol=1e-5)


def test_each_example_of_a_packed_row_has_its_own_invocation() -> None:
    examples = [[1, 7, 8, 4], [2, 3, 7], [8, 5, 7, 8, 6]]
    ids = torch.tensor([[token for example in examples for token in example]])
    positions = torch.tensor([[index for example in examples for index in range(len(example))]])
    mask = Invocation(TOKENS).mask(ids, positions)
    alone = [Invocation(TOKENS).mask(torch.tensor([example]))[0] for example in examples]
    assert torch.equal(mask[0], torch.cat(alone)) and mask.sum() == 3 + 3
    assert Invocation([5]).mask(torch.tensor([[5, 1]])).all() and not Invocation([1, 2, 3]).mask(ids[:, :2]).any()


def test_checkpointed_layers_get_the_same_gradients() -> None:
    model = randomize(lit_peft.attach(llama(), LoRASettings(**SETTINGS))).train()
    expected = []
    for rows in (IDS[:2], IDS[2:]):
        model(input_ids=rows, labels=rows).loss.backward()
        expected.append(grads(model))
    model.zero_grad()
    checkpointing(model, True)
    for rows, other in zip((IDS[:2], IDS[2:]), expected, strict=True):
        model(input_ids=rows, labels=rows).loss.backward()
        torch.testing.assert_close(grads(model), other)
    # Several forwards before the backward pass: each is computed again with its own tokens, in any order.
    for backward in (
        lambda one, two: (one + two).backward(),
        lambda one, two: (one.backward(), two.backward()),
        lambda one, two: (two.backward(), one.backward()),
    ):
        model.zero_grad()
        backward(*[model(input_ids=rows, labels=rows).loss for rows in (IDS[:2], IDS[2:])])
        torch.testing.assert_close(grads(model), expected[-1])


def test_training_without_the_tokens_is_said_and_copies_work() -> None:
    model = randomize(lit_peft.attach(llama(), LoRASettings(**SETTINGS))).train()
    with pytest.warns(UserWarning, match=r"No row of the first training batch.*\[7, 8\]"):
        model(input_ids=IDS[[1]], labels=IDS[[1]]).loss.backward()
    assert float(grads(model).max()) == 0
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(IDS).logits, model.eval()(IDS).logits)
    lit_peft.detach(model)
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_it_learns(quantization: str | None) -> None:
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    if quantization:
        model = llama()
        quantize(model, quantization)
    lit_peft.attach(model, LoRASettings(alora_invocation_tokens=[7, 8]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(10):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"alora_invocation_tokens": []}, "one or more tokens"),
        ({"alora_invocation_tokens": [-1]}, "one or more tokens"),
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"target_experts": True}, "target_experts"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is of type Embedding"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(LitPeftError, match=why):
        lit_peft.attach(llama(), LoRASettings(**{**SETTINGS, **change}))


def test_where_it_cannot_act_it_is_refused() -> None:
    model = llama()
    for name in "ab":
        lit_peft.add_adapter(model, name, LoRASettings(**SETTINGS))
    refused = {
        "merged": lambda: lit_peft.merge(model),
        "together": lambda: lit_peft.set_adapter(model, ["a", "b"]),
        "share a batch": lambda: lit_peft.row_adapters(model, ["a", "b"]).__enter__(),
        "combined": lambda: lit_peft.combine_adapters(model, "c", {"a": 1, "b": 1}),
        "input_ids": lambda: model(inputs_embeds=torch.zeros(1, 2, 16)),
        "outside of a forward": lambda: model.model.layers[0].self_attn.q_proj(torch.zeros(1, 2, 16)),
    }
    for why, call in refused.items():
        with pytest.raises(LitPeftError, match=why):
            call()
    shape = {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 50}
    with pytest.raises(LitPeftError, match="encoder and a decoder"):
        lit_peft.attach(T5ForConditionalGeneration(T5Config(**shape)), LoRASettings(alora_invocation_tokens=[1]))


def test_a_run_and_its_checkpoint(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    module = lit_peft.LoRA(base=str(tmp_path / "base"), task="causal_lm", **SETTINGS)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    loader = torch.utils.data.DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    options |= {"enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=1, **options)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = lit_peft.LoRA.load_from_checkpoint(tmp_path / "run.ckpt")
    assert torch.equal(again.model.eval()(IDS).logits, module.model.eval()(IDS).logits)


def test_the_command_trains_on_packed_rows_and_goes_on(
    decoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lit-peft"])
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    token = tokenizer("is", add_special_tokens=False).input_ids[0]
    options = ["--model", "LoRA", "--model.base", str(decoder), "--model.alora_invocation_tokens", f"[{token}]"]
    options += ["--model.gradient_checkpointing", "true", "--model.lora_bias", "true"]
    options += ["--data", "CausalLMData", "--data.train", str(reviews), "--data.packing", "true"]
    options += ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu", "--trainer.precision"]
    options += ["bf16-true", "--trainer.enable_progress_bar", "false", "--trainer.accumulate_grad_batches", "2"]
    assert main(["fit", *options, "--trainer.max_steps", "1"]) == 0, capsys.readouterr().err
    run = tmp_path / "version_0"
    assert (
        main(["fit", *options, "--trainer.max_steps", "2", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    )
    model = lit_peft.load_adapter(AutoModelForCausalLM.from_pretrained(decoder), tmp_path / "version_1" / "adapter")
    trained = [p for name, p in model.named_parameters() if name.endswith(("lora_B", "lora_bias"))]
    assert trained and all(p.abs().max() > 0 for p in trained)
    assert "alora_invocation_tokens" not in capsys.readouterr().err
