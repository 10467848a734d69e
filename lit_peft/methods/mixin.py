"""The mixin that gives a LightningModule its method: `class LoRA(LoRAMixin, BaseLM)`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar

from torch import nn

from lit_peft.methods.attach import attach
from lit_peft.methods.attachment import MethodSettings


class MethodMixin:
    """Gives a `BaseLM` one method: adds the method's settings to `__init__` and attaches it to the frozen model.

    A subclass only names its settings: `settings_class = LoRASettings`.
    """

    settings_class: ClassVar[type[MethodSettings]]
    settings: MethodSettings

    def attach_method(self, model: nn.Module, head: list[str]) -> None:
        """Attach the method to the frozen model and train the task's head in full.

        Args:
            model: the frozen model.
            head: names of the head's modules and parameters.

        Raises:
            LitPeftError: the settings do not fit the model.
        """
        settings = self.settings
        if head:
            names = list(dict.fromkeys([*(settings.modules_to_save or ()), *head]))
            settings = replace(settings, modules_to_save=names)
        attach(model, settings)

    @classmethod
    def split_settings(cls, values: dict[str, Any]) -> tuple[MethodSettings, dict[str, Any]]:
        """Separate the method's settings from a module's other arguments.

        Args:
            values: all arguments of the module by name.

        Returns:
            The method's settings, and the other arguments.

        Raises:
            LitPeftError: a setting is invalid.
        """
        names = {field.name for field in fields(cls.settings_class)}
        settings = cls.settings_class(**{name: value for name, value in values.items() if name in names})
        return settings, {name: value for name, value in values.items() if name not in names}
