"""The matrices of an adapter in the dtype of the computation, cast once for as long as they do not change."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_peft.nn.torch_internals import version_of


class CastOnce:
    """Keeps two matrices in another dtype, for calls without gradients: when tokens are decoded, each cast counts.

    Changes are seen by torch's counter of changes in place. Optimizers of bitsandbytes do not move it, so a layer must
    keep nothing while it trains. Nor does sharding, which reuses memory: in a process group, nothing is kept.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Tensor, ...], tuple[int | None, ...], tuple[Tensor, Tensor]] | None = None

    def __deepcopy__(self, memo: object) -> CastOnce:
        return CastOnce()

    def __reduce__(self) -> tuple[type[CastOnce], tuple[()]]:
        return CastOnce, ()

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return both matrices in a dtype; they are cast again after any change to them."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return a.to(dtype), b.to(dtype)
        kept, versions = self._kept, (version_of(a), version_of(b))  # read once: another thread may replace it
        if kept is not None and kept[1] == versions and kept[2][0].dtype == dtype:
            first, second = kept[0]
            # The matrices are kept as well, so that no others can lie at their address.
            if first.data_ptr() == a.data_ptr() and second.data_ptr() == b.data_ptr():
                return kept[2]
        made = a.to(dtype), b.to(dtype)
        # Inference tensors do not count their changes.
        self._kept = None if None in versions else ((a.detach(), b.detach()), versions, made)
        return made
