"""Products with W + s · B A for stacks of matrices, one for each expert of a mixture, without building the sum."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_peft.nn.operand import Operand
from lit_peft.nn.quantized_experts import QuantizedWeight

# A group as (matrix, first row, row after the last), without the groups that have no rows.
_Groups = list[tuple[int, int, int]]


def grouped_lora(x: Tensor, weight: Tensor | None, left: Tensor, right: Tensor, ends: Tensor, scaling: float) -> Tensor:
    """Return `x_g (W_g + s · L_g R_g)` for the rows x_g of each group g, which follow each other.

    Rows after the last group are zero in the result.

    Args:
        x: the rows, shape (rows, in_features).
        weight: W, shape (groups, in_features, out_features); None for zero.
        left: L, shape (groups, in_features, r).
        right: R, shape (groups, r, out_features).
        ends: the number of rows up to the end of each group, shape (groups,).
        scaling: s.

    Returns:
        The products, shape (rows, out_features).
    """
    if _has_kernel(x) and not (weight is not None and weight.requires_grad and torch.is_grad_enabled()):
        return _by_kernel(x, weight, left, right, ends.to(torch.int32), scaling)
    bounds = [0, *ends.tolist()]
    groups = [(g, start, end) for g, (start, end) in enumerate(itertools.pairwise(bounds)) if end > start]
    return _GroupedLoRA.apply(x, weight, left, right, scaling, groups)


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _by_kernel(x: Tensor, weight: Tensor | None, left: Tensor, right: Tensor, ends: Tensor, scaling: float) -> Tensor:
    """The products by torch's grouped kernel, which does not wait for the device to know the size of the groups."""
    # The kernel reads 16 bytes at a time, which is eight numbers in bfloat16.
    missing = -left.shape[-1] % 8
    if missing:
        left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
    # It leaves out the rows after the last group, in the result and in the gradient.
    counted = (torch.arange(len(x), device=x.device) < ends[-1])[:, None]
    x = torch.where(counted, x, 0)
    inner = torch.where(counted, F.grouped_mm(x, left, offs=ends), 0)
    update = F.grouped_mm(inner * scaling, right, offs=ends)
    out = update if weight is None else F.grouped_mm(x, weight, offs=ends) + update
    return torch.where(counted, out, 0)


class _GroupedLoRA(torch.autograd.Function):
    """The products in a loop over the groups that have rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, left: Tensor, right: Tensor, scaling: float, groups: _Groups
    ) -> Tensor:
        out, inner = x.new_empty(len(x), right.shape[2]), x.new_empty(len(x), left.shape[2])
        for g, start, end in groups:
            rows, part = x[start:end], out[start:end]
            torch.mm(rows, left[g], out=inner[start:end])
            if weight is None:
                torch.mm(inner[start:end], right[g], out=part).mul_(scaling)
            else:
                torch.mm(rows, weight[g], out=part)
                part.addmm_(inner[start:end], right[g], alpha=scaling)
        _clear_rest(groups, out)
        ctx.save_for_backward(x, inner, weight, left, right)
        ctx.scaling, ctx.groups = scaling, groups
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, left, right = ctx.saved_tensors
        for_x, for_weight, for_left, for_right = ctx.needs_input_grad[:4]
        grad = grad.contiguous()
        grad_inner = inner.new_empty(inner.shape)
        grad_x = x.new_empty(x.shape) if for_x else None
        # Zeros in the order in which L and R lie in memory; experts without rows keep them.
        grad_weight, grad_left, grad_right = (
            torch.zeros_like(operand) if needed else None
            for operand, needed in ((weight, for_weight), (left, for_left), (right, for_right))
        )
        for g, start, end in ctx.groups:
            rows, part, part_inner = x[start:end], grad[start:end], grad_inner[start:end]
            torch.mm(part, right[g].T, out=part_inner)
            part_inner.mul_(ctx.scaling)
            if grad_x is not None and weight is None:
                torch.mm(part_inner, left[g].T, out=grad_x[start:end])
            elif grad_x is not None:
                torch.mm(part, weight[g].T, out=grad_x[start:end])
                grad_x[start:end].addmm_(part_inner, left[g].T)
            if grad_weight is not None:
                torch.mm(rows.T, part, out=grad_weight[g])
            if grad_left is not None:
                torch.mm(rows.T, part_inner, out=grad_left[g])
            if grad_right is not None:
                torch.mm(inner[start:end].T, part, out=grad_right[g]).mul_(ctx.scaling)
        if grad_x is not None:
            _clear_rest(ctx.groups, grad_x)
        return grad_x, grad_weight, grad_left, grad_right, None, None


def _clear_rest(groups: _Groups, rows: Tensor) -> None:
    last = groups[-1][2] if groups else 0
    if last < len(rows):
        rows[last:] = 0


# Attributes that need no numbers.
_SAME_AS_WEIGHT = {"data_ptr", "element_size", "is_cuda", "is_meta", "layout", "numel", "requires_grad"}


class LowRankSum(Operand):
    """`W + s · L R` as an operand of products, which are computed as `x W + s · (x L) R`.

    In products of torch it behaves like a tensor: `F.linear`, `matmul`, `bmm`, grouped products, also after
    `transpose` and indexing by expert. Whatever else is done with it builds the sum.

    Args:
        weight: W, a matrix or a stack of matrices, shape (..., rows, columns).
        left: L, shape (..., rows, r).
        right: R, shape (..., r, columns).
        scaling: s.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
        self.weight, self.left, self.right, self.scaling = weight, left, right, scaling
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.ndim = weight.dim()

    def dense(self) -> Tensor:
        """Build the sum, shape (..., rows, columns). This is slow, so a warning says so."""
        warnings.warn(
            "The code of these experts uses their weight in another way than in products, so the weights of all "
            "experts with their updates are built in every step: this is right, but slow, and takes as much memory as "
            "the experts.",
            stacklevel=2,
        )
        return self.weight + (self.left @ self.right * self.scaling).to(self.dtype)

    @property
    def mT(self) -> LowRankSum:
        """The same sum with its last two dimensions exchanged."""
        return LowRankSum(self.weight.mT, self.right.mT, self.left.mT, self.scaling)

    @property
    def T(self) -> LowRankSum | Tensor:
        """The transposed matrix."""
        return self.mT if self.ndim == 2 else self.dense().T

    def view(self, *shape: Any) -> LowRankSum | Tensor:
        """Return the sum in another shape, as `Tensor.view` does: a matrix as a stack of matrices of its rows."""
        sizes = tuple(shape[0]) if shape and not isinstance(shape[0], int) else shape
        if self.ndim != 2 or len(sizes) != 3 or sizes[2] != self.shape[1]:
            return self.dense().view(*shape)
        weight = self.weight.view(sizes)
        left = self.left.reshape(*weight.shape[:2], -1)
        return LowRankSum(weight, left, self.right.expand(len(weight), -1, -1), self.scaling)

    def transpose(self, first: int, second: int) -> LowRankSum | Tensor:
        """Exchange two dimensions, as `Tensor.transpose` does."""
        if {first % self.ndim, second % self.ndim} == {self.ndim - 2, self.ndim - 1}:
            return self.mT
        return self.dense().transpose(first, second)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape or one size, as `Tensor.size` does."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def after(self, x: Tensor) -> Tensor:
        """Return the product of x and the sum, shape (..., columns)."""
        return x @ self.weight + (x @ self.left.to(x.dtype)) @ self.right.to(x.dtype) * self.scaling

    def __getitem__(self, index: Any) -> LowRankSum | Tensor:
        by_expert = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() < 2 and not _is_mask(index))
        if self.ndim != 3 or not by_expert:
            return self.dense()[index]
        return LowRankSum(self.weight[index], self.left[index], self.right[index], self.scaling)

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "weight" not in vars(self):
            raise AttributeError(name)
        return getattr(self.weight if name in _SAME_AS_WEIGHT else self.dense(), name)

    def after_groups_of(self, x: Tensor, ends: Tensor) -> Tensor | None:
        if self.ndim != 3:
            return None
        left, right = self.left.to(x.dtype), self.right.to(x.dtype)
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.after_groups(x, ends) + grouped_lora(x, None, left, right, ends, self.scaling)
        return grouped_lora(x, self.weight, left, right, ends, self.scaling)


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)
