"""A module whose precision does not round what must stay precise."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_peft.methods.adapter_dtype import cast_in_forward
from lit_peft.methods.attachment import attachment_or_none
from lit_peft.nn.torch_internals import computed_buffers
from lit_peft.training.lightning_internals import DtypeKeepingModule


class PreciseModule(DtypeKeepingModule):
    """Keeps the trained parameters and computed buffers of its `model` when it is cast, e.g. by `bf16-true`."""

    model: Any
    hparams: Any

    def parameters_not_rounded(self) -> list[nn.Parameter]:
        """Return the trained parameters, unless all are trained and no `adapter_dtype` was given."""
        parameters = [] if self.model is None else list(self.model.parameters())
        if self.hparams.adapter_dtype is None and all(p.requires_grad for p in parameters if p.is_floating_point()):
            return []
        return [parameter for parameter in parameters if parameter.requires_grad]

    def buffers_not_rounded(self) -> list[tuple[nn.Module, str]]:
        """Return the buffers that transformers computes, such as rotary frequencies, which it does not round either."""
        return [] if self.model is None else computed_buffers(self.model)

    def after_cast(self) -> None:
        """Let modules of the base with a trained parameter cast it to the base's type in each forward."""
        attachment = attachment_or_none(self.model)
        if attachment is not None:
            cast_in_forward(attachment)
