"""Score texts so that the better one of two has the higher score."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_peft.tasks.base import Batch, Float32Metric, Generation, Mean, Metrics, Task
from lit_peft.tasks.label_weights import run_without_labels
from lit_peft.util.errors import LitPeftError


class RewardDeviation(Float32Metric):
    """The standard deviation of the rewards of all texts, over all batches and processes."""

    full_state_update = False
    rewards: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rewards", [], dist_reduce_fx="cat")

    def update(self, rewards: Tensor) -> None:
        """Add the rewards of a batch of texts, of any shape."""
        self.rewards.append(rewards.flatten().to(self.dtype))

    def compute(self) -> Tensor:
        return self.or_nan(dim_zero_cat(self.rewards).std(correction=0))


class Reward(Task):
    """A reward model: a head with one output scores a text, and the chosen one of a pair is to score higher.

    Batches: `input_ids`, `attention_mask` [2 * pairs, length], the chosen texts first, then the rejected ones in the
    same order; `margin` [pairs], if the data has margins. The loss is that of Bradley and Terry: -log sigmoid(r_chosen
    - r_rejected - margin), the mean over pairs (Llama 2, arXiv:2307.09288, section 3.2.2).

    Metrics: `loss`; `accuracy`, the share of pairs whose chosen text scores higher; `margin`, the mean of r_chosen -
    r_rejected; `reward_mean` and `reward_std` over all texts. Prediction returns the `reward`
    of each text; of pairs, whose batches have `paired`, a list with an entry per pair, `chosen_reward` and
    `rejected_reward`.

    Args:
        center_rewards_coefficient: weight of a term that keeps the rewards around zero: the mean over pairs of
            (r_chosen + r_rejected)^2 (arXiv:2312.09244); usually 0.01. The loss alone fixes only differences. Unset: no
            such term.
    """

    name = "reward"
    auto_class = "AutoModelForSequenceClassification"
    heads = ("classifier", "score", "pre_classifier", "classification_head", "head")
    extras = ("margin", "paired")
    monitor = ("val_accuracy", "max")

    def __init__(self, center_rewards_coefficient: float | None = None) -> None:
        if center_rewards_coefficient is not None and not 0 < center_rewards_coefficient < math.inf:
            raise LitPeftError(
                f"task_args: center_rewards_coefficient={center_rewards_coefficient}: give a positive number, e.g. "
                "0.01, or leave it out."
            )
        self.center = center_rewards_coefficient

    def model_class(self, config: Any) -> Any:
        """Return the classification class, with one output."""
        config.num_labels = 1
        return super().model_class(config)

    def run(self, model: Any, batch: Batch) -> Any:
        """Call the model on a batch without its extras; nothing is generated, so a decoder needs no cache."""
        return run_without_labels(model, batch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the mean loss over the pairs of a batch, a scalar, computed in float32 at least."""
        logits = output.logits.squeeze(-1)
        rewards = logits if logits.dtype == torch.float64 else logits.float()
        chosen, rejected = rewards.chunk(2)
        difference = chosen - rejected
        if "margin" in batch:
            difference = difference - batch["margin"]
        loss = -logsigmoid(difference).mean()
        return loss if self.center is None else loss + self.center * (chosen + rejected).square().mean()

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["input_ids"]) // 2)

    def metrics(self, config: Any) -> dict[str, Metric]:
        means = {name: Mean() for name in ("loss", "accuracy", "margin", "reward_mean")}
        return {**means, "reward_std": RewardDeviation()}

    def update(self, metrics: Metrics, output: Any, batch: Batch) -> None:
        super().update(metrics, output, batch)
        rewards = output.logits.squeeze(-1).float()
        chosen, rejected = rewards.chunk(2)
        metrics["accuracy"].update((chosen > rejected).float())
        metrics["margin"].update(chosen - rejected)
        metrics["reward_mean"].update(rewards)
        metrics["reward_std"].update(rewards)

    def predict(self, model: Any, batch: Batch, generation: Generation) -> list[dict[str, Any]]:
        rewards = self.forward(model, batch).logits.squeeze(-1).float()
        if "paired" not in batch:
            return [{"reward": reward} for reward in rewards.tolist()]
        pairs = zip(*(part.tolist() for part in rewards.chunk(2)), strict=True)
        return [{"chosen_reward": chosen, "rejected_reward": rejected} for chosen, rejected in pairs]
