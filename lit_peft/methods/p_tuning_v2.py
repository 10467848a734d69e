"""P-Tuning v2 (Liu et al. 2021, arXiv:2110.07602): trained keys and values at every layer, beside a trained head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lit_peft.methods.mixin import MethodMixin
from lit_peft.methods.prefix import PrefixSettings


@dataclass(frozen=True)
class PTuningV2Settings(PrefixSettings):
    """Settings of P-Tuning v2: `attention(Q, [K_p; K], [V_p; V])`, K_p and V_p trained themselves (section 3.2).

    Made for understanding: the task's head is trained with it (as a LightningModule: by itself; with
    `lit_peft.attach`: name it in `modules_to_save`), and there is no verbalizer.
    """

    method: ClassVar[str] = "p_tuning_v2"
    learning_rate: ClassVar[float] = 5e-3

    num_virtual_tokens: int = 20
    prefix_projection: bool = False


class PTuningV2Mixin(MethodMixin):
    """P-Tuning v2 as a LightningModule's method."""

    settings_class = PTuningV2Settings
