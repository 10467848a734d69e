"""Every method, one line each: a new one is its module in `lit_peft.methods` and its line here.

From this table come the LightningModules, the names that `lit_peft` exports, the choices on the command line and in
comparisons, the type stubs, and the tables of the documentation. Importing it imports no method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_peft.methods.attachment import MethodSettings
    from lit_peft.methods.mixin import MethodMixin


@dataclass(frozen=True)
class Method:
    """Where a method is defined.

    Args:
        module: its module in `lit_peft.methods`, which has a class `NAMESettings` and, if needed, `NAMEMixin`.
        summary: what it trains, and where it was published: one line.
        baseline: whether it is a baseline to compare with, and no method of parameter-efficient fine-tuning.
    """

    module: str
    summary: str
    baseline: bool = False


METHODS: dict[str, Method] = {
    "FullFineTuning": Method("baselines", "Every parameter is trained: the upper baseline.", baseline=True),
    "HeadOnly": Method("baselines", "Only the task head is trained: the lower baseline.", baseline=True),
    "LoRA": Method("lora", "A low-rank update beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."),
    "IA3": Method("ia3", "Vectors that scale keys, values and FFNs (Liu et al. 2022, arXiv:2205.05638)."),
    "AdapterH": Method("adapter_h", "Bottlenecks after attention and FFN (Houlsby et al. 2019, arXiv:1902.00751)."),
    "AdapterP": Method("adapter_p", "A bottleneck after the FFN (Pfeiffer et al. 2020, arXiv:2005.00052)."),
    "Parallel": Method("parallel", "A bottleneck in parallel to the FFN (He et al. 2021, arXiv:2110.04366)."),
    "PrefixTuning": Method("prefix_tuning", "Keys and values computed by an MLP (Li, Liang 2021, arXiv:2101.00190)."),
    "PTuningV2": Method("p_tuning_v2", "Keys and values in every attention layer (Liu et al. 2021, arXiv:2110.07602)."),
    "PTuning": Method("p_tuning", "Virtual tokens computed by a bi-LSTM (Liu et al. 2021, arXiv:2103.10385)."),
    "PromptTuning": Method("prompt_tuning", "Embeddings before the input (Lester et al. 2021, arXiv:2104.08691)."),
}


def settings_class(name: str) -> type[MethodSettings]:
    """The settings of a registered method, by its name in `METHODS`."""
    found: type[MethodSettings] = getattr(_module(name), f"{name}Settings")
    return found


def mixin_class(name: str) -> type[MethodMixin]:
    """The mixin of a registered method: its own where it has one, else one that only names its settings."""
    from lit_peft.methods.mixin import MethodMixin

    own: type[MethodMixin] | None = getattr(_module(name), f"{name}Mixin", None)
    return own or type(f"{name}Mixin", (MethodMixin,), {"settings_class": settings_class(name)})


def all_settings() -> Iterator[type[MethodSettings]]:
    """The settings of every registered method, and of every other method that has been imported."""
    from lit_peft.methods.attachment import MethodSettings

    for name in METHODS:
        settings_class(name)
    pending = [MethodSettings]
    while pending:
        children = pending.pop().__subclasses__()
        pending += children
        yield from children


def _module(name: str) -> object:
    return import_module(f"lit_peft.methods.{METHODS[name].module}")
