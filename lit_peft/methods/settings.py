"""The settings that all methods share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from lit_peft.util.type_checks import check_types

if TYPE_CHECKING:
    from lit_peft.methods.attachment import Attachment


@dataclass(frozen=True)
class MethodSettings:
    """The settings that all methods share.

    Args:
        modules_to_save: names of modules to train in full and to save with the adapter, e.g. a classification head.
            A full parameter name selects a single parameter.
        trainable_token_indices: token ids whose embeddings are trained, as in peft; rows that the base lacks are added.
            A list for the input embeddings (and a head that shares their weight), or lists by the names of modules.

    Raises:
        LitPeftError: a value does not have the type of its field.
    """

    method: ClassVar[str] = ""
    # The usual learning rate of the method, for runs that set none.
    learning_rate: ClassVar[float] = 1e-3
    # Whether a row may hold several examples: the method treats each token alike.
    packs: ClassVar[bool] = True
    # Whether its adapters can be stacked, see `Stack`.
    stacks: ClassVar[bool] = False
    modules_to_save: tuple[str, ...] | list[str] | None = field(default=None, kw_only=True)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Add the method to a model. Every change must go through `attachment`, which can undo it.

        Args:
            model: the frozen model.
            attachment: makes and records the changes.

        Raises:
            LitPeftError: the settings do not fit the model.
        """
        raise NotImplementedError

    def learning_rate_factor(self, name: str) -> float:
        """Return the factor on the learning rate for one parameter.

        Args:
            name: the parameter's name in the model.

        Returns:
            The factor; 1 unless the method has different learning rates.
        """
        return 1.0
