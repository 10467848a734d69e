"""LoRA as one operation, compared with the plain formula: outputs, gradients of any order, and what is saved."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_peft.nn import LoRALinear
from lit_peft.nn.factors import factors_or_self
from lit_peft.nn.lora import LoRAEmbedding
from lit_peft.nn.lora_function import lora_linear, pack_bits, unpack_bits


def layer(kind: str = "linear", **settings: float) -> LoRALinear:
    torch.manual_seed(0)
    base = Conv1D(20, 12) if kind == "Conv1D" else nn.Linear(12, 20, bias=kind == "linear")
    made = LoRALinear(base, r=4, **settings)
    nn.init.normal_(made.lora_B)
    return made


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    module.zero_grad()
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]  # type: ignore[list-item]


class Formula(nn.Module):
    """The layer as the paper writes it, with the same parameters."""

    def __init__(self, module: LoRALinear) -> None:
        super().__init__()
        self.layer = module

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        dropped = F.dropout(x, layer.lora_dropout, layer.training)
        low = F.linear(dropped, layer.lora_A.to(x.dtype)) * layer.scaling
        out: Tensor = layer.base_layer(x)
        return out + F.linear(low, layer.lora_B.to(x.dtype)).to(out.dtype)


def is_plain(module: LoRALinear, x: torch.Tensor) -> bool:
    return module._is_plain(x, module.base_layer, module.weight)


@pytest.mark.parametrize("kind", ["linear", "no bias", "Conv1D"])
@pytest.mark.parametrize("trained_bias", [False, True])
def test_equals_the_plain_formula(kind: str, trained_bias: bool) -> None:
    module, x = layer(kind), torch.randn(2, 5, 12)
    if trained_bias and module.bias is not None:
        module.bias.requires_grad_(True)
    assert is_plain(module, x)
    ours = gradients(module, x)
    for mine, theirs in zip(ours, gradients(Formula(module), x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["linear", "no bias", "Conv1D"])
@pytest.mark.parametrize("autocast", [False, True])
def test_without_gradients_it_is_the_same_in_four_operations(kind: str, autocast: bool) -> None:
    module, x = layer(kind, lora_dropout=0.5).eval(), torch.randn(2, 5, 12)
    operations = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            operations.append(function._schema.name.removeprefix("aten::"))
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = module(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(
                module(x), expected, rtol=1e-5, atol=0.02 * float(expected.abs().max()) if autocast else 1e-5
            )
    with torch.no_grad(), Watch():
        module(x)
    assert len([name for name in operations if name in ("mm", "addmm", "add_", "linear", "bmm")]) <= 4
    module.train()
    with torch.no_grad():
        assert not torch.equal(module(x), expected)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x, w, bias, a, b = (torch.randn(*s, dtype=torch.float64) for s in [(3, 5), (4, 5), (4,), (2, 5), (4, 2)])
    for tensor in (x, bias, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: lora_linear(t[0], w, *t[1:], 0.5), (x, bias, a, b))


@pytest.mark.parametrize("shape", [(3, 5), (4, 16)])
def test_dropout_is_one_mask_forward_and_backward(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, (rows, d) = torch.randn(shape), shape
    w, a, b = torch.randn(6, d), torch.randn(2, d, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    x.requires_grad_()
    torch.manual_seed(7)
    out = lora_linear(x, w, None, a, b, 0.5, 0.4)
    torch.manual_seed(7)
    kept = torch.native_dropout(torch.ones(shape), 0.4, True)[0]
    assert 0 < int((kept == 0).sum()) < rows * d
    plain = F.linear(x, w) + 0.5 * F.linear(F.linear(x * kept, a), b)
    torch.testing.assert_close(out, plain)
    wanted = torch.autograd.grad(plain.square().sum(), (x, a, b))
    for mine, theirs in zip(torch.autograd.grad(out.square().sum(), (x, a, b)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_bits() -> None:
    mask = torch.rand(7, 13) < 0.5
    bits = pack_bits(mask)
    assert bits.numel() == 12 and torch.equal(unpack_bits(bits, mask.shape), mask)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    module = layer()
    if not autocast:
        module.base_layer.bfloat16()
    x = torch.randn(3, 12, dtype=torch.float32 if autocast else torch.bfloat16)
    exact = gradients(copy.deepcopy(module).float(), x.float())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = gradients(module, x)
        plain = gradients(Formula(module), x)
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.float() - truth).norm() <= 1.2 * (theirs.float() - truth).norm() + 1e-3 * truth.norm()


def test_the_input_is_saved_once_and_no_dropped_copy() -> None:
    x = torch.randn(64, 12).requires_grad_()
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    layers = [layer(lora_dropout=0.1) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [module(x) for module in layers]
    frozen = sum(p.nbytes for module in layers for p in module.parameters())
    # x once; for each layer x A (r = 4 wide) and a bit for each element of x.
    assert sum(storages.values()) <= frozen + x.nbytes + 3 * (64 * 4 * 4 + 64 * 12 // 8)
    assert all(out.requires_grad for out in outputs)


def test_a_base_that_is_more_than_a_product_takes_the_plain_path() -> None:
    x = torch.randn(3, 12)
    hooked = layer()
    hooked.base_layer.register_forward_hook(lambda module, args, out: out * 0)
    assert not is_plain(hooked, x) and not is_plain(layer(), x.bfloat16())
    merged = layer()
    merged.merge()
    assert not is_plain(merged, x)


def saved_storages(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(storage.nbytes() for storage in storages.values()), out


@pytest.mark.parametrize("autocast", [False, True])
def test_a_product_is_kept_as_its_factors_bit_for_bit(autocast: bool) -> None:
    module = layer(lora_dropout=0.3)
    gate, up = torch.randn(2, 64, 12).requires_grad_(), torch.randn(2, 64, 12).requires_grad_()

    def step(copied: bool) -> tuple[int, list[Tensor]]:
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            # A copy of the product is no product: it is kept itself.
            size, out = saved_storages(lambda: module((F.silu(gate) * up).clone() if copied else F.silu(gate) * up))
        leaves = (gate, up, module.lora_A, module.lora_B)
        return size, [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    size, values = step(False)
    plain_size, plain = step(True)
    assert plain_size - size == gate.nbytes
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(values, plain, strict=True))


def test_a_product_under_checkpointing_and_offloading() -> None:
    module = layer()
    gate, up = torch.randn(3, 12).requires_grad_(), torch.randn(3, 12).requires_grad_()
    leaves = (gate, up, module.lora_A, module.lora_B)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(F.silu(gate) * up).square().sum(), leaves)

    plain = step()
    checkpoint = torch.utils.checkpoint.checkpoint(lambda: module(F.silu(gate) * up), use_reentrant=False)
    again = torch.autograd.grad(checkpoint.square().sum(), leaves)
    with torch.autograd.graph.save_on_cpu():
        offloaded = step()
    for values in (again, offloaded):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(values, plain, strict=True))


def test_what_is_not_a_product_of_two_of_its_shape_is_kept_itself() -> None:
    x = torch.randn(3, 12).requires_grad_()
    for other in (2.0, torch.randn(12).requires_grad_(), torch.randn(3, 12)):
        product = x * other
        assert factors_or_self(product) == (product,)
    assert len(factors_or_self(x + x)) == 1


def second_gradients(module: nn.Module, x: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradients of a gradient penalty, as in WGAN-GP: of the squares of all first gradients."""
    torch.manual_seed(0)
    first = torch.autograd.grad(module(x).pow(3).sum(), leaves, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "no bias", "Conv1D"])
def test_gradients_of_gradients(kind: str, dropout: float) -> None:
    module = layer(kind, lora_dropout=dropout).double()
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    leaves = (x, module.lora_A, module.lora_B)
    ours = second_gradients(module, x, leaves)
    masked = Formula(module)
    if dropout:
        # The same mask: torch draws it for the rows of x.
        torch.manual_seed(0)
        mask = torch.native_dropout(torch.ones(6, 12, dtype=torch.float64), dropout, True)[0].view(2, 3, 12)
        base, a, b, s = module.base_layer, module.lora_A, module.lora_B, module.scaling
        masked.forward = lambda x: base(x) + s * (x * mask) @ a.T @ b.T  # type: ignore[method-assign]
    for mine, theirs in zip(ours, second_gradients(masked, x, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("held", [True, False])
def test_gradients_of_gradients_through_a_product(held: bool) -> None:
    """Its factors are kept, yet its own gradient may be asked for as long as somebody holds the product."""
    module = layer().double()
    gate, up = (torch.randn(3, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(net: nn.Module) -> list[Tensor]:
        product = F.silu(gate) * up
        out = net(product)
        wanted = (gate, up, module.lora_A, *((product,) if held else ()))
        del product
        gc.collect()
        first = torch.autograd.grad(out.pow(3).sum(), (module.lora_A, module.lora_B), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))  # type: ignore[arg-type]

    for mine, theirs in zip(run(module), run(Formula(module)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_second_gradients_are_checked_by_differences() -> None:
    torch.manual_seed(0)
    x, w, bias, a, b = (torch.randn(*s, dtype=torch.float64) for s in [(3, 5), (4, 5), (4,), (2, 5), (4, 2)])
    for tensor in (x, bias, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *t: lora_linear(t[0], w, *t[1:], 0.5), (x, bias, a, b))


def test_function_transforms_take_the_plain_path() -> None:
    module, x = layer().double(), torch.randn(4, 12, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(module)(x), module(x))
    torch.testing.assert_close(torch.func.jacrev(module)(x[0]), torch.func.jacfwd(module)(x[0]))
    direction = torch.randn_like(x)
    out, change = torch.func.jvp(module, (x,), (direction,))
    torch.testing.assert_close(out, module(x))
    torch.testing.assert_close(change, module(x + direction) - module(x))


@pytest.mark.parametrize("kind", ["linear", "no bias", "Conv1D"])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (0, 12)], ids=str)
def test_the_output_may_be_changed_in_place(kind: str, shape: tuple[int, ...]) -> None:
    module, x = layer(kind), torch.randn(shape, requires_grad=True)
    results = []
    for change in (lambda out: out.add_(1).relu_(), lambda out: (out + 1).relu()):
        out = change(module(x))
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, module.lora_A, module.lora_B))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding"])
def test_doras_norm_makes_no_matrix_as_large_as_the_weight(kind: str) -> None:
    module = (
        layer(kind, use_dora=True) if kind != "embedding" else LoRAEmbedding(nn.Embedding(50, 12), r=4, use_dora=True)
    )
    nn.init.normal_(module.lora_A)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not any(
                out.untyped_storage().data_ptr() == p.data_ptr() for p in module.parameters()
            ):
                largest = max(largest, out.numel())
            return out

    with Watch():
        norm = module._weight_norm()
    whole = module.dense_weight() + module.scaling * module.lora_B @ module.lora_A
    torch.testing.assert_close(norm, torch.linalg.vector_norm(whole, dim=1), rtol=1e-6, atol=0)
    assert largest < module.weight.numel()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_dora_with_one_product_equals_its_plain_formula(kind: str, dropout: float) -> None:
    x = torch.randn(2, 3, 12, requires_grad=True)
    module = layer(kind, use_dora=True, lora_dropout=dropout)
    for parameter in (module.lora_A, module.lora_B):
        nn.init.normal_(parameter)
    trained = [x, module.lora_A, module.lora_B, module.lora_magnitude]
    results = []
    for plain in (False, True):
        torch.manual_seed(1)
        handle = module.base_layer.register_forward_hook(lambda *_: None) if plain else None
        assert is_plain(module, x) is not plain
        out = module(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), trained)])
        if handle is not None:
            handle.remove()
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5 * float(slow.detach().abs().max()))
