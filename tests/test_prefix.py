"""Prefix Tuning and P-Tuning v2: reference cases, peft on every architecture, the paper's formula, folders."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import (
    ALL,
    DECODERS,
    ENCODERS,
    GOLDEN,
    PEFT_TASK,
    SEQ2SEQS,
    batch,
    checkpointing,
    checkpointing_changes_nothing,
    close,
    learns,
    make,
    scramble,
    trained_of,
)
from safetensors.torch import load_file

import lit_peft
import lit_peft.formats.adapterhub_prefix as adapterhub_prefix
from lit_peft import LitPeftError, PrefixTuningSettings, PTuningV2Settings
from lit_peft.methods.attachment import attachment_of
from lit_peft.models.call_arguments import cache_of
from lit_peft.nn.prefix import Prefix

CASES = sorted(
    path.parent
    for path in GOLDEN.glob("*/*/case.json")
    if json.loads(path.read_text())["method"] in ("prefix_tuning", "p_tuning_v2")
)
# peft hands its prefix over in a cache, which these do not take.
WITHOUT_PEFT = {"distilbert", "deberta-v2", "modernbert"}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    inputs = batch(name)
    labels = inputs.pop("labels")
    return {**inputs, "decoder_input_ids": labels} if name in SEQ2SEQS else inputs


@pytest.mark.skipif(not CASES, reason="no reference cases: set LIT_PEFT_GOLDEN to their folder")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_reference_case(case: Path, attention: str) -> None:
    facts = json.loads((case / "case.json").read_text())
    io = load_file(case / "io.safetensors")
    inputs = {name: io[name] for name in io if not name.startswith("output")}
    auto = getattr(transformers, facts["auto_class"])
    model = auto.from_pretrained(case / "base", attn_implementation=attention).eval()
    with torch.no_grad():
        base = model(**inputs)[facts["output"]]
    lit_peft.load_adapter(model, case / "adapter").eval()
    with torch.no_grad():
        close(model(**inputs)[facts["output"]], io["output"])
        assert torch.equal(lit_peft.detach(model)(**inputs)[facts["output"]], base)


def show_past_key_values(model: Any) -> Any:
    """peft looks for an argument of that name, which transformers still takes, and now shows by another."""
    backbone = model.base_model
    original = backbone.forward
    name = "cache" if "cache" in inspect.signature(original).parameters else "past_key_values"

    def forward(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return original(*args, **{name: past_key_values}, **kwargs)

    backbone.forward = forward
    return model


def peft_model(name: str, **settings: Any) -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    base = make(name)
    if name == "falcon new":
        del base.config.num_key_value_heads  # the table's; Falcon's own name for it is another
    elif name.startswith("falcon"):  # multi-query, which peft does not know
        settings = {"num_attention_heads": 1, "token_dim": 8, **settings}
    if name == "t5" or name == "mt5":
        settings = {"num_layers": 2, **settings}
    torch.manual_seed(3)
    model = get_peft_model(base, PrefixTuningConfig(task_type=PEFT_TASK[name], num_virtual_tokens=4, **settings)).eval()
    scramble(model)
    if name in ENCODERS:
        show_past_key_values(base)
    return model


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [name for name in ALL if name not in WITHOUT_PEFT])
def test_what_peft_saves_gives_its_logits(name: str, padded: bool, tmp_path: Path) -> None:
    theirs = peft_model(name, prefix_projection=padded, encoder_hidden_size=12)
    theirs.save_pretrained(str(tmp_path))
    ours = lit_peft.load_adapter(make(name), tmp_path).eval()
    inputs = inputs_of(name)
    if padded:
        inputs["attention_mask"][0, :3] = 0
        inputs["attention_mask"][1, 5:] = name in DECODERS
    with torch.no_grad():
        close(ours(**inputs).logits, theirs(**inputs).logits)
        assert (ours(**inputs).logits - make(name)(**inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_every_architecture(name: str, projection: bool) -> None:
    model, inputs = make(name), batch(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        base = model(**inputs).logits
    size = 8 if projection else None
    lit_peft.attach(
        model,
        PrefixTuningSettings(num_virtual_tokens=3, prefix_projection=projection, prefix_projection_size=size),
    )
    trained = trained_of(model)
    assert len(trained) == (5 if projection else 1) * (3 if name in SEQ2SEQS else 1)
    learns(model.train(), inputs, rate=0.5)
    scramble(model)
    checkpointing_changes_nothing(model, inputs)
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        adapted = model.eval()(**inputs).logits
        assert (adapted - base).abs().max() > 1e-4
        assert torch.equal(copied(**inputs).logits, adapted)
        # Another implementation of attention, and what a pass with gradients computes, give the same.
        model.set_attn_implementation("eager")
        close(model(**inputs).logits, adapted)
    model.set_attn_implementation("eager" if name == "deberta-v2" else "sdpa")
    close(model(**inputs).logits.detach(), adapted)
    lit_peft.detach(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQS])
def test_generate_with_and_without_cache(name: str, beams: int) -> None:
    model = lit_peft.attach(make(name), PrefixTuningSettings(num_virtual_tokens=3)).eval()
    scramble(model)
    inputs = {key: value for key, value in batch(name).items() if key != "labels"}
    inputs["attention_mask"][0, :2] = 0
    cached, plain = (
        model.generate(**inputs, max_new_tokens=6, num_beams=beams, do_sample=False, pad_token_id=1, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing(name: str, attention: str) -> None:
    model = make(name)
    if name != "deberta-v2":
        model.set_attn_implementation(attention)
    lit_peft.attach(model, PrefixTuningSettings(num_virtual_tokens=3)).eval()
    scramble(model)
    ids, mask = batch(name)["input_ids"], batch(name)["attention_mask"]
    filler = torch.full((2, 3), model.config.pad_token_id or 1)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        more = {"decoder_input_ids": ids[:, :4] * 0 + 7} if name in SEQ2SEQS else {}
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, **more).logits

    plain = run(ids, mask)
    right = run(torch.cat([ids, filler], 1), torch.cat([mask, filler * 0], 1))
    close(right[:, :7] if name in DECODERS else right, plain)
    if name in DECODERS:
        close(run(torch.cat([filler, ids], 1), torch.cat([filler * 0, mask], 1))[:, 3:], plain)


@pytest.mark.parametrize("kind", [PrefixTuningSettings, PTuningV2Settings])
@pytest.mark.parametrize("name", ALL)
def test_folders_come_back(name: str, kind: Any, tmp_path: Path) -> None:
    model = lit_peft.attach(make(name), kind(num_virtual_tokens=3)).eval()
    scramble(model)
    inputs = inputs_of(name)
    inputs["attention_mask"][0, :2] = 0
    folder = lit_peft.save_adapter(model, tmp_path / "adapter")
    again = lit_peft.load_adapter(make(name), folder).eval()
    with torch.no_grad():
        wanted = model(**inputs).logits
        close(again(**inputs).logits, wanted)
    # A table without its MLP is trained on by itself.
    flat = {key for key, p in again.named_parameters() if p.requires_grad}
    assert name in SEQ2SEQS or (len(flat) == 1 and next(iter(flat)).endswith("self_prefix.embedding"))
    if name in SEQ2SEQS:
        with pytest.raises(LitPeftError, match="encoder"):
            lit_peft.save_adapter(model, tmp_path / "peft", format="peft")
        assert not (tmp_path / "peft").exists()


def longer_bart() -> Any:
    torch.manual_seed(0)
    settings = {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(vocab_size=61, max_position_embeddings=64, **settings, **heads)
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", [*(name for name in ALL if name not in WITHOUT_PEFT | {*SEQ2SEQS}), "bart"])
def test_peft_loads_what_we_save(name: str, projection: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    def base() -> Any:
        return longer_bart() if name == "bart" else make(name)

    settings = PrefixTuningSettings(
        num_virtual_tokens=3,
        prefix_projection=projection,
        encoder_prefix=False,
        cross_prefix=False,
        modules_to_save=["classifier"] if name in ENCODERS else None,
    )
    model = lit_peft.attach(base(), settings).eval()
    scramble(model)
    folder = lit_peft.save_adapter(model, tmp_path / "adapter", format="peft")
    bare = show_past_key_values(base()) if name in ENCODERS else base()
    if name == "falcon new":
        del bare.config.num_key_value_heads
    theirs = PeftModel.from_pretrained(bare, str(folder)).eval()
    inputs = inputs_of(name)
    with torch.no_grad():
        close(theirs(**inputs).logits, model(**inputs).logits)
        close(lit_peft.load_adapter(base(), folder).eval()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("case", [case for case in CASES if case.parent.name == "adapters"], ids=lambda p: p.name)
def test_adapterhub_names(case: Path, tmp_path: Path) -> None:
    facts = json.loads((case / "case.json").read_text())
    model = getattr(transformers, facts["auto_class"]).from_pretrained(case / "base")
    lit_peft.load_adapter(model, case / "adapter")
    assert lit_peft.trainable_parameters(model) == facts["trainable"]
    lit_peft.save_adapter(model, tmp_path / "again", format="adapterhub", name="ref")
    theirs = torch.load(case / "adapter" / "pytorch_adapter.bin", weights_only=True)
    ours = load_file(tmp_path / "again" / "adapter.safetensors")
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    config, wanted = (
        json.loads((folder / "adapter_config.json").read_text())["config"]
        for folder in (tmp_path / "again", case / "adapter")
    )
    assert {name: wanted[name] for name in config} == config
    lit_peft.detach(model)
    lit_peft.attach(model, PTuningV2Settings())
    with pytest.raises(LitPeftError, match="positions='mask'"):
        lit_peft.save_adapter(model, tmp_path / "other", format="adapterhub")


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart", "bert", "distilbert"])
def test_adapterhub_folders(name: str, projection: bool, tmp_path: Path) -> None:
    size = {"prefix_projection_size": 8, "non_linearity": "relu"} if projection else {}
    settings = PrefixTuningSettings(
        num_virtual_tokens=3,
        prefix_projection=projection,
        positions="adapterhub",
        leave_out=[1],
        **size,
    )
    model = lit_peft.attach(make(name), settings).eval()
    scramble(model)
    lit_peft.save_adapter(model, tmp_path / "adapter", format="adapterhub")
    role = "self" if name == "distilbert" else "self_prefix"
    assert any(f".{role}." in key for key in load_file(tmp_path / "adapter" / "adapter.safetensors"))
    again = lit_peft.load_adapter(make(name), tmp_path / "adapter").eval()
    inputs = inputs_of(name)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert lit_peft.trainable_parameters(again) == lit_peft.trainable_parameters(model)


def test_adapterhub_folders_of_grouped_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prefix for each key head, as AdapterHub 1.3 has it; earlier versions had one for each query head."""
    settings = PTuningV2Settings(num_virtual_tokens=5, positions="adapterhub")
    lit_peft.save_adapter(lit_peft.attach(make("llama"), settings), tmp_path / "new", format="adapterhub")
    (flat,) = {tensor.numel() for tensor in load_file(tmp_path / "new" / "adapter.safetensors").values()}
    config = make("llama").config
    head = config.hidden_size // config.num_attention_heads
    assert flat == 5 * 2 * config.num_hidden_layers * config.num_key_value_heads * head
    early = lit_peft.attach(make("llama"), dataclasses.replace(settings, per_query_head=True)).eval()
    scramble(early)
    with pytest.raises(LitPeftError, match="per_query_head=True"):
        lit_peft.save_adapter(early, tmp_path / "early", format="adapterhub")
    monkeypatch.setattr("lit_peft.formats.adapterhub_prefix.unsupported_settings", lambda *_: [])
    lit_peft.save_adapter(early, tmp_path / "early", format="adapterhub")
    again = lit_peft.load_adapter(make("llama"), tmp_path / "early").eval()
    inputs = inputs_of("llama")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, early(**inputs).logits)
        rest = {name: value[:1, 3:] for name, value in inputs.items()}
        expected = early(**rest, position_ids=torch.arange(3, 7)[None]).logits
        inputs["attention_mask"][0, :3] = 0
        close(early(**inputs).logits[:1, 3:], expected)


@pytest.mark.parametrize("past", [0, 2])
def test_t5s_bias_where_adapterhub_moves_the_keys_alone(past: int) -> None:
    """The prefix is the first keys of all, and no query is moved: their distances are those of the longer sequence."""
    settings = PTuningV2Settings(num_virtual_tokens=3, positions="adapterhub")
    attention = lit_peft.attach(make("t5"), settings).encoder.block[0].layer[0].SelfAttention
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5 + past, 8)
    attention.config.call.past = past
    bias = attention.compute_bias(5, 5 + past, past_seen_tokens=past)
    expected = attention.compute_bias(5, 8 + past, past_seen_tokens=past)
    close(attention.config.extend_bias(bias, query, key), expected)
    assert not torch.equal(expected[..., 3:], bias)


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon serial", "t5", "deberta-v2"])
def test_half_precision_bases_keep_full_precision_prefixes(name: str) -> None:
    model = lit_peft.attach(make(name).to(torch.bfloat16), PrefixTuningSettings(num_virtual_tokens=4))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(**inputs_of(name)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert"])
def test_positions_beyond_the_table_are_refused(name: str) -> None:
    model = lit_peft.attach(make(name), PTuningV2Settings(num_virtual_tokens=4))
    inputs = inputs_of(name)
    ids = torch.arange(7).expand(2, -1)
    model(**inputs, position_ids=ids + 53)
    with pytest.raises(LitPeftError, match=r"61 tokens and 4 virtual tokens, which is more than the 64 positions"):
        model(**inputs, position_ids=ids + 54)


def test_adapterhubs_network_is_512_wide_where_none_is_said() -> None:
    read = adapterhub_prefix.settings({"prefix_length": 3}, Path("folder"))
    assert read.prefix_projection_size == 512 and read.num_virtual_tokens == 3


def test_the_mlp_is_folded_away_outside_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lit_peft.attach(make("llama"), PrefixTuningSettings(num_virtual_tokens=3)).eval()
    scramble(model)
    calls, forward = [], Prefix.forward
    monkeypatch.setattr(Prefix, "forward", lambda self: calls.append(1) or forward(self))
    inputs = inputs_of("llama")
    model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=1)
    model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=1)
    assert len(calls) == 1
    with torch.no_grad():
        before = model(**inputs).logits
        scramble(model)
        assert (model(**inputs).logits - before).abs().max() > 1e-4 and len(calls) == 2
    model.train()
    checkpointing(model, True)
    for _ in range(2):
        model(**batch("llama")).loss.backward()
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["llama", "t5", "bart", "opt", "bloom", "falcon"])
def test_a_cache_of_fixed_size(name: str) -> None:
    settings = PTuningV2Settings(num_virtual_tokens=3, init_std=1.0)
    model = lit_peft.attach(make(name), settings).eval()
    inputs = {key: value for key, value in batch(name).items() if key != "labels"}
    wanted, fixed = (
        model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=1,
            cache_implementation=kind,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for kind in (None, "static")
    )
    assert torch.equal(wanted.sequences, fixed.sequences)
    close(torch.stack(fixed.logits), torch.stack(wanted.logits))


def test_a_prefix_of_real_tokens_is_those_tokens() -> None:
    """A GPT-2 whose prefix holds the keys and values of tokens answers as if they stood in front."""
    model = make("gpt2")
    ids = batch("gpt2")["input_ids"][:1]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=True)
        layers = whole[1 if whole.get("past_key_values") is None else "past_key_values"].layers
        kept = [(layer.keys[0, :, :3], layer.values[0, :, :3]) for layer in layers]
        lit_peft.attach(model, PTuningV2Settings(num_virtual_tokens=3)).eval()
        table = torch.cat([part.transpose(0, 1).flatten(1) for pair in kept for part in pair], dim=-1)
        model.transformer.self_prefix.embedding.copy_(table)
        close(model(input_ids=ids[:, 3:]).logits, whole.logits[:, 3:])


@pytest.mark.parametrize("name", ["distilbert", "deberta-v2", "modernbert", "bert"])
def test_attention_with_equal_weights(name: str) -> None:
    """Queries of zeros see all keys alike: attention gives the mean of the values, the prefix's among them."""
    from lit_peft.models.architectures import layer_stacks

    model = make(name)
    (stack,) = layer_stacks(model)
    attention = stack[0].module.get_submodule(stack[0].architecture.self_attention)
    lit_peft.attach(model, PTuningV2Settings(num_virtual_tokens=3, init_std=1.0)).eval()
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        if name == "modernbert":
            attention.Wqkv.weight[:32] = 0
            attention.Wqkv.register_forward_hook(lambda m, a, out: seen.update(value=out[..., 64:]))
            attention.Wo.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
        else:
            names = {"distilbert": ("q_lin", "v_lin"), "bert": ("query", "value")}
            query, value = (getattr(attention, n) for n in names.get(name, ("query_proj", "value_proj")))
            for linear in [query, *([attention.pos_query_proj] if name == "deberta-v2" else [])]:
                linear.weight.zero_()
                linear.bias.zero_()
            value.register_forward_hook(lambda m, a, out: seen.update(value=out[:, -7:]))
            if name == "distilbert":
                attention.out_lin.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
            else:
                attention.register_forward_hook(lambda m, a, out: seen.update(out=out[0]))
        model(**inputs_of(name))
        prefix = next(m for path, m in model.named_modules() if path.endswith("self_prefix")).embedding[:, 32:64]
        values = torch.cat([prefix.expand(2, -1, -1), seen["value"]], dim=1)
        close(seen["out"], values.mean(1, keepdim=True).expand(-1, 7, -1))


@pytest.mark.parametrize("leave_out", [[0], [1], [0, 1], [2]])
@pytest.mark.parametrize("name", SEQ2SEQS)
def test_layers_left_out_have_no_prefix(name: str, leave_out: list[int]) -> None:
    model = lit_peft.attach(make(name), PTuningV2Settings(num_virtual_tokens=3, leave_out=leave_out)).eval()
    shapes = {role: len(m.shapes) for role, m in model.named_modules() if role.endswith("_prefix")}
    encoder = 2 - len({0, 1} & set(leave_out))
    assert sum(shapes.values()) == encoder + 2 * (2 - len({2} & set(leave_out)))
    with torch.no_grad():
        model(**inputs_of(name))


def test_bad_input_names_the_fix_and_leaves_the_model_alone() -> None:
    model = make("bert")
    names = list(model.state_dict())
    for settings, message in [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"positions": "none"}, "positions='none'"),
        ({"non_linearity": "sine"}, "non_linearity='sine'"),
        ({"prefix_projection": True, "prefix_projection_size": 0}, "prefix_projection_size=0"),
        ({"prefix_projection_size": 5}, "prefix_projection=False"),
        ({"non_linearity": "relu"}, "non_linearity='relu'.*prefix_projection=False"),
        ({"leave_out": [7]}, "0 to 1"),
        ({"leave_out": [0, 1]}, "without any prefix"),
    ]:
        with pytest.raises(LitPeftError, match=message):
            lit_peft.attach(model, PTuningV2Settings(**settings))
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_the_table_is_the_papers_network_and_dropped_in_training(training: bool) -> None:
    torch.manual_seed(0)
    shapes = [(2, 4), (1, 6)]
    prefix = Prefix(5, shapes, projection_size=7, hidden_size=3, dropout=0.3, init_std=2.0).train(training)
    assert prefix.embedding.shape == (5, 3) and abs(prefix.embedding.std() / 2 - 1) < 0.5
    hidden = torch.tanh(prefix.embedding @ prefix.down.weight.T + prefix.down.bias)
    table = hidden @ prefix.up.weight.T + prefix.up.bias
    for number, (parts, (heads, size)) in enumerate(zip((table[:, :16], table[:, 16:]), shapes, strict=True)):
        like = torch.randn(2, heads, 9, size)
        expected = [part.view(5, heads, size).permute(1, 0, 2).expand(2, -1, -1, -1) for part in parts.chunk(2, 1)]
        torch.manual_seed(1)
        expected = [F.dropout(part, 0.3, training) for part in expected]
        torch.manual_seed(1)
        key, value = prefix.extend(prefix.slots[number], like, like + 1)
        for got, wanted, own in ((key, expected[0], like), (value, expected[1], like + 1)):
            close(got, torch.cat([wanted, own], 2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_virtual_tokens": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"projection_size": 0},
        {"non_linearity": "tan"},
    ],
)
def test_a_prefix_of_no_size_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LitPeftError, match="{}={!r}".format(*next(iter(wrong.items())))):
        Prefix(**{"num_virtual_tokens": 2, "shapes": [(2, 4)], "hidden_size": 4, **wrong})


def test_the_smallest_prefix_and_the_usual_start() -> None:
    assert Prefix(1, [(1, 1)], projection_size=1, hidden_size=1)().shape == (1, 2)
    whole = Prefix(2, [(2, 4)], projection_size=3, hidden_size=4, device=torch.device("meta"))
    assert all(parameter.is_meta for parameter in whole.parameters())
    torch.manual_seed(0)
    assert Prefix(100, [(2, 50)]).embedding.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_prefix_starts_as_wide_as_it_is_told() -> None:
    torch.manual_seed(0)
    model = lit_peft.attach(make("llama"), PTuningV2Settings(num_virtual_tokens=40, init_std=1.0))
    (table,) = (p for p in model.parameters() if p.requires_grad)
    assert table.std().item() == pytest.approx(1.0, rel=0.05)


def test_a_copy_of_a_prefix_computes_its_own_table() -> None:
    prefix = Prefix(2, [(2, 4)], projection_size=3, hidden_size=4)
    like = torch.randn(1, 2, 3, 4)
    with torch.no_grad():
        prefix.layer(prefix.slots[0], like)
        copied = copy.deepcopy(prefix)
        assert copied.slots[0].latest is None and copied._kept is None
        copied.embedding.add_(1.0)
        assert not torch.equal(copied.layer(copied.slots[0], like)[0], prefix.layer(prefix.slots[0], like)[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "bloom", "t5", "bart", "deberta-v2"])
def test_embeddings_stand_for_their_tokens(name: str) -> None:
    model, inputs = lit_peft.attach(make(name), PTuningV2Settings(num_virtual_tokens=3)).eval(), inputs_of(name)
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embeds, **inputs).logits, model(input_ids=ids, **inputs).logits)


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt"])
def test_the_last_position_may_be_used(name: str) -> None:
    model = lit_peft.attach(make(name), PTuningV2Settings(num_virtual_tokens=57)).eval()
    model(**inputs_of(name))
    lit_peft.attach(lit_peft.detach(model), PTuningV2Settings(num_virtual_tokens=58))
    with pytest.raises(LitPeftError, match=r"7 tokens and 58 virtual tokens, which is more than the 64 positions"):
        model(**inputs_of(name))


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert", "llama"])
def test_positions_that_are_given_are_moved_behind_the_prefix(name: str) -> None:
    model, inputs = lit_peft.attach(make(name), PTuningV2Settings(num_virtual_tokens=4)).eval(), inputs_of(name)
    ids = torch.arange(7).expand(2, -1)
    close(model(**inputs, position_ids=ids).logits, model(**inputs).logits)
    assert not torch.allclose(model(**inputs, position_ids=ids * 2).logits, model(**inputs).logits, atol=1e-4)


def test_what_is_set_reaches_the_prefix() -> None:
    settings = PrefixTuningSettings(num_virtual_tokens=3, dropout=0.3, non_linearity="relu", init_std=0.0)
    model = lit_peft.attach(make("bert"), settings)
    (prefix,) = (module for module in model.modules() if isinstance(module, Prefix))
    assert (prefix.dropout, prefix.non_linearity, prefix.down.out_features) == (0.3, "relu", 32)
    assert not prefix.embedding.any()
    lit_peft.attach(lit_peft.detach(model), PrefixTuningSettings(prefix_projection_size=24))
    (prefix,) = (module for module in model.modules() if isinstance(module, Prefix))
    assert prefix.down.out_features == 24


@pytest.mark.parametrize(
    "settings", [{}, {"share_att_key": True}, {"pos_att_type": []}, {"relative_attention": False}], ids=str
)
def test_debertas_of_every_kind(settings: dict[str, Any]) -> None:
    """Real tokens share attention as without a prefix, and prefix keys are scored by themselves, without positions."""
    config = make("deberta-v2").config
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = transformers.DebertaV2Model(config).eval()
    attention, hidden = model.encoder.layer[0].attention.self, torch.randn(2, 7, 32)
    given = {"attention_mask": torch.ones(2, 1, 7, 7), "output_attentions": True}
    if model.encoder.relative_attention:
        given["rel_embeddings"] = torch.randn_like(model.encoder.get_rel_embedding())
    with torch.no_grad():
        _, plain = attention(hidden, **given)
        lit_peft.attach(model, PTuningV2Settings(num_virtual_tokens=3, init_std=1.0)).eval()
        _, weights = attention(hidden, **given)
        prefix, real = weights.split([3, 7], -1)
        close(real / real.sum(-1, keepdim=True), plain)
        query = attention.query_proj(hidden).unflatten(-1, (4, 8)).transpose(1, 2)
        keys = model.self_prefix.embedding[:, :32].unflatten(-1, (4, 8)).transpose(0, 1)
        scores = query @ keys.transpose(1, 2) / (8 * (1 + len(config.pos_att_type))) ** 0.5
    close(prefix / prefix.sum(-1, keepdim=True), scores.softmax(-1))


def test_t5_has_no_positions_at_its_cross_attention() -> None:
    model = lit_peft.attach(make("t5"), PTuningV2Settings(num_virtual_tokens=3))
    attention = model.decoder.block[0].layer[1].EncDecAttention
    query, key = torch.zeros(1, 4, 5, 8), torch.zeros(1, 4, 7, 8)
    assert torch.equal(attention.config.extend_bias(torch.zeros(1, 4, 5, 7), query, key), torch.zeros(1, 4, 5, 10))


def test_an_encoder_decoder_of_single_layers() -> None:
    config = make("t5").config
    config.num_layers = config.num_decoder_layers = 1
    model = transformers.T5ForConditionalGeneration(config)
    lit_peft.attach(model, PTuningV2Settings(num_virtual_tokens=3))
    assert {path.rpartition(".")[2] for path in attachment_of(model).adapted} == {
        *("encoder_prefix", "self_prefix", "cross_prefix")
    }
    model(**inputs_of("t5"))


@pytest.mark.parametrize("positions", ["mask", "peft", "adapterhub"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "falcon serial", "t5", "bart"])
def test_a_token_at_a_time_is_the_whole(name: str, positions: Any) -> None:
    """Prefixes as wide as keys, so that a position that is off by one shows."""
    settings = PTuningV2Settings(num_virtual_tokens=3, positions=positions, init_std=1.0)
    model, inputs = lit_peft.attach(make(name), settings).eval(), inputs_of(name)
    key = "decoder_input_ids" if name in SEQ2SEQS else "input_ids"
    ids = inputs.pop(key)
    inputs.pop("attention_mask")
    if name in SEQ2SEQS:
        inputs["encoder_outputs"] = model.get_encoder()(inputs.pop("input_ids"))
    with torch.no_grad():
        whole, cache, parts = model(**{key: ids}, **inputs).logits, None, []
        for at in range(ids.shape[1]):
            output = model(**{key: ids[:, at : at + 1]}, **inputs, cache=cache, use_cache=True)
            cache = cache_of(output)
            parts.append(output.logits)
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("llama", {"per_query_head": True}, "per_query_head=True"),
        ("llama", {"leave_out": [1]}, r"leave_out=\[1\]"),
        ("t5", {}, r"a prefix at the encoder or at cross-attention \(encoder_prefix, cross_prefix\)"),
        ("bart", {"encoder_prefix": False}, "a prefix at the encoder or at cross-attention"),
        ("t5", {"encoder_prefix": False, "cross_prefix": False}, ".* encoder-decoder with an even number of layers"),
    ],
    ids=str,
)
def test_what_pefts_format_has_no_place_for(name: str, settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = lit_peft.attach(make(name), PTuningV2Settings(num_virtual_tokens=3, **settings))
    with pytest.raises(LitPeftError, match=f"peft's format cannot hold {said}"):
        lit_peft.save_adapter(model, tmp_path / "adapter", format="peft")
    assert not (tmp_path / "adapter").exists()
    lit_peft.save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_virtual_tokens": "3"}, "num_virtual_tokens='3', .* the folder is incomplete"),
        ({"num_virtual_tokens": 4}, r"num_virtual_tokens=4, .* \(3, 128\): the folder is incomplete"),
        ({"modules_to_save": 5}, "adapter_config.json: modules_to_save=5 has the wrong type"),
    ],
    ids=str,
)
def test_a_peft_prefix_of_odd_settings(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = lit_peft.attach(make("bert"), PTuningV2Settings(num_virtual_tokens=3))
    folder = lit_peft.save_adapter(model, tmp_path / "adapter", format="peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(LitPeftError, match=said):
        lit_peft.load_adapter(make("bert"), folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(LitPeftError, match="the stored prompt_embeddings has the shape None"):
        lit_peft.load_adapter(make("bert"), folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prefix_length": "3"}, "prefix_length='3' and bottleneck_size=512"),
        ({"bottleneck_size": None, "flat": False}, "prefix_length=3 and bottleneck_size=None"),
        ({"use_gating": True, "wings": 2}, "sets use_gating, wings, which"),
    ],
    ids=str,
)
def test_an_adapterhub_prefix_of_odd_settings(changes: dict[str, Any], said: str) -> None:
    config = {"prefix_length": 3, "bottleneck_size": 512, "flat": True, "non_linearity": "relu", "use_gating": False}
    settings = adapterhub_prefix.settings(config, Path("folder"))
    assert isinstance(settings, PTuningV2Settings) and settings.non_linearity == "tanh"
    assert adapterhub_prefix.settings({**config, "flat": False}, Path("folder")).non_linearity == "relu"
    with pytest.raises(LitPeftError, match=f"folder/adapter_config.json (has|sets)? ?{said}"):
        adapterhub_prefix.settings({**config, **changes}, Path("folder"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_a_headless_model_has_the_prefix_of_the_whole_one(name: str) -> None:
    whole, inputs = lit_peft.attach(make(name), PTuningV2Settings(num_virtual_tokens=3)).eval(), inputs_of(name)
    bare = transformers.AutoModel.from_config(make(name).config)
    # T5's with a head is its own base model, and has the head's weight too.
    bare.load_state_dict(make(name).base_model.state_dict(), strict=name != "t5")
    lit_peft.attach(bare.eval(), PTuningV2Settings(num_virtual_tokens=3))
    ends = {path.rpartition(".")[2]: module for path, module in attachment_of(whole).adapted.items()}
    for path, module in attachment_of(bare).adapted.items():
        module.load_state_dict(ends[path.rpartition(".")[2]].state_dict())
    kept: list[torch.Tensor] = []
    inner = whole.decoder if name == "t5" else whole.base_model
    inner.register_forward_hook(lambda m, a, out: kept.append(out[0]))
    with torch.no_grad():
        whole(**inputs)
        close(bare(**inputs)[0], kept[0])


def test_prefixes_beside_double_precision_are_of_it() -> None:
    model = lit_peft.attach(make("llama").double(), PTuningV2Settings(num_virtual_tokens=3))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float64}


def test_a_prefix_for_each_query_head_that_is_the_same_in_a_group_is_the_shared_one() -> None:
    shared = lit_peft.attach(make("llama"), PTuningV2Settings(num_virtual_tokens=3, init_std=1.0)).eval()
    apart = lit_peft.attach(make("llama"), PTuningV2Settings(num_virtual_tokens=3, per_query_head=True)).eval()
    (few,), (many,) = ([m for m in model.modules() if isinstance(m, Prefix)] for model in (shared, apart))
    assert few.shapes == ((2, 8), (2, 8)) and many.shapes == ((4, 8), (4, 8))
    with torch.no_grad():
        # Keys, then values, of each layer; each of two heads is that of two query heads.
        many.embedding.copy_(few.embedding.unflatten(-1, (4, 2, 8)).repeat_interleave(2, dim=-2).flatten(1))
        assert not torch.allclose(make("llama")(**inputs_of("llama")).logits, shared(**inputs_of("llama")).logits)
        close(apart(**inputs_of("llama")).logits, shared(**inputs_of("llama")).logits)


@pytest.mark.parametrize("architecture", ["t5", "mt5", "umt5"])
def test_padding_on_the_left_changes_nothing_where_positions_are_distances(architecture: str) -> None:
    shape = {"vocab_size": 61, "d_model": 32, "d_ff": 48, "num_heads": 4, "d_kv": 8, "num_layers": 2}
    config = transformers.AutoConfig.for_model(architecture, **shape, decoder_start_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    lit_peft.attach(model, PTuningV2Settings(num_virtual_tokens=3)).eval()
    scramble(model)
    ids, targets = torch.randint(3, 61, (2, 7)), torch.randint(3, 61, (2, 5))
    zeros = torch.zeros(2, 6, dtype=torch.long)
    mask = torch.cat([zeros, torch.ones_like(ids)], 1)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=targets).logits
        padded = model(input_ids=torch.cat([zeros, ids], 1), attention_mask=mask, decoder_input_ids=targets).logits
    close(padded, plain, 1e-5)
