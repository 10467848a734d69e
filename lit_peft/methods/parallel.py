"""Parallel adapters (He et al. 2022, arXiv:2110.04366): a bottleneck beside the FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lit_peft.methods.bottleneck import BottleneckSettings
from lit_peft.methods.mixin import MethodMixin
from lit_peft.models.architectures import Layer


@dataclass(frozen=True)
class ParallelSettings(BottleneckSettings):
    """Settings of Parallel: `FFN(x) + s · up(ReLU(down(x)))` (section 3.3, table 1).

    x is the layer's residual at the FFN: in a post-LN layer the FFN's own input, in a pre-LN layer its input before
    the LayerNorm. By default the bottleneck is half of the hidden size and s = 4. With `mh_adapter` an adapter stands
    beside each attention as well; with `placement="llm_adapters"` beside each query, key and value projection, or
    beside the linear layers that `target_modules` names.
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
        return layer.architecture.qkv_linears


class ParallelMixin(MethodMixin):
    """Parallel adapters as a LightningModule's method."""

    settings_class = ParallelSettings
