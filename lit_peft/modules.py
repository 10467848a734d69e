"""The LightningModules: one line for each method."""

from __future__ import annotations

from lit_peft.base import BaseLM
from lit_peft.methods.baselines import FullFineTuningMixin, HeadOnlyMixin
from lit_peft.methods.lora import LoRAMixin


class LoRA(LoRAMixin, BaseLM):
    """LoRA: a trained low-rank update beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."""


class FullFineTuning(FullFineTuningMixin, BaseLM):
    """Every parameter is trained: the baseline from above."""


class HeadOnly(HeadOnlyMixin, BaseLM):
    """Only the task's head is trained: the baseline from below."""
