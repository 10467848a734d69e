"""The two baselines that every method is compared with: training all parameters, and training only the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lit_peft.methods.attachment import Attachment, MethodSettings
from lit_peft.methods.mixin import MethodMixin
from lit_peft.methods.trained_modules import train_modules
from lit_peft.nn.quantized import is_quantized
from lit_peft.util.errors import LitPeftError


@dataclass(frozen=True)
class FullFineTuningSettings(MethodSettings):
    """Settings of full fine-tuning, which has none but those of `MethodSettings`."""

    method: ClassVar[str] = "full_fine_tuning"
    learning_rate: ClassVar[float] = 3e-5

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Train every parameter in place. No copy of the base is kept, so the method cannot be detached.

        Args:
            model: the frozen model.
            attachment: records that the method cannot be detached.

        Raises:
            LitPeftError: the base is quantized.
        """
        if any(is_quantized(module) for module in model.modules()):
            raise LitPeftError("A quantized base cannot be trained in full: load it without quantization, or use LoRA.")
        attachment.irreversible = "Full fine-tuning changes the base itself: load the base again instead of detaching."
        for parameter in model.parameters():
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class HeadOnlySettings(MethodSettings):
    """Settings of training only the task's head, which has none but those of `MethodSettings`."""

    method: ClassVar[str] = "head_only"

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Train the output projection of a language model. Other models train what `modules_to_save` names.

        Args:
            model: the frozen model.
            attachment: makes and records the changes.

        Raises:
            LitPeftError: the model is not a language model, and `modules_to_save` names no head.
        """
        output = getattr(model, "get_output_embeddings", lambda: None)()
        if output is None and not self.modules_to_save:
            raise LitPeftError(
                f"{type(model).__name__} is not a language model and modules_to_save is not set, so nothing would be "
                "trained: name the head, e.g. modules_to_save=['classifier']."
            )
        for path, module in list(model.named_modules()):
            if output is not None and module is output:
                train_modules(attachment, [path])


class FullFineTuningMixin(MethodMixin):
    """Makes full fine-tuning the method of a LightningModule."""

    settings_class = FullFineTuningSettings

    def attach_method(self, model: nn.Module, head: list[str]) -> None:
        """Attach the method. The head needs no mention, because every parameter is trained."""
        super().attach_method(model, [])


class HeadOnlyMixin(MethodMixin):
    """Makes training only the head the method of a LightningModule."""

    settings_class = HeadOnlySettings
