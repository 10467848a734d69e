"""BaseLM: the LightningModule that every method is mixed into."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, Literal

from torch import Tensor, nn

from lit_peft.methods.attachment import MethodSettings
from lit_peft.models.tokenization import load_tokenizer
from lit_peft.nn.torch_internals import DtypeKeepingDict
from lit_peft.tasks import find_task
from lit_peft.tasks.base import Batch, Generation, watch_output
from lit_peft.training.accumulation import WeightedAccumulation
from lit_peft.training.adapter_methods import AdapterMethods
from lit_peft.training.building import build_empty_model, build_metrics, build_model, share_average_model
from lit_peft.training.checkpoint_class import CLASS_KEY, class_name, class_of_checkpoint
from lit_peft.training.compile_setting import compile_for_training
from lit_peft.training.data_checks import DataChecks
from lit_peft.training.flat_init import flat_init
from lit_peft.training.lightning_internals import (
    datamodule_of,
    mark_resumed_checkpoint,
    subclass_arguments,
    trainer_of,
)
from lit_peft.training.named_sets import NamedSets, metrics_attribute, set_names
from lit_peft.training.neftune import embedding_noise
from lit_peft.training.optimizer import check_finite, lightning_schedule, make_optimizer, parameter_groups, with_fused
from lit_peft.training.precision import PreciseModule
from lit_peft.training.randomness import run_seed, seed_all
from lit_peft.training.run_record import RECORD
from lit_peft.training.setting_checks import check_settings
from lit_peft.training.sharding import across_processes
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import check_types


class BaseLM(AdapterMethods, DataChecks, NamedSets, WeightedAccumulation, PreciseModule):
    """A frozen language model with a task head; the method that is mixed in trains a few parameters.

    Contains the training, validation, test and prediction steps, the optimizer, and checkpoints of only the trained
    tensors. Knows no method by name.

    Args:
        base: hub id, model folder, `.gguf` file, or `pkg:DISTRIBUTION` for a model in an installed package.
        task: `causal_lm`, `seq2seq`, `sequence_classification`, `token_classification`, `multiple_choice`,
            `question_answering`, `masked_lm`, `embedding`, `speech_seq2seq`, `reward` or `preference`.
        labels: names of the labels, for classification; taken from the data module if unset.
        num_labels: number of labels, if they have no names.
        learning_rate: peak learning rate; the method's usual one if unset.
        optimizer: class of `torch.optim`; `AdamW8bit`, `PagedAdamW8bit` or another one of bitsandbytes; or the import
            path of any other.
        optimizer_args: further arguments of the optimizer. On a GPU, Adam and AdamW are `fused` unless this says not.
        weight_decay: for the trained matrices; biases, norms and other vectors have none.
        lr_scheduler: `linear`, `cosine` or `constant`, after the warmup; or another schedule of transformers, e.g.
            `cosine_with_min_lr`, `warmup_stable_decay`, `inverse_sqrt`, `polynomial` or `reduce_lr_on_plateau`.
        warmup_steps: optimizer steps of linear warmup; below 1, a share of all steps.
        generation: arguments of transformers' `generate`, for tasks that generate text, e.g. `{max_new_tokens: 64}`.
        dtype: `float32`, `bfloat16` or `float16` for the frozen base; the trainer's precision decides if unset.
        adapter_dtype: the same for the trained parameters; `float32` if unset, also under precision `bf16-true`. Full
            fine-tuning, which trains the base itself, then has the base's type.
        quantization: `int8` or `int4` (torchao), `nf4`, `nf4-dq`, `fp4`, `fp4-dq` or `llm-int8` (bitsandbytes), or
            `fp8` (fast on new GPUs) for the frozen base, or a quantization config of transformers as a dictionary.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, ...; transformers' choice if unset.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        supervised_loss: compute the loss of a causal LM only on the supervised tokens: the same loss in less time and
            memory.
        compile: compile each transformer layer for training, see `lit_peft.compile_layers`; `auto`: on GPUs, on one or
            with DDP.
        add_tokens: new special tokens. Only their embeddings are trained, in addition to the method, and saved with it.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run code that a hub model brings with it. It can do anything on this machine.
        lr_scheduler_kwargs: its further arguments, e.g. `{min_lr_rate: 0.1}` or `{num_decay_steps: 0.2}`; numbers of
            steps below 1 are shares of all steps.
        neftune_noise_alpha: strength of uniform noise on the input embeddings during training (NEFTune), e.g. 5.
        adapter: folder of a trained adapter to start from, in the format of peft, of AdapterHub or our own. The method
            and its settings must be the folder's; those that are unset are taken from it.
        task_args: settings of the task, if it has any.
        stack: folder of a trained bottleneck adapter, or several, to stack this one on: it lies before this one in each
            layer and stays as it is (MAD-X: a language's adapter under a task's).
    """

    settings: MethodSettings
    hparams: Any

    def __init__(
        self,
        base: str,
        task: str = "causal_lm",
        labels: list[str] | None = None,
        num_labels: int | None = None,
        learning_rate: float | None = None,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_scheduler: str = "linear",
        warmup_steps: float = 0.06,
        generation: dict[str, Any] | None = None,
        dtype: str | None = None,
        adapter_dtype: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        supervised_loss: bool = True,
        compile: bool | Literal["auto"] = "auto",
        add_tokens: list[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        neftune_noise_alpha: float | None = None,
        adapter: str | None = None,
        task_args: dict[str, Any] | None = None,
        stack: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        values = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_types(BaseLM.__init__, values)
        settings = getattr(self, "settings", None)
        own = {} if settings is None else {field.name: getattr(settings, field.name) for field in fields(settings)}
        plain = {"optimizer_args": optimizer_args or {}, "generation": generation or {}}
        plain.update(lr_scheduler_kwargs=lr_scheduler_kwargs or {}, task_args=task_args or {})
        self.save_hyperparameters({**subclass_arguments(self), **values, **own, **plain})
        self.task = find_task(task, task_args)
        check_settings(values, self.task)
        if settings is not None:
            self.task.check_method(settings)
        self.model: Any = None
        self.val_metrics, self.test_metrics = DtypeKeepingDict(), DtypeKeepingDict()
        self.strict_loading = False
        self._tokenizer: Any = None
        self._run_seed: int | None = None
        self._is_first_batch = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if getattr(cls, "settings_class", None) is not None and "__init__" not in vars(cls):
            cls.__init__ = flat_init(cls, BaseLM)  # type: ignore[method-assign]

    # ------------------------------------------------------------------------------------------ the model

    def configure_model(self) -> None:
        """Load the base, freeze it and attach the method. Does nothing if the model exists.

        Under `ModelParallelStrategy` each process keeps only its shard (FSDP2).

        Raises:
            LitPeftError: the base cannot be loaded, or the method's settings do not fit it.
        """
        if self.model is not None:
            return
        self.check_data(datamodule_of(self))
        self.take_labels(datamodule_of(self))
        self.model = build_model(self)
        self.task.prepare(self.model)
        self.val_metrics, self.test_metrics = (build_metrics(self.task, self.model.config) for _ in range(2))
        share_average_model(self)

    def check(self) -> None:
        """Check the settings before anything is loaded or written: attach the method to a model without weights.

        Raises:
            LitPeftError: as `configure_model`.
        """
        build_empty_model(self)

    def attach_method(self, model: nn.Module, head: list[str]) -> None:
        """Make part of the frozen model trainable; the mixin of a method does it.

        Args:
            model: the frozen model.
            head: names of the task's modules and parameters, which are trained in full.
        """
        raise LitPeftError(f"{type(self).__name__} has no method: use LoRA or another module of lit_peft.")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the data module, or else of the base model, loaded when it is first used."""
        if self._tokenizer is None:
            self._tokenizer = getattr(datamodule_of(self), "tokenizer", None) or load_tokenizer(
                self.hparams.base, "model.base", self.hparams.revision
            )
        return self._tokenizer

    def forward(self, **batch: Any) -> Any:
        """Run the model on a batch; return transformers' output object.

        Positions are counted over the attention mask, so that padding on the left changes nothing.
        """
        return self.task.forward(self.model, batch)

    # --------------------------------------------------------------------------------------------- steps

    def on_train_start(self) -> None:
        """Keep the callback that wrote the checkpoint being resumed from saving the same step again."""
        mark_resumed_checkpoint(self.trainer)
        self._is_first_batch = True

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the randomness of each batch (dropout) from the run, the process, the epoch and the batch.

        A resumed run thus draws the same numbers as an uninterrupted one, whatever validation or loaders drew. Before
        the first batch, compile the layers.
        """
        if self._is_first_batch:
            self._is_first_batch = False
            compile_for_training(self, lambda: self._loss(batch))
        if self._run_seed is None:
            self._run_seed = self.trainer.strategy.broadcast(run_seed())
        # Processes that share one batch (tensor parallelism) draw the same numbers.
        mesh = self.device_mesh
        process = self.global_rank if mesh is None else mesh["data_parallel"].get_local_rank()
        seed_all(self._run_seed, process, self.current_epoch, batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch. Works without a Trainer as well.

        With several processes, each has a part of the batch; the average over processes, which the strategy computes,
        is then the mean over all tokens (or examples) of the whole batch, as in a single process.
        """
        loss = self._loss(batch)
        if trainer_of(self) is not None:
            size = len(next(iter(batch.values())))
            loss, mean, weight = across_processes(loss, self.task.weight(batch), self.device_mesh)
            self.weight_batch(weight)
            self.log("train_loss", mean, prog_bar=True, batch_size=size)
            if self.global_step % getattr(self.trainer, "log_every_n_steps", 1) == 0:
                check_finite(mean, self.parameters(), self.global_step, self.learning_rate)
        return loss

    def _loss(self, batch: Batch) -> Tensor:
        with _loss_only(self), embedding_noise(self.model, self.hparams.neftune_noise_alpha):
            return self.task.loss(self(**batch), batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the validation metrics of its loader.

        The metrics of the first loader have plain names, e.g. `val_loss`; the others end in `/dataloader_idx_1`, ….
        Those of sets with names end in the name; see `NamedSets`.
        """
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any] | None:
        """Add a batch to the test metrics of its loader; see `validation_step`.

        Returns:
            One plain dict per example, under the key `rows`, if the task evaluates generated text; else None.
        """
        rows = self._evaluate(batch, "test", dataloader_idx)
        return None if rows is None else {"rows": rows}

    def _evaluate(self, batch: Batch, stage: str, loader: int) -> list[dict[str, Any]] | None:
        attribute, sets = metrics_attribute(stage, loader), set_names(self, stage)
        if not hasattr(self, attribute):
            setattr(self, attribute, build_metrics(self.task, self.model.config).to(self.device))
        metrics: Any = getattr(self, attribute)
        # Rows that were repeated so that all processes have equally many do not count. This process still makes the
        # calls that processes make together, for the metrics that the others update.
        surplus = batch.pop("surplus", False)
        updated = copy.deepcopy(metrics) if surplus else metrics
        with _loss_only(self), watch_output(self.model, updated):
            rows = self.task.evaluate(self.model, updated, batch, self._generation)
        if trainer_of(self) is not None:
            size = len(next(iter(batch.values())))
            # A task may have metrics that do not apply to this data.
            for name, metric in ((name, metric) for name, metric in metrics.items() if updated[name].update_called):
                monitored = stage == "val" and name == self.task.monitor[0].removeprefix("val_")
                self.log(
                    f"{stage}_{name}/{sets[loader]}" if sets else f"{stage}_{name}",
                    metric,
                    on_step=False,
                    on_epoch=True,
                    prog_bar=monitored and not loader and not sets,
                    batch_size=size,
                    add_dataloader_idx=loader > 0 and not sets,
                    metric_attribute=f"{attribute}.{name}",
                )
        return None if surplus else rows

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Return one plain dict per example: label and probabilities, or generated text."""
        return self.task.predict(self.model, batch, self._generation)

    @property
    def _generation(self) -> Generation:
        length = getattr(datamodule_of(self), "max_new_tokens", None)
        return Generation(lambda: self.tokenizer, self.hparams.generation, length)

    # ---------------------------------------------------------------------------------------- optimizing

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the one given, or the method's usual one."""
        return float(self.hparams.learning_rate or self.settings.learning_rate)

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        change = value / self.learning_rate
        self.hparams["learning_rate"] = value
        # A schedule that exists already (LearningRateFinder) continues with the new peak.
        for plan in getattr(trainer_of(self), "lr_scheduler_configs", ()):
            if hasattr(plan.scheduler, "base_lrs"):
                plan.scheduler.base_lrs = [rate * change for rate in plan.scheduler.base_lrs]

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the trained parameters, and the schedule, which steps with the optimizer."""
        hparams = self.hparams
        factor = self.settings.learning_rate_factor
        groups = parameter_groups(self.named_parameters(), self.learning_rate, hparams.weight_decay, factor)
        arguments = with_fused(hparams, groups, trainer_of(self))
        optimizer = make_optimizer(groups, hparams.optimizer, self.learning_rate, arguments)
        if trainer_of(self) is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": lightning_schedule(self, optimizer)}

    # --------------------------------------------------------------------------------------- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return only the trained tensors; the frozen base is loaded from where it came from."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        trained = {f"{prefix}{name}" for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = super().state_dict(*args, **kwargs)
        for name in [name for name in state if name.startswith(prefix) and name not in trained]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the trained tensors: all of them, and no unknown ones. `strict` has no effect on the frozen base.

        Raises:
            LitPeftError: a trained tensor is missing, there is an unknown one, or a shape differs.
        """
        self.configure_model()
        trained = {name: value.shape for name, value in self.named_parameters() if value.requires_grad}
        known = {name for name, _ in self.named_parameters()} | {name for name, _ in self.named_buffers()}
        missing, unexpected = sorted(set(trained) - set(state_dict)), sorted(set(state_dict) - known)
        if missing or unexpected:
            raise LitPeftError(
                f"The checkpoint does not fit this {type(self).__name__}: it lacks {missing[:3]} and has unknown "
                f"tensors {unexpected[:3]}. Give the base, method and settings that it was trained with."
            )
        for name, shape in trained.items():
            if state_dict[name].shape != shape:
                raise LitPeftError(
                    f"The checkpoint's {name} has shape {tuple(state_dict[name].shape)}, but this "
                    f"{type(self).__name__} needs {tuple(shape)}: give the settings that it was trained with."
                )
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        # Only frozen tensors can be missing here, and Lightning would warn about each of them.
        result.missing_keys.clear()
        return result

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a module and its trained tensors; arguments as in Lightning.

        Called on `BaseLM`, it returns a module of the class that wrote the checkpoint.

        Raises:
            LitPeftError: the checkpoint does not fit, or its class is not known.
        """
        if getattr(cls, "settings_class", None) is None:
            return class_of_checkpoint(cls, checkpoint_path).load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model before its tensors are loaded, and restore the seed of the run.

        Raises:
            LitPeftError: in a Trainer, the data, the labels or the settings are not those of the checkpoint's run.
        """
        # The checkpoints that Lightning's tuners write for themselves are not those of a run.
        self.started = self.started or RECORD in checkpoint
        self.configure_model()
        self.check_checkpoint(checkpoint)
        self._run_seed = checkpoint.get("run_seed", self._run_seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the seed of the run, what it is trained on and how, and the name of the class."""
        checkpoint["run_seed"] = self._run_seed
        if self.run is not None:
            checkpoint[RECORD] = self.run
        checkpoint[CLASS_KEY] = class_name(type(self))

    def describe(self) -> dict[str, str]:
        """Return what a banner shows: base, task and method."""
        return {"base": self.hparams.base, "task": self.task.name, "method": type(self).__name__}


def _loss_only(module: BaseLM) -> Any:
    return module.task.loss_only(module.model) if module.hparams.supervised_loss else nullcontext()
