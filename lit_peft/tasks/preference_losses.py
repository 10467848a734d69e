"""The losses of preference tuning: functions of the log-probabilities of whole answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_peft.util.errors import LitPeftError, closest


@dataclass(frozen=True)
class LossSettings:
    """The settings of a loss; see `Preference`."""

    loss_type: str = "sigmoid"
    beta: float | None = None
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    rpo_alpha: float = 0.0
    sft_on_prompt: bool = False
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        kind = self.loss_type
        if kind not in LOSS_TYPES:
            raise LitPeftError(
                f"task_args: loss_type={kind!r} is not known: use {closest(kind, LOSS_TYPES, n=len(LOSS_TYPES))}."
            )
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            users = _USERS.get(name, LOSS_TYPES)
            if value != setting.default and kind not in users:
                raise LitPeftError(
                    f"task_args: {name}={value} has no effect with loss_type={kind!r}: leave it out, or use "
                    f"{closest(kind, users, n=len(users))}."
                )
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise LitPeftError(f"task_args: beta={self.beta}: give a positive number, e.g. 0.1.")
        most = 0.5 if kind == "robust" else 1.0
        least_is_zero = kind != "exo_pair"
        if not (0 if least_is_zero else 1e-12) <= self.label_smoothing < most:
            raise LitPeftError(
                f"task_args: label_smoothing={self.label_smoothing}: give a number of at least 0 and below {most}, the "
                f"share of the pairs whose answers are swapped{'' if least_is_zero else '; exo_pair needs it above 0'}."
            )
        for name in ("simpo_gamma", "rpo_alpha", "desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LitPeftError(f"task_args: {name}={getattr(self, name)}: give a number of at least 0.")

    @property
    def strength(self) -> float:
        """`beta`, or its usual value."""
        if self.beta is not None:
            return self.beta
        return 2.0 if self.loss_type == "simpo" else 0.1

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the model with the reference."""
        return self.loss_type not in ("simpo", "orpo")

    @property
    def is_unpaired(self) -> bool:
        """Whether the loss takes single answers with a label."""
        return self.loss_type == "kto"

    @property
    def averages(self) -> bool:
        """Whether the reward of an answer is that of its mean token."""
        return self.loss_type in ("simpo", "orpo")


@dataclass(frozen=True)
class Pairs:
    """Both answers of each pair: log-probabilities, with the model and the reference, and numbers of tokens.

    Every tensor has the shape (pairs,). Without a reference, its values are zero.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """log π(y|x) − log π_ref(y|x) of the chosen and of the rejected answers."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The same, divided by the number of tokens."""
        chosen, rejected = self.ratios
        return chosen / self.chosen_tokens.clamp(min=1), rejected / self.rejected_tokens.clamp(min=1)


def _sigmoid(pairs: Pairs, settings: LossSettings) -> Tensor:
    """Equation 7 of DPO (https://arxiv.org/abs/2305.18290), and with label smoothing that of its note on noisy labels
    (https://ericmitchell.ai/cdpo.pdf)."""
    chosen, rejected = pairs.ratios
    return _smoothed(settings.strength * (chosen - rejected), settings.label_smoothing)


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def _hinge(pairs: Pairs, settings: LossSettings) -> Tensor:
    """SLiC's hinge on the margin (https://arxiv.org/abs/2305.10425)."""
    chosen, rejected = pairs.ratios
    return torch.relu(1 - settings.strength * (chosen - rejected))


def _ipo(pairs: Pairs, settings: LossSettings) -> Tensor:
    """Equation 17 of IPO (https://arxiv.org/abs/2310.12036), with the mean over tokens, as its authors compute it."""
    chosen, rejected = pairs.means
    return (chosen - rejected - 1 / (2 * settings.strength)).square()


def _robust(pairs: Pairs, settings: LossSettings) -> Tensor:
    """The unbiased loss of robust DPO (https://arxiv.org/abs/2403.00409, section 3.2)."""
    chosen, rejected = pairs.ratios
    margin, swapped = settings.strength * (chosen - rejected), settings.label_smoothing
    return ((1 - swapped) * -logsigmoid(margin) + swapped * logsigmoid(-margin)) / (1 - 2 * swapped)


def _exo_pair(pairs: Pairs, settings: LossSettings) -> Tensor:
    """Equation 16 of EXO (https://arxiv.org/abs/2402.00856)."""
    chosen, rejected = pairs.ratios
    margin, swapped = settings.strength * (chosen - rejected), settings.label_smoothing
    right, wrong = logsigmoid(margin), logsigmoid(-margin)
    return right.exp() * (right - math.log1p(-swapped)) + wrong.exp() * (wrong - math.log(swapped))


def _nca_pair(pairs: Pairs, settings: LossSettings) -> Tensor:
    """NCA for pairs (https://arxiv.org/abs/2402.05369)."""
    chosen, rejected = (settings.strength * ratio for ratio in pairs.ratios)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _sppo_hard(pairs: Pairs, settings: LossSettings) -> Tensor:
    """Equation 4.7 of SPPO (https://arxiv.org/abs/2405.00675), where the chosen answer always wins."""
    chosen, rejected = pairs.ratios
    half = 0.5 / settings.strength
    return (chosen - half).square() + (rejected + half).square()


def _apo_zero(pairs: Pairs, settings: LossSettings) -> Tensor:
    """APO-zero (https://arxiv.org/abs/2408.06266): chosen answers are better than those of the model."""
    chosen, rejected = pairs.ratios
    return torch.sigmoid(-settings.strength * chosen) + torch.sigmoid(settings.strength * rejected)


def _apo_down(pairs: Pairs, settings: LossSettings) -> Tensor:
    """APO-down (https://arxiv.org/abs/2408.06266): chosen answers are worse than those of the model."""
    chosen, rejected = pairs.ratios
    return torch.sigmoid(settings.strength * chosen) + torch.sigmoid(-settings.strength * (chosen - rejected))


def _sigmoid_norm(pairs: Pairs, settings: LossSettings) -> Tensor:
    """DPO with the mean over tokens (https://arxiv.org/abs/2411.15124, section 5.1)."""
    chosen, rejected = pairs.means
    return -logsigmoid(settings.strength * (chosen - rejected))


def _simpo(pairs: Pairs, settings: LossSettings) -> Tensor:
    """Equation 6 of SimPO (https://arxiv.org/abs/2405.14734)."""
    chosen, rejected = pairs.means
    return _smoothed(settings.strength * (chosen - rejected) - settings.simpo_gamma, settings.label_smoothing)


def _orpo(pairs: Pairs, settings: LossSettings) -> Tensor:
    """The odds ratio term of ORPO (https://arxiv.org/abs/2403.07691, equation 7)."""
    chosen, rejected = pairs.means
    odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return -settings.strength * logsigmoid(odds)


def _log1mexp(value: Tensor) -> Tensor:
    """Return log(1 − exp(value)) of negative numbers; those that are almost 0 give a finite result."""
    value = value.clamp(max=-torch.finfo(value.dtype).eps)
    # Two forms, of which each is precise where the other is not.
    near = torch.log(-torch.expm1(value.clamp(min=-math.log(2))))
    return torch.where(value > -math.log(2), near, torch.log1p(-torch.exp(value)))


PAIR_LOSSES: dict[str, Callable[[Pairs, LossSettings], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "sigmoid_norm": _sigmoid_norm,
    "simpo": _simpo,
    "orpo": _orpo,
}
"""The loss of each pair by the name of the loss, shape (pairs,)."""
LOSS_TYPES = (*PAIR_LOSSES, "kto")
# The losses that a setting has an effect on; one that is not here has an effect on all.
_USERS: dict[str, tuple[str, ...]] = {
    "label_smoothing": ("sigmoid", "robust", "exo_pair", "simpo"),
    "simpo_gamma": ("simpo",),
    "rpo_alpha": tuple(name for name in PAIR_LOSSES if name != "orpo"),
    "sft_on_prompt": ("orpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


def kto_losses(ratios: Tensor, kl: Tensor, desirable: Tensor, settings: LossSettings) -> Tensor:
    """Return the loss of each answer, equation 7 of KTO (https://arxiv.org/abs/2402.01306).

    Args:
        ratios: log π(y|x) − log π_ref(y|x), shape (answers,).
        kl: the estimate of the divergence from the reference, a scalar without a gradient.
        desirable: whether an answer is a good one, shape (answers,).
        settings: the settings.
    """
    good = settings.desirable_weight * (1 - torch.sigmoid(settings.strength * (ratios - kl)))
    bad = settings.undesirable_weight * (1 - torch.sigmoid(settings.strength * (kl - ratios)))
    return torch.where(desirable, good, bad)
