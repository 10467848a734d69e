"""Prefix Tuning (Li and Liang 2021, arXiv:2101.00190): trained keys and values in every attention layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lit_peft.methods.mixin import MethodMixin
from lit_peft.methods.prefix import PrefixSettings


@dataclass(frozen=True)
class PrefixTuningSettings(PrefixSettings):
    """Settings of Prefix Tuning: `attention(Q, [K_p; K], [V_p; V])`, `(K_p, V_p) = MLP(P)` (sections 4.2 and 4.3).

    P is a trained table with one row for each virtual token. The MLP maps the hidden size to `prefix_projection_size`
    and, after tanh, to the keys and values of all layers. Outside training its output is computed once and reused;
    adapter folders hold the output instead of the MLP.
    """

    method: ClassVar[str] = "prefix_tuning"

    num_virtual_tokens: int = 30
    prefix_projection: bool = True


class PrefixTuningMixin(MethodMixin):
    """Makes Prefix Tuning the method of a LightningModule."""

    settings_class = PrefixTuningSettings
