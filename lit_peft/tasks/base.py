"""What a task is: the head, the loss and the metrics of one kind of problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from lit_peft.methods.attachment import MethodSettings
from lit_peft.methods.positions import count_positions
from lit_peft.models.architectures import counts_over_mask, learned_positions
from lit_peft.models.call_arguments import arguments
from lit_peft.models.transformers_internals import has_model_class
from lit_peft.tasks.packed import is_packed
from lit_peft.util.errors import LitPeftError

Metrics = Mapping[str, Any]
Batch = dict[str, Any]


class FiniteMetric(Metric):
    """A mixin of metrics that are NaN if the model's output was: the largest of several NaN values is the first class,
    which may well be right. It comes before the metric in the list of bases.

    Attributes:
        non_finite: number of batches whose output was NaN or infinite.
    """

    non_finite: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_state("non_finite", torch.tensor(0.0), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the metric, or NaN."""
        return self.or_nan(super().compute())  # type: ignore[safe-super]

    def or_nan(self, value: Tensor) -> Tensor:
        """Return a value of the metric, or NaN if an output was not finite."""
        value = value if value.is_floating_point() else value.float()  # some are the integer 0 if undefined
        return torch.where(self.non_finite > 0, torch.full_like(value, float("nan")), value)


@cache
def finite(kind: type[Metric]) -> type[Any]:
    """Return a class of metrics with `FiniteMetric` mixed in."""
    return type(kind.__name__, (FiniteMetric, kind), {})


@contextmanager
def watch_output(model: Any, metrics: Mapping[str, Any]) -> Iterator[None]:
    """Note in the metrics whether what the model returns within the block is finite.

    A value of minus infinity is an output, too, e.g. of a token that must not be chosen, unless all are.
    """
    bad: list[Tensor] = []

    def look(module: Any, arguments: Any, output: Any) -> None:
        for name in ("logits", "start_logits", "end_logits"):
            values = getattr(output, name, None)
            if isinstance(values, Tensor) and values.is_floating_point() and values.numel():
                bad.append(~values.detach().amax(-1).isfinite().all())

    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
    if bad:
        found = torch.stack(bad).any()
        for metric in metrics.values():
            if hasattr(metric, "non_finite"):
                metric.non_finite += found.to(metric.non_finite.device)


class Float32Metric(FiniteMetric):
    """A mixin of metrics that cast values to their type: it is always float32."""

    @property
    def dtype(self) -> torch.dtype:
        """The type that values are cast to; torchmetrics has the default type at the last `to`, which may be half."""
        return torch.float32


class Mean(Float32Metric, MeanMetric):
    """A mean that becomes NaN when a value is NaN, instead of ignoring the value."""

    def __init__(self) -> None:
        # A number replaces NaN values and keeps their weights; the strategy "disable" would drop the weights as well.
        super().__init__(nan_strategy=float("nan"))


@contextmanager
def float32_default() -> Iterator[None]:
    """Within the block new tensors are float32, also under a half-precision Trainer.

    Metrics created or updated under a half-precision default type lose counts: in bfloat16, 256 + 1 is 256.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Generation:
    """What a task needs to generate text, apart from the model.

    Attributes:
        load_tokenizer: returns the tokenizer; called only when text is generated.
        settings: arguments of transformers' `generate`.
        max_new_tokens: number of new tokens if `settings` has none; the task's own if None.
    """

    load_tokenizer: Callable[[], Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.load_tokenizer()


class Task:
    """The head, loss and metrics of one kind of problem. The arguments of `__init__`, if any, are its settings.

    Attributes:
        name: how the user calls it.
        auto_class: the transformers class that builds the model with this head.
        heads: names of the head's modules over all architectures; those a model has are trained in full.
        labelled: whether the head has one output per label.
        new_head: whether the head may be a new one, for which the base has no weights.
        packs: whether it can train on packed rows.
        generates: whether it generates text, with the module's `generation`.
        unused: names of modules of the model that the task does not run, so that they are never trained.
        extras: keys of a batch that the model does not take, used by metrics and predictions.
        free_settings: its settings that change no weight and no loss, so that a trained model may be given others.
        monitor: the metric that selects the best checkpoint, and "min" or "max".
        positions: size of the model's table of position embeddings; None without one. Set by `prepare`.
        mini_batch_size: rows whose activations are computed again in the backward pass; None: none are.
        pads_right: whether all batches for the loss are known to be padded on the right.
        may_choose_attention: whether packed rows may get another attention function: the setting names none.
        group: the processes that have the parts of a batch, if others have parts of the model; None: all.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    heads: ClassVar[tuple[str, ...]] = ()
    labelled: ClassVar[bool] = False
    new_head: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ()
    extras: ClassVar[tuple[str, ...]] = ()
    free_settings: ClassVar[tuple[str, ...]] = ()
    monitor: tuple[str, str] = ("val_loss", "min")
    positions: int | None = None
    mini_batch_size: int | None = None
    counts_positions: bool = False
    pads_right: bool = False
    may_choose_attention: bool = True
    group: Any = None

    @property
    def compares_with_base(self) -> bool:
        """Whether the loss compares the model with the base without its adapter."""
        return False

    def model_class(self, config: Any) -> Any:
        """Return the auto class that builds a model of this config for the task.

        Raises:
            LitPeftError: transformers has no such model.
        """
        import transformers

        if has_model_class(self.auto_class, config) or self.auto_class in (getattr(config, "auto_map", None) or {}):
            return getattr(transformers, self.auto_class)
        kind = self.auto_class.removeprefix("AutoModelFor")
        kind = f"an {kind}" if kind[0] in "AEIOU" else f"a {kind}"
        raise LitPeftError(
            f"task={self.name!r} needs {kind} model, and transformers has none of model_type={config.model_type!r}: "
            "choose another base or another task."
        )

    def check_method(self, settings: MethodSettings) -> None:
        """Refuse a method that the task cannot use; called before anything is loaded.

        Raises:
            LitPeftError: names the method, and one to use instead.
        """

    def learn(self, problem_type: str | None, counts: Callable[[], tuple[list[int], int]]) -> dict[str, Any]:
        """Take from the data the settings that depend on it. Called before the model is built.

        Args:
            problem_type: `single_label`, `multi_label` or `regression`; None if the data does not say.
            counts: returns how many training rows have each label, and how many there are.

        Returns:
            The settings that were taken, to be recorded with those that were given.

        Raises:
            LitPeftError: a setting contradicts the data.
        """
        return {}

    def check_data(self, data: Any) -> None:
        """Refuse a data module whose batches are of another kind; called before the base is loaded.

        Raises:
            LitPeftError: says what the task needs.
        """

    def prepare(self, model: Any) -> None:
        """Note what `forward` must know of the model. Called once, after the method is attached."""
        self.positions = learned_positions(model)
        self.counts_positions = counts_over_mask(model, model.config)

    def check_length(self, length: int, where: str) -> None:
        """Refuse rows that are longer than the model's table of position embeddings.

        Raises:
            LitPeftError: `length` exceeds `positions`.
        """
        if self.positions is not None and length > self.positions:
            raise LitPeftError(
                f"{where} has rows of {length} tokens, but the base model has only {self.positions} positions: set "
                f"data.max_length to at most {self.positions}."
            )

    def forward(self, model: Any, batch: Batch) -> Any:
        """Run the model on a batch as loaders yield it.

        Positions are counted over the attention mask, so that padding on the left changes nothing.

        Raises:
            LitPeftError: the rows are too long for the model.
        """
        batch = {name: value for name, value in batch.items() if name not in self.extras}
        mask = batch.get("attention_mask")
        if "input_ids" in batch and not is_packed(batch):  # in a packed row the positions restart
            self.check_length(batch["input_ids"].shape[-1], "A batch")
        if self.counts_positions and mask is not None and mask.dim() == 2:
            batch.setdefault("position_ids", count_positions(mask))
        return self.run(model, batch)

    def run(self, model: Any, batch: Batch) -> Any:
        """Call the model on a batch without its extras; for a loss without a cache, which only generation needs."""
        if "labels" in batch and "use_cache" in arguments(model):
            batch = {"use_cache": False, **batch}
        return model(**batch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar; zero, with a gradient of zero, if nothing is supervised."""
        loss: Tensor = output.loss
        logits = getattr(output, "logits", None)
        if logits is not None and self.weight(batch) == 0:
            # The models compute 0/0 here; its gradient would turn every weight into NaN.
            return logits.float().sum() * 0.0
        return loss

    def precise_loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the loss for metrics, without a gradient and in float32 at least."""
        loss = self.loss(output, batch).detach()
        if loss.dtype in (torch.float32, torch.float64):
            return loss
        again = self.float32_loss(output, batch)
        # The model's own has few bits. If the two differ by more than that, the model adds other terms to its loss.
        own = loss.float()
        return again if again is not None and (again - own).abs() <= 0.02 * own.abs() else own

    def float32_loss(self, output: Any, batch: Batch) -> Tensor | None:
        """Return the loss computed from the output in float32; None if that is not known here."""
        return None

    def loss_only(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which the model computes its loss and may leave out its logits."""
        return nullcontext()

    def weight(self, batch: Batch) -> Tensor:
        """Return the number of terms that the batch's mean loss averages, a scalar."""
        return torch.tensor(len(next(iter(batch.values()))))

    def metrics(self, config: Any) -> dict[str, Metric]:
        """Return new metrics by name, for a model with this config; every task has at least `loss`."""
        return {"loss": Mean()}

    def evaluate(
        self, model: Any, metrics: Metrics, batch: Batch, generation: Generation
    ) -> list[dict[str, Any]] | None:
        """Run the model on a batch and update the metrics.

        Returns:
            One plain dict per example if the task evaluates generated text; else None.
        """
        output = self.forward(model, batch)
        with float32_default():
            self.update(metrics, output, batch)
        return None

    def update(self, metrics: Metrics, output: Any, batch: Batch) -> None:
        """Update the metrics with the output for a batch."""
        metrics["loss"].update(self.precise_loss(output, batch), self.weight(batch))

    def predict(self, model: Any, batch: Batch, generation: Generation) -> list[dict[str, Any]]:
        """Return one plain dict per example of the batch."""
        raise NotImplementedError
