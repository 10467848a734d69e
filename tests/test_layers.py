"""The plain layers by what their docstrings promise: defaults, types, devices, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import close
from torch import nn

import lit_peft.nn.cross_entropy as loss_module
from lit_peft import LitPeftError, LoRASettings
from lit_peft.nn.bottleneck import Bottleneck, SublayerAdapter
from lit_peft.nn.cross_entropy import head_cross_entropy
from lit_peft.nn.lora import LoRALinear
from lit_peft.nn.prefix import Prefix
from lit_peft.nn.prompt import PromptEncoder
from lit_peft.nn.quantized import QuantizedLinear
from lit_peft.nn.rows import LoRARows, ModuleRows

WHOLE: dict[str, Any] = {"ln_before": True, "ln_after": True, "use_gating": True}


def test_defaults() -> None:
    lora = LoRALinear(nn.Linear(12, 10))
    assert (lora.r, lora.lora_alpha, lora.scaling, lora.lora_dropout) == (8, 16, 2.0, 0.0)
    layer = Bottleneck(12, 4)
    assert (layer.non_linearity, layer.scaling, layer.dropout) == ("relu", 1.0, 0.0)
    assert layer.norm_before is layer.norm_after is layer.gate is None and not layer.adapter_residual_before_ln
    assert not layer.up.weight.any() and layer.down.weight.any()
    place = SublayerAdapter(12, 4)
    assert not place.is_parallel and not place.original_ln_before and not place.needs_residual
    assert place.original_ln_after is place.residual_before_ln is True


@pytest.mark.parametrize("scaling", [2.5, "learned", "channel"])
def test_every_part_of_a_bottleneck_is_where_and_what_it_was_asked_for(scaling: Any) -> None:
    double = Bottleneck(12, 4, 6, scaling=scaling, dtype=torch.float64, **WHOLE)
    meta = Bottleneck(12, 4, 6, scaling=scaling, device=torch.device("meta"), **WHOLE)
    assert {parameter.dtype for parameter in double.parameters()} == {torch.float64}
    assert all(parameter.is_meta for parameter in meta.parameters())
    sizes = {"learned": (1,), "channel": (6,)}
    assert double.scaling == 2.5 if isinstance(scaling, float) else double.scaling.shape == sizes[scaling]


@pytest.mark.parametrize("scaling", [2.5, "learned", "channel"])
@pytest.mark.parametrize("before_ln", [False, True])
def test_a_bottleneck_gives_its_residuals_type(before_ln: bool, scaling: Any) -> None:
    layer = Bottleneck(12, 4, scaling=scaling, init_weights="bert", adapter_residual_before_ln=before_ln, **WHOLE)
    x = torch.randn(2, 3, 12)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x, x.bfloat16()).dtype == torch.bfloat16
    close(layer(x.bfloat16(), x.bfloat16()).float(), layer(x, x), 3e-2)
    parallel = SublayerAdapter(12, 4, is_parallel=True)
    assert parallel._adapted(x.bfloat16(), x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "values",
    [{"bottleneck_size": 0}, {"non_linearity": "rely"}, {"scaling": "x"}, {"dropout": 1.0}, {"init_weights": "x"}],
    ids=str,
)
def test_bottlenecks_that_cannot_be(values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(LitPeftError, match=f"{name}={value!r}"):
        Bottleneck(12, **{"bottleneck_size": 4, **values})


def test_what_a_layer_says_of_itself() -> None:
    lora, dora = (repr(LoRALinear(nn.Linear(12, 10), r=2, use_dora=dora)) for dora in (False, True))
    assert "r=2, lora_alpha=16, lora_dropout=0.0\n" in lora and "lora_dropout=0.0, use_dora=True\n" in dora
    assert "scaling=2.5" in repr(Bottleneck(12, 4, scaling=2.5))
    assert "scaling=learned" in repr(Bottleneck(12, 4, scaling="learned"))


def test_the_starts_of_a_lora_are_named() -> None:
    with pytest.raises(LitPeftError, match="'pisa' is not known: use 'pissa'\\."):
        LoRALinear(nn.Linear(12, 10), init_lora_weights="pisa")  # type: ignore[arg-type]


def test_the_smallest_sizes() -> None:
    assert LoRASettings(r=1).r == 1
    assert Bottleneck(12, 1).down.weight.shape == (1, 12) and LoRALinear(nn.Linear(12, 10), r=1).r == 1
    for r in (0, -1):
        with pytest.raises(LitPeftError, match=f"r={r}"):
            LoRALinear(nn.Linear(12, 10), r=r)


class Transposed(nn.Module):
    """A layer of somebody's own that stores W as (in, out), and takes more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 10), requires_grad=False)

    def forward(self, x: torch.Tensor, times: float, *, plus: float) -> torch.Tensor:
        return times * x @ self.weight + plus


def test_a_transposed_layer_with_further_inputs() -> None:
    base, x = Transposed(), torch.randn(3, 12)
    layer = LoRALinear(base, r=2, fan_in_fan_out=True)
    nn.init.normal_(layer.lora_B)
    assert layer.lora_A.shape == (2, 12) and layer.lora_B.shape == (10, 2)
    close(layer(x, 2.0, plus=1.0), 2 * x @ base.weight + 1 + x @ layer.delta_weight().T)
    layer.merge()
    close(layer(x, 1.0, plus=0.0), x @ base.weight)
    assert LoRALinear(Transposed(), r=2, fan_in_fan_out=False).lora_A.shape == (2, 10)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_gives_its_inputs_type(use_dora: bool, training: bool) -> None:
    base = nn.Linear(12, 10, dtype=torch.bfloat16)
    layer = LoRALinear(base, r=2, use_dora=use_dora, lora_dropout=0.5).train(training)
    base.register_forward_hook(lambda *_: None)  # what is hooked is computed in its parts
    assert layer.lora_A.dtype == torch.float32
    out = layer(torch.randn(3, 12, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "fewest", "size"), [(8, 3, 40.0), (11, 4, 1.0)])
@pytest.mark.parametrize("scale", [None, 1.0, 2.0, 0.5, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_the_heads_loss_in_blocks(
    rows: int,
    fewest: int,
    size: float,
    scale: float | None,
    softcap: float | None,
    biased: bool,
    trained: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several blocks with targets in each, the last one shorter; also logits that overflow an exponential of fp32."""
    monkeypatch.setattr(loss_module, "_BLOCK", 1)
    monkeypatch.setattr(loss_module, "_FEWEST_ROWS", fewest)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(rows, 12), torch.randn(19, 12) * size, torch.randint(0, 19, (rows,))
    bias = torch.randn(19) if biased else None
    hidden[3] *= 10 if size > 1 else 1
    ours, theirs = hidden.clone().requires_grad_(trained), hidden.clone().requires_grad_(trained)
    loss = head_cross_entropy(ours, weight, targets, bias, *([] if scale is None else [scale]), softcap=softcap)
    logits = F.linear(theirs, weight, bias) * (1.0 if scale is None else scale)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    close(loss, expected)
    if trained:
        (loss * 3).backward()
        (expected * 3).backward()
        close(ours.grad, theirs.grad)


def test_the_heads_loss_is_precise_in_half_precision() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(8, 12), torch.randn(9, 12), torch.randint(0, 9, (8,))
    half = head_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, torch.randn(9).bfloat16() * 0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head_cross_entropy(hidden, weight, targets, torch.zeros(9))
    logits = F.linear(hidden.bfloat16(), weight.bfloat16()).float()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    assert half.dtype == mixed.dtype == torch.float32
    close(half, expected, 1e-6)
    close(mixed, expected, 1e-6)


class Scaled(nn.Linear):
    """A layer with further inputs, whose output may be of another type than its input."""

    def forward(self, x: torch.Tensor, by: float = 1.0, *, plus: float = 0.0) -> torch.Tensor:
        return (super().forward(x) * by + plus).to(torch.float64 if by == 2 else x.dtype)


def each_row(layers: list[nn.Module], index: list[int], x: torch.Tensor, *args: float, **kwargs: float) -> torch.Tensor:
    count = len(x) // len(index)
    return torch.cat([layers[n](x[i * count : (i + 1) * count], *args, **kwargs) for i, n in enumerate(index)])


@pytest.mark.parametrize("count", [1, 2])
def test_rows_through_their_own_layers(count: int) -> None:
    torch.manual_seed(0)
    base = Scaled(6, 5)
    small, large = LoRALinear(base, r=2), LoRALinear(base, r=4, lora_alpha=2)
    for layer in (small, large):
        nn.init.normal_(layer.lora_B)
    index = [1, 0, 3, 2, 1]
    x = torch.randn(5 * count, 3, 6)
    forms: list[nn.Module] = [small, large, base, base]
    lora = LoRARows(base, [small, large, None], torch.tensor(index))
    rows = ModuleRows(base, [(form, {}) for form in forms[:3]], torch.tensor(index))
    for module in (lora, rows):
        close(module(x), each_row(forms, index, x))
        close(module(x, 3.0, plus=1.0), each_row(forms, index, x, 3.0, plus=1.0))
        assert module(x, 2).dtype == torch.float64
        half = copy.deepcopy(module).bfloat16()
        assert half(x.bfloat16()).dtype == torch.bfloat16
        close(half(x.bfloat16()).float(), each_row(forms, index, x), 5e-2)
    assert rows.weight is base.weight and rows.in_features == 6
    for size in (0, 4, 6 * count):
        with pytest.raises(LitPeftError, match=f"{size} rows.* for 5"):
            lora(torch.randn(size, 3, 6))


def test_rows_of_forms_of_other_types_share_the_first_ones() -> None:
    base = nn.Linear(6, 5)
    rows = ModuleRows(base, [(nn.Sequential(base, Cast()), {})], torch.tensor([1, 0]))
    x = torch.randn(2, 6)
    assert rows(x).dtype == torch.float64
    # Some processors round a product of one row otherwise than one of two.
    torch.testing.assert_close(rows(x)[1], base(x)[1].double(), rtol=0, atol=1e-6)


class Cast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


# ------------------------------------------------------------------------- what is computed once, and second gradients


def computed(kind: str) -> tuple[Any, Callable[[], torch.Tensor]]:
    """A network that computes virtual tokens or a prefix, and what it gives."""
    torch.manual_seed(0)
    if kind == "prefix":
        prefix = Prefix(3, [(2, 4)], projection_size=5, hidden_size=6).eval()

        def keys() -> torch.Tensor:
            prefix.start()
            return prefix.layer(prefix.slots[0], torch.zeros(1))[0]

        return prefix, keys
    encoder = PromptEncoder(4, 8, 3, kind=kind).eval()  # type: ignore[arg-type]
    return encoder, encoder


@pytest.mark.parametrize("kind", ["prefix", "LSTM", "MLP"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_kept_result_is_never_stale(kind: str, mode: Any) -> None:
    network, run = computed(kind)
    with mode():
        if mode is torch.inference_mode:
            network = network.to(torch.float64)
            assert all(p.is_inference() for p in network.parameters())
        for change in (lambda p: p.add_(0.5), lambda p: p.mul_(2), lambda p: p.zero_()):
            before = run().clone()
            for parameter in network.parameters():
                change(parameter)
            assert not torch.equal(run(), before)
    fresh, run_fresh = computed(kind)
    fresh.load_state_dict(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(run(), run_fresh().to(run().dtype))


@pytest.mark.parametrize("kind", ["prefix", "LSTM", "MLP"])
def test_a_kept_result_follows_a_new_dtype_and_new_memory(kind: str) -> None:
    network, run = computed(kind)
    with torch.no_grad():
        first = run()
        assert torch.equal(run(), first)
        for parameter in network.parameters():
            parameter.data = parameter.data + 1
        assert not torch.equal(run(), first)


@pytest.mark.parametrize("kind", ["LSTM", "MLP"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_virtual_tokens_get_gradients_under_autocast_and_in_evaluation(
    kind: str, training: bool, dtype: torch.dtype
) -> None:
    network, run = computed(kind)
    network.train(training)
    exact = run()
    with torch.autocast("cpu", dtype):
        out = run()
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, exact)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def second_gradients(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    (first,) = torch.autograd.grad(run(x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(3).sum(), x)
    return second


@pytest.mark.parametrize("bits", [8, 4])
def test_second_gradients_through_a_quantized_layer(bits: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (5, 6), dtype=torch.int8)
    layer = QuantizedLinear(codes, torch.rand(5, 2, dtype=torch.float64), None, None, bits)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = layer.dense_weight()
    close(second_gradients(layer, x), second_gradients(lambda x: x @ weight.T, x))
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
def test_second_gradients_through_the_heads_loss(scale: float, softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight, bias, targets = torch.randn(7, 6).double(), torch.randn(7).double(), torch.randint(0, 7, (5,))

    def plain(hidden: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, weight, bias) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, targets, reduction="sum")

    def ours(hidden: torch.Tensor) -> torch.Tensor:
        return head_cross_entropy(hidden, weight, targets, bias, scale, softcap)

    close(second_gradients(ours, hidden), second_gradients(plain, hidden))
    assert torch.autograd.gradgradcheck(ours, hidden)
    found, expected = (torch.func.jvp(loss, (hidden,), (weight[:5],)) for loss in (ours, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("training", [False, True])
def test_an_lstm_avoids_cudnn_where_that_has_no_backward_pass(training: bool) -> None:
    encoder = PromptEncoder(4, 8, 3).train(training)
    assert encoder.lstm_head is not None
    enabled = []
    encoder.lstm_head.register_forward_pre_hook(lambda *_: enabled.append(torch.backends.cudnn.enabled))
    encoder()
    with torch.no_grad():
        encoder()
    assert enabled == [training, True] and torch.backends.cudnn.enabled
