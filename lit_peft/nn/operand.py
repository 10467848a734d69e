"""What stands for a weight in products of torch, without being a tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Operand:
    """Base class of what behaves like a tensor in `F.linear`, `matmul`, `bmm` and grouped products.

    Other functions of torch get `dense()` in its place.
    """

    @property
    def mT(self) -> Any:
        """The same with its last two dimensions exchanged."""
        raise NotImplementedError

    def dim(self) -> int:
        """Return the number of dimensions."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Build the tensor."""
        raise NotImplementedError

    def after(self, x: Tensor) -> Tensor:
        """Return the product of x and this, shape (..., columns)."""
        raise NotImplementedError

    def after_groups_of(self, x: Tensor, ends: Tensor) -> Tensor | None:
        """Return the products of groups of rows, (rows, columns), each with one matrix; None if this is no stack."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if value is not None}
        product = _product(func.__name__, args, kwargs)
        if product is not None:
            return product
        args = tuple(_as_dense(value) for value in args)
        return func(*args, **{name: _as_dense(value) for name, value in kwargs.items()})


def _as_dense(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_as_dense(inner) for inner in value)
    return value.dense() if isinstance(value, Operand) else value


def _product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the product that a function of torch computes, or None if it is another function."""
    first, second, *rest = (*args, None, None)
    if isinstance(second, Operand) and isinstance(first, Tensor):
        if name == "linear" and second.dim() == 2 and set(kwargs) <= {"bias"}:
            bias = kwargs.get("bias", rest[0])
            out: Tensor = second.mT.after(first)
            return out if bias is None else out + bias
        if name in ("matmul", "__matmul__", "mm", "bmm") and not kwargs:
            return second.after(first)
        # torch's function, which calls `_grouped_mm`, and transformers' operator for where torch's does not run
        if name in ("grouped_mm", "_grouped_mm", "grouped_mm_fallback") and set(kwargs) <= {"offs"}:
            ends = kwargs.get("offs", rest[0])
            if first.dim() == 2 and isinstance(ends, Tensor):
                return second.after_groups_of(first, ends)
    is_product = name in ("mm", "bmm") or (name in ("matmul", "__matmul__") and getattr(second, "ndim", 0) > 1)
    if is_product and isinstance(first, Operand) and isinstance(second, Tensor) and not kwargs:
        found: Tensor = first.mT.after(second.mT).mT
        return found
    return None
