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
    """Settings of P-Tuning: a bi-LSTM and an MLP compute virtual tokens from v trained embeddings (section 3.2).

    The virtual tokens precede the input, or take the places of `prompt_token_id` in a template. The network runs once
    in each training step and only once in evaluation. peft's format saves its output instead of its weights.

    Args:
        encoder_reparameterization_type: `LSTM` for an LSTM followed by an MLP, or `MLP` for an MLP only.
        encoder_hidden_size: hidden size of the network. None selects half the size of the embeddings.
        encoder_num_layers: number of LSTM layers.
        encoder_dropout: dropout probability between LSTM layers.

    Raises:
        LitPeftError: a setting is invalid or has no effect.
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
                f"encoder_num_layers={self.encoder_num_layers} has no effect on the MLP, which always has three "
                "layers: leave it out, or use encoder_reparameterization_type='LSTM'."
            )
        if self.encoder_dropout and (mlp or self.encoder_num_layers == 1):
            raise LitPeftError(
                f"encoder_dropout={self.encoder_dropout} applies between LSTM layers, but there is "
                f"{'no LSTM' if mlp else 'only one layer'}: leave it out, or use an LSTM with at least two layers."
            )

    def make_prompt(self, model: nn.Module, embeddings: nn.Module) -> PromptEncoder:
        """Build the network with initial weights in fp32.

        Args:
            model: the frozen model.
            embeddings: its input embeddings, with a weight of shape (vocabulary, hidden size).

        Returns:
            The network, which computes embeddings of shape (`rows`, hidden size).
        """
        weight: Any = embeddings.weight
        hidden_size = weight.shape[1]
        return PromptEncoder(
            self.rows,
            hidden_size,
            self.encoder_hidden_size or max(1, hidden_size // 2),
            self.encoder_num_layers,
            self.encoder_dropout,
            self.encoder_reparameterization_type,
            device=weight.device,
            dtype=torch.float32,
        )


class PTuningMixin(MethodMixin):
    """Makes P-Tuning the method of a LightningModule."""

    settings_class = PTuningSettings
