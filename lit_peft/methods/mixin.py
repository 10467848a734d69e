"""What turns a method's settings into a LightningModule: `class LoRA(LoRAMixin, BaseLM)`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar

from torch import nn

from lit_peft.methods.attachment import MethodSettings, attach


class MethodMixin:
    """Gives a `BaseLM` one method: its settings join `__init__`, and it attaches to the frozen model.

    A concrete mixin only names its settings: `settings_class = LoRASettings`.
    """

    settings_class: ClassVar[type[MethodSettings]]
    settings: MethodSettings

    def attach_method(self, model: nn.Module, head: list[str]) -> None:
        """Attach the method to the frozen model; `head` are the task's modules, trained in full beside it."""
        wanted = list(dict.fromkeys([*(self.settings.modules_to_save or ()), *head]))
        attach(model, replace(self.settings, modules_to_save=wanted or None))

    @classmethod
    def split_settings(cls, values: dict[str, Any]) -> tuple[MethodSettings, dict[str, Any]]:
        """Take the method's settings out of all of a module's arguments; return them, and the rest."""
        own = {field.name for field in fields(cls.settings_class)}
        settings = cls.settings_class(**{name: value for name, value in values.items() if name in own})
        return settings, {name: value for name, value in values.items() if name not in own}
