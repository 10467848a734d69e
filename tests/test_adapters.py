"""Several named adapters on one base: switching, mixed batches, combinations."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, close, make, scramble

import lit_peft
from lit_peft import (
    AdapterHSettings,
    AdapterPSettings,
    LitPeftError,
    LoRASettings,
    ParallelSettings,
    PrefixTuningSettings,
    PromptTuningSettings,
)
from lit_peft.methods.rows import can_share

QV = ["q_proj", "v_proj"]


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**(inputs or {"input_ids": batch("llama")["input_ids"]})).logits


def with_loras(*ranks: int, **settings: Any) -> Any:
    model = make("llama")
    for number, r in enumerate(ranks):
        lit_peft.add_adapter(model, f"a{number}", LoRASettings(r=r, **{"target_modules": QV, **settings}))
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_a_thousand_switches_among_eight_change_nothing(decoder: Path) -> None:
    import transformers

    model = with_loras(*(2, 4, 8, 2, 4, 8, 2, 4))
    base = logits(make("llama"))
    names = lit_peft.adapter_names(model)
    expected = {}
    for name in names:
        expected[name] = logits(lit_peft.set_adapter(model, name))
    assert len({float(value.sum()) for value in expected.values()}) == 8

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    before = tensors()
    seconds = 1.0
    for step in range(1000):
        start = time.perf_counter()
        lit_peft.set_adapter(model, names[step % 8])
        seconds = min(seconds, time.perf_counter() - start)
        if step % 100 < 8:
            assert torch.equal(logits(model), expected[names[step % 8]])
    assert tensors() <= before
    start = time.perf_counter()
    transformers.AutoModelForCausalLM.from_pretrained(decoder)
    assert seconds < 0.25 * (time.perf_counter() - start)  # 1 % for a real base, whose loading takes seconds
    with lit_peft.disable_adapter(model):
        assert torch.equal(logits(model), base)
    assert lit_peft.active_adapter(model) == names[999 % 8]
    lit_peft.set_adapter(model, None)
    assert list(model.state_dict()) == list(make("llama").state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make("llama").parameters(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        LoRASettings(init_lora_weights="pissa", r=4),
        LoRASettings(use_dora=True, bias="all", target_modules="all-linear", modules_to_save=["norm"]),
        AdapterHSettings(reduction_factor=4),
        ParallelSettings(reduction_factor=4),
        PrefixTuningSettings(num_virtual_tokens=3),
        PromptTuningSettings(num_virtual_tokens=3),
    ],
    ids=lambda settings: settings.method,
)
def test_adapters_of_any_method_stand_beside_each_other(settings: Any, tmp_path: Path) -> None:
    base = make("llama")
    torch.manual_seed(0)
    alone = lit_peft.attach(base, settings)
    scramble(alone)
    expected = logits(alone)
    model = with_loras(4)
    lora = logits(model)
    torch.manual_seed(0)
    lit_peft.add_adapter(model, "other", settings)
    scramble(model)
    trained = lit_peft.trainable_parameters(model)
    for _ in range(2):
        close(logits(lit_peft.set_adapter(model, "other")), expected, 0)
        assert lit_peft.trainable_parameters(model) == trained
        close(logits(lit_peft.set_adapter(model, "a0")), lora, 0)
    close(logits(lit_peft.delete_adapter(model, "other")), lora, 0)
    folder = lit_peft.save_adapter(model, tmp_path / "a0")
    again = lit_peft.load_adapter(make("llama"), folder, name="first")
    lit_peft.load_adapter(again, folder, name="second")
    close(logits(again), lora, 0)
    with pytest.raises(LitPeftError, match="already"):
        lit_peft.load_adapter(again, folder, name="first")
    with pytest.raises(LitPeftError, match="'second'"):
        lit_peft.set_adapter(again, "secnd")
    assert lit_peft.active_adapter(again) == "second"
    detached = lit_peft.detach(again)
    assert lit_peft.adapter_names(detached) == ["first"]


def test_a_mixed_batch_equals_the_single_runs() -> None:
    model = with_loras(2, 8, 4, target_modules="all-linear")
    lit_peft.add_adapter(model, "q", LoRASettings(r=4, target_modules=["q_proj"]))
    scramble(model)
    ids = torch.randint(0, 61, (6, 9))
    names = ["a1", None, "q", "a0", "a2", "a1"]
    with lit_peft.row_adapters(model, names):
        mixed = logits(model, input_ids=ids)
        beams = model.generate(ids, num_beams=2, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert lit_peft.active_adapter(model) == "q"
    for row, name in enumerate(names):
        lit_peft.set_adapter(model, name)
        close(mixed[row], logits(model, input_ids=ids[row : row + 1])[0])
        one = model.generate(ids[row : row + 1], num_beams=2, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(beams[row], one[0])
    with lit_peft.row_adapters(model, names), pytest.raises(LitPeftError, match="4 rows"):
        logits(model, input_ids=ids[:4])


ROWS: list[tuple[str, list[Any]]] = [
    ("llama", [LoRASettings(use_dora=True, target_modules="all-linear"), LoRASettings(r=2, target_modules=QV)]),
    ("llama", [LoRASettings(target_modules=["embed_tokens", "q_proj"]), LoRASettings(target_modules=["embed_tokens"])]),
    ("llama", [LoRASettings(init_lora_weights="pissa"), LoRASettings(init_lora_weights="olora", use_dora=True)]),
    ("llama", [LoRASettings(modules_to_save=["norm", "lm_head"]), LoRASettings(modules_to_save=["lm_head"])]),
    (
        "llama",
        [AdapterHSettings(reduction_factor=4), ParallelSettings(reduction_factor=4), LoRASettings(use_dora=True)],
    ),
    ("llama", [AdapterPSettings(reduction_factor=4, use_gating=True), AdapterPSettings(reduction_factor=8)]),
    (
        "llama",
        [AdapterHSettings(placement="llm_adapters", bottleneck_size=8), LoRASettings(target_modules=["up_proj"])],
    ),
    ("gpt2", [LoRASettings(use_dora=True), LoRASettings(target_modules=["c_attn", "c_fc", "wte"])]),
    ("gpt2", [ParallelSettings(placement="llm_adapters", bottleneck_size=8), AdapterPSettings(reduction_factor=4)]),
    ("opt", [AdapterHSettings(reduction_factor=4), LoRASettings(bias="lora_only", target_modules=["q_proj", "fc1"])]),
    (
        "bert",
        [AdapterPSettings(reduction_factor=4, modules_to_save=None), LoRASettings(modules_to_save=["classifier"])],
    ),
    ("roberta", [AdapterHSettings(reduction_factor=4, train_layer_norms=True), LoRASettings(bias="lora_only")]),
    ("t5", [AdapterHSettings(reduction_factor=4, cross_adapter=True), LoRASettings(use_dora=True), ParallelSettings()]),
]


@pytest.mark.parametrize(("base", "settings"), ROWS, ids=lambda value: str(value)[:40])
def test_adapters_of_many_kinds_share_a_batch(base: str, settings: list[Any]) -> None:
    model = make(base)
    for number, each in enumerate(settings):
        lit_peft.add_adapter(model, f"a{number}", each)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    before = lit_peft.active_adapter(model)
    names = ["a1", None, f"a{len(settings) - 1}", "a0", "a1", "a0"]
    ids = torch.randint(3, 61, (6, 9))
    more = {"decoder_input_ids": torch.randint(3, 61, (6, 4))} if base == "t5" else {}
    with lit_peft.row_adapters(model, names):
        mixed = logits(model, input_ids=ids, **more)
    assert lit_peft.active_adapter(model) == before
    singles = {}
    for name in dict.fromkeys(names):
        singles[name] = logits(lit_peft.set_adapter(model, name), input_ids=ids, **more)
    for row, name in enumerate(names):
        close(mixed[row], singles[name][row])
        assert name is None or float((singles[name][row] - singles[None][row]).abs().max()) > 1e-3
    lit_peft.set_adapter(model, None)
    bare = dict(make(base).named_parameters())
    assert all(torch.equal(value, bare[name]) for name, value in model.named_parameters())


def test_what_cannot_share_a_batch_is_named() -> None:
    model = with_loras(2)
    lit_peft.add_adapter(model, "prefix", PrefixTuningSettings(num_virtual_tokens=2))
    lit_peft.add_adapter(model, "prompt", PromptTuningSettings(num_virtual_tokens=2, prompt_tuning_init="RANDOM"))
    for name in ("prefix", "prompt"):
        with pytest.raises(LitPeftError, match=f"'{name}'"), lit_peft.row_adapters(model, ["a0", name]):
            pass
        assert lit_peft.active_adapter(model) == "prompt" and not can_share(model, name) and can_share(model, "a0")


@pytest.mark.parametrize(
    ("name", "settings", "shares"),
    [
        ("bert", {"original_ln_after": False}, False),
        ("bert", {}, True),
        ("opt post-LN", {"original_ln_after": False}, False),
        # Where no norm follows, none is passed over.
        ("gpt2", {"original_ln_after": False}, True),
        ("bert", {"original_ln_before": True, "modules_to_save": ["classifier"]}, False),
        ("bert", {"original_ln_before": False, "modules_to_save": ["classifier"]}, True),
    ],
    ids=str,
)
def test_which_bottlenecks_share_a_batch(name: str, settings: dict[str, Any], shares: bool) -> None:
    model = lit_peft.add_adapter(make(name), "a", AdapterPSettings(bottleneck_size=4, **settings))
    assert can_share(model, "a") is shares


def test_a_hot_swap_compiles_nothing_again() -> None:
    model = with_loras(2, 4, 8, 3)
    expected = {name: logits(lit_peft.set_adapter(model, name)) for name in lit_peft.adapter_names(model)}
    lit_peft.add_adapter(model, "slot", LoRASettings(r=8, lora_alpha=3, target_modules=QV))
    compiled = []
    fast = torch.compile(model, backend=lambda graph, _: compiled.append(1) or graph.forward)
    logits(fast)
    count = len(compiled)
    for name in [*expected, *expected]:
        lit_peft.hotswap_adapter(model, name)
        close(logits(fast), expected[name])
        close(logits(model), expected[name])
        lit_peft.hotswap_adapter(model, "slot")
        close(logits(model), expected[name])
    assert len(compiled) == count > 0
    for settings in (LoRASettings(r=2, target_modules=QV), LoRASettings(r=8, lora_alpha=0, target_modules=QV)):
        lit_peft.add_adapter(model, f"small {settings.r}", settings)
        with pytest.raises(LitPeftError, match="'a2' does not fit"):
            lit_peft.hotswap_adapter(model, "a2")


@pytest.mark.parametrize(
    ("ours", "theirs"), [("linear", "linear"), ("cat", "cat"), ("svd", "svd"), ("ties", "ties_svd")]
)
def test_combinations_equal_peft(ours: Any, theirs: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = with_loras(4, 4)
    for name in ("a0", "a1"):
        lit_peft.save_adapter(lit_peft.set_adapter(model, name), tmp_path / name)
    peft = PeftModel.from_pretrained(make("llama"), str(tmp_path / "a0"), adapter_name="a0")
    peft.load_adapter(str(tmp_path / "a1"), "a1")
    density = {"density": 0.4} if ours == "ties" else {}
    peft.add_weighted_adapter(["a0", "a1"], [0.7, -0.4], "mix", combination_type=theirs, **density)
    peft.set_adapter("mix")
    lit_peft.combine_adapters(model, "mix", {"a0": 0.7, "a1": -0.4}, ours, **density)
    close(logits(model), logits(peft), 3e-5)
    lit_peft.save_adapter(model, tmp_path / "mix")
    close(logits(lit_peft.load_adapter(make("llama"), tmp_path / "mix")), logits(model))


def test_dare_keeps_the_sum_on_average() -> None:
    model = with_loras(4, 4)
    layer = "model.layers.0.self_attn.q_proj"
    exact = lit_peft.combine_adapters(model, "cat", {"a0": 0.5, "a1": 0.5}).get_submodule(layer).delta_weight()
    draws = []
    for seed in range(60):
        mixed = lit_peft.combine_adapters(model, f"dare{seed}", {"a0": 0.5, "a1": 0.5}, "dare", 32, 0.5, seed)
        draws.append(mixed.get_submodule(layer).delta_weight().detach())
    assert (torch.stack(draws).mean(0) - exact).norm() < 0.25 * exact.norm()
    assert (draws[0] - exact).norm() > 0.25 * exact.norm()


def test_merge_and_unmerge() -> None:
    model = with_loras(4)
    expected, weight = logits(model), model.model.layers[0].self_attn.q_proj.weight.clone()
    close(logits(lit_peft.merge_adapter(model)), expected)
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)
    close(logits(lit_peft.unmerge_adapter(model)), expected, 0)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)
    plain = lit_peft.merge_and_unload(model)
    close(logits(plain), expected)
    assert list(plain.state_dict()) == list(make("llama").state_dict())
    assert lit_peft.adapter_names(plain) == []


def test_dare_depends_on_its_seed_alone() -> None:
    model, made = with_loras(4, 4), []
    for name, around, seed in (("x", 0, 3), ("y", 1, 3), ("z", 0, 4)):
        torch.manual_seed(around)
        lit_peft.combine_adapters(model, name, {"a0": 0.5, "a1": 0.5}, "dare", density=0.5, seed=seed)
        made.append(logits(model))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_an_adapter_on_a_tied_weight_is_not_merged_in_place() -> None:
    model = lit_peft.attach(make("gpt2"), LoRASettings(target_modules=["wte"]))
    with pytest.raises(LitPeftError, match="tied"):
        lit_peft.merge_adapter(model)
    apart = lit_peft.attach(make("gpt2"), LoRASettings(target_modules=["c_attn"]))
    lit_peft.merge_adapter(apart)


def test_an_attached_method_is_an_adapter_of_its_own() -> None:
    model = make("llama")
    with pytest.raises(LitPeftError, match="no adapter 'x' on this model: it has none"):
        lit_peft.set_adapter(model, "x")
    lit_peft.attach(model, LoRASettings(r=2, target_modules=QV))
    assert lit_peft.active_adapter(model) == "default"
    lit_peft.add_adapter(model, "more", LoRASettings(r=2, target_modules=QV))
    assert lit_peft.adapter_names(model) == ["default", "more"]
    lit_peft.set_adapter(model, "default")
    lit_peft.detach(model)
    assert lit_peft.adapter_names(model) == ["more"] and lit_peft.active_adapter(model) is None


def test_an_adapter_that_comes_back_is_in_the_models_mode() -> None:
    model = with_loras(2, 2)
    for training in (False, True):
        lit_peft.set_adapter(model, "a1")
        model.train(training)
        layer = lit_peft.set_adapter(model, "a0").model.layers[0].self_attn.q_proj
        assert layer.training is training and layer is not model.get_submodule("model.layers.0.self_attn.k_proj")


def test_combined_adapters_must_adapt_the_same_modules() -> None:
    model = with_loras(2)
    lit_peft.add_adapter(model, "b", LoRASettings(r=2, target_modules=["q_proj"]))
    with pytest.raises(LitPeftError, match=r"model\.layers\.0\.self_attn\.v_proj"):
        lit_peft.combine_adapters(model, "both", {"a0": 1.0, "b": 1.0})


def test_a_bottleneck_and_a_dora_at_the_same_layer_cannot_share_a_batch() -> None:
    model = lit_peft.add_adapter(make("llama"), "dora", LoRASettings(r=2, target_modules=QV, use_dora=True))
    for name, settings in (("beside", ParallelSettings), ("before", AdapterHSettings)):
        settings = settings(placement="llm_adapters", target_modules=["q_proj"], bottleneck_size=4)
        lit_peft.add_adapter(model, name, settings)
        words = r"self_attn\.q_proj has both a bottleneck adapter and trained tensors or a LoRA with DoRA"
        with pytest.raises(LitPeftError, match=words), lit_peft.row_adapters(model, ["dora", name]):
            pass
