"""LoRA on the experts of a mixture, compared with peft's `target_parameters` on every family of models."""

from __future__ import annotations

import copy
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from models import checkpointing
from safetensors.torch import load_file
from torch import Tensor, nn

import lit_peft
from lit_peft import LoRASettings
from lit_peft.cli import main
from lit_peft.formats.peft_experts import as_peft, expert_layers
from lit_peft.methods.attachment import attachment_of
from lit_peft.models.experts import experts_adapted, experts_left_out, stacked_experts
from lit_peft.nn.expert_lora import ExpertLoRA
from lit_peft.nn.grouped import LowRankSum, grouped_lora
from lit_peft.training.sharding import shard, whole
from lit_peft.util.errors import LitPeftError

BASE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
JAMBA = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 0,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
}
DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 16},
    "qwen3_moe": QWEN,
    "qwen3_next": {**QWEN, **LINEAR_ATTENTION, "num_hidden_layers": 4, "shared_expert_intermediate_size": 16},
    "gpt_oss": {**LOCAL, "head_dim": 8},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": LOCAL,
    "jamba": JAMBA,
    "jetmoe": {**LOCAL, "kv_channels": 8},
    "phimoe": {**LOCAL, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "dbrx": DBRX,
}
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def moe(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    shape = {**FAMILIES[kind], **settings} if kind == "dbrx" else {**BASE, **FAMILIES[kind], **settings}
    config = transformers.AutoConfig.for_model(kind, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def scramble(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2


def only_experts(**settings: Any) -> LoRASettings:
    return LoRASettings(**{"r": 3, "lora_alpha": 6, "target_modules": [], "target_experts": True, **settings})


def adapted(kind: str, **settings: Any) -> Any:
    model = lit_peft.attach(moe(kind), only_experts(**settings))
    scramble(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-3))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of LoRA on experts, by peft's names and in its shapes."""
    found = {}
    for name, layer in expert_layers(attachment_of(model)).items():
        values = copy.copy(layer)
        a, b = layer.lora_A.grad, layer.lora_B.grad
        assert a is not None and b is not None
        values.__dict__ = {**layer.__dict__, "_parameters": {"lora_A": a, "lora_B": b}}
        found[f"{name}.lora_A"], found[f"{name}.lora_B"] = as_peft(values)
    return found


# ------------------------------------------------------------------------------------------- the same as peft, folders


# peft 0.21 cannot wrap the parameters of DBRX, which another module reads.
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "dbrx"])
def test_outputs_gradients_and_folders_are_pefts(kind: str, tmp_path: Path) -> None:
    model = moe(kind)
    bare = copy.deepcopy(model)
    names = sorted({".".join(name.split(".")[-2:]) for name in stacked_experts(model)})
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=[], target_parameters=names, init_lora_weights=False, use_rslora=True
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).train()
    theirs.save_pretrained(str(tmp_path / "peft"))
    expected = theirs(input_ids=IDS, labels=IDS)
    expected.loss.backward()

    lit_peft.load_adapter(model, tmp_path / "peft").train()
    found = model(input_ids=IDS, labels=IDS)
    found.loss.backward()
    assert not close(logits(bare.train()), expected.logits), "the adapter must matter"
    assert close(found.logits, expected.logits)
    theirs_by_name = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    ours = gradients(model)
    assert ours.keys() == theirs_by_name.keys()
    for name, gradient in ours.items():
        assert close(gradient, theirs_by_name[name]), name

    lit_peft.save_adapter(model.eval(), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(bare.eval(), str(tmp_path / "ours"))
    assert close(logits(again), logits(model))


def test_a_folder_with_linear_layers_and_patterns_goes_both_ways(tmp_path: Path) -> None:
    settings = LoRASettings(
        r=4,
        target_parameters=EXPERTS,
        rank_pattern={r"layers\.1\.mlp\.experts\.down_proj": 2, "q_proj": 3},
        alpha_pattern={"gate_up_proj": 5},
        modules_to_save=["mlp.gate"],
    )
    model = lit_peft.attach(moe("qwen3_moe"), settings)
    scramble(model)
    assert model.get_submodule("model.layers.1.mlp.experts.lora_down_proj").lora_A.shape == (4, 2, 16)
    lit_peft.save_adapter(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(moe("qwen3_moe"), str(tmp_path / "a"))
    assert close(logits(theirs), logits(model))
    ours = lit_peft.load_adapter(moe("qwen3_moe"), tmp_path / "a")
    assert torch.equal(logits(ours), logits(model))


def test_peft_folders_that_name_the_weight_of_a_linear_layer_or_a_router(tmp_path: Path) -> None:
    names = ["q_proj.weight", "mlp.gate.weight"]
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=names, init_lora_weights=False)
    theirs = peft.get_peft_model(moe("qwen3_moe"), config)
    theirs.save_pretrained(str(tmp_path / "a"))
    ours = lit_peft.load_adapter(moe("qwen3_moe"), tmp_path / "a")
    assert close(logits(ours), logits(theirs)) and not close(logits(ours), logits(moe("qwen3_moe")))


def test_shared_experts_do_not_stand_for_all_experts(tmp_path: Path) -> None:
    model = moe("qwen2_moe")
    bare = copy.deepcopy(model)
    lit_peft.attach(model, LoRASettings(r=2, target_modules=["shared_expert.gate_proj", "shared_expert.up_proj"]))
    scramble(model)
    assert not any(isinstance(layer, ExpertLoRA) for layer in model.modules())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".shared_expert." in name for name in trained)
    lit_peft.save_adapter(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare), str(tmp_path / "a"))
    again = lit_peft.load_adapter(bare, tmp_path / "a")
    assert torch.equal(logits(again), logits(model)) and close(logits(theirs), logits(model))


def test_a_folder_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    lit_peft.save_adapter(adapted("qwen3_moe"), tmp_path / "a")
    other = moe("qwen3_moe", num_experts=8)
    before = logits(other)
    with pytest.raises(LitPeftError, match=r"lora_A\.weight has 12 rows, and r=3 needs 24 for the 8 experts in .*up"):
        lit_peft.load_adapter(other, tmp_path / "a", check_base=False)
    assert torch.equal(logits(other), before)


def test_the_rank_in_a_folder_is_that_of_each_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lit_peft.save_adapter(adapted("qwen3_moe"), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(file.read_text().replace('"r": 3', '"r": 12'))
    built: list[Any] = []
    monkeypatch.setattr(ExpertLoRA, "reset_parameters", lambda self, init: built.append(self))
    with pytest.raises(LitPeftError, match=r"lora_A\.weight has 12 rows, and r=12 needs 48 for the 4 experts"):
        lit_peft.load_adapter(moe("qwen3_moe"), tmp_path / "a")
    assert not built


# -------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_every_implementation_of_experts_computes_the_same(kind: str, implementation: str) -> None:
    model = adapted(kind)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected, by_groups = logits(model), gradients(model)
    model.zero_grad()
    model.set_experts_implementation(implementation)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert close(logits(model), expected)
    for name, gradient in gradients(model).items():
        assert close(gradient, by_groups[name]), name


def test_no_sum_of_weight_and_update_is_built_in_any_family(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    monkeypatch.setattr(LowRankSum, "dense", lambda self: built.append(self) or self.weight)
    for kind in FAMILIES:
        logits(adapted(kind))
    assert not built


def test_code_that_does_something_else_with_the_weight_gets_the_sum_and_a_warning() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,eoi->neo", x, self.stack)

    model = nn.Sequential(Odd())
    lit_peft.attach(model, LoRASettings(r=2, target_modules=[], target_parameters=["stack"]))
    scramble(model)
    (layer,) = expert_layers(attachment_of(model)).values()
    x = torch.randn(6, 5)
    with pytest.warns(UserWarning, match="built in every step"):
        found = model(x)
    assert close(found, torch.einsum("ni,eoi->neo", x, layer.weight + layer.delta_weight()))
    found.sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_A.grad.abs().max() > 0


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_equal_a_loop_with_formulas_of_torch(transposed: bool) -> None:
    torch.manual_seed(0)
    sizes = [3, 0, 4]
    weight = torch.randn(3, 5, 6).mT.contiguous().mT if transposed else torch.randn(3, 5, 6)
    left, right = torch.randn(3, 5, 2, requires_grad=True), torch.randn(3, 2, 6, requires_grad=True)
    x = torch.randn(9, 5, requires_grad=True)  # two rows more than the groups have
    weight.requires_grad_()
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    inputs = (x, weight, left, right)
    whole = weight + 0.7 * left @ right
    parts = [rows @ matrix for rows, matrix in zip(x[:7].split(sizes), whole, strict=True)]
    expected = torch.cat([*parts, torch.zeros(2, 6)])
    found = grouped_lora(*inputs, ends, 0.7)
    assert close(found, expected)
    upstream = torch.randn(9, 6)
    pairs = zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    )
    assert all(close(ours, theirs) for ours, theirs in pairs)


def test_the_kernels_products_equal_the_loops() -> None:
    from lit_peft.nn import grouped

    torch.manual_seed(0)
    x, weight = torch.randn(11, 16, dtype=torch.bfloat16), torch.randn(3, 16, 24, dtype=torch.bfloat16)
    left, right = torch.randn(3, 16, 3, dtype=torch.bfloat16), torch.randn(3, 3, 24, dtype=torch.bfloat16)
    factors = [x.requires_grad_(), left.requires_grad_(), right.requires_grad_()]
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)
    by_kernel = grouped._by_kernel(x, weight, left, right, ends, 0.5)
    by_loop = grouped_lora(x, weight, left, right, ends, 0.5)
    upstream = torch.randn(11, 24, dtype=torch.bfloat16)
    both = [[out, *torch.autograd.grad(out, factors, upstream)] for out in (by_kernel, by_loop)]
    for one, other in zip(*both, strict=True):
        assert (one.float() - other.float()).abs().max() <= 2e-2 * other.float().abs().max()


def test_the_weight_multiplies_like_the_sum_in_each_product_of_torch() -> None:
    torch.manual_seed(0)
    part = LowRankSum(torch.randn(3, 4, 5), torch.randn(3, 4, 2), torch.randn(3, 2, 5), 0.5)
    whole = part.weight + 0.5 * part.left @ part.right
    x, rows, bias = torch.randn(6, 4), torch.randn(3, 6, 4), torch.randn(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = [
            (torch.bmm(rows, part), torch.bmm(rows, whole)),  # type: ignore[arg-type]
            (torch.bmm(part.transpose(1, 2), rows.mT), torch.bmm(whole.mT, rows.mT)),  # type: ignore[arg-type]
            (x @ part[1], x @ whole[1]),
            (x @ part[torch.tensor(2)], x @ whole[2]),
            (F.linear(torch.randn(0, 5), part[0], bias), torch.zeros(0, 4)),  # type: ignore[arg-type]
            (F.linear(whole[1], part[1], bias), F.linear(whole[1], whole[1], bias)),  # type: ignore[arg-type]
            (torch.mm(part[1].T, x.mT), torch.mm(whole[1].T, x.mT)),  # type: ignore[arg-type, union-attr]
        ]
    assert all(close(found, expected) if expected.numel() else not found.numel() for found, expected in pairs)
    assert part.size() == whole.shape and part.size(1) == 4 and len(part) == 3 and part.dim() == 3


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text"])
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    model = adapted(kind)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    checkpointing(model, True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(close(gradient, expected[name]) for name, gradient in gradients(model).items())


def test_a_compiled_layer_runs() -> None:
    model = adapted("qwen3_moe")
    expected = logits(model)
    model.model.layers[1].mlp.compile(backend="eager")
    assert close(logits(model), expected)


def test_half_precision_keeps_float32_adapters_and_computes_in_half() -> None:
    model = lit_peft.attach(moe("mixtral").bfloat16(), only_experts())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = model(input_ids=IDS, labels=IDS)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_the_routers_auxiliary_loss_counts_and_routers_can_be_trained() -> None:
    model = moe("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    lit_peft.attach(model, only_experts(modules_to_save=["mlp.gate"]))
    scramble(model)
    out = model(input_ids=IDS, labels=IDS)
    out.aux_loss.backward()
    gate = model.get_parameter("model.layers.1.mlp.gate.weight")
    assert gate.requires_grad and gate.grad is not None and gate.grad.abs().max() > 0
    plain = model(input_ids=IDS, labels=IDS, output_router_logits=False).loss
    assert close(model(input_ids=IDS, labels=IDS).loss, plain + 0.5 * model(input_ids=IDS).aux_loss)
    assert not any(p.requires_grad for n, p in adapted("mixtral").named_parameters() if "gate.weight" in n)


# -------------------------------------------------------------------------------------- start, merge, several adapters


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_training_starts_at_the_base_and_as_in_peft(init: Any) -> None:
    bare = moe("gpt_oss")
    expected = logits(bare)
    torch.manual_seed(5)
    theirs = peft.get_peft_model(
        copy.deepcopy(bare),
        peft.LoraConfig(r=3, target_modules=[], target_parameters=EXPERTS, init_lora_weights=init == "kaiming" or init),
    )
    torch.manual_seed(5)
    model = lit_peft.attach(bare, only_experts(init_lora_weights=init))
    assert torch.equal(logits(model), expected)
    ours = {f"base_model.model.{n}": as_peft(layer)[0] for n, layer in expert_layers(attachment_of(model)).items()}
    for name, a in ours.items():
        b = theirs.get_parameter(f"{name}.lora_A.default.weight")
        assert a.shape == b.shape and torch.allclose(a.std(), b.std(), rtol=0.3) and a.abs().max() <= 6 * b.std()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text", "dbrx"])
def test_merging_keeps_the_outputs_and_detaching_restores_every_bit(kind: str) -> None:
    bare, model = moe(kind), adapted(kind)
    expected = logits(model)
    lit_peft.merge_adapter(model)
    assert close(logits(model), expected)
    lit_peft.unmerge_adapter(model)
    assert torch.equal(logits(model), expected)
    with lit_peft.disable_adapter(model):
        assert torch.equal(logits(model), logits(bare))
    assert torch.equal(logits(model), expected)
    lit_peft.merge_adapter(model)
    lit_peft.detach(model)
    now, before = model.state_dict(), bare.state_dict()
    assert list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in before)
    lit_peft.attach(model, only_experts())
    scramble(model)
    merged = lit_peft.merge(model)
    assert close(logits(merged), expected) and list(merged.state_dict()) == list(before)
    assert not any(isinstance(module, ExpertLoRA) for module in merged.modules())


def test_copies_and_pickles_are_independent() -> None:
    model = adapted("mixtral")
    expected = logits(model)
    twin = copy.deepcopy(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (twin, torch.load(stream, weights_only=False)):
        assert torch.equal(logits(other), expected)
        scramble(other, seed=9)
        assert not close(logits(other), expected) and torch.equal(logits(model), expected)
        lit_peft.detach(other)
        assert torch.equal(logits(other), logits(moe("mixtral")))


def test_several_adapters_switch_swap_and_combine() -> None:
    model = moe("qwen3_moe")
    outputs = {}
    for seed, name in enumerate(("a", "b"), 2):
        lit_peft.add_adapter(model, name, only_experts(target_modules=["q_proj"]))
        scramble(model, seed)
        outputs[name] = logits(model)
    lit_peft.set_adapter(model, "a")
    assert torch.equal(logits(model), outputs["a"])
    lit_peft.add_adapter(model, "slot", only_experts(target_modules=["q_proj"], r=5))
    lit_peft.hotswap_adapter(model, "b")
    assert close(logits(model), outputs["b"])

    lit_peft.combine_adapters(model, "sum", {"a": 0.5, "b": 2.0}, "cat")
    path = "model.layers.1.mlp.experts.lora_down_proj"
    whole = model.get_submodule(path).delta_weight()
    lit_peft.combine_adapters(model, "svd", {"a": 0.5, "b": 2.0}, "svd", r=6)
    assert close(model.get_submodule(path).delta_weight(), whole)
    deltas = {}
    for name in ("a", "b"):
        lit_peft.set_adapter(model, name)
        deltas[name] = model.get_submodule(path).delta_weight()
    assert close(whole, 0.5 * deltas["a"] + 2 * deltas["b"])
    for combination in ("linear", "ties", "dare"):
        lit_peft.combine_adapters(model, combination, {"a": 0.5, "b": 0.5}, combination)
        assert torch.isfinite(logits(model)).all()


def test_rows_of_one_batch_are_refused() -> None:
    model = moe("mixtral")
    lit_peft.add_adapter(model, "a", only_experts())
    with pytest.raises(LitPeftError, match=r"'a' adapts the experts.*set_adapter"), lit_peft.row_adapters(model, ["a"]):
        pass


# ------------------------------------------------------------------------------------------- settings, counts, messages


def test_target_experts_adds_all_experts_and_no_router_or_bias() -> None:
    model = moe("gpt_oss")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lit_peft.attach(model, LoRASettings(r=2, target_modules="all-linear", target_experts=True))
    layers = [layer for layer in model.modules() if isinstance(layer, ExpertLoRA)]
    assert [layer.parameter_name for layer in layers] == ["gate_up_proj", "down_proj"] * 2
    count = 2 * 4 * 2 * ((32 + 96) + (48 + 32))  # layers, experts, rank
    about = experts_adapted(model)
    assert about is not None and f"4 parameters × 4 experts trains {count:,} parameters" in about
    assert experts_left_out(model) is None
    linear = {name for name, p in model.named_parameters() if p.requires_grad and ".experts." not in name}
    assert linear and all("_proj." in name for name in linear)


def test_half_of_the_experts_is_still_said_to_be_left_out() -> None:
    model = lit_peft.attach(moe("mixtral"), LoRASettings(target_parameters=["gate_up_proj"]))
    about = experts_left_out(model)
    assert about is not None and "down_proj" in about
    assert {name.rpartition(".")[2] for name in stacked_experts(model)} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": ["experts.gate_up"]}, r"'experts.gate_up', which names no parameter.*gate_up_proj"),
        ({"target_parameters": ["mlp.experts"]}, r"is a module; its parameters are down_proj, gate_up_proj"),
        ({"target_parameters": ["q_proj.weight"]}, r"the weight of a Linear: name the module in target_modules"),
        ({"target_parameters": ["q_norm.weight"]}, r"of shape \(8,\).*only stacked matrices"),
        ({"target_experts": True, "lora_dropout": 0.1}, r"lora_dropout=0.1 does not work with target_experts"),
        ({"target_parameters": EXPERTS, "use_dora": True}, r"use_dora=True does not work with target_parameters"),
        ({"target_experts": True, "init_lora_weights": "pissa"}, r"'pissa' is defined for linear layers only"),
        ({"target_experts": True, "modules_to_save": ["experts"]}, r"leaves no parameter to adapt"),
        ({"target_parameters": "gate_up_proj"}, r"target_parameters='gate_up_proj'.*list"),
        ({"target_experts": True, "rank_pattern": {"gate_up": 2}}, r"'gate_up', which matches no adapted module"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_settings_that_cannot_work_are_refused_before_anything_changes(settings: Any, message: str) -> None:
    model = moe("qwen3_moe")
    with pytest.raises(LitPeftError, match=message):
        lit_peft.attach(model, LoRASettings(**settings))
    assert not any(isinstance(module, ExpertLoRA) for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), moe("qwen3_moe").parameters(), strict=True))


def test_a_model_without_stacked_experts_is_refused() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE))
    with pytest.raises(LitPeftError, match="has no experts that are stored as one parameter"):
        lit_peft.attach(model, LoRASettings(target_experts=True))


def test_layers_and_exclusions_apply_to_experts_too() -> None:
    model = lit_peft.attach(moe("mixtral"), only_experts(layers_to_transform=[1]))
    assert list(attachment_of(model).adapted) == [
        "model.layers.1.mlp.experts.lora_gate_up_proj",
        "model.layers.1.mlp.experts.lora_down_proj",
    ]
    settings = LoRASettings(target_experts=True, exclude_modules=r".*layers\.0\..*")
    paths = list(attachment_of(lit_peft.attach(moe("mixtral"), settings)).adapted)
    assert len(paths) == 4 and all("layers.1." in path for path in paths)


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """A process group of this process, and its mesh as the strategies make it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    names = ("data_parallel", "tensor_parallel")
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=names)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_sharded_and_replicated_experts_train_the_same(kind: str, alone: Any) -> None:
    plain, sharded, replicated = adapted(kind), adapted(kind), adapted(kind)
    plain(input_ids=IDS, labels=IDS).loss.backward()
    expected = [p.grad for p in plain.parameters() if p.requires_grad]
    shard(sharded, alone)
    sharded.to("cpu")  # as strategies do, and FSDP2 looks all of its parameters up
    for _ in range(2):
        sharded.zero_grad()
        sharded(input_ids=IDS, labels=IDS).loss.backward()
    found = [whole(p.grad) for p in sharded.parameters() if p.requires_grad and p.grad is not None]
    assert len(found) == len(expected) and all(close(a, b) for a, b in zip(found, expected, strict=True))
    nn.parallel.DistributedDataParallel(replicated)(input_ids=IDS, labels=IDS).loss.backward()
    found = [p.grad for p in replicated.parameters() if p.requires_grad and p.grad is not None]
    assert len(found) == len(expected) and all(close(a, b) for a, b in zip(found, expected, strict=True))


def mixture(tokenizer_folder: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    shape = {**BASE, **QWEN, "vocab_size": 40, "eos_token_id": 4, "initializer_range": 0.2}
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape)).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


def fit(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    config = {
        "model": {"class_path": "LoRA", "init_args": {"base": str(base), "target_experts": True, "r": 4}},
        "data": {"class_path": "CausalLMData", "init_args": {"train": str(data), "limit_train": 32}},
        "trainer": {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu", "devices": 1},
    }
    out.mkdir()
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(out / "config.yaml"), "--trainer.default_root_dir", str(out), *more]


def test_the_command_trains_experts_says_what_it_costs_and_saves_them(
    tokenizer_folder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = mixture(tokenizer_folder, tmp_path / "base")
    assert main(fit(base, reviews, tmp_path / "run")) == 0
    shown = capsys.readouterr().out
    trained = 2 * 4 * 4 * ((32 + 32) + (16 + 32))  # layers, experts, rank
    assert f"experts:   LoRA on 4 parameters × 4 experts trains {trained:,} parameters" in shown
    (folder,) = (tmp_path / "run").glob("*/adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    ids = IDS % 40
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert close(lit_peft.load_adapter(model, folder)(input_ids=ids).logits, expected)
    assert main(["merge", "--base", str(base), "--adapter", str(folder), "--output", str(tmp_path / "merged")]) == 0
    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert close(merged(input_ids=ids).logits, expected)


@pytest.mark.heavy
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_the_experts_that_one_does(
    strategy: str, tokenizer_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    base = mixture(tokenizer_folder, tmp_path / "base")
    assert main(fit(base, reviews, tmp_path / "one", "--data.batch_size", "16")) == 0
    file = Path(__file__).parents[1] / "configs" / "strategies" / f"{strategy}.yaml"
    more = ["--config", str(file), "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--data.batch_size", "8"]
    script = tmp_path / "run.py"
    script.write_text("import sys\nfrom lit_peft.cli import main\nassert main(sys.argv[1:]) == 0\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += fit(base, reviews, tmp_path / "two", *more)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-6000:]
    one, two = (
        load_file(next((tmp_path / name).glob("*/adapter")) / "adapter_model.safetensors") for name in ("one", "two")
    )
    assert set(one) == set(two)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-5, rtol=1e-5)
