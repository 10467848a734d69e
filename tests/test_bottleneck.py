"""AdapterH, AdapterP and Parallel: AdapterHub's reference cases, every architecture, published counts, folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import (
    ALL,
    DECODERS,
    GOLDEN,
    SEQ2SEQS,
    SHAPE,
    batch,
    checkpointing_changes_nothing,
    close,
    learns,
    make,
    scramble,
    trained_of,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.activations import ACT2FN

import lit_peft
from lit_peft import AdapterHSettings, AdapterPSettings, LitPeftError, ParallelSettings
from lit_peft.methods.attachment import attachment_of
from lit_peft.methods.bottleneck import BottleneckSettings
from lit_peft.nn.bottleneck import ACTIVATIONS, Bottleneck

METHODS = {"adapter_h": AdapterHSettings, "adapter_p": AdapterPSettings, "parallel": ParallelSettings}
CASES = sorted(
    path.parent
    for path in (GOLDEN / "adapters").glob("*/case.json")
    if json.loads(path.read_text())["method"] in METHODS
)


@pytest.mark.skipif(not CASES, reason="no reference cases: set LIT_PEFT_GOLDEN to their folder")
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_reference_case(case: Path, tmp_path: Path) -> None:
    facts = json.loads((case / "case.json").read_text())
    io = load_file(case / "io.safetensors")
    inputs = {name: io[name] for name in io if not name.startswith("output")}

    def base() -> Any:
        return getattr(transformers, facts["auto_class"]).from_pretrained(case / "base").eval()

    model = lit_peft.load_adapter(base(), case / "adapter").eval()
    assert lit_peft.trainable_parameters(model) == facts["trainable"]
    with torch.no_grad():
        close(model(**inputs)[facts["output"]], io["output"])
        # The names and settings we write are AdapterHub's own.
        lit_peft.save_adapter(model, tmp_path / "again", format="adapterhub", name="ref")
        theirs = torch.load(case / "adapter" / "pytorch_adapter.bin", weights_only=True)
        ours = load_file(tmp_path / "again" / "adapter.safetensors")
        assert {n: tuple(t.shape) for n, t in ours.items()} == {n: tuple(t.shape) for n, t in theirs.items()}
        config, wanted = (
            json.loads((folder / "adapter_config.json").read_text())["config"]
            for folder in (tmp_path / "again", case / "adapter")
        )
        assert {name: wanted[name] for name in config} == config
        close(lit_peft.detach(model)(**inputs)[facts["output"]], io["output_base"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ALL)
def test_every_architecture(name: str, method: str) -> None:
    model, inputs = make(name), batch(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        base = model(**inputs).logits
    extra = {"cross_adapter": True} if name in SEQ2SEQS else {}
    extra.update(mh_adapter=method != "adapter_p")
    lit_peft.attach(model, METHODS[method](bottleneck_size=4, non_linearity="gelu", **extra))
    with torch.no_grad():
        close(model(**inputs).logits, base, 1e-6)
    trained = trained_of(model)
    assert len(trained) == 4 * (2 if name not in SEQ2SEQS else 4) * (1 + extra["mh_adapter"]) + 8 * (len(extra) - 1)
    learns(model.train(), inputs, rate=0.1)
    scramble(model)
    checkpointing_changes_nothing(model, inputs)
    with torch.no_grad():
        assert (model.eval()(**inputs).logits - base).abs().max() > 1e-3
    lit_peft.detach(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize("name", ALL)
def test_unknown_model_types_are_found_by_structure(name: str) -> None:
    from lit_peft.models.architectures import layer_stacks

    model = make(name)
    known = layer_stacks(model)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.model_type = "new"
    found = layer_stacks(model)
    assert [[layer.path for layer in stack] for stack in found] == [[layer.path for layer in stack] for stack in known]
    inputs = {key: value for key, value in batch(name).items() if key != "labels"}
    if name in SEQ2SEQS:
        inputs["decoder_input_ids"] = batch(name)["labels"]
    outputs = []
    for kind in ("new", name.split()[0]):
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.model_type = kind
        torch.manual_seed(0)
        lit_peft.attach(
            model, AdapterHSettings(bottleneck_size=4, original_ln_before=name != "phi", init_weights="bert")
        )
        scramble(model)
        with torch.no_grad():
            outputs.append(model(**inputs).logits)
        lit_peft.detach(model)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gptj", "falcon", "bloom", "opt post-LN", "t5", "bart", "marian"])
def test_generate_with_and_without_cache(name: str, beams: int) -> None:
    model = lit_peft.attach(make(name), ParallelSettings(mh_adapter=True, reduction_factor=8)).eval()
    scramble(model)
    inputs = {key: value for key, value in batch(name).items() if key != "labels"}
    cached, plain = (
        model.generate(**inputs, max_new_tokens=6, num_beams=beams, do_sample=False, pad_token_id=1, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_padding_changes_nothing(name: str, attention: str) -> None:
    model = make(name)
    model.set_attn_implementation(attention)
    lit_peft.attach(model, AdapterHSettings(bottleneck_size=4)).eval()
    scramble(model)
    ids, mask = batch(name)["input_ids"], batch(name)["attention_mask"]
    filler = torch.full((2, 3), 5)
    position_ids = torch.arange(7).expand(2, 7)

    def run(ids: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        more = {"position_ids": position_ids} if name in DECODERS else {}
        if name == "t5":
            more = {"decoder_input_ids": ids[:, :4] * 0 + 7}
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, **more).logits

    plain = run(ids, mask, position_ids)
    right = run(torch.cat([ids, filler], 1), torch.cat([mask, filler * 0], 1), torch.arange(10).expand(2, 10))
    close(right[:, :7] if name in DECODERS else right, plain)
    if name in DECODERS:
        left = torch.cat([filler * 0, position_ids], 1)
        close(run(torch.cat([filler, ids], 1), torch.cat([filler * 0, mask], 1), left)[:, 3:], plain)


# In ModernBERT and Phi, AdapterHub gives the adapter less than the layer's output.
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("modernbert", "phi")])
def test_adapter_p_is_the_papers_formula(name: str) -> None:
    from lit_peft.models.architectures import layer_stacks

    model, inputs = make(name), batch(name)
    layer = layer_stacks(model)[0][0]
    norm = layer.architecture.ffn.norm
    ln = None if norm is None else layer.module.get_submodule(norm)
    outputs, sums = [], []
    layer.module.register_forward_hook(lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    if ln is not None:
        ln.register_forward_pre_hook(lambda m, a: sums.append(a[0]))
    with torch.no_grad():
        model(**inputs)
        lit_peft.attach(model, AdapterPSettings(bottleneck_size=4)).eval()
        scramble(model)
        z, adapter = outputs[0] if ln is None else sums[0], layer.module.ffn_adapter
        model(**inputs)

        def a(h: torch.Tensor) -> torch.Tensor:
            return adapter.up(torch.relu(adapter.down(h)))

        close(outputs[1], z + a(z) if ln is None else ln(z + a(ln(z))))


OPTIONS: list[tuple[type[BottleneckSettings], dict[str, Any], Any]] = [
    # In each formula y is the FFN's output, x the residual, a the bottleneck, ln the layer's LayerNorm.
    (AdapterHSettings, {}, lambda y, x, a, ln, m: ln(a(y) + y + x)),
    (AdapterHSettings, {"original_ln_after": False}, lambda y, x, a, ln, m: a(y) + y),
    (AdapterPSettings, {"residual_before_ln": False}, lambda y, x, a, ln, m: ln(a(ln(y + x)) + ln(y + x) + x)),
    (AdapterPSettings, {"residual_before_ln": "post_add"}, lambda y, x, a, ln, m: ln(a(ln(y + x)) + y + x + x)),
    (
        AdapterPSettings,
        {"residual_before_ln": False, "original_ln_after": False},
        lambda y, x, a, ln, m: a(ln(y + x)) + ln(y + x),
    ),
    (
        AdapterHSettings,
        {"ln_before": True, "ln_after": True},
        lambda y, x, a, ln, m: ln(m.norm_after(a(m.norm_before(y))) + y + x),
    ),
    (
        AdapterHSettings,
        {"ln_after": True, "adapter_residual_before_ln": True},
        lambda y, x, a, ln, m: ln(m.norm_after(a(y) + y) + x),
    ),
    (
        AdapterHSettings,
        {"use_gating": True},
        lambda y, x, a, ln, m: ln(a(y) * torch.sigmoid(m.gate(y)).mean(1, keepdim=True) + y + x),
    ),
    (AdapterHSettings, {"scaling": "learned"}, lambda y, x, a, ln, m: ln(m.scaling * a(y) + y + x)),
    (AdapterHSettings, {"scaling": "channel"}, lambda y, x, a, ln, m: ln(a(y) * m.scaling + y + x)),
    (AdapterHSettings, {"scaling": 0.5}, lambda y, x, a, ln, m: ln(0.5 * a(y) + y + x)),
    (ParallelSettings, {}, lambda y, x, a, ln, m: ln(y + 4 * a(x) + x)),
    (ParallelSettings, {"original_ln_after": False}, lambda y, x, a, ln, m: y + 4 * a(x)),
]


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize(("kind", "values", "formula"), OPTIONS)
def test_options(name: str, kind: Any, values: dict[str, Any], formula: Any) -> None:
    model, inputs = make(name), batch(name)
    layer = model.bert.encoder.layer[0] if name == "bert" else model.model.layers[0]
    output, residual = (
        (layer.output.dropout, layer.intermediate) if name == "bert" else (layer.mlp, layer.post_attention_layernorm)
    )
    seen: dict[str, torch.Tensor] = {}
    handles = [
        output.register_forward_hook(lambda m, a, out: seen.update(y=out)),
        residual.register_forward_pre_hook(lambda m, a: seen.update(x=a[0])),
    ]
    with torch.no_grad():
        model(**inputs)
        for handle in handles:
            handle.remove()
        layer.register_forward_hook(lambda m, a, out: seen.update(out=out))
        values = {"mh_adapter": False, "bottleneck_size": 4, "non_linearity": "tanh", **values}
        lit_peft.attach(model, kind(**values)).eval()
        scramble(model)
        model(**inputs)
        m = layer.ffn_adapter
        ln = layer.output.LayerNorm if name == "bert" else nn.Identity()
        close(seen["out"], formula(seen["y"], seen["x"], lambda h: m.up(torch.tanh(m.down(h))), ln, m))


def test_layers_are_counted_through_encoder_and_decoder() -> None:
    settings = AdapterHSettings(leave_out=[0, 3], reduction_factor={"2": 8, "default": 4})
    model = lit_peft.attach(make("t5"), settings)
    sizes = {path: m.down.out_features for path, m in model.named_modules() if isinstance(m, Bottleneck)}
    assert sizes == {
        f"{block}.{role}_adapter": size
        for block, size in (("encoder.block.1", 8), ("decoder.block.0", 4))
        for role in ("attention", "ffn")
    }


class _Wrapped(nn.Module):
    """LLM-Adapters' three forms, written out."""

    def __init__(self, linear: nn.Linear, adapter: Bottleneck, form: str) -> None:
        super().__init__()
        self.linear, self.adapter, self.form = linear, adapter, form

    def a(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.adapter.down.weight.T) @ self.adapter.up.weight.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "before":
            return self.linear(self.a(x) + x)
        y = self.linear(x)
        return y + (self.a(x) if self.form == "beside" else self.a(y))


@pytest.mark.parametrize(
    ("method", "forms"),
    [
        ("adapter_h", {"mlp.gate_proj": "before", "mlp.up_proj": "before", "mlp.down_proj": "after"}),
        ("adapter_p", {"mlp.down_proj": "after"}),
        ("parallel", {f"self_attn.{name}": "beside" for name in ("q_proj", "k_proj", "v_proj")}),
    ],
)
def test_llm_adapters_placement(method: str, forms: dict[str, str], tmp_path: Path) -> None:
    model = lit_peft.attach(make("llama"), METHODS[method](placement="llm_adapters", bottleneck_size=4)).eval()
    scramble(model)
    adapters = {path: module for path, module in model.named_modules() if isinstance(module, Bottleneck)}
    assert set(adapters) == {f"model.layers.{i}.{name}.adapter" for i in range(2) for name in forms}
    reference = make("llama")
    for path, adapter in adapters.items():
        place = path.removesuffix(".adapter")
        parent, _, name = place.rpartition(".")
        form = forms[place.split(".", 3)[3]]
        setattr(reference.get_submodule(parent), name, _Wrapped(reference.get_submodule(place), adapter, form))
    ids = batch("llama")["input_ids"]
    close(model(ids).logits, reference(ids).logits)
    lit_peft.save_adapter(model, tmp_path / "a")
    assert torch.equal(lit_peft.load_adapter(make("llama"), tmp_path / "a").eval()(ids).logits, model(ids).logits)
    with pytest.raises(LitPeftError, match="placement"):
        lit_peft.save_adapter(model, tmp_path / "b", format="adapterhub")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "bloom", "modernbert", "phi3"])
def test_named_linears_of_every_kind(name: str) -> None:
    inputs = batch(name)
    for method, settings in METHODS.items():
        model = make(name)
        base = model(**inputs).loss
        lit_peft.attach(model, settings(placement="llm_adapters", bottleneck_size=4))
        loss = model(**inputs).loss
        close(loss, base, 1e-6)
        loss.backward()
        assert any(p.requires_grad and p.grad.abs().max() > 0 for p in model.parameters()), method


def test_published_count() -> None:
    with torch.device("meta"):
        config = transformers.LlamaConfig(vocab_size=32000, intermediate_size=11008)
        model = transformers.LlamaForCausalLM(config)
    lit_peft.attach(model, AdapterPSettings(placement="llm_adapters"))
    trained = lit_peft.trainable_parameters(model)
    assert trained == 32 * 2 * 4096 * 256
    # LLM-Adapters, table 1: the series adapter trains 0.99 % of base plus adapter.
    assert round(100 * trained / sum(p.numel() for p in model.parameters()), 2) == 0.99


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert", AdapterHSettings(train_layer_norms=True, leave_out=[1], modules_to_save=["classifier"])),
        ("gpt2", AdapterPSettings(bottleneck_size=5, scaling="learned", bias=False, ln_before=True, ln_after=True)),
        ("mbart", ParallelSettings(mh_adapter=True, cross_adapter=True, reduction_factor={"0": 4, "default": 8})),
        ("t5", AdapterHSettings(use_gating=True, scaling="channel", original_ln_after=False)),
        ("llama", AdapterHSettings(placement="llm_adapters", target_modules=["k_proj", "up_proj"], leave_out=[0])),
    ],
)
def test_folders_round_trip(name: str, settings: BottleneckSettings, tmp_path: Path) -> None:
    model = lit_peft.attach(make(name), settings).eval()
    scramble(model)
    inputs = batch(name)
    folder = lit_peft.save_adapter(model, tmp_path / "adapter")
    again = lit_peft.load_adapter(make(name), folder).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    assert [key for key, p in again.named_parameters() if p.requires_grad] == names


def test_layer_norms_are_trained_and_come_back() -> None:
    model = make("bert")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    lit_peft.attach(model, AdapterHSettings(train_layer_norms=True))
    trained = [key for key, p in model.named_parameters() if p.requires_grad and "_adapter" not in key]
    assert trained == [key for key in before if "LayerNorm" in key]
    scramble(model)
    after = lit_peft.detach(model).state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_dropped_adapters_are_left_out(name: str) -> None:
    inputs = batch(name)
    model = lit_peft.attach(make(name), AdapterPSettings(bottleneck_size=4)).eval()
    scramble(model)
    whole = model(**inputs).logits
    less = lit_peft.attach(make(name), AdapterPSettings(bottleneck_size=4, leave_out=[0])).eval()
    less.load_state_dict(model.state_dict(), strict=False)
    close(lit_peft.drop_adapters(model, 1)(**inputs).logits, less(**inputs).logits)
    assert torch.equal(lit_peft.drop_adapters(model, 2)(**inputs).logits, make(name)(**inputs).logits)
    assert torch.equal(lit_peft.drop_adapters(model, 0)(**inputs).logits, whole)
    with pytest.raises(LitPeftError, match="lowest=3"):
        lit_peft.drop_adapters(model, 3)


@pytest.mark.parametrize("settings", [AdapterHSettings(), AdapterPSettings(ln_before=True), ParallelSettings()])
def test_half_precision_bases_keep_full_precision_adapters(settings: BottleneckSettings) -> None:
    model = lit_peft.attach(make("llama").to(torch.bfloat16), settings)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    scramble(model)
    outputs = model(**batch("llama"))
    assert outputs.logits.dtype == torch.bfloat16
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_head_beside_the_adapter_is_loaded(tmp_path: Path) -> None:
    model = make("bert")
    lit_peft.save_adapter(lit_peft.attach(model, AdapterPSettings()), tmp_path / "a", format="adapterhub")
    head = {"classifier.weight": torch.randn(2, 32), "classifier.bias": torch.randn(2)}
    torch.save(head, tmp_path / "a" / "pytorch_model_head.bin")
    loaded = lit_peft.load_adapter(make("bert"), tmp_path / "a")
    assert torch.equal(loaded.classifier.weight, head["classifier.weight"]) and loaded.classifier.bias.requires_grad
    assert torch.equal(lit_peft.detach(loaded).classifier.weight, make("bert").classifier.weight)


def test_cross_attention_is_named_as_adapterhub_names_it(tmp_path: Path) -> None:
    for name, place in (("bart", "model.decoder.layers.1.cross_attention_adapters"), ("t5", "decoder.block.1.layer.1")):
        model = lit_peft.attach(make(name), AdapterHSettings(cross_adapter=True))
        folder = lit_peft.save_adapter(model, tmp_path / name, format="adapterhub", name="x")
        assert f"{place}.adapters.x.adapter_up.weight" in load_file(folder / "adapter.safetensors")


def test_an_adapterhub_bert_decoder_has_adapters_at_both_attentions(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        part = transformers.BertConfig(vocab_size=61, is_decoder=True, add_cross_attention=True, **SHAPE)
        return transformers.BertLMHeadModel(part).eval()

    saved = lit_peft.attach(model(), AdapterHSettings(cross_adapter=True))
    scramble(saved)
    folder = lit_peft.save_adapter(saved, tmp_path / "a", format="adapterhub")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["config"]["cross_adapter"] = False
    (folder / "adapter_config.json").write_text(json.dumps(config))
    inputs = {"input_ids": torch.arange(7)[None], "encoder_hidden_states": torch.randn(1, 5, 32)}
    with torch.no_grad():
        assert torch.equal(lit_peft.load_adapter(model(), folder)(**inputs).logits, saved.eval()(**inputs).logits)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(_Code.folder),)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    folder = lit_peft.save_adapter(lit_peft.attach(make("bert"), AdapterPSettings()), tmp_path / "a", "adapterhub")
    text = (folder / "adapter_config.json").read_text()
    model = make("bert")

    def refused(match: str, **changes: Any) -> None:
        config = json.loads(text)
        config["config"].update(changes)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(LitPeftError, match=match) as caught:
            lit_peft.load_adapter(model, folder)
        assert str(folder) in str(caught.value)
        assert not any("_adapter" in key for key in model.state_dict())
        assert all(parameter.requires_grad for parameter in model.parameters())

    refused("inv_adapter, phm_layer", phm_layer=True, inv_adapter="nice")
    refused("new_setting", new_setting=3)
    refused("union", architecture="union")
    refused("unexpected", leave_out=[0])
    refused("shape", reduction_factor=8)
    refused("shape", reduction_factor={"0": 8, "7": 4, "default": 2})
    (folder / "adapter.safetensors").unlink()
    refused("adapter.safetensors nor")
    _Code.folder = tmp_path / "run"
    torch.save(_Code(), folder / "pytorch_adapter.bin")
    refused("could run code")
    assert not _Code.folder.exists()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(LitPeftError, match="neither 'peft_type'"):
        lit_peft.load_adapter(model, folder)


@pytest.mark.parametrize(
    ("kind", "values", "match"),
    [
        (AdapterHSettings, {"non_linearity": "rely"}, "'relu'"),
        (AdapterHSettings, {"scaling": "learnt"}, "scaling='learnt'"),
        (AdapterHSettings, {"reduction_factor": 0}, "reduction_factor=0"),
        (AdapterPSettings, {"reduction_factor": 4, "bottleneck_size": 8}, "give one"),
        (AdapterPSettings, {"bottleneck_size": 0}, "bottleneck_size=0"),
        (AdapterPSettings, {"dropout": 1.0}, "dropout=1.0"),
        (AdapterPSettings, {"output_adapter": False}, "all false"),
        (ParallelSettings, {"init_weights": "zero"}, "init_weights='zero'"),
        (ParallelSettings, {"placement": "here"}, "placement='here'"),
        (ParallelSettings, {"target_modules": ["mlp"]}, "llm_adapters"),
        (ParallelSettings, {"residual_before_ln": "post"}, "post_add"),
        (AdapterHSettings, {"leave_out": [2]}, "layers are 0 to 1"),
        (AdapterHSettings, {"leave_out": [0, 1]}, "without any adapter"),
        (AdapterHSettings, {"reduction_factor": {"0": 4}}, "layer 1"),
        (AdapterHSettings, {"reduction_factor": {"0": 4, "2": 8, "default": 2}}, r"names \['2'\].*layers are 0 to 1"),
        (AdapterHSettings, {"cross_adapter": True}, "no cross-attention"),
        (AdapterHSettings, {"placement": "llm_adapters", "cross_adapter": True}, "cross_adapter=True has no effect"),
        (AdapterPSettings, {"placement": "llm_adapters", "mh_adapter": True}, "mh_adapter=True has no effect"),
        (
            ParallelSettings,
            {"placement": "llm_adapters", "output_adapter": False},
            "output_adapter=False has no effect",
        ),
        (AdapterPSettings, {"placement": "llm_adapters", "original_ln_before": False}, "original_ln_before=False has"),
        (AdapterHSettings, {"placement": "llm_adapters", "target_modules": "("}, r"target_modules has .* '\('"),
        (AdapterHSettings, {"placement": "llm_adapters", "target_modules": ["down_prj"]}, "'down_proj'"),
        (AdapterHSettings, {"placement": "llm_adapters", "target_modules": ["embed_tokens"]}, "linear layers only"),
    ],
)
def test_bad_input_names_the_fix_and_leaves_the_model_alone(kind: Any, values: dict[str, Any], match: str) -> None:
    model = make("llama")
    names = list(model.state_dict())
    with pytest.raises(LitPeftError, match=match):
        lit_peft.attach(model, kind(**values))
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_adapterhubs_factors_of_layers_that_are_not_there_are_passed_over(tmp_path: Path) -> None:
    model = lit_peft.attach(make("bert"), AdapterPSettings(reduction_factor={"0": 8, "default": 4})).eval()
    scramble(model)
    folder = lit_peft.save_adapter(model, tmp_path / "adapter", format="adapterhub")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["config"]["reduction_factor"]["11"] = 2
    (folder / "adapter_config.json").write_text(json.dumps(config))
    again = lit_peft.load_adapter(make("bert"), folder).eval()
    assert torch.equal(again(**batch("bert")).logits, model(**batch("bert")).logits)


def test_a_model_without_known_layers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(LitPeftError, match="target_modules"):
        lit_peft.attach(model, AdapterPSettings())
    named = {"placement": "llm_adapters", "target_modules": ["0"]}
    for counted in ({"leave_out": [0], "bottleneck_size": 2}, {"reduction_factor": {"default": 2}}):
        with pytest.raises(LitPeftError, match="target_modules"):
            lit_peft.attach(model, AdapterPSettings(**named, **counted))
    lit_peft.attach(model, AdapterPSettings(**named, bottleneck_size=2)).eval()
    assert lit_peft.trainable_parameters(model) == 16
    scramble(model)
    x, adapter = torch.randn(3, 4), model[0].adapter
    # A square layer is adapted behind it.
    y = F.linear(x, model[0].weight, model[0].bias)
    close(model(x), y + torch.tanh(y @ adapter.down.weight.T) @ adapter.up.weight.T)


@pytest.mark.parametrize(
    ("name", "version"),
    [("bert", "1.3.0"), ("gpt2", "1.3.0"), ("bert", "1.0.1"), ("bert", "1.1.0"), ("bert", "2.0.0")],
)
def test_adapterhub_lora(name: str, version: str, tmp_path: Path) -> None:
    """W + alpha/r · B A by hand; a fused projection has an update of its own for each of q, k and v."""
    torch.manual_seed(0)
    places = {
        "bert": {f"bert.encoder.layer.1.attention.self.{part}": 1 for part in ("query", "value")},
        "gpt2": {"transformer.h.0.attn.c_attn": 2, "transformer.h.1.mlp.c_fc": 1},
    }[name]
    r, alpha = 4, 12
    model, reference, stored = make(name), make(name), {}
    scale = 1.0 if version == "1.0.1" else alpha / r
    for path, count in places.items():
        weight = reference.get_submodule(path).weight.data
        delta = weight if name == "bert" else weight.T
        a = torch.randn(count * r, delta.shape[1])
        b = torch.randn(delta.shape[0] // 3 * 2 if count == 2 else delta.shape[0], r)
        stored[f"{path}.loras.ref.lora_A"], stored[f"{path}.loras.ref.lora_B"] = a, b
        if count == 1:
            delta += scale * b @ a
        else:
            third = delta.shape[0] // 3
            delta[:third] += scale * b[:third] @ a[:r]
            delta[2 * third :] += scale * b[third:] @ a[r:]
    torch.save(stored, tmp_path / "pytorch_adapter.bin")
    config = {"architecture": "lora", "r": r, "alpha": alpha, "attn_matrices": ["q", "v"], "use_gating": False}
    text = json.dumps({"config": config, "name": "ref", "version": f"adapters.{version}"})
    (tmp_path / "adapter_config.json").write_text(text)
    inputs = batch(name)
    with torch.no_grad():
        close(lit_peft.load_adapter(model, tmp_path).eval()(**inputs).logits, reference(**inputs).logits)
    (tmp_path / "adapter_config.json").write_text(text.replace('"use_gating": false', '"use_gating": true'))
    with pytest.raises(LitPeftError, match="use_gating"):
        lit_peft.load_adapter(make(name), tmp_path)
    (tmp_path / "adapter_config.json").write_text(text.replace('"r": 4', '"r": 4, "composition_mode": "scale"'))
    with pytest.raises(LitPeftError, match="sets composition_mode='scale'"):
        lit_peft.load_adapter(make(name), tmp_path)


def test_a_layer_without_a_batch_axis_keeps_its_shape() -> None:
    model = lit_peft.attach(make("opt post-LN"), AdapterPSettings(original_ln_after=False))
    assert model(**batch("opt")).logits.shape == (2, 7, 61)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_transformers(name: str) -> None:
    x = torch.linspace(-8, 8, 101)
    close(ACTIVATIONS[name](x), ACT2FN["leaky_relu" if name == "leakyrelu" else name](x))


def test_starts_are_their_papers() -> None:
    """mam: U(-1/√d, 1/√d) and zero; bert: N(0, 0.02²); houlsby: N(0, 0.01²) cut at two deviations; biases zero."""
    torch.manual_seed(0)
    mam, bert, houlsby = (
        Bottleneck(400, 50, init_weights=how, use_gating=True) for how in ("mam_adapter", "bert", "houlsby")
    )
    assert mam.down.weight.abs().max() <= 1 / 20 and mam.down.weight.std() > 0.95 / 20 / 3**0.5
    assert not mam.up.weight.any() and not mam(torch.randn(2, 3, 400)).any()
    for layer in (bert.down, bert.up, bert.gate, mam.gate, houlsby.gate):
        assert 0.9 * 0.02 < layer.weight.std() < 1.1 * 0.02
    for layer in (houlsby.down, houlsby.up):
        # 0.8796: the deviation of a standard normal that is cut at ±2.
        assert layer.weight.abs().max() <= 0.02 and abs(layer.weight.std() / 0.008796 - 1) < 0.05
    for layer in (mam, bert, houlsby):
        assert not any(part.bias.any() for part in (layer.down, layer.up, layer.gate))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_on_the_scaled_output(training: bool) -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(5, 12), Bottleneck(12, 4, 8, dropout=0.5, scaling=3.0, bias=False, init_weights="bert")
    torch.manual_seed(1)
    expected = F.dropout(3 * (x @ layer.down.weight.T).relu() @ layer.up.weight.T, 0.5, training)
    torch.manual_seed(1)
    close(layer.train(training)(x), expected)


def test_without_a_sequence_axis_tokens_are_gated_one_by_one() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(5, 12), Bottleneck(12, 4, init_weights="bert", use_gating=True)
    nn.init.normal_(layer.gate.weight)
    ungated = layer.up(layer.down(x).relu())
    close(layer(x), ungated * torch.sigmoid(layer.gate(x)))
    close(layer(x[None])[0], ungated * torch.sigmoid(layer.gate(x)).mean())


@pytest.mark.parametrize("place", ["before", "after", "beside"])
def test_hooks_of_a_module_with_more_than_one_input(place: str) -> None:
    """The adapter acts on the first input, in the module's type; switched off, the module is what it was."""
    torch.manual_seed(0)
    base, x, more = nn.Linear(8, 8, dtype=torch.bfloat16), torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(2)
    layer = Bottleneck(8, 4, init_weights="bert", scaling=40.0, dtype=torch.float32)

    class Module(nn.Module):
        def forward(self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            assert first is more and second is more
            return base(x)

    module = Module()
    hook = getattr(layer, place)
    module.register_forward_pre_hook(hook) if place == "before" else module.register_forward_hook(hook)
    y = base(x)
    expected = {"before": base(x + layer(x)), "after": y + layer(y), "beside": y + layer(x)}[place]
    out = module(x, more, more)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected) and not torch.equal(out, y)
    layer.enabled = False
    assert torch.equal(module(x, more, more), y)


def test_layer_norms_keep_their_epsilon() -> None:
    layer, x = Bottleneck(8, 4, ln_before=True, ln_after=True, init_weights="bert"), torch.randn(2, 8)
    layer.norm_before.eps = layer.norm_after.eps = 0.5
    close(layer(x), layer.norm_after(layer.up(layer.down(layer.norm_before(x)).relu())))


def test_a_factor_that_makes_more_than_a_folder_holds_is_refused_before_it_is_built(tmp_path: Path) -> None:
    folder = lit_peft.save_adapter(lit_peft.attach(make("bert"), AdapterPSettings()), tmp_path / "a", "adapterhub")
    config = json.loads((folder / "adapter_config.json").read_text())
    # 32 / 0.5 is 64, as wide as the largest tensor, 32 by 2.
    for factor, match in (
        (0.5, "shape"),
        (0.49, "the bottleneck size from reduction_factor=65.3"),
        ({"default": 0.49}, "65.3"),
    ):
        config["config"]["reduction_factor"] = factor
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(LitPeftError, match=match):
            lit_peft.load_adapter(make("bert"), folder)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("houlsby", AdapterHSettings()),
        ("double_seq_bn", AdapterHSettings()),
        ("pfeiffer", AdapterPSettings()),
        ("seq_bn", AdapterPSettings()),
        ("parallel", ParallelSettings(reduction_factor=2, non_linearity="relu", scaling=4.0)),
        ("par_bn", ParallelSettings(reduction_factor=2, non_linearity="relu", scaling=4.0)),
    ],
)
def test_adapterhubs_own_configurations_by_name(name: str, settings: BottleneckSettings, tmp_path: Path) -> None:
    model = lit_peft.attach(make("bert"), settings).eval()
    scramble(model)
    folder = lit_peft.save_adapter(model, tmp_path / "a", "adapterhub")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "config": name}))
    again = lit_peft.load_adapter(make("bert"), folder).eval()
    assert torch.equal(again(**batch("bert")).logits, model(**batch("bert")).logits)
    assert type(attachment_of(again).settings) is type(settings)


def test_layer_norms_of_an_adapter_have_adapterhubs_names(tmp_path: Path) -> None:
    settings = AdapterPSettings(ln_before=True, ln_after=True)
    model = lit_peft.attach(make("bert"), settings).eval()
    scramble(model)
    folder = lit_peft.save_adapter(model, tmp_path / "a", "adapterhub", name="mine")
    places = {name.partition(".adapters.mine.")[2] for name in load_file(folder / "adapter.safetensors")}
    # AdapterHub's `adapter_down` is a sequence: the norm, which it has under a name of its own as well, then the layer.
    norms = ("adapter_norm_before", "adapter_norm_after", "adapter_down.0", "adapter_down.1", "adapter_up")
    assert places == {f"{part}.{kind}" for part in norms for kind in ("weight", "bias")}
    again = lit_peft.load_adapter(make("bert"), folder).eval()
    assert torch.equal(again(**batch("bert")).logits, model(**batch("bert")).logits)


def test_what_adapterhubs_configuration_cannot_say_is_named_and_kept_beside_it(tmp_path: Path) -> None:
    settings = AdapterPSettings(placement="llm_adapters", bias=False, bottleneck_size=4)
    model = lit_peft.attach(make("llama"), settings)
    with pytest.raises(LitPeftError, match=r"cannot hold placement='llm_adapters', bias=False:"):
        lit_peft.save_adapter(model, tmp_path / "theirs", format="adapterhub")
    lit_peft.detach(model)
    norms = lit_peft.attach(model, AdapterHSettings(train_layer_norms=True))
    with pytest.raises(LitPeftError, match="cannot hold train_layer_norms=True:"):
        lit_peft.save_adapter(norms, tmp_path / "theirs", format="adapterhub")
    folder = lit_peft.save_adapter(lit_peft.attach(make("llama"), settings), tmp_path / "ours")
    assert json.loads((folder / "adapter_config.json").read_text())["config"] == {"architecture": "lit_peft"}


@pytest.mark.parametrize(
    ("attention", "ffn"),
    [
        ("attention_text_task_adapters", "layer_text_task_adapters"),
        ("attention_text_lang_adapters", "layer_text_lang_adapters"),
    ],
)
@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_adapterhubs_old_names(attention: str, ffn: str, prefix: str, tmp_path: Path) -> None:
    """Folders from before AdapterHub 3 name adapters by their kind; a headless model's names have no prefix."""
    model = lit_peft.attach(make("bert"), AdapterHSettings()).eval()
    scramble(model)
    folder = lit_peft.save_adapter(model, tmp_path / "a", "adapterhub")
    stored = load_file(folder / "adapter.safetensors")
    renamed = {}
    for name, tensor in stored.items():
        kind = attention if ".attention.output." in name else ffn
        renamed[prefix + name.removeprefix("bert.").replace(".adapters.", f".{kind}.")] = tensor
    assert set(renamed) != set(stored)
    save_file(renamed, folder / "adapter.safetensors")
    again = lit_peft.load_adapter(make("bert"), folder).eval()
    assert torch.equal(again(**batch("bert")).logits, model(**batch("bert")).logits)


def test_llm_adapters_sizes_by_layer() -> None:
    settings = AdapterPSettings(placement="llm_adapters", reduction_factor={"0": 8, "default": 4})
    model = lit_peft.attach(make("llama"), settings)
    assert [layer.mlp.down_proj.adapter.down.out_features for layer in model.model.layers] == [4, 8]
    lit_peft.detach(model)
    left = AdapterPSettings(placement="llm_adapters", target_modules=["q_proj"], bottleneck_size=4, leave_out=[0])
    places = list(attachment_of(lit_peft.attach(model, left)).adapted)
    assert places == ["model.layers.1.self_attn.q_proj.adapter"]


@pytest.mark.parametrize("size", [1, 3, 5, 7, 32])
def test_adapterhub_finds_the_same_size_in_a_factor(size: int, tmp_path: Path) -> None:
    model = lit_peft.attach(make("bert"), AdapterPSettings(bottleneck_size=size)).eval()
    folder = lit_peft.save_adapter(model, tmp_path / "a", "adapterhub")
    config = json.loads((folder / "adapter_config.json").read_text())
    # AdapterHub cuts the width over the factor down to a whole number.
    assert int(32 // config["config"]["reduction_factor"]) == size
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "lit_peft"}))
    again = lit_peft.load_adapter(make("bert"), folder).eval()
    assert torch.equal(again(**batch("bert")).logits, model(**batch("bert")).logits)


@pytest.mark.parametrize(("factor", "size"), [(1, 32), (0.5, 64), (5, 6), (32, 1), (100, 1)])
def test_sizes_by_factor(factor: float, size: int) -> None:
    model = lit_peft.attach(make("bert"), AdapterPSettings(reduction_factor=factor))
    assert {module.down.out_features for module in model.modules() if isinstance(module, Bottleneck)} == {size}
