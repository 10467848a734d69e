"""Adapters and prefixes on hybrid models, mixtures of experts and latent attention, against plain computations."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import checkpointing, close
from sweep import METHODS, answers, sound
from sweep_models import OWN, build, settings_of
from test_expert_lora import scramble
from torch import Tensor, nn
from transformers import AttentionInterface

import lit_peft
from lit_peft import (
    AdapterHSettings,
    AdapterPSettings,
    LitPeftError,
    LoRASettings,
    ParallelSettings,
    PrefixTuningSettings,
    PTuningV2Settings,
)
from lit_peft.methods.attachment import attachment_of
from lit_peft.models.architectures import layer_stacks
from lit_peft.nn.prefix import Prefix

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
Part = tuple[tuple[str, ...], str, str]
BLOCKS: list[Part] = [
    (("mamba", "self_attn"), "input_layernorm", "attention_adapter"),
    (("feed_forward",), "pre_ff_layernorm", "ffn_adapter"),
]
QWEN: list[Part] = [
    (("linear_attn", "self_attn"), "input_layernorm", "attention_adapter"),
    (("mlp",), "post_attention_layernorm", "ffn_adapter"),
]
GRANITE: list[Part] = [
    (("mamba", "self_attn"), "input_layernorm", "attention_adapter"),
    (("block_sparse_moe", "shared_mlp"), "post_attention_layernorm", "ffn_adapter"),
]
# The parts of a layer, each `x = x + f(norm(x))`: the modules of f, of which a layer has one or adds up several, the
# norm, and the name of the adapter.
PARTS: dict[str, list[Part]] = {
    "bamba": BLOCKS,
    "falcon_h1": BLOCKS,
    "jamba": BLOCKS,
    "granitemoe": GRANITE,
    "granitemoehybrid": GRANITE,
    "granitemoeshared": GRANITE,
    "lfm2": [
        (("conv", "self_attn"), "operator_norm", "attention_adapter"),
        (("feed_forward",), "ffn_norm", "ffn_adapter"),
    ],
    "llama4_text": [QWEN[0], (("feed_forward",), "post_attention_layernorm", "ffn_adapter")],
    "mamba": [(("mixer",), "norm", "ffn_adapter")],
    "mamba2": [(("mixer",), "norm", "ffn_adapter")],
    "mpt": [(("attn",), "norm_1", "attention_adapter"), (("ffn",), "norm_2", "ffn_adapter")],
    "nemotron_h": [(("mixer",), "norm", "")],
    "qwen3_5_text": QWEN,
    "qwen3_next": QWEN,
    "recurrent_gemma": [
        (("temporal_block",), "temporal_pre_norm", "attention_adapter"),
        (("mlp_block",), "channel_pre_norm", "ffn_adapter"),
    ],
}
# What a layer multiplies the outputs of these modules by.
FACTORS = {"mamba": "ssm_out_multiplier", "self_attn": "attn_out_multiplier"}
SETTINGS: dict[str, Any] = {
    "AdapterH": AdapterHSettings(reduction_factor=4),
    "AdapterP": AdapterPSettings(reduction_factor=4),
    "Parallel": ParallelSettings(reduction_factor=4),
}


def base_of(kind: str) -> Any:
    model = build(kind, "decoder")
    for module in model.modules():
        if kind == "falcon_h1" and hasattr(module, "ssm_out_multiplier"):
            module.ssm_out_multiplier, module.attn_out_multiplier = 0.7, 1.3
        if kind.startswith("granite") and hasattr(module, "residual_multiplier"):
            module.residual_multiplier = 0.5
    return model


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def plain_layer(layer: nn.Module, parts: list[Part], method: str, adapters: dict[str, Any]) -> Callable[..., Any]:
    """The forward of a layer with adapters, written out."""
    returns_tuple = isinstance_tuple(layer)

    def call(name: str, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        module = layer.get_submodule(name)
        if name == "mamba" and "mamba_attention_mask" in kwargs:
            kwargs = {**kwargs, "attention_mask": kwargs["mamba_attention_mask"]}
        taken = inspect.signature(module.forward).parameters
        given = {key: value for key, value in kwargs.items() if key in taken and key != "residual"}
        if "layer_past" in kwargs:
            given["cache"] = kwargs["layer_past"]
        if "residual" in taken:
            given = {"residual": torch.zeros_like(hidden)}
        return first(module(hidden, **given)).view_as(hidden) * getattr(layer, FACTORS.get(name, ""), 1.0)

    def adapter(name: str, hidden: Tensor) -> Tensor:
        weights = adapters[name]
        act = F.silu if method == "AdapterH" else F.relu
        inner = act(F.linear(hidden, weights["down.weight"], weights["down.bias"]))
        return F.linear(inner, weights["up.weight"], weights["up.bias"]) * (4.0 if method == "Parallel" else 1.0)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs = {
            **dict(zip(list(inspect.signature(type(layer).forward).parameters)[2:], args, strict=False)),
            **kwargs,
        }
        x = hidden_states
        for modules, norm, name in parts:
            normed = layer.get_submodule(norm)(x)
            y = sum(call(each, normed, kwargs) for each in modules if getattr(layer, each, None) is not None)
            name = name or next(each for each in adapters)
            if name in adapters and method == "AdapterH":
                y = y + adapter(name, y)
            elif name in adapters and method == "AdapterP":
                y = y + adapter(name, y + x)
            elif name in adapters:
                y = y + adapter(name, x)
            x = x + y * getattr(layer, "residual_multiplier", 1.0)
        return (x, None) if returns_tuple else x

    return forward


def isinstance_tuple(layer: nn.Module) -> bool:
    return type(layer).__name__ in ("BambaDecoderLayer", "FalconH1DecoderLayer", "MptBlock")


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("kind", PARTS)
def test_adapters_give_the_outputs_and_gradients_of_layers_written_out(kind: str, method: str) -> None:
    base = base_of(kind)
    plain = copy.deepcopy(base)
    ours = lit_peft.attach(copy.deepcopy(base), SETTINGS[method])
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, base(input_ids=IDS).logits), "adapters start without effect"
    scramble(ours)
    weights: dict[str, dict[str, dict[str, Tensor]]] = {}
    for path, module in attachment_of(ours).adapted.items():
        layer, _, name = path.rpartition(".")
        copied = {key: value.detach().clone().requires_grad_() for key, value in module.named_parameters()}
        weights.setdefault(layer, {})[name] = copied
    for path, adapters in weights.items():
        layer = plain.get_submodule(path)
        layer.forward = plain_layer(layer, PARTS[kind], method, adapters)
    if method == "AdapterH" and kind != "granitemoehybrid":
        layers = [layer for stack in layer_stacks(base) for layer in stack]
        assert sum(map(len, weights.values())) == len(layers) * len(PARTS[kind]), "after each mixer and each FFN"
    assert weights
    out, expected = ours(input_ids=IDS, labels=IDS), plain(input_ids=IDS, labels=IDS)
    close(out.logits, expected.logits)
    with torch.no_grad():
        assert not torch.allclose(out.logits, base(input_ids=IDS).logits, atol=1e-3)
    out.loss.backward()
    expected.loss.backward()
    for path, module in attachment_of(ours).adapted.items():
        layer, _, name = path.rpartition(".")
        for key, parameter in module.named_parameters():
            grad, other = parameter.grad, weights[layer][name][key].grad
            assert grad is not None and other is not None
            close(grad, other, 1e-4)


# Layers in which x can be read off: they add it unchanged to a sublayer's output, or to its norm.
WITH_RESIDUALS = {
    "decoder": [
        *(kind for kind in PARTS),
        *("afmoe", "apertus", "cpmant", "ctrl", "dbrx", "lfm2_moe", "lfm3", "olmo_hybrid", "xlstm", "rwkv", "zamba2"),
    ],
    "encoder": ["albert", "esm", "fnet", "gte", "megatron-bert", "mpnet", "nomic_bert", "roberta-prelayernorm"],
    "encoder-decoder": ["bigbird_pegasus", "nllb-moe", "prophetnet", "seamless_m4t"],
}


def test_families_of_which_the_residual_is_known_are_in_the_table() -> None:
    from lit_peft.models.architectures import ARCHITECTURES

    assert {kind for kinds in WITH_RESIDUALS.values() for kind in kinds} <= set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("family", "kind"), [(family, kind) for family in WITH_RESIDUALS for kind in WITH_RESIDUALS[family]]
)
def test_a_layer_without_its_feed_forward_network_returns_the_residual(family: str, kind: str) -> None:
    """What AdapterP and Parallel take for x is what the layer adds to the output of its feed-forward network."""
    model = build(kind, family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    given = {"decoder_input_ids": IDS} if family == "encoder-decoder" else {}
    seen = 0
    for layer in (layer for stack in layer_stacks(model) for layer in stack):
        sublayer = layer.architecture.ffn
        if sublayer is None:
            continue
        found: dict[str, Tensor] = {}

        def keep_x(module: Any, args: Any, kwargs: Any, found: dict[str, Tensor] = found) -> None:
            found["x"] = args[0] if args else kwargs["hidden_states"]

        def keep_output(module: Any, args: Any, output: Any, found: dict[str, Tensor] = found) -> None:
            found["output"] = first(output)

        def zero(module: Any, args: Any, output: Any) -> Any:
            return first(output) * 0 if isinstance(output, Tensor) else type(output)((first(output) * 0, *output[1:]))

        hooks = [layer.module.get_submodule(sublayer.output).register_forward_hook(zero)]
        if kind in ("zamba2",):  # the output is another block's input, not a part of the layer's
            target = layer.module.get_submodule("mamba_decoder.input_layernorm")
            hooks.append(target.register_forward_pre_hook(lambda _, args, found=found: found.update(output=args[0])))
        else:
            hooks.append(layer.module.register_forward_hook(keep_output))
        if sublayer.more_output is not None:
            hooks.append(layer.module.get_submodule(sublayer.more_output).register_forward_hook(zero))
        hooks.append(layer.module.get_submodule(sublayer.residual).register_forward_pre_hook(keep_x, with_kwargs=True))
        with torch.no_grad():
            model(input_ids=IDS, **given)
            x = found["x"] if sublayer.norm is None else layer.module.get_submodule(sublayer.norm)(found["x"])
        for hook in hooks:
            hook.remove()
        close(found["output"].reshape(-1), x.reshape(-1))
        seen += 1
    assert seen


# ------------------------------------------------------------------------------------------------------------- prefixes

# The attention modules of models whose other layers have none, or whose keys and values have different widths.
ATTENTION = {
    "bamba": ["model.layers.1.self_attn"],
    "deepseek_v2": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
    "deepseek_v3": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
    "deepseek_v32": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
    "falcon_h1": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
    "granitemoe": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
    "jamba": ["model.layers.1.self_attn"],
    "kimi_linear": ["model.layers.1.self_attn"],
    "lfm2": ["model.layers.1.self_attn"],
    "llama4_text": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
    "nemotron_h": ["model.layers.2.mixer"],
    "qwen3_5_text": ["model.layers.1.self_attn", "model.layers.3.self_attn"],
    "qwen3_next": ["model.layers.1.self_attn", "model.layers.3.self_attn"],
    "zamba2": ["model.layers.1.shared_transformer.self_attn", "model.layers.3.shared_transformer.self_attn"],
}
LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_linear")
V = 3


def prefix_base(kind: str) -> Any:
    settings = OWN.setdefault(kind, {})
    more = {"index_topk": 4} if kind == "deepseek_v32" else {}  # fewer than there are tokens
    before = dict(settings)
    settings.update(more)
    try:
        return build(kind, "decoder")
    finally:
        settings.clear()
        settings.update(before)


@contextmanager
def plain_sdpa(pairs: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Replace transformers' attention function by one written out, with keys and values in front of the tokens'."""
    original = AttentionInterface()["sdpa"]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        values = value.repeat_interleave(groups, 1)
        if id(module) in pairs:
            first_keys, first_values = (
                each.repeat_interleave(query.shape[1] // each.shape[0], 0) for each in pairs[id(module)]
            )
            scores = torch.cat([query @ first_keys.transpose(1, 2) * scaling, scores], -1)
            values = torch.cat([first_values.expand(len(query), -1, -1, -1), values], 2)
        return (scores.softmax(-1) @ values).transpose(1, 2), None

    AttentionInterface.register("sdpa", attention)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", original)


def widths(kind: str, module: Any) -> tuple[int, int, int]:
    """Heads, width of a key, width of a value."""
    if kind in LATENT:
        return module.config.num_attention_heads, module.config.qk_head_dim, module.config.v_head_dim
    size = module.head_dim
    return module.k_proj.out_features // size, size, size


def with_prefix(kind: str) -> tuple[Any, Any, Prefix]:
    base = prefix_base(kind)
    assert base.config._attn_implementation == "sdpa"
    ours = lit_peft.attach(copy.deepcopy(base), PTuningV2Settings(num_virtual_tokens=V))
    scramble(ours)
    (prefix,) = (module for module in attachment_of(ours).adapted.values() if isinstance(module, Prefix))
    return base, ours, prefix


@pytest.mark.parametrize("kind", ATTENTION)
def test_prefixes_stand_where_a_layer_has_attention_and_give_what_is_written_out(kind: str) -> None:
    base, ours, prefix = with_prefix(kind)
    table = prefix.embedding.detach().clone().requires_grad_()
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    column = 0
    for path in ATTENTION[kind]:
        module = base.get_submodule(path)
        heads, key, value = widths(kind, module)
        parts = []
        for size in (key, value):
            part = table[:, column : column + heads * size]
            parts.append(part.unflatten(-1, (heads, size)).transpose(0, 1))
            column += heads * size
        pairs[id(module)] = (parts[0], parts[1])
    assert column == table.shape[1], "only the attention layers have a prefix"
    out = ours(input_ids=IDS, labels=IDS)
    positions = torch.arange(V, V + IDS.shape[1])[None]
    given = {"position_ids": positions} if "position_ids" in inspect.signature(type(base).forward).parameters else {}
    with plain_sdpa(pairs):
        expected = base(input_ids=IDS, labels=IDS, **given)
    close(out.logits, expected.logits)
    out.loss.backward()
    expected.loss.backward()
    assert prefix.embedding.grad is not None and table.grad is not None
    close(prefix.embedding.grad, table.grad, 1e-4)
    with torch.no_grad():
        assert not torch.allclose(out.logits, base(input_ids=IDS).logits, atol=1e-4)


def test_the_prefix_of_mpt_is_as_far_from_each_query_as_the_query_itself() -> None:
    base = build("mpt", "decoder")
    ours = lit_peft.attach(copy.deepcopy(base), PTuningV2Settings(num_virtual_tokens=V))
    scramble(ours)
    table = next(iter(attachment_of(ours).adapted.values())).embedding.detach()
    heads, size = base.config.n_heads, base.config.d_model // base.config.n_heads
    slopes = torch.tensor([2.0 ** (-8 * (number + 1) / heads) for number in range(heads)])
    number, length = 0, IDS.shape[1]
    distance = torch.arange(length)[None] - torch.arange(length)[:, None]

    def attention(module: Any, hidden: Tensor) -> Tensor:
        nonlocal number
        key_0, value_0 = (
            part.unflatten(-1, (heads, size)).transpose(0, 1)
            for part in table.chunk(4, -1)[2 * number : 2 * number + 2]
        )
        number += 1
        query, key, value = (
            part.unflatten(-1, (heads, size)).transpose(1, 2) for part in module.Wqkv(hidden).chunk(3, -1)
        )
        scores = query @ key.transpose(2, 3) / size**0.5 + slopes[:, None, None] * distance
        scores = scores.masked_fill(distance > 0, -torch.inf)
        scores = torch.cat([query @ key_0.transpose(1, 2) / size**0.5, scores], -1)
        values = torch.cat([value_0.expand(len(hidden), -1, -1, -1), value], 2)
        return module.out_proj((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))

    for block in base.transformer.blocks:
        module = block.attn
        module.forward = lambda hidden, module=module, **_: (attention(module, hidden), None)
    with torch.no_grad():
        close(ours(input_ids=IDS).logits, base(input_ids=IDS).logits)


# In which a padded row, a cache and no cache give the base's own answers, and with a method of each kind.
GENERATE = (
    "deepseek_v3",
    "deepseek_v32",
    "falcon_h1",
    "gpt_neox_japanese",
    "lfm2",
    "mpt",
    "qwen3_next",
    "xglm",
    "zamba2",
)


@pytest.mark.parametrize("method", ["AdapterH", "PTuningV2"])
@pytest.mark.parametrize("kind", GENERATE)
def test_padding_and_the_cache_change_nothing(kind: str, method: str) -> None:
    base = build(kind, "decoder")
    expected = sound(answers(base, "decoder"), 2e-5)
    assert "uncached" in expected
    model = lit_peft.attach(copy.deepcopy(base), METHODS[method]).eval()
    scramble(model)
    found = answers(model, "decoder")
    assert expected <= sound(found, 1e-4)
    assert not torch.allclose(found["logits"], answers(base, "decoder")["logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("falcon_h1", AdapterHSettings(reduction_factor=4)),
        ("granitemoeshared", AdapterPSettings(reduction_factor=4)),
        ("qwen3_next", PTuningV2Settings(num_virtual_tokens=3)),
        ("deepseek_v3", PrefixTuningSettings(num_virtual_tokens=3)),
    ],
)
def test_gradients_are_the_same_with_gradient_checkpointing(kind: str, settings: Any) -> None:
    model = lit_peft.attach(build(kind, "decoder"), settings).train()
    scramble(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    plain = [parameter.grad.clone() for parameter in trained if parameter.grad is not None]
    model.zero_grad()
    checkpointing(model, True)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(plain) == len(trained)
    for parameter, expected in zip(trained, plain, strict=True):
        assert parameter.grad is not None
        close(parameter.grad, expected)


@pytest.mark.parametrize("kind", ["falcon_h1", "granitemoeshared", "llama4_text"])
def test_rows_of_a_batch_have_adapters_of_their_own(kind: str) -> None:
    model = base_of(kind)
    for seed, name in enumerate(("one", "two")):
        lit_peft.add_adapter(model, name, AdapterHSettings(reduction_factor=4))
        scramble(model, seed)
    with torch.no_grad():
        expected = []
        for row, name in enumerate(("one", "two")):
            with lit_peft.use_adapter(model, name):
                expected.append(model(input_ids=IDS[row : row + 1]).logits)
        with lit_peft.row_adapters(model, ["one", "two"]):
            close(model(input_ids=IDS).logits, torch.cat(expected))


def test_a_layer_without_its_residual_returns_the_adapted_sum() -> None:
    settings = AdapterHSettings(reduction_factor=4, original_ln_after=False)
    base = base_of("falcon_h1")
    model = lit_peft.attach(copy.deepcopy(base), settings)
    layer = model.model.layers[0]
    found: dict[str, Tensor] = {}
    layer.feed_forward.register_forward_hook(lambda _, args, output: found.update(y=output), prepend=True)
    layer.register_forward_hook(lambda _, args, output: found.update(out=output[0]))
    with torch.no_grad():
        model(input_ids=IDS)
    close(found["out"], found["y"])


# ---------------------------------------------------------------------------------------------------- folders, refusals


@pytest.mark.parametrize("kind", ["deepseek_v3", "lfm2"])
def test_a_prefix_of_such_a_model_is_saved_and_loaded_but_not_in_pefts_format(kind: str, tmp_path: Path) -> None:
    base, ours, _ = with_prefix(kind)
    reason = "widths" if kind == "deepseek_v3" else "only some layers have attention"
    with pytest.raises(LitPeftError, match=f"peft's format cannot hold .*{reason}"):
        lit_peft.save_adapter(ours, tmp_path / "peft", format="peft")
    lit_peft.save_adapter(ours, tmp_path / "own")
    loaded = lit_peft.load_adapter(copy.deepcopy(base), tmp_path / "own")
    with torch.no_grad():
        close(loaded(input_ids=IDS).logits, ours(input_ids=IDS).logits)
        assert torch.equal(lit_peft.detach(loaded)(input_ids=IDS).logits, base(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"])
def test_a_model_without_attention_takes_no_prefix(kind: str) -> None:
    model = build(kind, "decoder")
    before = set(dict(model.named_modules()))
    with pytest.raises(LitPeftError, match="has no attention in its layers"):
        lit_peft.attach(model, PTuningV2Settings(num_virtual_tokens=3))
    assert set(dict(model.named_modules())) == before


def test_the_decoder_takes_a_prefix_where_the_encoder_cannot() -> None:
    model = build("longt5", "encoder-decoder")
    with pytest.raises(LitPeftError, match=r"has no layer\.0\.SelfAttention"):
        lit_peft.attach(model, PTuningV2Settings(num_virtual_tokens=3))
    lit_peft.attach(model, PTuningV2Settings(num_virtual_tokens=3, encoder_prefix=False))
    assert {path.rpartition(".")[2] for path in attachment_of(model).adapted} == {"self_prefix", "cross_prefix"}


def test_attention_of_ones_own_with_cross_attention_takes_no_prefix() -> None:
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            "rembert", **settings_of("rembert"), is_decoder=True, add_cross_attention=True
        )
    )
    with pytest.raises(LitPeftError, match="computes attention in its own code"):
        lit_peft.attach(model, PTuningV2Settings(num_virtual_tokens=3))


def test_layers_of_several_attentions_are_refused_before_training() -> None:
    model = build("longcat_flash", "decoder")
    with pytest.raises(LitPeftError, match="no known place for an adapter"):
        lit_peft.attach(model, AdapterHSettings())
    with pytest.raises(LitPeftError, match="no known place for a prefix: use another method"):
        lit_peft.attach(model, PTuningV2Settings())


def test_blocks_of_keys_that_are_selected_by_position_take_a_prefix_without_positions() -> None:
    model = build("minimax_m3_vl_text", "decoder")
    with pytest.raises(LitPeftError, match=r"by their positions.* set positions='adapterhub'"):
        lit_peft.attach(model, PTuningV2Settings(num_virtual_tokens=3))
    lit_peft.attach(model, PTuningV2Settings(num_virtual_tokens=3, positions="adapterhub"))
    assert torch.isfinite(model(input_ids=IDS).logits).all()


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("axk2", ["q_gate_proj", "kv_b_proj"]),
        ("inkling2_text", ["q_proj.linear", "v_proj.linear"]),
        ("moshi", ["q_proj.linear", "v_proj.linear"]),
    ],
)
def test_default_targets_of_wrapped_and_gated_projections(kind: str, targets: list[str]) -> None:
    model = lit_peft.attach(build(kind, "decoder"), LoRASettings(r=2))
    adapted = list(attachment_of(model).adapted)
    assert len(adapted) >= 2
    assert all(any(path.endswith(f".{target}") for target in targets) for path in adapted)
