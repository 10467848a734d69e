"""AdapterH (Houlsby et al. 2019, arXiv:1902.00751): serial adapters after attention and after the FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lit_peft.methods.attachment import Attachment
from lit_peft.methods.bottleneck import BottleneckSettings
from lit_peft.methods.mixin import MethodMixin
from lit_peft.models.transformers_internals import is_norm


@dataclass(frozen=True)
class AdapterHSettings(BottleneckSettings):
    """Settings of AdapterH: `y + up(act(down(y)))` on the output y of each attention and each FFN (section 2.1).

    The adapters stand before the layer's residual and LayerNorm. By default the bottleneck is a sixteenth of the
    hidden size and the activation swish. A decoder's cross-attention gets an adapter with `cross_adapter` only. With
    `placement="llm_adapters"` they stand at every linear layer of the FFN: before the layers that widen, on their
    input, and after the one that narrows.

    Args:
        mh_adapter: an adapter at each self-attention.
        train_layer_norms: train the model's LayerNorms as well, as the paper does.
    """

    method: ClassVar[str] = "adapter_h"
    defaults: ClassVar[dict[str, Any]] = {
        **BottleneckSettings.defaults,
        "reduction_factor": 16,
        "non_linearity": "swish",
    }

    mh_adapter: bool = True
    train_layer_norms: bool = False

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Put the adapters on, and train the norms where the settings say so."""
        super().attach_to(model, attachment)
        if self.train_layer_norms:
            added = tuple(f"{path}." for path in attachment.adapted)
            for path, module in list(model.named_modules()):
                if is_norm(module) and not path.startswith(added):
                    for name, _ in list(module.named_parameters(recurse=False)):
                        attachment.train(f"{path}.{name}")


class AdapterHMixin(MethodMixin):
    """AdapterH as a LightningModule's method."""

    settings_class = AdapterHSettings
