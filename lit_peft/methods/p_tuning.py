"""P-Tuning (Liu et al. 2021, arXiv:2103.10385): settings, and the network that computes the virtual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lit_peft.methods.mixin import MethodMixin
from lit_peft.methods.soft_prompt import SoftPromptSettings
from lit_peft.nn.prompt import PromptEncoder, Reparameterization
from lit_peft.util.errors import LitPeftError


@dataclass(frozen=True)
class PTuningSettings(SoftPromptSettings):
    """Settings of P-Tuning: virtual tokens computed by a bi-LSTM and an MLP from v trained anchors (section 3.2).

    They stand in front of the input, or in a template, where `prompt_token_id` marks their places. The network is run
    once for each forward pass, in evaluation once at all, and only its result is saved in peft's format.

    Args:
        encoder_reparameterization_type: `LSTM`, followed by an MLP, or `MLP` alone.
        encoder_hidden_size: hidden size of the network; half of the embeddings' size when None.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: dropout between the LSTM's layers.
    """

    method: ClassVar[str] = "p_tuning"
    learning_rate: ClassVar[float] = 1e-3
    encoder_reparameterization_type: Reparameterization = "LSTM"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_reparameterization_type not in ("LSTM", "MLP"):
            raise LitPeftError(
                f"encoder_reparameterization_type={self.encoder_reparameterization_type!r} is not known: use 'LSTM' or "
                "'MLP'."
            )
        if self.encoder_hidden_size is not None and self.encoder_hidden_size <= 0:
            raise LitPeftError(f"encoder_hidden_size={self.encoder_hidden_size}: give a positive number, e.g. 128.")
        if self.encoder_num_layers <= 0:
            raise LitPeftError(f"encoder_num_layers={self.encoder_num_layers}: give a positive number, e.g. 2.")
        if not 0 <= self.encoder_dropout < 1:
            raise LitPeftError(f"encoder_dropout={self.encoder_dropout}: give a probability below 1, e.g. 0.1.")
        mlp = self.encoder_reparameterization_type == "MLP"
        if mlp and self.encoder_num_layers != 2:
            raise LitPeftError(
                f"encoder_num_layers={self.encoder_num_layers} has no effect on the MLP, which always has its three "
                "layers: leave it out, or use encoder_reparameterization_type='LSTM'."
            )
        if self.encoder_dropout and (mlp or self.encoder_num_layers == 1):
            raise LitPeftError(
                f"encoder_dropout={self.encoder_dropout} acts between the layers of an LSTM, and there is "
                f"{'no LSTM' if mlp else 'one layer alone'}: leave it out, or use an LSTM of two layers."
            )

    def make_prompt(self, model: nn.Module, embeddings: nn.Module) -> PromptEncoder:
        """The network, at its start, in single precision."""
        weight: Any = embeddings.weight
        dim = weight.shape[1]
        return PromptEncoder(
            self.rows,
            dim,
            self.encoder_hidden_size or max(1, dim // 2),
            self.encoder_num_layers,
            self.encoder_dropout,
            self.encoder_reparameterization_type,
            device=weight.device,
            dtype=torch.float32,
        )


class PTuningMixin(MethodMixin):
    """P-Tuning as a LightningModule's method."""

    settings_class = PTuningSettings
