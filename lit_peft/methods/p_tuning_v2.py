"""P-Tuning v2 (Liu et al. 2021, arXiv:2110.07602): trained keys and values at every layer, and a trained head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lit_peft.methods.mixin import MethodMixin
from lit_peft.methods.prefix import PrefixSettings


@dataclass(frozen=True)
class PTuningV2Settings(PrefixSettings):
    """Settings of P-Tuning v2: `attention(Q, [K_p; K], [V_p; V])` with K_p and V_p trained directly (section 3.2).

    The method is meant for language understanding and trains the task's head instead of using a verbalizer. The
    LightningModule does so automatically; with `lit_peft.attach`, name the head in `modules_to_save`.
    """

    method: ClassVar[str] = "p_tuning_v2"
    learning_rate: ClassVar[float] = 5e-3

    num_virtual_tokens: int = 20
    prefix_projection: bool = False


class PTuningV2Mixin(MethodMixin):
    """Makes P-Tuning v2 the method of a LightningModule."""

    settings_class = PTuningV2Settings
