"""Parallel adapters (He et al. 2022, arXiv:2110.04366): a bottleneck in parallel with the FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lit_peft.methods.bottleneck import BottleneckSettings
from lit_peft.methods.mixin import MethodMixin
from lit_peft.models.architectures import Layer


@dataclass(frozen=True)
class ParallelSettings(BottleneckSettings):
    """Settings of Parallel: `FFN(x) + s · up(ReLU(down(x)))` (section 3.3, table 1).

    x is the residual that the layer adds to the FFN's output: the FFN's input in a post-LN layer, and the input of the
    LayerNorm before the FFN in a pre-LN layer. By default the bottleneck is half the hidden size, and s = 4. With
    `mh_adapter` each attention gets a parallel adapter too. With `placement="llm_adapters"` each query, key and value
    projection gets one, or each linear layer that `target_modules` names.
    """

    method: ClassVar[str] = "parallel"
    is_parallel: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Any]] = {
        **BottleneckSettings.defaults,
        "reduction_factor": 2,
        "non_linearity": "relu",
        "scaling": 4.0,
    }

    def target_names(self, layer: Layer) -> tuple[str, ...]:
        """Return the names of the query, key and value projections."""
        return layer.architecture.qkv_linears


class ParallelMixin(MethodMixin):
    """Makes parallel adapters the method of a LightningModule."""

    settings_class = ParallelSettings
