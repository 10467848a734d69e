"""LoRA against peft: stored reference cases, gradients on one batch, published parameter counts."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import ALL, ENCODERS, GOLDEN, batch, checkpointing_changes_nothing, close, make, scramble, trained_of
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding as GemmaScaled

import lit_peft
from lit_peft import LitPeftError, LoRASettings
from lit_peft.methods.attachment import attached_model, attachment_of
from lit_peft.nn.lora import LoRAEmbedding, LoRALinear
from lit_peft.nn.quantized import QuantizedLinear

CASES = sorted(p.parent for p in (GOLDEN / "peft").glob("*/case.json") if json.loads(p.read_text())["method"] == "lora")


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.mark.skipif(not CASES, reason="no reference cases: set LIT_PEFT_GOLDEN to their folder")
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_reference_case(case: Path) -> None:
    facts = json.loads((case / "case.json").read_text())
    model = getattr(transformers, facts["auto_class"]).from_pretrained(case / "base").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    io = load_file(case / "io.safetensors")
    batch = {name: io[name] for name in io if not name.startswith("output")}
    lit_peft.load_adapter(model, case / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, io["output"], atol=1e-5 * io["output"].abs().max(), rtol=0)
        merged = lit_peft.merge(model)(**batch).logits
    torch.testing.assert_close(merged, io["output"], atol=1e-5 * float(io["output"].abs().max()), rtol=0)
    assert set(model.state_dict()) == set(before)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj", "embed_tokens"]])
def test_gradients_equal_peft(dora: bool, targets: list[str], tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=dora, init_lora_weights=False)
    theirs = get_peft_model(tiny(), config)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    theirs = PeftModel.from_pretrained(tiny(), str(tmp_path), is_trainable=True)
    ours = lit_peft.load_adapter(tiny(), tmp_path)
    ids = torch.randint(0, 97, (2, 9))
    loss = ours(input_ids=ids, labels=ids).loss
    reference = theirs(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    loss.backward()
    reference.backward()
    wanted = {n.replace("base_model.model.", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    mine = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(mine) == len(wanted) > 0
    for name, gradient in mine.items():
        name = name.replace("lora_magnitude", "lora_magnitude_vector")
        spellings = [name, name.replace("lora_", "lora_embedding_")]
        found = next(g for n, g in wanted.items() if any(n.startswith(s + ".default") for s in spellings))
        torch.testing.assert_close(gradient, found, rtol=1e-5, atol=1e-5 * float(found.abs().max()))


@pytest.mark.parametrize(
    "settings",
    [
        LoRASettings(),
        LoRASettings(target_modules="all-linear", use_dora=True, bias="all"),
        LoRASettings(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]),
        LoRASettings(init_lora_weights="pissa", r=4),
        LoRASettings(init_lora_weights="olora", r=4),
    ],
)
def test_starts_as_the_base_and_detaches_bit_for_bit(settings: LoRASettings) -> None:
    model = tiny().eval()
    ids = torch.arange(14).view(2, 7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = model(input_ids=ids).logits
    lit_peft.attach(model, settings)
    torch.testing.assert_close(model(input_ids=ids).logits, base, atol=1e-5, rtol=0)
    lit_peft.detach(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_llama_7b_count() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, intermediate_size=11008))
    lit_peft.attach(model, LoRASettings(r=8, target_modules=["q_proj", "v_proj"]))
    assert lit_peft.trainable_parameters(model) == 4_194_304
    assert sum(p.numel() for p in model.parameters()) == 6_742_609_920


def test_bad_input_names_the_fix_and_leaves_the_model_alone() -> None:
    model = tiny()
    names = list(model.state_dict())
    with pytest.raises(LitPeftError, match="q_proj"):
        lit_peft.attach(model, LoRASettings(target_modules=["v_proj", "q_prj"]))
    with pytest.raises(LitPeftError, match="r=0"):
        LoRASettings(r=0)
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
    lit_peft.attach(model, LoRASettings())
    with pytest.raises(LitPeftError, match="already"):
        lit_peft.attach(model, LoRASettings())


@pytest.mark.parametrize(
    "settings",
    [
        LoRASettings(r=4, bias="lora_only", layers_to_transform=[0, 2]),
        LoRASettings(r=4, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 4}, use_rslora=True),
        LoRASettings(r=4, rank_pattern={"v_proj": 2, "[qv]_proj": 3}, alpha_pattern={"v_proj": 2, "[qv]_proj": 3}),
        LoRASettings(target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"]),
        LoRASettings(target_modules=["embed_tokens", "q_proj"]),
        LoRASettings(modules_to_save=["model.norm.weight"]),
    ],
)
def test_peft_loads_what_we_save(settings: LoRASettings, tmp_path: Path) -> None:
    from peft import PeftModel

    model = lit_peft.attach(tiny(), settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.randint(0, 97, (2, 9))
    ours = model.eval()(input_ids=ids).logits
    folder = lit_peft.save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny(), str(folder)).eval()(input_ids=ids).logits
    again = lit_peft.load_adapter(tiny(), folder).eval()(input_ids=ids).logits
    scale = ours.detach().abs().max().item()
    torch.testing.assert_close(theirs, ours, atol=1e-5 * scale, rtol=0)
    torch.testing.assert_close(again, ours, atol=0, rtol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
    with pytest.raises(LitPeftError, match="not an empty folder"):
        lit_peft.save_adapter(model, folder)


@pytest.mark.parametrize("name", ALL)
def test_every_architecture(name: str) -> None:
    """Starts as the base; checkpointing changes no gradient; generation needs no cache; detaches bit for bit."""
    model, inputs = make(name), batch(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        base = model(**inputs).logits
    lit_peft.attach(model, LoRASettings(r=4, target_modules="all-linear"))
    with torch.no_grad():
        close(model(**inputs).logits, base, 1e-6)
    scramble(model)
    with torch.no_grad():
        assert (model(**inputs).logits - base).abs().max() > 1e-3
    if name not in ENCODERS:
        prompt = {key: value for key, value in inputs.items() if key != "labels"}
        for beams in (1, 3):
            cached, plain = (
                model.generate(
                    **prompt, max_new_tokens=4, num_beams=beams, do_sample=False, pad_token_id=1, use_cache=cache
                )
                for cache in (True, False)
            )
            assert torch.equal(cached, plain)
    checkpointing_changes_nothing(model, inputs)
    assert all(value.grad.isfinite().all() and value.grad.abs().max() > 0 for value in trained_of(model).values())
    lit_peft.detach(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_starts_are_their_papers() -> None:
    """Kaiming: U(-1/√d, 1/√d). Gaussian: N(0, 1/r²). PiSSA: the best of rank r. OLoRA: the first r of Q and R."""
    torch.manual_seed(0)
    weight = torch.randn(40, 400)
    base = nn.Linear(400, 40, bias=False)
    made = {}
    for how in ("kaiming", "gaussian", "pissa", "olora"):
        base.weight.data.copy_(weight)
        made[how] = LoRALinear(copy.deepcopy(base), r=8, lora_alpha=16, init_lora_weights=how)
    assert made["kaiming"].lora_A.abs().max() <= 1 / 20 and made["kaiming"].lora_A.std() > 0.95 / 20 / 3**0.5
    assert 0.95 / 8 < made["gaussian"].lora_A.std() < 1.05 / 8
    for how in ("kaiming", "gaussian"):
        assert not made[how].lora_B.any() and not made[how].moved and torch.equal(made[how].weight, weight)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    q, r = torch.linalg.qr(weight)
    for how, update in (("pissa", u[:, :8] * s[:8] @ v[:8]), ("olora", 2 * q[:, :8] @ r[:8])):
        close(made[how].delta_weight(), update)
        close(made[how].weight, weight - update)
        nn.init.normal_(made[how].lora_B)
        a, b = made[how].plain()
        assert made[how].moved and a.shape == (16, 400)
        close(weight + 2 * b @ a, made[how].weight + made[how].delta_weight())
    balance = made["pissa"].lora_A.norm(dim=1)
    close(balance, (s[:8] / 2).sqrt())


def test_doras_dropout_is_on_the_updates_input_alone() -> None:
    """`W x + (m/‖W + sBA‖ - 1) · W x̃ + m/‖W + sBA‖ · s B A x̃ + b`, x̃ the dropped x, as peft has it."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(12, 20), r=4, lora_dropout=0.4, use_dora=True)
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter)
    x, update = torch.randn(3, 12), layer.scaling * layer.lora_B @ layer.lora_A
    scale = layer.lora_magnitude / (layer.weight + update).norm(dim=1)
    for training in (True, False):
        torch.manual_seed(1)
        dropped = F.dropout(x, 0.4, training)
        product = x @ layer.weight.T + (scale - 1) * (dropped @ layer.weight.T) + scale * (dropped @ update.T)
        torch.manual_seed(1)
        close(layer.train(training)(x), product + layer.bias)


@pytest.mark.parametrize("dora", [False, True])
def test_an_embedding_that_scales_scales_its_update(dora: bool) -> None:
    torch.manual_seed(0)
    layer = LoRAEmbedding(GemmaScaled(30, 12, 0, embed_scale=3.0), r=4, use_dora=dora)
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter)
    ids = torch.tensor([[3, 7, 29]])
    expected = 3 * (layer.weight + (layer.scaling * layer.lora_B @ layer.lora_A).T)
    if dora:
        expected = expected * layer.lora_magnitude / (expected / 3).norm(dim=0)
    close(layer(ids), F.embedding(ids, expected))
    layer.merge()
    close(layer(ids), F.embedding(ids, expected))
    assert torch.equal(layer(ids), layer.base_layer(ids))


def test_adapters_are_fp32_beside_half_and_fp64_beside_fp64() -> None:
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        layer = LoRALinear(nn.Linear(4, 4, dtype=dtype), use_dora=True)
        assert {p.dtype for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude)} == {wanted}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank_pattern": {"v_prj": 2}}, "rank_pattern has 'v_prj', .*'v_proj'"),
        ({"rank_pattern": {"v_proj": 2, "k_proj": 3}}, "rank_pattern has 'k_proj'"),
        ({"alpha_pattern": {"v_prj": 2}}, "alpha_pattern has 'v_prj', .*'v_proj'"),
        ({"rank_pattern": {"[qv]_proj": 4, "v_proj": 2}}, "rank_pattern has 'v_proj' after"),
        ({"exclude_modules": ["lm_head", "v_prj"]}, "exclude_modules has 'v_prj', .*'v_proj'"),
        ({"exclude_modules": ["layers.0"]}, "exclude_modules has 'layers.0'"),
        ({"exclude_modules": "v_proj"}, r"exclude_modules='v_proj'.*\['v_proj'\]"),
        ({"target_modules": "q_proj"}, r"target_modules='q_proj'.*\['q_proj'\]"),
        ({"target_modules": r".*q_prj"}, r"target_modules='\.\*q_prj' .*matches no .* closest are 'q_proj'"),
        ({"target_modules": ["q_prj"]}, "target_modules has 'q_prj', .*'q_proj'"),
        ({"layers_to_transform": [0, 3, -1]}, r"layers_to_transform has 3, -1, .*0 to 2"),
        ({"layers_to_transform": 3}, r"layers_to_transform has 3, .*0 to 2"),
        (
            {"layers_to_transform": [0], "layers_pattern": ["layers", "layer"]},
            "layers_pattern has 'layer', .*'layers'",
        ),
        ({"layers_pattern": "layers"}, r"layers_pattern=\['layers'\].*layers_to_transform"),
        *(
            ({field: value}, rf"{field} has the regular expression '\('")
            for field in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
            for value in [{"(": 2} if field.endswith("k_pattern") or field.startswith("alpha") else "("]
        ),
    ],
    ids=str,
)
def test_what_matches_no_module_is_refused(settings: dict[str, Any], words: str) -> None:
    """peft warns of some of these and passes over the rest; what is trained is not what was asked for in any."""
    model = tiny()
    with pytest.raises(LitPeftError, match=words):
        lit_peft.attach(model, LoRASettings(**{"target_modules": ["q_proj", "v_proj"], **settings}))
    assert all(p.requires_grad for p in model.parameters()) and "q_proj.lora_A" not in str(list(model.state_dict()))


def test_what_is_left_out_need_not_be_a_target() -> None:
    model = lit_peft.attach(tiny(), LoRASettings(target_modules=["q_proj"], exclude_modules=["lm_head", "v_proj"]))
    assert lit_peft.trainable_parameters(model) == 3 * 8 * (32 + 32)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_dropout_that_is_no_probability(dropout: float) -> None:
    with pytest.raises(LitPeftError, match=f"lora_dropout={dropout}"):
        LoRALinear(nn.Linear(4, 4), lora_dropout=dropout)


@pytest.mark.parametrize(
    "values",
    [
        {"r": 0},
        {"lora_dropout": 1.0},
        {"lora_dropout": -0.1},
        {"init_lora_weights": "gausian"},
        {"rank_pattern": {"q": 0}},
        {"loraplus_lr_ratio": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_be(values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(LitPeftError, match=f"{name}={re.escape(repr(value))}"):
        LoRASettings(**values)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 17, "init_lora_weights": "pissa"}, r"r=17.*16"),
        ({"r": 17, "init_lora_weights": "olora"}, r"r=17.*16"),
        ({"r": 4, "lora_alpha": 0, "init_lora_weights": "pissa"}, "lora_alpha=0"),
        ({"r": 4, "lora_alpha": -1, "init_lora_weights": "pissa"}, "lora_alpha=-1"),
    ],
    ids=str,
)
def test_starts_that_a_weight_does_not_give(settings: dict[str, Any], words: str) -> None:
    model = tiny()
    with pytest.raises(LitPeftError, match=words):
        lit_peft.attach(model, LoRASettings(target_modules=["v_proj"], **settings))
    with torch.device("meta"), pytest.raises(LitPeftError, match=words):
        lit_peft.attach(tiny(), LoRASettings(target_modules=["v_proj"], **settings))


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_starts_out_of_a_weight_need_a_dense_one(how: str) -> None:
    codes = torch.randint(-8, 8, (6, 8), dtype=torch.int8)
    base = QuantizedLinear(codes, torch.ones(6, 1), None, None, bits=4)
    with pytest.raises(LitPeftError, match=f"{how}.*quantized"):
        LoRALinear(base, r=2, init_lora_weights=how)
    with pytest.raises(LitPeftError, match=f"{how}.*linear layers only"):
        LoRAEmbedding(nn.Embedding(6, 8), r=2, init_lora_weights=how)
    with pytest.raises(LitPeftError, match="quantized, so an update cannot be added"):
        LoRALinear(base, r=2).merge()


def test_a_moved_start_follows_the_adapters_type() -> None:
    layer = LoRALinear(nn.Linear(8, 6), r=2, init_lora_weights="pissa").bfloat16()
    assert {tensor.dtype for tensor in layer.plain()} == {torch.bfloat16}


def test_an_adapted_embedding_still_says_what_it_is() -> None:
    base = nn.Embedding(9, 4, padding_idx=3)
    layer = LoRAEmbedding(base, r=2)
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (9, 4, 3)


class _Renamed(nn.Module):
    """A language model whose output projection has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.words_out = nn.Linear(4, 4), nn.Linear(4, 9)

    def get_output_embeddings(self) -> nn.Module:
        return self.words_out


def test_all_linear_leaves_out_the_output_projection_by_what_it_is() -> None:
    model = lit_peft.attach(_Renamed(), LoRASettings(target_modules="all-linear"))
    assert list(attachment_of(model).adapted) == ["body"]
    # A head with layers of its own, and a model that has no words to give.
    for other in (make("roberta"), nn.Sequential(nn.Linear(2, 2))):
        lit_peft.attach(other, LoRASettings(target_modules="all-linear"))
        assert not any("classifier" in path for path in attachment_of(other).adapted)
    with pytest.raises(LitPeftError, match="the layers of _Renamed are not numbered"):
        lit_peft.attach(_Renamed(), LoRASettings(target_modules=["body"], layers_to_transform=0))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_which_biases_are_trained(bias: Any) -> None:
    model = lit_peft.attach(make("bert"), LoRASettings(target_modules=["query"], bias=bias))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")]
    everywhere = [name for name, _ in make("bert").named_parameters() if name.endswith(".bias")]
    queries = [name for name in everywhere if name.endswith("query.bias")]
    wanted = {"none": [], "lora_only": queries, "all": everywhere}[bias]
    assert [name.replace(".base_layer", "") for name in trained] == wanted and len(everywhere) > len(queries) == 2


def test_the_least_rank_of_a_pattern_is_one() -> None:
    model = lit_peft.attach(tiny(), LoRASettings(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 1}))
    assert len(model.model.layers[0].self_attn.v_proj.lora_A) == 1


def test_a_list_of_layers_is_found_by_its_name() -> None:
    """A block of T5 has layers of its own, by number: 1 is the encoder's feed-forward and the decoder's cross one."""
    settings: dict[str, Any] = {"target_modules": ["wi"]}
    for pattern, wanted in (
        (None, ["encoder.block.1.layer.1", "decoder.block.1.layer.2"]),
        ("block", ["encoder.block.1.layer.1", "decoder.block.1.layer.2"]),
        (["layer"], ["encoder.block.0.layer.1", "encoder.block.1.layer.1"]),
        ("layer", ["decoder.block.0.layer.2", "decoder.block.1.layer.2"]),
    ):
        settings["layers_to_transform"] = 2 if pattern == "layer" else 1
        model = lit_peft.attach(make("t5"), LoRASettings(layers_pattern=pattern, **settings))
        assert [path.removesuffix(".DenseReluDense.wi") for path in attachment_of(model).adapted] == wanted


def test_a_module_trained_in_full_is_not_adapted_as_well() -> None:
    model = lit_peft.attach(make("llama"), LoRASettings(target_modules="all-linear", modules_to_save=["mlp"]))
    assert {path.split(".")[3] for path in attachment_of(model).adapted} == {"self_attn"}
    assert {path.split(".")[3] for path in attachment_of(model).trained} == {"mlp"}


def test_b_learns_faster_by_loraplus() -> None:
    settings = LoRASettings(loraplus_lr_ratio=4)
    factors = [settings.learning_rate_factor(f"a.{name}") for name in ("lora_A", "lora_B", "lora_B.bias")]
    assert factors == [1, 4, 1] and lit_peft.AdapterPSettings().learning_rate_factor("lora_B") == 1


def test_a_tied_parameter_is_trained_by_either_name() -> None:
    for name in ("lm_head.weight", "transformer.wte.weight"):
        model = lit_peft.attach(make("gpt2"), LoRASettings(modules_to_save=[name]))
        assert attachment_of(model).trained == [name]
        assert attached_model(nn.Sequential(nn.Linear(2, 2), model)) is model
    assert attached_model(nn.Linear(2, 2)) is None


def test_dropout_reaches_the_layers() -> None:
    model = lit_peft.attach(tiny(), LoRASettings(lora_dropout=0.25))
    assert model.model.layers[0].self_attn.q_proj.lora_dropout == 0.25


@pytest.mark.parametrize("target", ["lm_head", "wte"])
def test_merging_into_one_of_two_tied_weights(target: str, tmp_path: Path) -> None:
    model, ids = lit_peft.attach(make("gpt2"), LoRASettings(target_modules=[target])), batch("gpt2")["input_ids"]
    scramble(model)
    expected = model.eval()(ids).logits
    plain = lit_peft.merge(model)
    assert plain.config.tie_word_embeddings is False
    same = {"lm_head": plain.transformer.wte, "wte": plain.lm_head}[target].weight
    assert torch.equal(same, make("gpt2").lm_head.weight) and same.requires_grad
    close(plain(ids).logits, expected)
    plain.save_pretrained(tmp_path)
    close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, expected)
