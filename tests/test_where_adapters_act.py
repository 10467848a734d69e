"""Every adapted layer acts and gets a gradient, or attaching refuses it; what is left out is said."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from models import SHAPE, make, scramble, trained_of
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

import lit_peft
from lit_peft import LitPeftError, LoRASettings
from lit_peft.methods.targets import default_targets, find_targets
from lit_peft.models.experts import experts_left_out, stacked_experts
from lit_peft.nn.bottleneck import Bottleneck
from lit_peft.nn.lora import LoRALinear

SIZE: dict[str, Any] = {**SHAPE, "vocab_size": 61, "eos_token_id": None, "pad_token_id": 0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8}
VISION = {**SHAPE, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}


def decoder(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZE, **settings})
    return transformers.AutoModelForCausalLM.from_config(config)


def mamba(kind: str) -> Any:
    more = {"num_heads": 4, "head_dim": 16, "n_groups": 1} if kind == "mamba2" else {}
    return decoder(kind, state_size=8, expand=2, **more)


def llava(kind: str) -> Any:
    torch.manual_seed(0)
    text = transformers.AutoConfig.for_model(kind, **SIZE, num_key_value_heads=2)
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)
    return transformers.LlavaForConditionalGeneration(config)


def all_get_gradients(model: nn.Module, loss: torch.Tensor) -> None:
    loss.backward()
    trained = trained_of(model)
    assert trained and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values()), [
        name for name, p in trained.items() if p.grad is None or not p.grad.any()
    ]


# --------------------------------------------------------------------------------------------- torch's own layers


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["linear2"]], ids=str)
def test_a_transformer_of_torch_evaluates_what_it_trains(targets: Any, padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 2)
    x, before = torch.randn(2, 5, 16), set(vars(net))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    seen = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    with torch.no_grad():
        base = net.eval()(x, src_key_padding_mask=mask)[seen]
    lit_peft.attach(net, LoRASettings(r=2, target_modules=targets))
    assert not any("out_proj" in name for name in trained_of(net))
    scramble(net)
    trained = net.train()(x, src_key_padding_mask=mask)[seen]
    all_get_gradients(net, trained.square().sum())
    net.eval()
    with torch.no_grad():
        evaluated = net(x, src_key_padding_mask=mask)[seen]
        copied = copy.deepcopy(net)(x, src_key_padding_mask=mask)[seen]
    torch.testing.assert_close(evaluated, trained.detach())
    assert torch.equal(copied, evaluated) and not torch.allclose(evaluated, base)
    lit_peft.detach(net)
    with torch.no_grad():
        assert torch.equal(net(x, src_key_padding_mask=mask)[seen], base)
    assert set(vars(net)) == before and net.use_nested_tensor


def test_rows_of_a_transformer_of_torch_have_their_own_adapters() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        base = net(x)
        lit_peft.attach(net, LoRASettings(r=2, target_modules=["linear1"]))
        scramble(net)
        adapted = net(x)
        with lit_peft.row_adapters(net, ["default", None]):
            mixed = net(x)
    torch.testing.assert_close(mixed, torch.stack([adapted[0], base[1]]))
    assert not torch.allclose(adapted, base)


def test_a_layer_whose_weight_is_used_without_a_call_is_refused() -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "linear": nn.Linear(16, 16)})
    assert find_targets(net, "all-linear") == ["linear"]
    with pytest.raises(LitPeftError, match=r"attention\.out_proj.*MultiheadAttention.*no effect.*exclude_modules"):
        lit_peft.attach(net, LoRASettings(target_modules=["out_proj"]))
    # An expression that matches the attention as well adapts it as a whole, with the projection inside.
    lit_peft.attach(net, LoRASettings(target_modules=r".*"))
    assert sum(p.requires_grad for p in net.parameters()) == 2 * 3


# ------------------------------------------------------------------------------------------- models of transformers


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_a_state_space_model_adapts_what_its_kernels_do_not_bypass(kind: str) -> None:
    model = lit_peft.attach(mamba(kind), LoRASettings(r=2, target_modules="all-linear"))
    adapted = {name.rpartition(".")[0].rpartition(".")[2] for name in trained_of(model)}
    assert "in_proj" in adapted and not adapted & {"dt_proj", "out_proj"}
    scramble(model)
    ids = torch.randint(3, 61, (2, 7))
    all_get_gradients(model, model(input_ids=ids, labels=ids).loss)
    refused = ["out_proj"] if kind == "mamba2" else ["dt_proj"]
    with pytest.raises(LitPeftError, match=rf"{refused[0]}.*no effect"):
        lit_peft.attach(mamba(kind), LoRASettings(target_modules=refused))


def test_the_attention_of_wavlm_is_refused() -> None:
    convolutions = {"conv_dim": (32,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    config = transformers.WavLMConfig(**SHAPE, **convolutions, num_conv_pos_embeddings=16)
    model = transformers.WavLMModel(config)
    with pytest.raises(LitPeftError, match=r"q_proj.*WavLMAttention uses without calling"):
        lit_peft.attach(model, LoRASettings(target_modules=["q_proj", "v_proj"]))
    assert not any(name.endswith(("q_proj", "out_proj")) for name in find_targets(model, "all-linear"))


def test_a_router_that_returns_several_tensors_is_refused() -> None:
    model = decoder("llama4_text", num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48, head_dim=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not any("router" in name for name in find_targets(model, "all-linear"))
    with pytest.raises(LitPeftError, match=r"router, a Llama4Router that does not return one tensor"):
        lit_peft.attach(model, LoRASettings(target_modules=["router"]))


def test_bloom_that_computes_layers_without_calling_them_is_refused() -> None:
    model = make("bloom")
    assert any(name.endswith("dense") for name in find_targets(model, "all-linear"))
    model.config.slow_but_exact, model.config.pretraining_tp = True, 2
    assert not any(name.endswith("dense") for name in find_targets(model, "all-linear"))
    with pytest.raises(LitPeftError, match="slow_but_exact"):
        lit_peft.attach(model, LoRASettings(target_modules=["dense"]))


def test_a_pooler_that_the_head_does_not_use_is_refused() -> None:
    config = transformers.BigBirdConfig(**SIZE, is_decoder=True, attention_type="original_full")
    model = transformers.BigBirdForCausalLM(config)
    with pytest.raises(LitPeftError, match="pooler, whose output the head of BigBirdForCausalLM does not use"):
        lit_peft.attach(model, LoRASettings(target_modules=["pooler"]))
    lit_peft.attach(model, LoRASettings(r=2, target_modules="all-linear"))
    scramble(model)
    ids = torch.randint(3, 61, (2, 7))
    all_get_gradients(model, model(input_ids=ids, labels=ids).loss)
    assert any("pooler" in name for name in find_targets(make("bert"), "all-linear")), "its classifier uses it"


def test_an_indexer_that_only_selects_tokens_is_refused() -> None:
    sparse = nn.ModuleDict({"indexer": nn.ModuleDict({"wq": nn.Linear(4, 4)}), "q_proj": nn.Linear(4, 4)})
    assert find_targets(sparse, "all-linear") == ["q_proj"]
    with pytest.raises(LitPeftError, match=r"indexer\.wq, which only selects tokens"):
        find_targets(sparse, ["wq"])


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", {"q_proj", "v_proj"}),
        ("phi3", {"qkv_proj"}),
        ("gpt_neox", {"query_key_value"}),
        ("qwen2", {"q_proj", "v_proj"}),
    ],
)
def test_the_default_targets_are_the_language_models(kind: str, names: set[str]) -> None:
    model = llava(kind)
    targets = default_targets(model)
    adapted = find_targets(model, targets)
    assert {name.rpartition(".")[2] for name in adapted} == names
    assert all("language_model" in name for name in adapted)
    assert len(adapted) == 2 * len(names), "in each of the two layers"
    lit_peft.attach(model, LoRASettings(r=2))
    scramble(model)
    ids = torch.randint(9, 60, (2, 7))
    all_get_gradients(model, model(input_ids=ids, labels=ids).loss)


def test_the_default_targets_of_a_model_of_one_part_are_short_names() -> None:
    assert default_targets(make("llama")) == ["q_proj", "v_proj"]
    assert default_targets(make("t5")) == ["q", "v"] and default_targets(make("bert")) == ["query", "value"]


# --------------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=str)
def test_the_share_of_experts_that_stay_frozen_is_said(targets: Any) -> None:
    model = decoder("qwen2_moe", shared_expert_intermediate_size=16, **MOE)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = experts / sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in stacked_experts(model).values()) == experts > 0
    with pytest.warns(UserWarning, match=f"{share:.0%} of the weights.*experts.*stay frozen"):
        lit_peft.attach(model, LoRASettings(target_modules=targets))


def test_nothing_is_said_where_nobody_expects_experts_to_be_adapted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lit_peft.attach(decoder("qwen3_moe", **MOE), LoRASettings())
        lit_peft.attach(make("llama"), LoRASettings(target_modules="all-linear"))
    assert experts_left_out(make("llama")) is None and experts_left_out(make("bert")) is None
    assert experts_left_out(mamba("mamba2")) is None, "convolutions are no experts"


def test_experts_that_are_asked_for_by_name_are_mentioned() -> None:
    with pytest.raises(LitPeftError, match=r"'gate_proj'.*of the weights.*experts"):
        lit_peft.attach(decoder("qwen3_moe", **MOE), LoRASettings(target_modules=["q_proj", "gate_proj"]))


# ------------------------------------------------------------------------------------------------ in place, merging


@pytest.mark.parametrize(
    "settings",
    [
        LoRASettings(r=2, target_modules=["0", "2"]),
        LoRASettings(r=2, target_modules=["0", "2"], use_dora=True),
        LoRASettings(r=2, target_modules=["0", "2"], lora_dropout=0.1),
    ],
    ids=["lora", "dora", "dropout"],
)
@pytest.mark.parametrize("dims", [2, 3])
def test_an_operation_in_place_behind_an_adapted_layer(settings: LoRASettings, dims: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.SiLU(inplace=True))
    plain = copy.deepcopy(net)
    for index in (1, 3):
        plain[index].inplace = False
    x = torch.randn(*[4] * (dims - 1), 6)
    grads = []
    for model in (net, plain):
        torch.manual_seed(1)
        lit_peft.attach(model, settings)
        scramble(model)
        torch.manual_seed(2)
        model.train()(x).square().sum().backward()
        grads.append({name: p.grad for name, p in trained_of(model).items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])


def test_an_operation_in_place_behind_a_bottleneck_and_an_embedding() -> None:
    net = nn.Sequential(nn.Embedding(9, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True))
    lit_peft.attach(net, LoRASettings(r=2, target_modules=["0"]))
    net[2].register_forward_hook(Bottleneck(6, 2, init_weights="bert").after)
    net(torch.arange(5)).sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", ["lora_B", "lora_A", "base_layer.weight"])
def test_a_merge_that_would_give_nan_changes_nothing(broken: str, value: float) -> None:
    model = lit_peft.attach(make("llama"), LoRASettings(r=2))
    scramble(model)
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    with torch.no_grad():
        layers[-1].get_parameter(broken)[0, 0] = value
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    source = "base" if "base" in broken else "adapter"
    with pytest.raises(LitPeftError, match=f"cannot be merged.*come from the {source}"):
        lit_peft.merge(model)
    with pytest.raises(LitPeftError, match=f"come from the {source}"):
        layers[-1].merge()
    assert not layers[-1].merged and all(isinstance(layer, LoRALinear) for layer in layers)
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name


def test_a_merge_that_overflows_the_weights_type_is_refused() -> None:
    layer = LoRALinear(nn.Linear(4, 4).half(), r=2)
    nn.init.constant_(layer.lora_A, 300)
    nn.init.constant_(layer.lora_B, 300)
    before = layer.weight.detach().clone()
    with pytest.raises(LitPeftError, match="too large for the weight's dtype"):
        layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged


@pytest.mark.parametrize("targets", [["fp8"], ["plain"]], ids=str)
def test_a_merge_into_fp8_is_refused_and_changes_nothing(targets: list[str]) -> None:
    net = nn.ModuleDict({"plain": nn.Linear(64, 64), "fp8": FP8Linear(64, 64, block_size=(32, 32))})
    lit_peft.attach(net, LoRASettings(r=4, target_modules=targets))
    scramble(net)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(LitPeftError, match="FP8Linear stores its weight"):
        lit_peft.merge(net)
    found = net.state_dict()
    assert found.keys() == state.keys()
    assert all(
        torch.equal(found[name].float().nan_to_num(), value.float().nan_to_num()) for name, value in state.items()
    )
    assert type(lit_peft.detach(net)["fp8"]) is FP8Linear
