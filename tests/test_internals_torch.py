"""The private names of torch that lit_peft uses still mean what `lit_peft/nn/torch_internals.py` takes them to mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from models import make
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lit_peft.nn.torch_internals import (
    DtypeKeepingDict,
    backward_is_running,
    compile_training_calls,
    computed_buffers,
    copy_all_,
    function_transforms_are_active,
    has_forward_hooks,
    is_compiled,
    keep_last,
    lerp_all_,
    own_parameter,
    reshaped,
    restore_calls,
    runs_last,
    saved_factors,
    scaled_product,
    torch_handles_saved_tensors,
    version_of,
    weights_read_by,
)


def test_forward_hooks_are_found_and_their_removal_too() -> None:
    layer = nn.Linear(2, 2)
    assert not has_forward_hooks(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert has_forward_hooks(layer)
        handle.remove()
        assert not has_forward_hooks(layer)


def test_numbers_in_8_bits_are_multiplied_with_a_scale_for_each_row() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(32, 64).to(torch.float8_e4m3fn), torch.randn(48, 64).to(torch.float8_e4m3fn)
    a_scale, b_scale = torch.rand(32, 1), torch.rand(1, 48)
    product = scaled_product(a, b.t(), a_scale, b_scale)
    assert product.dtype == torch.bfloat16
    wanted = (a.float() * a_scale) @ (b.float().t() * b_scale)
    torch.testing.assert_close(product.float(), wanted, rtol=1e-2, atol=1e-2)


def test_a_hook_may_stay_behind_those_that_come_later() -> None:
    layer, seen = nn.Linear(2, 2), []

    @runs_last
    def last(*_: object) -> None:
        seen.append("last")

    for register in (layer.register_forward_pre_hook, layer.register_forward_hook):
        register(last)
        register(lambda *_: seen.append("later"))
    layer(torch.ones(2))
    keep_last(layer)
    layer(torch.ones(2))
    assert seen == ["last", "later"] * 2 + ["later", "last"] * 2


def test_a_parameter_is_found_behind_an_attribute_of_the_same_name() -> None:
    layer = nn.Linear(2, 2, bias=False)
    weight = layer.weight
    vars(layer)["weight"] = weight.double()
    assert layer.weight.dtype == torch.float64 and own_parameter(layer, "weight") is weight
    assert own_parameter(layer, "bias") is None and own_parameter(layer, "nothing") is None


def test_an_autograd_function_may_return_what_was_reshaped_and_have_it_changed_in_place() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return reshaped((2 * x).view(6), (2, 3))

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return 2 * grad

    x = torch.ones(2, 3, requires_grad=True)
    out = Double.apply(x)
    out.add_(1)  # torch raises here if it is a view
    assert out.tolist() == [[3.0] * 3] * 2
    out.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[2.0] * 3] * 2
    tensor = torch.zeros(6)
    assert reshaped(tensor, (2, 3)).data_ptr() == tensor.data_ptr()


def test_the_version_grows_with_each_change_in_place() -> None:
    tensor = torch.zeros(2)
    first = version_of(tensor)
    assert first is not None and version_of(tensor) == first
    tensor.add_(1)
    changed = version_of(tensor)
    assert changed is not None and changed > first
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) is None


def test_autograd_keeps_both_factors_of_a_product() -> None:
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    found = saved_factors(a * b)
    assert found is not None and found[0].data_ptr() == a.data_ptr() and found[1].data_ptr() == b.data_ptr()
    assert saved_factors(a + b) is None and saved_factors(a) is None
    assert saved_factors(a * torch.ones(3)) is None, "the gradient of one factor alone needs the other one alone"


def test_hooks_of_torch_on_saved_tensors_are_told_from_those_of_others() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_handles_saved_tensors())
        return x * 2

    assert not torch_handles_saved_tensors()
    with save_on_cpu():
        assert torch_handles_saved_tensors()
    with saved_tensors_hooks(lambda x: x, lambda x: x):
        assert not torch_handles_saved_tensors()
    checkpoint(look, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert seen == [True]


def test_function_transforms_are_noticed() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(function_transforms_are_active())
        return x * 2

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2))
    torch.func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    torch.func.grad(lambda x: look(x).sum())(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        look(torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2)))
    look(torch.ones(2))
    assert seen == [False, True, True, True, True, False]


def test_layers_are_known_whose_weight_is_used_without_a_call() -> None:
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    def read_by(kind: type[nn.Module]) -> frozenset[str]:
        return weights_read_by(kind.__new__(kind))

    assert read_by(nn.MultiheadAttention) == {"out_proj"}
    assert not read_by(nn.TransformerEncoderLayer) & {"linear1", "linear2"}
    assert read_by(WavLMAttention) >= {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert "dt_proj" in read_by(JambaMambaMixer) and "out_proj" in read_by(Mamba2Mixer)
    # These look at a weight's dtype, or use the weight in one case and call the layer in the other.
    for name in ("llama", "bloom", "t5"):
        assert not any(weights_read_by(module) for module in make(name).modules())


def test_a_compiled_module_is_known() -> None:
    layer = nn.Linear(2, 2)
    assert not is_compiled(layer)
    layer.compile(backend="eager")
    assert is_compiled(layer)


def test_tensors_move_towards_their_ends() -> None:
    tensors, ends = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.full((3,), 3.0)]
    lerp_all_(tensors, ends, 0.25)
    assert torch.equal(tensors[0], torch.full((2,), 0.25)) and torch.equal(tensors[1], torch.full((3,), 1.5))


def test_tensors_are_copied_together() -> None:
    targets, sources = [torch.zeros(2), torch.zeros(3, 1)], [torch.ones(2), torch.full((3, 1), math.nan)]
    copy_all_(targets, sources)
    assert torch.equal(targets[0], torch.ones(2)) and bool(targets[1].isnan().all())


def test_buffers_that_no_checkpoint_has_are_found() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    module[1].register_buffer("table", torch.ones(3), persistent=False)
    module[1].register_buffer("numbers", torch.arange(3), persistent=False)  # not of floating point
    assert computed_buffers(module) == [(module[1], "table")]
    assert "1.table" not in module.state_dict()


def test_a_dictionary_of_modules_moves_and_is_never_cast() -> None:
    kept = DtypeKeepingDict({"norm": nn.BatchNorm1d(3)})
    outer = nn.Sequential(kept, nn.Linear(3, 3)).to(torch.bfloat16)
    assert {tensor.dtype for tensor in kept.state_dict().values()} == {torch.float32, torch.int64}
    assert outer[1].weight.dtype == torch.bfloat16
    assert outer.to("meta")[0]["norm"].weight.is_meta


def test_only_training_calls_are_compiled_and_hooks_that_change_are_noticed() -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        calls.append(len(inputs))
        return graph.forward

    class Layer(nn.Linear):  # torch does not compile its own modules alone
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    torch._dynamo.reset()
    layer, x = Layer(3, 3), torch.ones(2, 3)
    compile_training_calls(layer, backend)
    plain = layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    assert not calls
    torch.testing.assert_close(layer(x), plain)
    layer(torch.ones(5, 3))
    assert len(calls) == 1
    hook = layer.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(layer(x), 2 * plain)
    hook.remove()
    torch.testing.assert_close(layer(x), plain)
    compiled = len(calls)
    restore_calls(layer)
    layer(torch.ones(7, 3, requires_grad=True))
    assert len(calls) == compiled
    torch._dynamo.reset()


def test_the_backward_pass_is_seen() -> None:
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(backward_is_running())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(backward_is_running())
            return grad

    Look.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == [False, True] and not backward_is_running()
