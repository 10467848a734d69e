"""Packed rows without a mask: what the examples give apart, by each way that a CPU can compute."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from models import QUIET, SHAPE, checkpointing, close, make, scramble
from test_packing import examples, instructions, results
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import lit_peft
from lit_peft import InstructionData, LitPeftError, LoRASettings
from lit_peft.data.collate import PadCollator
from lit_peft.data.packing import PackCollator
from lit_peft.models import varlen_attention
from lit_peft.models.varlen_attention import NAME, attend, boundaries, packed_rows, register, way_for
from lit_peft.tasks.packed import BOUNDARIES, prepare_packing, run_packed

register()


def packed(*rows: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Examples of these lengths in packed rows, and the same examples padded, a row for each."""
    made = iter(examples(*(length for row in rows for length in row)))
    packs = [[next(made) for _ in row] for row in rows]
    return PackCollator(0)(packs), PadCollator(0)([example for row in packs for example in row])


def varlen(name: str = "llama", **settings: Any) -> Any:
    model = lit_peft.attach(make(name), LoRASettings(r=4, **settings))
    scramble(model)
    model.set_attn_implementation(NAME)
    return model


def test_the_collator_finds_the_boundaries_of_the_examples() -> None:
    batch, _ = packed([9, 4, 2], [12], [1])
    assert batch["cu_seq_lens_q"].tolist() == [0, 9, 13, 15, 27, 30, 31, 45]  # the padding of a row is one more
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["max_length_q"] == 14
    found = boundaries(batch["position_ids"])
    for name in BOUNDARIES:
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(batch[name])), name
    full, _ = packed([3, 2], [5])
    assert full["cu_seq_lens_k"].tolist() == [0, 3, 5, 10] and full["max_length_k"] == 5


@pytest.mark.parametrize("alone", [True, False], ids=["supervised", "whole"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma"])
def test_loss_and_gradients_are_those_of_the_examples_apart(name: str, alone: bool) -> None:
    model = varlen(name)
    batch, padded = packed([9, 4, 2], [12, 7], [1])
    seen = []
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    loss, gradients = results(model, batch, alone)
    assert seen and all(kwargs["attention_mask"] is None for kwargs in seen), "there is a mask"
    model.set_attn_implementation("sdpa")
    wanted, grown = results(model, padded, alone)
    close(loss, wanted)
    assert len(gradients) == len(grown) >= 4
    for gradient, other in zip(gradients, grown, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_the_boundaries_need_not_be_given() -> None:
    model = varlen()
    batch, _ = packed([9, 4, 2], [12, 7], [1])
    without = {name: value for name, value in batch.items() if name not in BOUNDARIES}
    assert torch.equal(run_packed(model, without).loss, run_packed(model, batch).loss)


def test_checkpointing_computes_the_same_attention_again() -> None:
    model = varlen().train()
    batch, _ = packed([9, 4, 2], [12, 7])
    plain = [gradient.clone() for gradient in results(model, batch, True)[1]]
    checkpointing(model, True)
    for again, first in zip(results(model, batch, True)[1], plain, strict=True):
        assert torch.equal(again, first)


@pytest.mark.parametrize("window", [4, 100])
def test_a_window_within_each_example(window: int) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**{**SHAPE, "num_key_value_heads": 2}, sliding_window=window)
    model = transformers.MistralForCausalLM(config)
    batch, padded = packed([9, 4, 2], [12, 7])
    wanted = model(**padded, use_cache=False).loss
    model.set_attn_implementation(NAME)
    close(run_packed(model, batch).loss, wanted)


def test_other_batches_and_generation_are_those_of_sdpa() -> None:
    model = varlen().eval()
    _, padded = packed([9, 4, 2])
    ids = padded["input_ids"][:, :4]
    mine = model(**padded).logits, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.set_attn_implementation("sdpa")
    theirs = model(**padded).logits, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


class Calling(nn.Module):
    """An attention module that has nothing but its mode."""

    num_key_value_groups = 2


def tokens(heads: int, key_heads: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, count, 10, 8, dtype=dtype, requires_grad=True) for count in (heads, key_heads, key_heads)]


def formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """torch's variable-length attention as it is defined; of a window below 0, all tokens before are seen."""
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    at = torch.arange(len(query))
    example = torch.bucketize(at, ends, right=True)
    apart = at[:, None] - at
    seen = (example[:, None] == example) & (apart >= 0) & ((apart <= window) | (window < 0))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def kernel(query: Any, key: Any, value: Any, ends: Any, key_ends: Any, *longest: int, **given: Any) -> torch.Tensor:
    """Stands for `varlen_attn`, which has no kernel for a CPU."""
    window, right = given["window_size"]
    assert right == 0 and given.get("enable_gqa", False) == (query.shape[1] != key.shape[1])
    assert torch.equal(ends, key_ends) and longest == (int(ends.diff().max()),) * 2
    return formula(query, key, value, ends, given["scale"], window)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("grouped", [True, False], ids=["torch 2.12", "torch 2.11"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["all heads", "grouped"])
def test_the_arguments_of_torchs_kernel(
    heads: tuple[int, int], grouped: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel needs a GPU; what it is asked for is compared with SDPA, example by example."""
    monkeypatch.setattr(varlen_attention, "_GROUPED", grouped)
    monkeypatch.setattr(varlen_attention, "varlen_attn", kernel)
    found = []
    for function in (varlen_attention._by_kernel, varlen_attention._one_by_one):
        q, k, v = tokens(*heads)
        ends = torch.tensor([0, 4, 10, 11, 20], dtype=torch.int32)
        flat = [each.transpose(1, 2).flatten(0, 1) for each in (q, k, v)]
        longest = (9,) if function is varlen_attention._by_kernel else ()
        out = function(*flat, ends, *longest, 0.3, window)
        out.square().sum().backward()
        found.append([out, q.grad, k.grad, v.grad])
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_torchs_kernel_takes_what_it_is_given() -> None:
    """torch's own shapes for a device without memory: arguments by name, dtypes and sizes."""
    with FakeTensorMode():
        q, k, v = (torch.randn(20, 4, 8, dtype=torch.bfloat16) for _ in range(3))
        ends = torch.zeros(5, dtype=torch.int32)
        out = varlen_attention._by_kernel(q, k, v, ends, 9, 0.3, 3)
    assert out.shape == q.shape and out.dtype == torch.bfloat16


def test_attention_under_autocast_runs_in_its_dtype() -> None:
    q, k, v = tokens(4, 2)
    ends = torch.tensor([0, 4, 10, 20], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attend(Calling(), q, k, v, None, cu_seq_lens_q=ends, max_length_q=10)
    exact, _ = attend(Calling(), q, k, v, None, cu_seq_lens_q=ends, max_length_q=10)
    assert out.dtype == torch.bfloat16 and out.shape == exact.shape == (2, 10, 4, 8)
    assert 0 < (out - exact).abs().max() < 0.05
    # The last example is a whole row.
    close(exact[1].transpose(0, 1), F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[1])


def test_what_the_kernels_do_not_have_is_refused() -> None:
    q, k, v = tokens(4, 2)
    ends = torch.tensor([0, 20], dtype=torch.int32)
    for extra in ({"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}):
        with pytest.raises(LitPeftError, match=f"attention with {next(iter(extra))}.*set model.attn_implementation"):
            attend(Calling(), q, k, v, None, cu_seq_lens_q=ends, **extra)


def test_models_that_need_the_mask_keep_it() -> None:
    assert way_for(make("llama")) == "examples"
    dropping = make("llama")
    dropping.config.attention_dropout = 0.1
    assert way_for(dropping) is None and way_for(make("bloom")) is None
    dropping.set_attn_implementation(NAME)
    with pytest.raises(LitPeftError, match="needs the mask or drops out attention weights: use 'sdpa'"):
        prepare_packing(dropping)
    # Without a GPU nothing is chosen.
    plain = make("llama")
    prepare_packing(plain)
    assert plain.config._attn_implementation == "sdpa"


def test_a_model_that_mixes_examples_is_seen() -> None:
    """The test at the first batch compares with the example by itself."""
    model = make("llama")
    model.set_attn_implementation(NAME)
    prepare_packing(model)
    for layer in model.model.layers:  # attention that ignores the boundaries
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "cu_seq_lens_q": torch.tensor([0, 6], dtype=torch.int32)}),
            with_kwargs=True,
        )
    with pytest.raises(LitPeftError, match="lets the tokens of one example see"):
        prepare_packing(model)


def test_a_kernel_without_a_backward_pass_is_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    computed = varlen_attention._one_by_one
    monkeypatch.setattr(varlen_attention, "_one_by_one", lambda *given: Forward.apply(computed(*given)))
    model = varlen()
    with torch.no_grad():
        run_packed(model, packed([9, 4])[0])
    with pytest.raises(NotImplementedError, match="backward"):
        prepare_packing(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_state_ends_with_the_block() -> None:
    model, (batch, padded) = varlen(), packed([9, 4])
    with pytest.raises(RuntimeError, match="stop"), packed_rows("examples"):
        raise RuntimeError("stop")
    assert model(**padded).loss.isfinite() and run_packed(model, batch).loss.isfinite()
    assert varlen_attention._packed.way is None


def test_compiled_layers_take_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compilation for each kind of layer, whatever the number of examples and their lengths."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)

    # Without a GPU, a kernel that can be traced takes the place of the one that can.
    def traceable(q: Any, k: Any, v: Any, ends: Any, scale: Any, window: Any) -> torch.Tensor:
        return formula(q, k, v, ends, scale, -1)

    monkeypatch.setattr(varlen_attention, "_one_by_one", traceable)
    model = varlen().train()
    counter = CompileCounterWithBackend("eager")
    # Sizes that are equal in the first batch, or 1, are compiled as such.
    rows = [[9, 4, 2], [12, 7], [3, 8]], [[5, 5, 5, 5], [3], [6, 6], [2], [4]], [[11, 2], [3, 3, 3], [1, 13], [8]]
    batches = [packed(*each)[0] for each in rows]
    plain = [[each.clone() for each in results(model, batch, True)[1]] for batch in batches]
    torch._dynamo.reset()
    counters.clear()
    lit_peft.compile_layers(model, backend=counter)
    for batch, wanted in zip(batches, plain, strict=True):
        for one, other in zip(results(model, batch, True)[1], wanted, strict=True):
            close(one, other)
    assert 0 < counter.frame_count <= 2 and not counters["graph_break"]
    torch._dynamo.reset()


def test_a_run_on_packed_rows_by_the_setting(decoder: Path, tmp_path: Path) -> None:
    weights = []
    for attention in (NAME, None):
        pl.seed_everything(0)
        data = InstructionData(
            base=str(decoder), train=instructions(tmp_path / "rows.jsonl", [3, 9, 4, 6, 2, 8]), packing=True,
            max_length=32, batch_size=2, validation_fraction=0,
        )  # fmt: skip
        module = lit_peft.LoRA(base=str(decoder), r=2, learning_rate=0.01, attn_implementation=attention)
        pl.Trainer(max_steps=3, enable_checkpointing=False, **QUIET).fit(module, data)
        assert module.model.config._attn_implementation == (attention or "sdpa")
        assert module.task.may_choose_attention == (attention is None)
        weights.append(module.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-5)
