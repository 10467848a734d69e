"""AdapterH (Houlsby et al. 2019, arXiv:1902.00751): serial adapters after attention and after the FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lit_peft.methods.attachment import Attachment
from lit_peft.methods.bottleneck import BottleneckSettings
from lit_peft.methods.mixin import MethodMixin
from lit_peft.nn.linear import is_norm


@dataclass(frozen=True)
class AdapterHSettings(BottleneckSettings):
    """Settings of AdapterH: `y + up(act(down(y)))` for the output y of each attention and each FFN (section 2.1).

    An adapter runs before the residual connection and the LayerNorm of its layer. By default the bottleneck is one
    sixteenth of the hidden size, and the activation is swish. Cross-attention only gets an adapter if `cross_adapter`
    is set. With `placement="llm_adapters"` every linear layer of the FFN gets one: on the input of a layer that
    widens, and on the output of any other.

    Args:
        mh_adapter: adapt each self-attention.
        train_layer_norms: also train the model's LayerNorms, as in the paper.
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
        """Add the adapters. If `train_layer_norms` is set, train the norms of the base as well."""
        super().attach_to(model, attachment)
        if self.train_layer_norms:
            inside_adapters = tuple(f"{path}." for path in attachment.adapted)
            for path, module in list(model.named_modules()):
                if is_norm(module) and not path.startswith(inside_adapters):
                    for name, _ in list(module.named_parameters(recurse=False)):
                        attachment.train(f"{path}.{name}")


class AdapterHMixin(MethodMixin):
    """Makes AdapterH the method of a LightningModule."""

    settings_class = AdapterHSettings
