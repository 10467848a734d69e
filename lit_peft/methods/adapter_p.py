"""AdapterP (Pfeiffer et al. 2020, MAD-X, arXiv:2005.00052): one serial adapter per layer, after the FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lit_peft.methods.bottleneck import BottleneckSettings
from lit_peft.methods.mixin import MethodMixin
from lit_peft.models.architectures import Layer, has_module


@dataclass(frozen=True)
class AdapterPSettings(BottleneckSettings):
    """Settings of AdapterP: `LN(z + A(LN(z)))` with z = y + x, the FFN's output plus the residual (section 2.3).

    LN is the layer's existing LayerNorm. A pre-LN layer has none after the FFN and computes `z + A(z)`. By default the
    bottleneck is one sixteenth of the hidden size, and the activation is ReLU. With `placement="llm_adapters"` the
    adapter follows the last linear layer of the FFN.

    Args:
        original_ln_before: apply the layer's residual and LayerNorm to the FFN's output before the adapter.
    """

    method: ClassVar[str] = "adapter_p"
    defaults: ClassVar[dict[str, Any]] = {
        **BottleneckSettings.defaults,
        "reduction_factor": 16,
        "non_linearity": "relu",
    }

    original_ln_before: bool = True

    def target_names(self, layer: Layer) -> tuple[str, ...]:
        """Return the name of the FFN's last linear layer."""
        return tuple(name for name in layer.architecture.ffn_linears if has_module(layer.module, name))[-1:]


class AdapterPMixin(MethodMixin):
    """Makes AdapterP the method of a LightningModule."""

    settings_class = AdapterPSettings
