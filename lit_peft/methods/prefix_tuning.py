"""Prefix Tuning (Li and Liang 2021, arXiv:2101.00190): trained keys and values in front of every attention layer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lit_peft.methods.mixin import MethodMixin
from lit_peft.methods.prefix import PrefixSettings


@dataclass(frozen=True)
class PrefixTuningSettings(PrefixSettings):
    """Settings of Prefix Tuning: `attention(Q, [K_p; K], [V_p; V])`, `(K_p, V_p) = MLP(P)` (sections 4.2 and 4.3).

    P is a trained table, one row for each virtual token. The MLP (hidden size → `prefix_projection_size` → all
    layers' keys and values, tanh) is folded away in adapter folders and outside training.
    """

    method: ClassVar[str] = "prefix_tuning"

    num_virtual_tokens: int = 30
    prefix_projection: bool = True


class PrefixTuningMixin(MethodMixin):
    """Prefix Tuning as a LightningModule's method."""

    settings_class = PrefixTuningSettings
