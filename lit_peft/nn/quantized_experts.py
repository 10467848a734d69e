"""The weights of all experts of a mixture in few bits, in the place of the parameter that held them.

Each expert is quantized on its own, in blocks of neighboring numbers with a scale each. A product dequantizes one
expert at a time, and only those that rows were routed to, in the forward and in the backward pass.
"""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.nn.autocast import autocast_dtype, without_autocast
from lit_peft.nn.expert_codes import SCALE_BLOCK, decoded, quantized
from lit_peft.nn.operand import Operand
from lit_peft.nn.torch_internals import own_parameter


class QuantizedStack(nn.Module):
    """W of every expert in 8 or 4 bits. In products it behaves as the parameter would, see `QuantizedWeight`.

    `int8` and `fp8` (e4m3) have one scale for each output, `int4` one for each 32 inputs of an output (or for each
    output, if 32 is not a divisor), and `nf4` and `fp4` one for each 64 numbers; with `-dq`, those scales have 8 bits.

    Args:
        weight: W, shape (experts, out_features, in_features), or (experts, in_features, out_features) if transposed.
        kind: one of `KINDS`.
        is_transposed: whether inputs come before outputs.
    """

    like: Tensor
    scale_bits: Tensor

    def __init__(self, weight: Tensor, kind: str, is_transposed: bool = False) -> None:
        super().__init__()
        self.kind, self.is_transposed = kind, is_transposed
        self.shape = weight.shape
        # Follows `.to(bfloat16)`, as W would.
        self.register_buffer("like", weight.new_empty(0), persistent=False)
        experts = [weight[index].detach() for index in range(len(weight))]
        parts = [quantized(matrix.T if is_transposed else matrix, kind) for matrix in experts]
        # Integers: `.to(bfloat16)` casts whatever is floating point.
        self.weight = nn.Parameter(torch.stack([codes for codes, _ in parts]), requires_grad=False)
        for name in parts[0][1]:
            stacked = torch.stack([scales[name] for _, scales in parts])
            bits = stacked if stacked.dtype == torch.int8 else stacked.float().view(torch.int32)
            self.register_buffer(f"{name}_bits", bits, persistent=False)

    def dense(self, expert: int) -> Tensor:
        """Return W of one expert dequantized, in the shape and the dtype that W would have."""
        rows, columns = self.shape[1:][::-1] if self.is_transposed else self.shape[1:]
        scale = self.scale_bits[expert]
        if scale.dtype == torch.int8:
            steps, mean = self.get_buffer("step_bits")[expert], self.get_buffer("mean_bits")[expert]
            expanded = steps.view(torch.float32).repeat_interleave(SCALE_BLOCK)[: len(scale)]
            scale = scale.float() * expanded + mean.view(torch.float32)
        else:
            scale = scale.view(torch.float32)
        numbers = decoded(self.weight[expert], self.kind, rows * columns, len(scale))
        matrix = (numbers * scale[:, None]).flatten()[: rows * columns].view(rows, columns).to(self.like.dtype)
        return matrix.T if self.is_transposed else matrix

    def dense_stack(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W of all experts dequantized, shape as it was stored."""
        dense = torch.stack([self.dense(expert) for expert in range(self.shape[0])])
        return dense if dtype is None else dense.to(dtype)

    def operand(self) -> QuantizedWeight:
        """Return what stands for W in products."""
        return QuantizedWeight(self)

    def __getitem__(self, index: Any) -> Any:
        return self.operand()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
            return getattr(self.operand(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args = tuple(_as_operand(value) for value in args)
        return func(*args, **{name: _as_operand(value) for name, value in (kwargs or {}).items()})

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.kind}"


def expert_weight(experts: nn.Module, name: str) -> Any:
    """Return the parameter of experts that has this name, or the operand that stands for it if it is quantized."""
    parameter = own_parameter(experts, name)
    if parameter is not None:
        return parameter
    stack = dict(experts.named_children())[name]
    assert isinstance(stack, QuantizedStack)
    return stack.operand()


def make_dense(experts: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Put a frozen parameter in the place of quantized weights; nothing happens if they are not quantized."""
    stack = dict(experts.named_children()).get(name)
    if isinstance(stack, QuantizedStack):
        delattr(experts, name)
        experts.register_parameter(name, nn.Parameter(stack.dense_stack(dtype), requires_grad=False))


def _as_operand(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_as_operand(inner) for inner in value)
    return value.operand() if isinstance(value, QuantizedStack) else value


@dataclass(frozen=True, eq=False)
class QuantizedWeight(Operand):
    """W of a `QuantizedStack` as an operand of products: all experts, one, or one for each of several rows.

    It stands for a tensor in `F.linear`, `matmul`, `bmm` and grouped products, also after `transpose` and indexing by
    expert. Whatever else is done with it dequantizes all experts, and a warning says so.

    Attributes:
        stack: the experts.
        index: None for all experts, the number of one, or a tensor of numbers.
        is_flipped: whether the last two dimensions are exchanged.
    """

    stack: QuantizedStack
    index: Any = None
    is_flipped: bool = False

    @property
    def shape(self) -> torch.Size:
        experts, first, second = self.stack.shape
        sizes = (second, first) if self.is_flipped else (first, second)
        if self.index is None:
            return torch.Size((experts, *sizes))
        return torch.Size(sizes if isinstance(self.index, int) else (*self.index.shape, *sizes))

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.like.dtype

    @property
    def device(self) -> torch.device:
        return self.stack.weight.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        return False

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def mT(self) -> QuantizedWeight:
        """The same weight with its last two dimensions exchanged."""
        return QuantizedWeight(self.stack, self.index, not self.is_flipped)

    @property
    def T(self) -> QuantizedWeight | Tensor:
        """The transposed matrix of one expert."""
        return self.mT if self.ndim == 2 else self.dense().T

    def transpose(self, first: int, second: int) -> QuantizedWeight | Tensor:
        """Exchange two dimensions, as `Tensor.transpose` does."""
        if {first % self.ndim, second % self.ndim} == {self.ndim - 2, self.ndim - 1}:
            return self.mT
        return self.dense().transpose(first, second)

    def to(self, *args: Any, **kwargs: Any) -> QuantizedWeight | Tensor:
        """Return the weight itself if only its own dtype or another floating-point one is asked for.

        Products are computed in the dtype of their other operand.
        """
        dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        plain = len(args) + len(kwargs) == 1 and dtypes and dtypes[0].is_floating_point
        return self if plain else self.matrices().to(*args, **kwargs)

    def matrices(self) -> Tensor:
        """Return the weight dequantized, of this shape."""
        if isinstance(self.index, int):
            dense = self.stack.dense(self.index)
        else:
            numbers = range(self.stack.shape[0]) if self.index is None else self.index.flatten().tolist()
            each = {number: self.stack.dense(number) for number in set(numbers)}
            dense = torch.stack([each[number] for number in numbers])
            dense = dense if self.index is None else dense.view(*self.index.shape, *dense.shape[1:])
        return dense.mT if self.is_flipped else dense

    def dense(self) -> Tensor:
        """Return the weight dequantized, of this shape. This is slow, so a warning says so."""
        warnings.warn(
            "The code of these experts uses their quantized weight in another way than in products, so all of it is "
            "dequantized in every step: this is right, but slow, and takes as much memory as without quantization.",
            stacklevel=3,
        )
        return self.matrices()

    # The compiler cannot follow weights that are no tensors.
    @torch.compiler.disable
    def after_groups(self, x: Tensor, ends: Any) -> Tensor:
        """Return the products of the rows of x with the expert of their group; rows after the last group are zero.

        Args:
            x: shape (rows, in_features), group after group.
            ends: the number of rows up to the end of each group, one for each expert.
        """
        ends = ends.tolist() if isinstance(ends, Tensor) else list(ends)
        bounds = itertools.pairwise([0, *ends])
        groups = tuple((expert, start, end) for expert, (start, end) in enumerate(bounds) if end > start)
        out: Tensor = _Products.apply(x, self.stack, groups, self.is_flipped)
        return out

    @torch.compiler.disable
    def after(self, x: Tensor) -> Tensor:
        """Return the product of x and the weight, for each expert that the weight has; shape (..., columns)."""
        rows, width = x.reshape(-1, x.shape[-1]), self.shape[-1]
        if isinstance(self.index, int):
            groups: tuple[tuple[int, int, int], ...] = ((self.index, 0, len(rows)),)
            return _Products.apply(rows, self.stack, groups, self.is_flipped).view(*x.shape[:-1], width)
        count = x.shape[-2]  # rows of each matrix
        if self.index is None:
            experts = self.stack.shape[0]
            rows = x.expand(experts, *x.shape[-2:]).reshape(-1, x.shape[-1])
            out = self.after_groups(rows, range(count, experts * count + 1, count))
            return out.view(experts, count, width)
        owners = self.index.reshape(-1).repeat_interleave(count)
        order = owners.argsort(stable=True)
        ends = torch.bincount(owners, minlength=self.stack.shape[0]).cumsum(0)
        out = self.after_groups(rows[order], ends)
        return out[order.argsort()].view(*x.shape[:-1], width)

    def __getitem__(self, index: Any) -> QuantizedWeight | Tensor:
        if self.index is None:
            if isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point():
                index = int(index)
            if isinstance(index, int):
                return QuantizedWeight(self.stack, index % self.stack.shape[0], self.is_flipped)
            if isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int32, torch.int64):
                return QuantizedWeight(self.stack, index, self.is_flipped)
        return self.dense()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "stack" not in vars(self):
            raise AttributeError(name)
        plain = {"data_ptr", "element_size", "is_cuda", "is_meta", "layout"}
        return getattr(self.stack.weight if name in plain else self.dense(), name)

    def after_groups_of(self, x: Tensor, ends: Tensor) -> Tensor | None:
        return self.after_groups(x, ends) if self.index is None else None


class _Products(torch.autograd.Function):
    """Products of groups of rows, each with one expert, which is dequantized for it and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: QuantizedStack, groups: Any, is_flipped: bool) -> Tensor:
        ctx.dtype, ctx.x_dtype = autocast_dtype(x.device) or x.dtype, x.dtype
        ctx.stack, ctx.groups, ctx.is_flipped, ctx.width = stack, groups, is_flipped, x.shape[1]
        width = stack.shape[1 if is_flipped else 2]
        return _each(x, stack, groups, not is_flipped, width, ctx.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out = _each(grad, ctx.stack, ctx.groups, ctx.is_flipped, ctx.width, ctx.dtype)
        return out.to(ctx.x_dtype), None, None, None


def _each(x: Tensor, stack: QuantizedStack, groups: Any, as_stored: bool, width: int, dtype: torch.dtype) -> Tensor:
    """Return x W for each group, or x Wᵀ unless `as_stored`."""
    out = x.new_empty(len(x), width, dtype=dtype)
    with without_autocast(x.device):
        for expert, start, end in groups:
            dense = stack.dense(expert).to(dtype)
            out[start:end] = F.linear(x[start:end].to(dtype), dense.T if as_stored else dense)
    last = groups[-1][2] if groups else 0
    out[last:] = 0
    return out
