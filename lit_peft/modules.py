"""The LightningModules: one line for each method."""

from __future__ import annotations

from lit_peft.methods.adapter_h import AdapterHMixin
from lit_peft.methods.adapter_p import AdapterPMixin
from lit_peft.methods.baselines import FullFineTuningMixin, HeadOnlyMixin
from lit_peft.methods.lora import LoRAMixin
from lit_peft.methods.p_tuning import PTuningMixin
from lit_peft.methods.p_tuning_v2 import PTuningV2Mixin
from lit_peft.methods.parallel import ParallelMixin
from lit_peft.methods.prefix_tuning import PrefixTuningMixin
from lit_peft.methods.prompt_tuning import PromptTuningMixin
from lit_peft.training.module import BaseLM


class LoRA(LoRAMixin, BaseLM):
    """LoRA: a trained low-rank update beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."""


class FullFineTuning(FullFineTuningMixin, BaseLM):
    """Every parameter is trained: the baseline from above."""


class HeadOnly(HeadOnlyMixin, BaseLM):
    """Only the task's head is trained: the baseline from below."""


class AdapterH(AdapterHMixin, BaseLM):
    """Bottlenecks after attention and FFN (Houlsby et al. 2019, arXiv:1902.00751)."""


class AdapterP(AdapterPMixin, BaseLM):
    """A bottleneck after the FFN (Pfeiffer et al. 2020, arXiv:2005.00052)."""


class Parallel(ParallelMixin, BaseLM):
    """A bottleneck beside the FFN (He et al. 2021, arXiv:2110.04366)."""


class PromptTuning(PromptTuningMixin, BaseLM):
    """Trained embeddings in front of the input (Lester et al. 2021, arXiv:2104.08691)."""


class PTuning(PTuningMixin, BaseLM):
    """Virtual tokens computed by a bi-LSTM, in front or in a template (Liu et al. 2021, arXiv:2103.10385)."""


class PrefixTuning(PrefixTuningMixin, BaseLM):
    """Trained keys and values at every attention, computed by an MLP (Li and Liang 2021, arXiv:2101.00190)."""


class PTuningV2(PTuningV2Mixin, BaseLM):
    """Trained keys and values at every attention, beside a trained head (Liu et al. 2021, arXiv:2110.07602)."""
