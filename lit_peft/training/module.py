"""BaseLM: the LightningModule every method is mixed into."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

import lit_peft
from lit_peft.methods.adapter_dtype import set_adapter_dtype
from lit_peft.methods.attachment import MethodSettings
from lit_peft.models.architectures import counts_over_mask, learned_positions
from lit_peft.models.generation import check_generation
from lit_peft.models.quantization import check_quantization, loading_arguments, quantize
from lit_peft.models.sources import BaseSource, hub_error, resolve_base
from lit_peft.tasks import find_task
from lit_peft.tasks.base import Batch
from lit_peft.tasks.packed import check_method, is_packed
from lit_peft.training.optimizer import SCHEDULES, make_optimizer, make_schedule
from lit_peft.training.randomness import run_seed, seed_all
from lit_peft.training.sharding import across_processes, shard
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief, check_types


class BaseLM(pl.LightningModule):
    """A frozen language model with a task head; a method mixed in makes a sliver of it trainable.

    Owns loading, freezing, the head, the steps, metrics, the optimizer, checkpoints of the trainable tensors only,
    and generation. Knows no method by name.

    Args:
        base: hub id, model folder, `.gguf` file, or `pkg:DISTRIBUTION` for a model in an installed package.
        task: `causal_lm`, `seq2seq`, `sequence_classification`, `token_classification`, `multiple_choice` or
            `question_answering`.
        labels: names of the labels, for classification; taken from the data module when unset.
        num_labels: number of labels where they have no names.
        learning_rate: peak learning rate; the method's usual one when unset.
        optimizer: class of `torch.optim`, or the import path of any other.
        optimizer_args: further arguments of the optimizer.
        weight_decay: of the trained matrices; biases, norms and other vectors have none.
        lr_scheduler: `linear`, `cosine` or `constant`, after the warmup.
        warmup_steps: optimizer steps of linear warmup; below 1, a share of all steps.
        generation: arguments of transformers' `generate` where the task writes text, e.g. `{max_new_tokens: 64}`.
        dtype: `float32`, `bfloat16` or `float16` for the frozen base; the trainer's precision decides when unset.
        adapter_dtype: the same for what is trained: `float32` keeps master weights under precision `bf16-true`.
        quantization: `int8` or `int4` (torchao), `nf4`, `nf4-dq`, `fp4`, `fp4-dq` or `llm-int8` (bitsandbytes) for
            the frozen base, or a quantization config of transformers as a dictionary.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, ...: transformers' choice when unset.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        supervised_loss: compute a causal LM's loss on the supervised tokens alone: the same loss for less.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run code that a hub model brings with it. It can do anything on this machine.
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
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        values = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_types(BaseLM.__init__, values)
        settings = getattr(self, "settings", None)
        values.update(
            {field.name: getattr(settings, field.name) for field in fields(settings)} if settings is not None else {}
        )
        self.save_hyperparameters({**values, "optimizer_args": optimizer_args or {}, "generation": generation or {}})
        self.task = find_task(task)
        if lr_scheduler not in SCHEDULES:
            raise LitPeftError(f"lr_scheduler={lr_scheduler!r} is not known: use {closest(lr_scheduler, SCHEDULES)}.")
        if learning_rate is not None and not learning_rate > 0:
            raise LitPeftError(f"learning_rate={learning_rate}: give a positive number, e.g. 5e-4.")
        if warmup_steps < 0:
            raise LitPeftError(f"warmup_steps={warmup_steps}: give a number of steps, or a share of them below 1.")
        if weight_decay < 0:
            raise LitPeftError(f"weight_decay={weight_decay}: give a number of at least 0, e.g. 0.01.")
        if num_labels is not None and num_labels < 1:
            raise LitPeftError(f"num_labels={num_labels}: give a number of at least 1; 1 is regression.")
        if labels is not None and len(set(labels)) < max(len(labels), 1):
            raise LitPeftError(f"labels={brief(labels)}: give each class a name of its own, or leave it out.")
        for name, value in (("dtype", dtype), ("adapter_dtype", adapter_dtype)):
            if value is not None and not isinstance(getattr(torch, value, None), torch.dtype):
                raise LitPeftError(f"{name}={value!r} is not known: use 'float32', 'bfloat16' or 'float16'.")
        check_quantization(quantization)
        check_generation(generation or {})
        if generation and task not in ("causal_lm", "seq2seq"):
            raise LitPeftError(f"generation is set, and task={task!r} writes no text: leave it out.")
        self.model: Any = None
        self.val_metrics = nn.ModuleDict()
        self.test_metrics = nn.ModuleDict()
        self.strict_loading = False
        self._tokenizer: Any = None
        self._takes_positions = False
        self._positions: int | None = None
        self._run_seed: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if getattr(cls, "settings_class", None) is not None and "__init__" not in vars(cls):
            cls.__init__ = _flat_init(cls)  # type: ignore[method-assign]

    # ------------------------------------------------------------------------------------------ building

    def configure_model(self) -> None:
        """Load the base, freeze it and attach the method. Calling it again does nothing.

        Under `ModelParallelStrategy` each process keeps its shard alone (FSDP2).

        Raises:
            LitPeftError: the base cannot be loaded, or the method's settings do not fit it.
        """
        if self.model is not None:
            return
        self.check_data(getattr(self._trainer, "datamodule", None))
        source = resolve_base(self.hparams.base)
        config = self._config(source)
        auto = self.task.model_class(config)
        dtype = getattr(torch, self.hparams.dtype) if self.hparams.dtype else torch.get_default_dtype()
        try:
            model, report = auto.from_pretrained(
                source.path,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                **self._hub_settings(),
                **loading_arguments(self.hparams.quantization, dtype, self.task.heads),
            )
        except Exception as problem:  # OSError, ValueError, ImportError, KeyError, by what is wrong
            raise hub_error(self.hparams.base, problem) from problem
        model._lit_peft_base = self.hparams.base
        missing = self._with_backbone(model, source, dtype, report["missing_keys"])
        if not self.task.new_head and missing:
            raise LitPeftError(
                f"base={self.hparams.base!r} has no weights for {', '.join(sorted(missing)[:3])}, which "
                f"task={self.hparams.task!r} needs: choose a base that was trained for it, or another task."
            )
        quantize(model, self.hparams.quantization, self.task.heads)
        model.train()  # transformers hands models over in evaluation mode, and Lightning keeps the mode it finds
        if self.hparams.gradient_checkpointing:
            # transformers renamed it, and warns of the old name.
            renamed = hasattr(model, "activation_checkpointing_enable")
            getattr(model, f"{'activation' if renamed else 'gradient'}_checkpointing_enable")()
        self._attach(model, missing)
        if self.device_mesh is not None:  # of ModelParallelStrategy
            shard(model, self.device_mesh)
        self.model = model
        self._positions = learned_positions(model)
        self._takes_positions = counts_over_mask(model, config)
        self.val_metrics, self.test_metrics = (nn.ModuleDict(self.task.metrics(config)) for _ in range(2))
        self._join_averaging()

    def _join_averaging(self) -> None:
        """Give `StochasticWeightAveraging`, which copied the module before there was a model in it, a copy with one."""
        for callback in getattr(self._trainer, "callbacks", ()):
            if isinstance(callback, StochasticWeightAveraging):
                # The frozen parameters are shared: their mean is themselves.
                frozen: dict[int, Any] = {id(p): p for p in self.parameters() if not p.requires_grad}
                callback._average_model = copy.deepcopy(self, frozen)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Casting the module, as Lightning's `bf16-true` does, casts the frozen part alone where `adapter_dtype` is set.
        own = self.hparams.adapter_dtype is not None and self.model is not None
        trained = [p for p in self.parameters() if p.requires_grad] if own else []
        kept = [(p, p.data, None if p.grad is None else p.grad.data) for p in trained]
        super()._apply(fn, recurse)
        for parameter, data, grad in kept:
            parameter.grad = None
            parameter.data = data.to(parameter.device)
            parameter.grad = None if grad is None else grad.to(parameter.device)
        return self

    def check(self) -> None:
        """Find what is wrong with the settings before anything is loaded or written: attach to a model without data.

        Raises:
            LitPeftError: as `configure_model`.
        """
        config = self._config(resolve_base(self.hparams.base))
        settings = {"trust_remote_code": self.hparams.trust_remote_code}
        with torch.device("meta"):
            model = self.task.model_class(config).from_config(config, **settings)
        self._attach(model, ())

    def check_data(self, data: Any) -> None:
        """Refuse a data module whose batches the method or the task cannot take.

        Raises:
            LitPeftError: it packs examples, and the method has virtual tokens, or the task is not `causal_lm`.
        """
        if not getattr(data, "packing", False):
            return
        check_method(self.settings)
        if self.task.name != "causal_lm":
            raise LitPeftError(f"data.packing is set, and task={self.task.name!r}: only causal_lm takes packed rows.")

    def _with_backbone(self, model: Any, source: BaseSource, dtype: torch.dtype, missing: Any) -> set[str]:
        """Load the backbone apart where the head's class calls it by another name; return what is missing then.

        transformers' QuestionAnswering classes of Llama and Qwen do, and would leave it random without an error.
        """
        prefix = f"{model.base_model_prefix}."
        backbone = getattr(model, model.base_model_prefix, None)
        tensors = set() if backbone is None else set(backbone.state_dict())
        if not tensors or not {f"{prefix}{name}" for name in tensors} <= set(missing):
            return set(missing)
        config = copy.deepcopy(model.config)
        vars(config).pop("quantization_config", None)
        settings = {**self._hub_settings(), "config": config, "dtype": dtype}
        settings |= loading_arguments(self.hparams.quantization, dtype)
        loaded = _transformers().AutoModel.from_pretrained(source.path, **settings)
        setattr(model, model.base_model_prefix, loaded)
        return {name for name in missing if not name.startswith(prefix)}

    def _config(self, source: BaseSource) -> Any:
        try:
            config = _transformers().AutoConfig.from_pretrained(source.path, **self._hub_settings(attention=False))
        except Exception as problem:
            raise hub_error(self.hparams.base, problem) from problem
        self.take_labels(getattr(self._trainer, "datamodule", None))
        if self.task.labelled:
            if self.hparams.labels is not None:
                config.id2label = dict(enumerate(map(str, self.hparams.labels)))
                config.label2id = {name: at for at, name in config.id2label.items()}
            elif self.hparams.num_labels is not None:
                config.num_labels = self.hparams.num_labels
        if self.task.new_head and getattr(config, "pad_token_id", None) is None:
            # Decoders find the last token of each row by it.
            end = getattr(config, "eos_token_id", None)
            config.pad_token_id = end[0] if isinstance(end, list) else end
        return config

    def take_labels(self, data: Any) -> None:
        """Take from a data module the labels' names, where the task needs them and the settings give none, and the
        metric that tells the best checkpoint, where it has its own."""
        if self.task.labelled and self.hparams.labels is None and self.hparams.num_labels is None:
            self.hparams["labels"] = getattr(data, "label_names", None)
            if self.hparams.labels is None:
                self.hparams["num_labels"] = getattr(data, "num_labels", None)
        self.task.monitor = getattr(data, "monitor", None) or self.task.monitor

    def _hub_settings(self, attention: bool = True) -> dict[str, Any]:
        settings: dict[str, Any] = {"trust_remote_code": self.hparams.trust_remote_code}
        if self.hparams.revision is not None:
            settings["revision"] = self.hparams.revision
        if attention and self.hparams.attn_implementation is not None:
            settings["attn_implementation"] = self.hparams.attn_implementation
        return settings

    def _attach(self, model: nn.Module, new_tensors: Any) -> None:
        """Attach the method, the task's head trained with it: the known heads, and what the base had no weights for."""
        head = {name for name, _ in model.named_children() if name in self.task.heads}
        new = {name for name, _ in model.named_parameters(remove_duplicate=False) if name in new_tensors}
        for name in new:
            # A module that is new as a whole; else the parameter alone, and not what the base has beside it.
            owner = name.rpartition(".")[0]
            inside = {f"{owner}.{inner}" for inner, _ in model.get_submodule(owner).named_parameters()}
            head.add(owner if inside <= new else name)
        self.attach_method(model, sorted(head))
        if self.hparams.adapter_dtype is not None:
            set_adapter_dtype(model, getattr(torch, self.hparams.adapter_dtype))

    def attach_method(self, model: nn.Module, head: list[str]) -> None:
        """Make part of the frozen model trainable: a method's mixin does it."""
        raise LitPeftError(f"{type(self).__name__} has no method: use LoRA or another module of lit_peft.")

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            from lit_peft.models.tokenization import load_tokenizer

            data = getattr(self._trainer, "datamodule", None)
            self._tokenizer = getattr(data, "tokenizer", None) or load_tokenizer(
                self.hparams.base, "model.base", self.hparams.revision
            )
        return self._tokenizer

    # --------------------------------------------------------------------------------------------- steps

    def forward(self, **batch: Any) -> Any:
        """Run the model on a batch; returns transformers' output object.

        Positions follow the attention mask, so that padding on the left changes nothing.
        """
        batch = {name: value for name, value in batch.items() if name not in self.task.extras}
        mask = batch.get("attention_mask")
        if "input_ids" in batch and not is_packed(batch):  # in a packed row positions begin anew
            self._check_length(batch["input_ids"].shape[-1], "A batch")
        if self._takes_positions and mask is not None and mask.dim() == 2:
            batch.setdefault("position_ids", (mask.long().cumsum(-1) - 1).clamp(min=0))
        return self.task.run(self.model, batch)

    def _check_length(self, length: int, where: str) -> None:
        if self._positions is not None and length > self._positions:
            raise LitPeftError(
                f"{where} has rows of {length} tokens, and base={self.hparams.base!r} has {self._positions} positions: "
                f"set data.max_length to {self._positions} at the most."
            )

    def _check_data(self, *stages: str) -> None:
        """Find out before the first step whether the model can take the data's tokens and labels.

        Raises:
            LitPeftError: a row is longer than the base's positions, a token is not in its vocabulary, or a label has
                another number in the data than in the model.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "extent"):
            return
        if self.task.new_head:
            # Decoders find the last token of each row by it, and it is the data that pads.
            self.model.config.pad_token_id = data.tokenizer.pad_token_id
        if self.task.labelled and stages != ("predict",):
            self._check_labels(data)
        embeddings = self.model.get_input_embeddings()
        known = getattr(embeddings, "num_embeddings", None)
        for stage in stages:
            length, token = data.extent(stage)
            self._check_length(length, f"data.{stage}")
            if known is not None and token >= known:
                raise LitPeftError(
                    f"data.{stage} holds the token {token}, and base={self.hparams.base!r} has embeddings for {known}: "
                    "data.tokenizer is not this model's, or tokens were added to it; give the model's own tokenizer, "
                    "or a base whose embeddings were resized (resize_token_embeddings) and saved with it."
                )

    def _check_labels(self, data: Any) -> None:
        names, count = getattr(data, "label_names", None) or (), getattr(data, "num_labels", None)
        outputs, own = self.model.config.num_labels, self.hparams.labels or ()
        if count is not None and (count > outputs or (count == 1) != (outputs == 1)):
            raise LitPeftError(
                f"The data has {count} labels, and the model {outputs} output(s): leave model.labels and "
                "model.num_labels out, or give as many."
            )
        # Other names for the data's labels are the user's to choose.
        moved = next((name for name, label in zip(own, names, strict=False) if name != label and name in names), None)
        if moved is not None:
            raise LitPeftError(
                f"{moved!r} is class {own.index(moved)} of the model's labels, and class {names.index(moved)} of the "
                "data's: leave model.labels out, or give data.labels in the same order."
            )

    def on_fit_start(self) -> None:
        self._check_data("train", "validation")

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != "fit":  # else it was done when fitting began
            self._check_data("validation")

    def on_test_start(self) -> None:
        self._check_data("test")

    def on_predict_start(self) -> None:
        self._check_data("predict")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the adapted model; arguments as transformers' `generate`."""
        with torch.no_grad():
            return self.model.generate(*args, **kwargs)

    # ------------------------------------------------------------------------------------------ adapters

    def save_adapter(self, folder: str | Path, format: Literal["peft", "adapterhub"] | None = None) -> Path:
        """Write the active adapter's folder; as `lit_peft.save_adapter`."""
        return lit_peft.save_adapter(self.model, folder, format)

    def load_adapter(self, folder: str | Path, name: str, check_base: bool = True) -> None:
        """Load an adapter beside the others, as the active one; as `lit_peft.load_adapter`."""
        self.configure_model()
        lit_peft.load_adapter(self.model, folder, check_base, name)

    def add_adapter(self, name: str, settings: MethodSettings) -> None:
        """Attach a new adapter beside the others, as the active one; as `lit_peft.add_adapter`."""
        self.configure_model()
        lit_peft.add_adapter(self.model, name, settings)

    def set_adapter(self, name: str | None) -> None:
        """Make an adapter the active one, None the base; the module's own is called `default`."""
        lit_peft.set_adapter(self.model, name)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """A context in which the model is its base."""
        return lit_peft.disable_adapter(self.model)

    def merge(self) -> None:
        """Fold the active LoRA into the base weights, until `unmerge`."""
        lit_peft.merge_adapter(self.model)

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        lit_peft.unmerge_adapter(self.model)

    def merge_and_unload(self) -> Any:
        """Fold the active LoRA into the base weights for good and return the plain transformers model."""
        return lit_peft.merge_and_unload(self.model)

    # --------------------------------------------------------------------------------------------- steps

    def on_train_start(self) -> None:
        """Tell the callback that wrote the checkpoint which is resumed that it has saved this step.

        Lightning does not. Where gradients are added up over batches it would save again after the next batch, whose
        gradient is in no checkpoint.
        """
        for keeper in self.trainer.checkpoint_callbacks:
            paths = (getattr(keeper, "best_model_path", None), getattr(keeper, "last_model_path", None))
            if isinstance(keeper, ModelCheckpoint) and self.trainer.ckpt_path and self.trainer.ckpt_path in paths:
                keeper._last_global_step_saved = self.trainer.global_step

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Begin the randomness of each batch (dropout) anew, from run, process, epoch and batch.

        So a run that was killed and resumed draws what the uninterrupted one draws, whatever was drawn in between by
        validation or by loaders.
        """
        if self._run_seed is None:
            self._run_seed = self.trainer.strategy.broadcast(run_seed())
        # Processes that share the parts of one batch (tensor parallelism) draw alike.
        mesh = self.device_mesh
        process = self.global_rank if mesh is None else mesh["data_parallel"].get_local_rank()
        seed_all(self._run_seed, process, self.current_epoch, batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch. Works without a Trainer, too.

        Of several processes each has a part of the batch, and what the strategy averages over them is the mean over all
        tokens (or examples) of the whole batch, as one process has it.
        """
        with self._loss_alone():
            loss = self.task.loss(self(**batch), batch)
        if self._trainer is not None:
            size = len(next(iter(batch.values())))
            loss, mean = across_processes(loss, self.task.weight(batch), self.device_mesh)
            self.log("train_loss", mean, prog_bar=True, batch_size=size)
            if self.global_step % getattr(self.trainer, "log_every_n_steps", 1) == 0:
                self._check_finite(mean)
        return loss

    def _check_finite(self, loss: Tensor) -> None:
        """Stop a run whose weights are spoilt for good.

        Raises:
            LitPeftError: a trained weight is NaN or infinite.
        """
        if not loss.isfinite() and not all(p.isfinite().all() for p in self.parameters() if p.requires_grad):
            raise LitPeftError(
                f"At step {self.global_step} the loss is {float(loss.detach())} and trained weights are NaN or "
                f"infinite: lower learning_rate (now {self.learning_rate:g}), set trainer.gradient_clip_val=1.0, or "
                "use trainer.precision=bf16-mixed in place of 16-mixed. Checkpoints from before are whole."
            )

    def _loss_alone(self) -> AbstractContextManager[None]:
        return self.task.loss_alone(self.model) if self.hparams.supervised_loss else nullcontext()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        self._evaluate(batch, self.val_metrics, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any] | None:
        """Add a batch to the test metrics; where the task judges generated text, return a plain dict per example."""
        rows = self._evaluate(batch, self.test_metrics, "test")
        return None if rows is None else {"rows": rows}

    def _evaluate(self, batch: Batch, metrics: Any, stage: str) -> list[dict[str, Any]] | None:
        # Rows repeated to even out the processes count nowhere; this one has part in the calls they make together, in
        # the metrics that others have something to say to.
        surplus = batch.pop("surplus", False)
        updated = copy.deepcopy(metrics) if surplus else metrics
        with self._loss_alone():
            rows = self.task.evaluate(self, updated, batch)
        if self._trainer is not None:
            size = len(next(iter(batch.values())))
            # A task may have metrics that this kind of data has nothing to say to.
            for name, metric in ((name, metric) for name, metric in metrics.items() if updated[name].update_called):
                shown = stage == "val" and name == self.task.monitor[0].removeprefix("val_")
                self.log(f"{stage}_{name}", metric, on_step=False, on_epoch=True, prog_bar=shown, batch_size=size)
        return None if surplus else rows

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one plain dict per example: label and probabilities, or generated text."""
        return self.task.predict(self, batch)

    # ---------------------------------------------------------------------------------------- optimizing

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the one given, or the method's usual one."""
        return float(self.hparams.learning_rate or self.settings.learning_rate)

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        change = value / self.learning_rate
        self.hparams["learning_rate"] = value
        # Of a run that has begun (LearningRateFinder), the schedule goes on from the new peak.
        for plan in self._trainer.lr_scheduler_configs if self._trainer is not None else ():
            if hasattr(plan.scheduler, "base_lrs"):
                plan.scheduler.base_lrs = [rate * change for rate in plan.scheduler.base_lrs]

    def configure_optimizers(self) -> Any:
        """Optimizer over the trainable parameters, and the schedule, stepped every optimizer step."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decay = self.hparams.weight_decay if parameter.dim() > 1 else 0.0
                groups.setdefault((self.settings.learning_rate_factor(name), decay), []).append(parameter)
        optimizer = make_optimizer(
            [
                {"params": members, "lr": self.learning_rate * factor, "weight_decay": decay}
                for (factor, decay), members in groups.items()
            ],
            self.hparams.optimizer,
            self.learning_rate,
            self.hparams.optimizer_args,
        )
        if self._trainer is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        warmup = self.hparams.warmup_steps
        if warmup < 1:
            warmup = warmup * steps if steps != float("inf") else 0
        schedule = make_schedule(optimizer, self.hparams.lr_scheduler, round(warmup), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --------------------------------------------------------------------------------------- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The trainable tensors alone; the frozen base is where it came from."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        trained = {f"{prefix}{name}" for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = super().state_dict(*args, **kwargs)
        for name in [name for name in state if name.startswith(prefix) and name not in trained]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load trained tensors: all of them, and no unknown one, whatever `strict` says of the frozen base.

        Raises:
            LitPeftError: a trainable tensor is missing, an unknown one is there, or a shape differs.
        """
        self.configure_model()
        trained = {name: value.shape for name, value in self.named_parameters() if value.requires_grad}
        known = {name for name, _ in self.named_parameters()} | {name for name, _ in self.named_buffers()}
        missing, unexpected = sorted(set(trained) - set(state_dict)), sorted(set(state_dict) - known)
        if missing or unexpected:
            raise LitPeftError(
                f"The checkpoint is not of this {type(self).__name__}: it lacks {missing[:3]} and has {unexpected[:3]} "
                "besides. Give the base, method and settings it was trained with."
            )
        for name, shape in trained.items():
            if state_dict[name].shape != shape:
                raise LitPeftError(
                    f"The checkpoint's {name} has shape {tuple(state_dict[name].shape)}, and this "
                    f"{type(self).__name__} needs {tuple(shape)}: give the settings it was trained with."
                )
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        # Only frozen tensors can be missing here, and nobody is to be warned of those.
        return result._replace(missing_keys=[])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model before its tensors arrive, and go on with the run's randomness."""
        self.configure_model()
        self._run_seed = checkpoint.get("run_seed", self._run_seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the run's randomness comes from."""
        checkpoint["run_seed"] = self._run_seed

    def describe(self) -> dict[str, str]:
        """Return what a banner shows: base, task and method."""
        return {"base": self.hparams.base, "task": self.task.name, "method": type(self).__name__}


def _transformers() -> Any:
    import transformers

    return transformers


def _flat_init(cls: type[Any]) -> Any:
    """Make an `__init__` that takes BaseLM's arguments and the method's settings side by side."""
    settings_class = cls.settings_class
    hints, own = get_type_hints(BaseLM.__init__), list(inspect.signature(BaseLM.__init__).parameters.values())
    parameters = [parameter.replace(annotation=hints.get(parameter.name, Any)) for parameter in own]
    settings_hints = get_type_hints(settings_class)
    for field in fields(settings_class):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        kind = inspect.Parameter.KEYWORD_ONLY
        annotation = settings_hints[field.name]
        parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=annotation))
    names = [parameter.name for parameter in parameters[1:]]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = [name for name in kwargs if name not in names]
        if not args and "base" not in kwargs:
            raise LitPeftError(f"{type(self).__name__} needs a base: a hub id, a model's folder, or pkg:DISTRIBUTION.")
        if unknown:
            raise LitPeftError(
                f"{type(self).__name__} has no setting {unknown[0]!r}: the closest are {closest(unknown[0], names)}."
            )
        settings, rest = cls.split_settings(kwargs)
        object.__setattr__(self, "settings", settings)
        BaseLM.__init__(self, *args, **rest)

    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    documented = [kind for kind in settings_class.__mro__ if "__dataclass_fields__" in vars(kind)]
    arguments = [_arguments(kind) for kind in (*documented, BaseLM)]
    __init__.__doc__ = "Build the module.\n\nArgs:\n" + "\n".join(filter(None, arguments))
    return __init__


def _arguments(documented: type[Any]) -> str:
    """The "Args:" part of a class's docstring, indented by four."""
    text = inspect.cleandoc(documented.__doc__ or "")
    _, _, after = text.partition("Args:\n")
    return after.split("\n\n")[0]
