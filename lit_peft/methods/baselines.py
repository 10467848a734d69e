"""The two baselines every method is compared with: training everything, and training the head alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lit_peft.methods.attachment import Attachment, MethodSettings
from lit_peft.methods.mixin import MethodMixin
from lit_peft.nn.quantized import is_quantized
from lit_peft.util.errors import LitPeftError


@dataclass(frozen=True)
class FullFineTuningSettings(MethodSettings):
    """Settings of full fine-tuning: there are none of its own."""

    method: ClassVar[str] = "full_fine_tuning"
    learning_rate: ClassVar[float] = 3e-5

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Train every parameter, where it is: no copy of the base is kept."""
        if any(is_quantized(module) for module in model.modules()):
            raise LitPeftError("A quantized base cannot be trained in full: leave out quantization, or use LoRA.")
        attachment.irreversible = "Full fine-tuning changes the base itself: load the base again instead of detaching."
        for parameter in model.parameters():
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class HeadOnlySettings(MethodSettings):
    """Settings of training the task's head on the frozen model: there are none of its own."""

    method: ClassVar[str] = "head_only"

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Add nothing; a language model, which has no task head, trains its output projection.

        Raises:
            LitPeftError: it is no language model, and `modules_to_save` names no head.
        """
        output = getattr(model, "get_output_embeddings", lambda: None)()
        if output is None and not self.modules_to_save:
            raise LitPeftError(
                f"{type(model).__name__} is no language model, and modules_to_save is not set, so nothing would be "
                "trained: name the head, e.g. modules_to_save=['classifier']."
            )
        for path, module in list(model.named_modules()):
            if output is not None and module is output:
                attachment.train_modules([path])


class FullFineTuningMixin(MethodMixin):
    """Full fine-tuning as a LightningModule's method."""

    settings_class = FullFineTuningSettings

    def attach_method(self, model: nn.Module, head: list[str]) -> None:
        super().attach_method(model, [])


class HeadOnlyMixin(MethodMixin):
    """Training the head alone, as a LightningModule's method."""

    settings_class = HeadOnlySettings
