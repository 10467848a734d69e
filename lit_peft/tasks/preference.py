"""Prefer some answers to others: DPO and its relatives, SimPO, ORPO and KTO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_peft.methods.attachment import MethodSettings
from lit_peft.methods.baselines import FullFineTuningSettings
from lit_peft.tasks.base import Batch, Float32Metric, Generation, Mean, Metrics
from lit_peft.tasks.causal_lm import CausalLM
from lit_peft.tasks.packed import packed_inputs
from lit_peft.tasks.preference_losses import PAIR_LOSSES, LossSettings, Pairs, kto_losses
from lit_peft.tasks.reference import ReferenceTable, reference_model
from lit_peft.tasks.supervised_loss import SupervisedLoss
from lit_peft.util.errors import LitPeftError

# The name that the inputs of KTO's mismatched answers start with.
_OTHER = "kl_"
_OWN = ("key", "input_ids", "attention_mask", "labels")
# How the rows are joined, if they are; see `lit_peft.data.packing.packed_layout`.
_LAYOUT = ("packed_index", "packed_positions")


class MeanDifference(Float32Metric, Metric):
    """The mean of the values of one group minus that of the other; NaN while a group is empty."""

    totals: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(2), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, values: Tensor, in_first: Tensor) -> None:
        """Add values, shape (n,), and whether each belongs to the first group."""
        for group, members in enumerate((in_first, ~in_first)):
            self.totals[group] += torch.where(members, values.float(), 0.0).sum()
            self.counts[group] += members.sum()

    def compute(self) -> Tensor:
        """Return the difference."""
        means = self.totals / self.counts
        return means[0] - means[1]


class Preference(CausalLM):
    """Raise the probability of good answers over that of bad ones, relative to a reference: the base without adapter.

    Batches of pairs: `input_ids`, `attention_mask` and `labels` [2 · pairs, length], first the chosen answers with
    their prompts, then the rejected ones; labels are -100 outside of the answers. Batches of single answers, for
    `kto`: the same with one row for each answer, `desirable` [answers], bool, and `kl_input_ids`, `kl_attention_mask`
    and `kl_labels`: the prompts with answers to other prompts, on which the divergence is estimated. With
    `packed_index` and `packed_positions` (`PreferenceData.padding_free`) a causal LM runs on the rows joined as these
    say. The model is a causal LM or an encoder-decoder, whose `labels` are the answers alone.

    The reward of an answer is beta · (log π(y|x) − log π_ref(y|x)); with `simpo` and `orpo`, which run no reference, it
    is beta times the mean log-probability of its tokens. The reference runs in evaluation mode.

    Metrics: `loss`; `accuracy`, the share of pairs whose chosen answer has the higher reward (`kto`: of answers whose
    reward is on the right side of beta · kl); `margin`, `rewards_chosen` and `rewards_rejected`; `logps_chosen` and
    `logps_rejected`, of whole answers (`simpo`, `orpo`: of their mean token); `kl` to the reference: for pairs, the sum
    over an answer's tokens of ½ (log π − log π_ref)², which is the divergence to second order, on tokens that the model
    did not choose itself; for `kto`, the mean of log π(y|x) − log π_ref(y|x) over the mismatched answers, at least 0.
    Prediction returns the rewards and log-probabilities of each row's answers.

    Args:
        loss_type: for pairs `sigmoid` (DPO), `hinge`, `ipo`, `robust`, `exo_pair`, `nca_pair`, `sppo_hard`, `apo_zero`,
            `apo_down`, `sigmoid_norm`, or without a reference `simpo` or `orpo`; `kto` for single answers.
        beta: how much a change of the probabilities counts, so that a larger one keeps the model closer to the
            reference; 0.1 if unset, and 2.0 for `simpo`.
        label_smoothing: share of the pairs whose answers are assumed to be swapped, for `sigmoid`, `robust`, `exo_pair`
            and `simpo`.
        simpo_gamma: the margin that `simpo` asks for.
        rpo_alpha: weight of the negative log-likelihood of the chosen answers, the mean over their tokens, in addition.
        sft_on_prompt: the likelihood term of `orpo` covers the prompts too.
        desirable_weight: weight of the losses of good answers, for `kto`.
        undesirable_weight: weight of the losses of bad answers, for `kto`.
        precompute_reference: compute the reference's log-probabilities before the run, once, and keep them in the
            cache; each step is then as fast as one of supervised tuning. For `FullFineTuning`, which has no other
            reference, the base is loaded for it. Not for a stream.

    Raises:
        LitPeftError: a setting is out of range, or has no effect.
    """

    name = "preference"
    packs = False
    generates = False
    extras = ("desirable", "key", *_LAYOUT, *(f"{_OTHER}{name}" for name in (*_OWN, *_LAYOUT)))
    monitor = ("val_accuracy", "max")

    def __init__(
        self,
        loss_type: str = "sigmoid",
        beta: float | None = None,
        label_smoothing: float = 0.0,
        simpo_gamma: float = 0.5,
        rpo_alpha: float = 0.0,
        sft_on_prompt: bool = False,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        precompute_reference: bool = False,
    ) -> None:
        super().__init__()
        self.settings = LossSettings(
            loss_type,
            beta,
            label_smoothing,
            simpo_gamma,
            rpo_alpha,
            sft_on_prompt,
            desirable_weight,
            undesirable_weight,
        )
        if precompute_reference and not self.settings.needs_reference:
            raise LitPeftError(
                f"task_args: precompute_reference is set, but loss_type={loss_type!r} has no reference: leave it out."
            )
        self.precompute_reference = precompute_reference
        # The precomputed log-probabilities of the reference.
        self.table = ReferenceTable()

    @property
    def compares_with_base(self) -> bool:
        """Whether the loss compares the model with the base without its adapter."""
        return self.settings.needs_reference

    def model_class(self, config: Any) -> Any:
        """Return the class of a causal LM or, for an encoder-decoder, of a sequence-to-sequence model."""
        if not getattr(config, "is_encoder_decoder", False):
            return super().model_class(config)
        import transformers

        return transformers.AutoModelForSeq2SeqLM

    def check_method(self, settings: MethodSettings) -> None:
        needed = self.settings.needs_reference and not self.precompute_reference
        if needed and isinstance(settings, FullFineTuningSettings):
            raise LitPeftError(
                f"task_args: loss_type={self.settings.loss_type!r} compares the model with the base, which "
                "FullFineTuning changes: set precompute_reference: true, use a loss without a reference (simpo, orpo), "
                "or use LoRA or another method that leaves the base as it is."
            )

    def check_data(self, data: Any) -> None:
        """Refuse data of the other kind: single answers for a loss on pairs, or pairs for KTO; or a stream.

        Raises:
            LitPeftError: names the loss and the fix.
        """
        if self.precompute_reference and getattr(data, "streaming", False):
            raise LitPeftError(
                "precompute_reference is set, but data.streaming reads the rows during training: leave one of them out."
            )
        unpaired = getattr(data, "is_unpaired", None)
        if unpaired is not None and unpaired != self.settings.is_unpaired:
            raise LitPeftError(self._wrong_rows(unpaired))

    def _wrong_rows(self, unpaired: bool) -> str:
        if unpaired:
            return (
                f"task_args: loss_type={self.settings.loss_type!r} needs pairs of a chosen and a rejected answer, and "
                "the data has single answers with a label: use loss_type: kto."
            )
        return (
            "task_args: loss_type='kto' needs single answers with a label, and the data has pairs: set data.unpair: "
            "true to take each answer by itself, or use another loss_type, e.g. sigmoid."
        )

    # ------------------------------------------------------------------------------------------- the model

    def forward(self, model: Any, batch: Batch) -> Any:
        """Run the model and the reference on a batch.

        Returns:
            `loss`; `losses`, one for each pair or answer; `log_probs` and `ref_log_probs` of the tokens, [rows,
            length], 0 outside of the answers; `rewards`, `logps` [rows]; and `kl`, None without a reference.

        Raises:
            LitPeftError: the batch has rows of the other kind, or the reference was not computed for them.
        """
        return self._compare(model, batch)

    def _compare(self, model: Any, batch: Batch, with_loss: bool = True) -> Any:
        """As `forward`; without the loss and KTO's divergence, processes need not have equally many batches."""
        settings, labels = self.settings, batch["labels"]
        if ("desirable" in batch) != settings.is_unpaired:
            raise LitPeftError(self._wrong_rows("desirable" in batch))
        first = 0 if model.config.is_encoder_decoder else 1  # the first token of a text is not predicted
        inputs, *others = _parts(batch)
        batch = batch if with_loss else dict(inputs)
        # Before the model, whose activations then need not be there at the same time.
        ref, *ref_others = self._reference(model, batch)
        if settings.sft_on_prompt:
            inputs["labels"] = self._with_prompts(model, batch)
        output, every = self._log_probs(model, inputs)
        log_probs = torch.where(labels != -100, every, 0.0)
        found = SimpleNamespace(log_probs=log_probs, ref_log_probs=ref, kl=None)
        tokens, sums = (labels[:, first:] != -100).sum(1), log_probs.sum(1)
        ref_sums = torch.zeros_like(sums) if ref is None else ref.sum(1).to(sums)
        found.logps = sums / tokens.clamp(min=1) if settings.averages else sums
        found.rewards = (settings.strength * (found.logps - ref_sums)).detach()
        if not with_loss:
            return found
        if settings.is_unpaired:
            found.kl = self._divergence(model, others[0], ref_others[0])
            found.losses = kto_losses(sums - ref_sums, found.kl, batch["desirable"], settings)
        else:
            (chosen, rejected), (ref_chosen, ref_rejected) = sums.chunk(2), ref_sums.chunk(2)
            found.losses = PAIR_LOSSES[settings.loss_type](
                Pairs(chosen, rejected, ref_chosen, ref_rejected, *tokens.chunk(2)), settings
            )
            if ref is not None:
                found.kl = 0.5 * (log_probs.detach() - ref).square().sum(1).mean()
        found.loss = found.losses.mean() + self._likelihood(inputs["labels"][:, first:], every)
        found.loss = self._with_router_loss(model, output, found.loss)
        return found

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the loss that `forward` computed."""
        loss: Tensor = output.loss
        return loss

    def loss_only(self, model: Any) -> AbstractContextManager[None]:
        return SupervisedLoss.of(model).active()

    def _log_probs(self, model: Any, inputs: Batch) -> tuple[Any, Tensor]:
        """Run the model, and return its output and the log-probabilities of the labels, [rows, length]."""
        supervised, run = SupervisedLoss.of(model), super().forward
        index, shape = inputs.get("packed_index"), inputs["labels"].shape
        if index is not None:
            inputs = packed_inputs(model, _joined(inputs))
        # The head may be another one than in the last call: the reference has the base's.
        with supervised.active() if supervised.enabled else nullcontext():
            output, found = supervised.token_log_probs(lambda: run(model, inputs), inputs["labels"])
        if index is None:
            return output, found
        # Padding has a place of its own, behind the others.
        places = torch.where(index < 0, shape.numel(), index).flatten()
        return output, found.new_zeros(shape.numel() + 1).scatter(0, places, found.flatten())[:-1].view(shape)

    def _reference(self, model: Any, batch: Batch) -> list[Tensor | None]:
        """Return the reference's log-probabilities of the answers, and of the mismatched ones if there are any."""
        if not self.settings.needs_reference:
            return [None]
        if self.precompute_reference:
            return [self.table.look_up(part.get("key"), part["labels"]) for part in _parts(batch)]
        with reference_model(model):
            return [self._log_probs(model, part)[1] for part in _parts(batch)]

    def reference_rows(self, model: Any, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Run a model that is the reference on all rows of a batch.

        Args:
            model: the model, see `reference_model`.
            batch: the batch; its mismatched rows count, too.

        Yields:
            Keys [rows], labels [rows, length], and log-probabilities of the labels [rows, length].
        """
        for part in _parts(batch):
            yield part["key"], part["labels"], self._log_probs(model, part)[1]

    def _divergence(self, model: Any, other: Batch, ref_other: Tensor | None) -> Tensor:
        """Return KTO's estimate of the divergence, from the answers to other prompts, over all processes."""
        assert ref_other is not None
        with torch.no_grad():
            ratios = (self._log_probs(model, other)[1] - ref_other).sum(1)
        sums = torch.stack([ratios.sum(), ratios.new_tensor(float(len(ratios)))])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return (sums[0] / sums[1]).clamp(min=0)

    def _with_prompts(self, model: Any, batch: Batch) -> Tensor:
        """Return the labels with those of the chosen answers' prompts, which ORPO may learn as well."""
        if model.config.is_encoder_decoder:
            raise LitPeftError(
                "task_args: sft_on_prompt is set, but the decoder of an encoder-decoder has no prompt to learn: leave "
                "it out."
            )
        labels = batch["labels"].clone()
        pairs = len(labels) // 2
        tokens, mask = batch["input_ids"][:pairs], batch["attention_mask"][:pairs].bool()
        labels[:pairs] = torch.where(mask, tokens, labels[:pairs])
        return labels

    def _likelihood(self, labels: Tensor, log_probs: Tensor) -> Tensor | float:
        """Return the weighted negative log-likelihood of the chosen rows, the mean over their labels."""
        weight = 1.0 if self.settings.loss_type == "orpo" else self.settings.rpo_alpha
        if not weight:
            return 0.0
        pairs = len(labels) // 2
        count = (labels[:pairs] != -100).sum().clamp(min=1)
        return -weight * log_probs[:pairs].sum() / count

    def _with_router_loss(self, model: Any, output: Any, loss: Tensor) -> Tensor:
        """Add a mixture of experts' load-balancing loss, if the model's config asks for it."""
        balance = getattr(output, "aux_loss", None)
        return loss if balance is None else loss + model.config.router_aux_loss_coef * balance.to(loss.device)

    # --------------------------------------------------------------------------------- metrics and prediction

    def prepare(self, model: Any) -> None:
        super().prepare(model)
        if model.config.is_encoder_decoder:  # its mask is that of the encoder, which sees what follows
            self.ignores_right_padding = False

    def weight(self, batch: Batch) -> Tensor:
        """Return the number of pairs or, for `kto`, of answers."""
        rows = len(batch["labels"])
        return torch.tensor(rows if "desirable" in batch else rows // 2)

    def metrics(self, config: Any) -> dict[str, Metric]:
        names = ("loss", "accuracy", "rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected", "kl")
        return {**{name: Mean() for name in names}, "margin": MeanDifference()}

    def update(self, metrics: Metrics, output: Any, batch: Batch) -> None:
        rewards, logps, weight = output.rewards, output.logps.detach(), self.weight(batch)
        metrics["loss"].update(output.loss.detach(), weight)
        chosen = batch.get("desirable")
        if chosen is None:
            chosen = torch.arange(len(rewards), device=rewards.device) < len(rewards) // 2
            margins = rewards[chosen] - rewards[~chosen]
        else:
            margins = torch.where(chosen, 1, -1) * (rewards - self.settings.strength * output.kl)
        # A margin that is no number must not count as a wrong one.
        metrics["accuracy"].update(torch.where(margins.isnan(), margins, (margins > 0).to(margins.dtype)))
        metrics["margin"].update(rewards, chosen)
        for name, values in {"rewards": rewards, "logps": logps}.items():
            for group, members in {"chosen": chosen, "rejected": ~chosen}.items():
                # Also without a value: every process must have the same metrics.
                metrics[f"{name}_{group}"].update(values[members])
        if output.kl is not None:
            metrics["kl"].update(output.kl, weight)

    def predict(self, model: Any, batch: Batch, generation: Generation) -> list[dict[str, Any]]:
        """Return for each pair `prompt`, `chosen`, `rejected`, `accurate`, `margin`, and the rewards and
        log-probabilities of both answers; for each single answer `prompt`, `completion`, `label`, `reward`, `logp`."""
        output = self._compare(model, batch, with_loss=False)
        rewards, logps = output.rewards.tolist(), output.logps.tolist()
        prompts, answers = _texts(batch, generation.tokenizer, model.config.is_encoder_decoder)
        if "desirable" in batch:
            columns = zip(prompts, answers, batch["desirable"].tolist(), rewards, logps, strict=True)
            names = ("prompt", "completion", "label", "reward", "logp")
            return [dict(zip(names, values, strict=True)) for values in columns]
        pairs = len(rewards) // 2
        return [
            {
                "prompt": prompts[chosen],
                "chosen": answers[chosen],
                "rejected": answers[rejected],
                "accurate": rewards[chosen] > rewards[rejected],
                "margin": rewards[chosen] - rewards[rejected],
                "reward_chosen": rewards[chosen],
                "reward_rejected": rewards[rejected],
                "logp_chosen": logps[chosen],
                "logp_rejected": logps[rejected],
            }
            for chosen, rejected in zip(range(pairs), range(pairs, 2 * pairs), strict=True)
        ]


def _parts(batch: Batch) -> list[Batch]:
    """Return the rows of a batch and, if it has any, the mismatched ones."""
    own = {name: value for name, value in batch.items() if not name.startswith(_OTHER)}
    other = {name.removeprefix(_OTHER): value for name, value in batch.items() if name.startswith(_OTHER)}
    return [own, other] if other else [own]


def _joined(rows: Batch) -> Batch:
    """Return the inputs of rows that are joined as their layout says."""
    index, positions = rows["packed_index"], rows["packed_positions"]
    ids, labels = (rows[name].flatten()[index.clamp(min=0)] for name in ("input_ids", "labels"))
    # The last token of the text before does not predict the first one.
    labels = torch.where((index < 0) | (positions == 0), -100, labels)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def _texts(batch: Batch, tokenizer: Any, is_encoder_decoder: bool) -> tuple[list[str], list[str]]:
    """Return the prompt and the answer of each row as text."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
    asked = mask if is_encoder_decoder else mask & (labels == -100)
    prompts = [row[places].tolist() for row, places in zip(ids, asked, strict=True)]
    answers = [row[row != -100].tolist() for row in labels]
    decoded = (tokenizer.batch_decode(texts, skip_special_tokens=True) for texts in (prompts, answers))
    return next(decoded), next(decoded)
