"""Checks of the data against a module and its model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from lit_peft.data.labels import label_counts
from lit_peft.tasks.packed import check_method
from lit_peft.tasks.reference import check_reference
from lit_peft.training.lightning_internals import datamodule_of, trainer_of
from lit_peft.training.new_tokens import check_tokens
from lit_peft.training.reference import precompute_reference
from lit_peft.training.run_record import RECORD, check_checkpoint, check_same_base, run_record, say, say_new_length
from lit_peft.training.stack_setting import check_stack_record, stack_record
from lit_peft.training.start_adapter import check_start
from lit_peft.util.errors import LitPeftError


class DataChecks:
    """Checks, when a run starts, that a `BaseLM` can use its data. A mixin of `BaseLM`."""

    task: Any
    settings: Any
    hparams: Any
    # What the checkpoints of this run say of it, from the start of training.
    run: dict[str, Any] | None = None
    # What the checkpoint says that this run is resumed from.
    resumed: Mapping[str, Any] | None = None
    # Whether the weights are those of a checkpoint, whatever `model.adapter` says.
    started: bool = False

    def check_data(self, data: Any) -> None:
        """Refuse a data module whose batches the method or the task cannot use.

        Raises:
            LitPeftError: it is for another task; its new tokens are not the module's; or it is packed, and the method
                has virtual tokens or the task cannot use packed rows.
        """
        check_tokens(self, data)
        made_for = getattr(data, "task", None)
        if isinstance(made_for, str) and made_for != self.task.name:
            raise LitPeftError(
                f"task={self.task.name!r} has no use for {type(data).__name__}, whose rows are for {made_for!r}: set "
                f"model.task to {made_for!r}, or use the data module of {self.task.name!r}."
            )
        self.task.check_data(data)
        if getattr(data, "padding_free", False):
            check_method(self.settings, "data.padding_free")
        if getattr(data, "packing", False):
            check_method(self.settings)
            if not self.task.packs:
                raise LitPeftError(
                    f"data.packing is set, and task={self.task.name!r} cannot train on packed rows: leave packing out."
                )

    def take_labels(self, data: Any) -> None:
        """Use the data's labels if the task has labels and the settings name none, and the data's metric if it has one.

        The metric selects the best checkpoint. What the task learns of the data is recorded as `task_args`.
        """
        if self.task.labelled and self.hparams.labels is None and self.hparams.num_labels is None:
            self.hparams["labels"] = getattr(data, "label_names", None)
            if self.hparams.labels is None:
                self.hparams["num_labels"] = getattr(data, "num_labels", None)
        if learned := self.task.learn(getattr(data, "problem_type", None), partial(label_counts, data)):
            self.hparams["task_args"] = {**self.hparams.task_args, **learned}
            _note_weights(data, learned)
        self.task.monitor = getattr(data, "monitor", None) or self.task.monitor

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose run had other data, labels or settings; see `run_record.check_checkpoint`."""
        trainer = trainer_of(self)  # type: ignore[arg-type]
        if self.started:
            check_start(self, getattr(trainer, "ckpt_path", None), checkpoint)
        if trainer is not None and trainer.state.fn is not None:
            stage, path = trainer.state.fn.value, trainer.ckpt_path
            for line in check_checkpoint(self, datamodule_of(self), checkpoint, path, stage):  # type: ignore[arg-type]
                say(line)
            check_same_base(self, checkpoint, path)
            check_stack_record(self, checkpoint.get(RECORD) or {}, path, stage)
            self.resumed = checkpoint.get(RECORD)

    def on_fit_start(self) -> None:
        check_stages(self, "train", "validation")
        if self.hparams.adapter is not None and not self.started:
            say(f"training starts from the weights in {self.hparams.adapter}", "adapter:")
            if self.task.compares_with_base:
                say("it is the base without that adapter; to compare with both, merge them first", "reference:")
        self.run = {**run_record(self), "stack": stack_record(self)}
        if self.resumed is not None:
            say_new_length(self, self.resumed, self.run)
            self.resumed = None

    def on_validation_start(self) -> None:
        trainer: Any = trainer_of(self)  # type: ignore[arg-type]
        if trainer.state.fn != "fit":  # checked when fitting began
            check_stages(self, "validation")

    def on_test_start(self) -> None:
        check_stages(self, "test")

    def on_predict_start(self) -> None:
        check_stages(self, "predict")


def check_stages(module: Any, *stages: str) -> None:
    """Check before the first step that the model can use the data's tokens and labels.

    Raises:
        LitPeftError: a row is longer than the base's positions, a token is not in its vocabulary, or the data and the
            model number the labels differently.
    """
    if not module.started:
        check_start(module, None)
    if module.task.compares_with_base:
        check_reference(module.model)
    data = datamodule_of(module)
    callbacks = getattr(trainer_of(module), "callbacks", ())
    module.task.pads_right = (
        getattr(data, "padding_side", "left") != "left"
        and module.device_mesh is None  # ranks that share a batch have parts of the logits, which cannot be compared
        and not any(getattr(callback, "needs_attention_mask", False) for callback in callbacks)
    )
    module.task.may_choose_attention = module.hparams.attn_implementation is None
    if module.device_mesh is not None:
        module.task.group = module.device_mesh["data_parallel"].get_group()
    if not hasattr(data, "extent"):
        return
    if module.task.new_head:
        # Decoders use it to find the last token of each row, and the data decides what rows are padded with.
        module.model.config.pad_token_id = data.tokenizer.pad_token_id
    if module.task.labelled and stages != ("predict",):
        _check_labels(data, module.model.config.num_labels, module.hparams.labels or ())
    embeddings = module.model.get_input_embeddings()
    vocabulary = getattr(embeddings, "num_embeddings", None)
    for stage in stages:
        length, token = data.extent(stage)
        module.task.check_length(length, f"data.{stage}")
        if vocabulary is not None and token >= vocabulary:
            raise LitPeftError(
                f"data.{stage} has the token {token}, but base={module.hparams.base!r} has only {vocabulary} "
                "embeddings: data.tokenizer belongs to another model, or tokens were added to it. Use the model's own "
                "tokenizer, or a base that was saved after resize_token_embeddings."
            )
    if getattr(module.task, "precompute_reference", False):
        precompute_reference(module, data, stages)


def _note_weights(data: Any, learned: Mapping[str, Any]) -> None:
    """Note balanced weights; of many labels, the smallest and the largest one."""
    for name, weights in learned.items():
        if isinstance(weights, list):
            shown = weights if len(weights) <= 8 else [min(weights), max(weights)]
            values = (", " if len(weights) <= 8 else " to ").join(f"{weight:.3g}" for weight in shown)
            data.notes.add(f"task_args: balanced {name} from data.train: {values}.", once=True)


def _check_labels(data: Any, outputs: int, own: Any) -> None:
    names, count = getattr(data, "label_names", None) or (), getattr(data, "num_labels", None)
    if count is not None and (count > outputs or (count == 1) != (outputs == 1)):
        raise LitPeftError(
            f"The data has {count} labels, but the model has {outputs} output(s): leave model.labels and "
            "model.num_labels out, or give as many labels as the data has."
        )
    # Users may choose other names for the data's labels, but not the same names in another order.
    moved = next((name for name, label in zip(own, names, strict=False) if name != label and name in names), None)
    if moved is not None:
        raise LitPeftError(
            f"{moved!r} is class {own.index(moved)} of the model's labels, but class {names.index(moved)} of the "
            "data's: leave model.labels out, or give data.labels in the same order."
        )
