"""AdapterP (Pfeiffer et al. 2020, MAD-X, arXiv:2005.00052): one serial adapter per layer, after the FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lit_peft.methods.bottleneck import BottleneckSettings
from lit_peft.methods.mixin import MethodMixin
from lit_peft.models.architectures import Layer, has_module


@dataclass(frozen=True)
class AdapterPSettings(BottleneckSettings):
    """Settings of AdapterP: `LN(z + A(LN(z)))`, z = y + x the FFN's output plus residual (section 2.3).

    It reuses the layer's own LayerNorm; in a pre-LN layer, which has none after the FFN, it is `z + A(z)`. By default
    the bottleneck is a sixteenth of the hidden size and the activation ReLU. With `placement="llm_adapters"` the
    adapter stands after the last linear layer of the FFN.

    Args:
        original_ln_before: give the adapter the FFN's output after the layer's residual and LayerNorm.
    """

    method: ClassVar[str] = "adapter_p"
    defaults: ClassVar[dict[str, Any]] = {
        **BottleneckSettings.defaults,
        "reduction_factor": 16,
        "non_linearity": "relu",
    }

    original_ln_before: bool = True

    def target_names(self, layer: Layer) -> tuple[str, ...]:
        return tuple(name for name in layer.architecture.ffn_linears if has_module(layer.module, name))[-1:]


class AdapterPMixin(MethodMixin):
    """AdapterP as a LightningModule's method."""

    settings_class = AdapterPSettings
