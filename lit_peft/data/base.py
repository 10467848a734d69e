"""The base class of the data modules: settings, the hooks a task implements, and Lightning's hooks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lit_peft.data.collate import PadCollator
from lit_peft.data.datasets_internals import get_fingerprint
from lit_peft.data.encoding import longest_and_largest, token_counts
from lit_peft.data.files import read_file
from lit_peft.data.joined import examples_of_sets, limit_rows
from lit_peft.data.lengths import MaxLength, encode_split
from lit_peft.data.loaders import (
    Collate,
    StatefulLoader,
    StreamLoader,
    evaluation_loader,
    streaming_loader,
    training_loader,
)
from lit_peft.data.notes import Notes
from lit_peft.data.packing import train_collator
from lit_peft.data.rows import Rows, Split
from lit_peft.data.sampling import Mixture
from lit_peft.data.settings import check_settings
from lit_peft.data.source_settings import Setting
from lit_peft.data.sources import HubDataset, missing_split, read_rows, text_options
from lit_peft.data.splits import hold_out, without_overlap
from lit_peft.data.streaming import check_first_rows, make_stream, training_sample
from lit_peft.data.tokenizers import adapted, tokenizer_of
from lit_peft.models.tokenization import with_padding
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset

# The splits that each stage of the Trainer reads.
_STAGES: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class LitDataModule(pl.LightningDataModule):
    """Text from files, installed packages or the hub, as padded batches of tokens.

    Splits: a file (or hub split) given for `validation` or `test` is used whole. Otherwise a fixed part of `train` is
    held out, by `validation_fraction` and `test_fraction`; duplicates are removed first, so that no text is in two
    splits. Keep `seed`, `test_fraction` and `where` the same for training and testing: they decide which rows are held
    out.

    Args:
        base: the base model, whose tokenizer is used unless `tokenizer` is given.
        train: training file (csv, tsv, json, jsonl, parquet, txt; also compressed), glob, folder, URL,
            'pkg:DISTRIBUTION/path' for a file in an installed package, 'hub:OWNER/NAME:CONFIGURATION:SPLIT' or, with
            `dataset`, the name of a split; a list of these; or a mixture with weights, {a.jsonl: 0.7, b.jsonl: 0.3}.
        validation: the same without weights, for validation; or several sets, {NAME: FILE, NAME: FILE}.
        test: the same, for testing.
        predict: the same, for prediction; its rows keep their order and need no answers.
        dataset: hub id of a dataset to take the splits from.
        dataset_config: configuration of that dataset.
        tokenizer: hub id, folder or packaged model whose tokenizer to use instead of the base model's.
        batch_size: examples per batch and device.
        max_length: maximum number of tokens of an example; if unset, what 99 % of the training examples need, at most
            2,048 and the model's maximum.
        truncation_side: what happens to longer examples: they are cut at their end ('right') or start ('left'), or
            training examples are dropped ('drop').
        num_workers: processes that prepare batches; 0: the main process; unset: 2 to train on a GPU, else 0.
        num_proc: processes that tokenize; unset: the main process. The result is cached on disk.
        group_by_length: batch training examples of similar lengths together, so that there is little padding.
        streaming: read the training rows during training, if there are too many to read first. Needs
            `trainer.max_steps`, and `labels` for classification; no rows are held out or removed, and of a hub dataset
            the first `limit_validation` (`limit_test`) rows are evaluated.
        shuffle_buffer: rows from which the next one is drawn when streaming; 1: the order of the file.
        seed: seed of the split, the limits and the order of training; the same seed gives the same of each.
        limit_train: use at most this many training rows, drawn at random.
        limit_validation: the same, for validation.
        limit_test: the same, for testing.
        validation_monitor: of several validation sets, the name of the one whose metrics are also logged without a name
            (`val_loss`), which select the checkpoint, or 'mean'; unset: the first.
        validation_fraction: share of the training rows to validate on if `validation` is not given.
        test_fraction: share of the training rows to test on if `test` is not given.
        where: keep only rows whose columns have these values (a list: one of them); not for `predict`.
        add_tokens: new special tokens, as in the model; on the command line the model's when unset.
        padding_side: 'right' or 'left'; unset: right, and left for prompts to generate from.
        pad_to_multiple_of: round the length of each batch up to a multiple of this.
        revision: branch, tag or commit of `base`, for its tokenizer; on the command line the model's when unset.

    Raises:
        LitPeftError: a setting is out of range.
    """

    # Remove texts of the validation and test files from training.
    drops_overlap: bool = True
    # The task that its batches are for; None: a task of one's own, or several.
    task: str | None = None
    # Join several training examples to one row; a setting of `SupervisedData`, None for other tasks.
    packing: bool | None = None
    # Whether labels are tokens to predict, each in the place of its token.
    learns_tokens: bool = False
    # The rows that an example has in a batch: first the first one of each example, then the second ones.
    rows_per_example: int = 1
    # Columns that are read if a table has them.
    optional_columns: Sequence[str] = ()
    # One row of a txt file: "line", "paragraph" or "document".
    text_unit: str = "line"
    # An integer in any case: what is unset is chosen from the data.
    max_length: Any = MaxLength(training_sample)
    # The most that is chosen for it, and the number of rows that are measured.
    most_tokens: int = 2_048
    measured_rows: int = 2_000
    # Whether the task cuts its examples itself, token by token, or lets the tokenizer do it.
    cuts_tokens: bool = False
    # The values of `truncation_side` that the task allows.
    truncation_sides: tuple[str, ...] = ("right", "left", "drop")
    # For tsv files in which quotes are part of the text, see `read_file`.
    tsv: tuple[str, ...] | None = None

    def __init__(
        self,
        base: str | None = None,
        train: Setting = None,
        validation: Setting = None,
        test: Setting = None,
        predict: Setting = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        tokenizer: str | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        truncation_side: Literal["right", "left", "drop"] = "right",
        num_workers: int | None = None,
        num_proc: int | None = None,
        group_by_length: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        seed: int = 0,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        limit_test: int | None = None,
        validation_monitor: str | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.0,
        where: dict[str, Any] | None = None,
        add_tokens: list[str] | None = None,
        padding_side: Literal["right", "left"] | None = None,
        pad_to_multiple_of: int | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.revision = revision
        self.sources: dict[Split, Any] = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.tokenizer_name = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.truncation_side = truncation_side
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.group_by_length = group_by_length
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.limits: dict[Split, int | None] = {
            "train": limit_train,
            "validation": limit_validation,
            "test": limit_test,
        }
        self.validation_monitor = validation_monitor
        self.fractions: dict[Split, float] = {"test": test_fraction, "validation": validation_fraction}
        self.where = dict(where or {})
        self.add_tokens = add_tokens
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of
        self.notes = Notes(streaming)
        # Indices of rows that need no prediction any more, set by `PredictionWriter`.
        self.finished: set[int] = set()
        self._tokenizer: Any = None
        self.hub = HubDataset(dataset, dataset_config, streaming)
        self._encoded: dict[Split, Any] = {}
        # The number of examples of each named set of a split, and how to mix the sources of the training examples.
        self.sets: dict[Split, dict[str, int]] = {}
        self._mixture: Mixture | None = None
        self._train_loader: StatefulLoader | StreamLoader | None = None
        self._loader_state: dict[str, Any] = {}
        check_settings(self)

    # ------------------------------------------------------------------------------ the hooks of a task

    @abstractmethod
    def columns(self, split: Split) -> dict[str, str | None]:
        """Return the columns that a split must have: setting's name -> column's name, None for an unused one."""

    @abstractmethod
    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """Return a function that maps a row index to a key; rows with equal keys are duplicates."""

    def group_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """Return a function that maps a row index to a key; rows with equal keys are never in two splits."""
        return self.duplicate_key(table)

    def read(self, value: str, field: str, split: Split) -> Dataset:
        """Read a file.

        Args:
            value: the path, or `"pkg:DISTRIBUTION/path"`.
            field: the setting's name, for error messages ("data.train").
            split: the split it is read for.
        """
        return read_file(value, field, **text_options(self, split))

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """Give a table the columns that `columns` names; `translation.en` is a field of the column `translation`."""
        for column in filter(None, self.columns(split).values()):
            if column not in table.column_names and column.split(".")[0] in table.column_names:
                return table.flatten()
        return table

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Check the values of a split, and return it without rows that are to be skipped.

        Raises:
            LitPeftError: names the first bad row.
        """
        return rows

    @abstractmethod
    def encode(self, rows: Rows, split: Split) -> Any:
        """Turn rows into examples: a map-style dataset of dicts of lists."""

    def collator(self, split: Split) -> Collate:
        """Return the function that joins the examples of a split into a batch."""
        return pad_collator(self)

    def to_show(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return an example as `lit-peft data` shows it: with what the collator adds."""
        return example

    # ---------------------------------------------------------------------------------- rows to examples

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use; set it to use one that is not on disk."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = adapted(with_padding(tokenizer, str(getattr(tokenizer, "name_or_path", ""))), self)

    @cached_property
    def rows(self) -> Mapping[Split, Rows]:
        """The rows of each split there is, before their values are checked."""
        splits: list[Split] = [split for split in self.sources if not (self.streaming and split == "train")]
        found = {split: rows for split in splits if (rows := read_rows(self, split)) is not None}
        if "train" in found:
            if self.drops_overlap:
                found["train"] = without_overlap(found, self.group_key, self.notes)
            fractions = {split: part for split, part in self.fractions.items() if part and split not in found}
            if fractions:
                train = self.check_rows(found["train"], "train")
                keys = self.duplicate_key(train.table), self.group_key(train.table)
                found.update(hold_out(train, fractions, *keys, self.seed, self.notes))
        for split, limit in self.limits.items():
            if split in found:
                found[split] = limit_rows(found[split], limit, self.seed)
        return found

    def report(self) -> list[str]:
        """Return what happened to the data so far: duplicates, overlap, dropped rows and cuts, one line each."""
        return self.notes.lines()

    def examples(self, split: Split) -> Any:
        """Return the examples of a split: a map-style dataset of dicts of lists, before padding."""
        if split not in self._encoded:
            self.setup({"train": "fit", "validation": "validate"}.get(split, split))
        return self._encoded[split]

    def extent(self, split: Split) -> tuple[int, int]:
        """Return the length of a split's longest text and its largest token id; zeros if they are unknown."""
        return longest_and_largest(self._encoded.get(split))

    def identity(self, split: Split) -> str:
        """Return a hash of a split's examples: the same file, tokenizer and settings give the same hash."""
        return get_fingerprint(self.examples(split))

    # -------------------------------------------------------------------------------- Lightning's hooks

    def prepare_data(self) -> None:
        """Fill the caches on one process per machine, so that the others only read them."""
        self.setup((self.trainer.state.fn if self.trainer is not None else None) or "fit")

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize the splits of a stage; calling it again does nothing.

        Args:
            stage: "fit", "validate", "test" or "predict"; None: every split that is given.

        Raises:
            LitPeftError: data is missing or wrong.
        """
        # The Trainer passes an enumeration member, whose text differs from its value.
        stage = getattr(stage, "value", stage)
        for split in _STAGES.get(str(stage), tuple(self.sources)):
            if split in self._encoded:
                continue
            if split == "train" and self.streaming:
                check_first_rows(self)
                continue
            # Prediction reads no other split, unless it needs the training labels.
            rows = read_rows(self, split) if split == "predict" else self.rows.get(split)
            if rows is not None:
                self._encoded[split], self.sets[split], mixture = encode_split(self, rows, split)
                self._mixture = mixture if split == "train" else self._mixture
            elif stage is not None and not (stage == "fit" and split == "validation"):
                # Only training does without one of its splits.
                raise LitPeftError(missing_split(self, split))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of training examples, in an order that depends on the seed and the epoch."""
        if self.streaming:
            loader: StatefulLoader | StreamLoader = streaming_loader(make_stream(self), self.trainer, self.num_workers)
        else:
            examples = self.examples("train")
            if getattr(self.trainer, "overfit_batches", 0):
                return evaluation_loader(examples, self.collator("train"), self.batch_size, self.num_workers)
            lengths = token_counts(examples) if self.packing or self.group_by_length else None
            loader = training_loader(
                examples,
                train_collator(self),
                self.batch_size,
                self.seed,
                self.trainer,
                self.num_workers,
                lengths,
                self.max_length if self.packing else None,
                self._mixture,
            )
        self._train_loader = loader
        if self._loader_state:
            loader.load_state_dict(self._loader_state)
        return loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches of validation examples in order; a list if there are several sets, empty if there are none."""
        return _evaluation_batches(self, "validation") if "validation" in self.rows else []

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches of test examples in order; a list if there are several sets."""
        return _evaluation_batches(self, "test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches of the rows to predict, in the order of the file, without those in `finished`."""
        examples = self.examples("predict")
        rows = [row for row in range(len(examples)) if row not in self.finished]
        # Every process needs at least one row, or prediction would not end; repeating the last one is cheap.
        rows += [len(examples) - 1] * (max(getattr(self.trainer, "world_size", 1), 1) - len(rows))
        sampler = rows if len(rows) != len(examples) or self.finished else None
        return evaluation_loader(examples, self.collator("predict"), self.batch_size, self.num_workers, sampler=sampler)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training examples, for the trainer's checkpoint."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue in the middle of an epoch.

        Lightning restores loaders too late for a loader that the learning rate schedule has asked for.

        Raises:
            LitPeftError: the settings now make other batches of the examples.
        """
        self._loader_state = state_dict
        if self._train_loader is not None:
            self._train_loader.load_state_dict(state_dict)


def pad_collator(data: LitDataModule) -> PadCollator:
    """Return the function that pads the tokens of a data module's examples."""
    return PadCollator(data.tokenizer.pad_token_id, data.padding_side or "right", data.pad_to_multiple_of)


def _evaluation_batches(data: LitDataModule, split: Split) -> DataLoader[Any] | list[Any]:
    settings = (data.collator(split), data.batch_size, data.num_workers, getattr(data.trainer, "world_size", 1))
    examples = data.examples(split)
    if len(data.sets[split]) < 2:
        return evaluation_loader(examples, *settings)
    parts = examples_of_sets(examples, list(data.sets[split].values()))
    return [evaluation_loader(part, *settings) for part in parts]
