"""What every data module shares: finding the rows, splitting them, caching, and the loaders."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from lit_peft.data.collate import PadCollator
from lit_peft.data.evened import Evened, RealOnly
from lit_peft.data.files import (
    ROW,
    column_values,
    fingerprint,
    is_file,
    read_file,
    read_hub,
    require_columns,
    stream_file,
)
from lit_peft.data.json_rows import table_of
from lit_peft.data.sampling import ByBatch, SeededBatches, StatefulLoader
from lit_peft.data.splits import carve, first_of_each, limited, matching, normalized
from lit_peft.data.streaming import Stream, StreamLoader, blocks
from lit_peft.models.tokenization import load_tokenizer, tokenizer_digest, with_padding
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "validation", "test", "predict"]

# What each stage of the Trainer reads.
_STAGES: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}
# Names under which hub datasets keep their validation split.
_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "validation_matched")


@dataclass(frozen=True)
class Rows:
    """Some rows of a table.

    Attributes:
        table: the whole table, as the file has it.
        numbers: which rows, as 0-based positions in the table.
        field: the setting they came from ("data.train"), for messages.
        source: that setting's value.
        places: where the table's rows stand in the file, from 1, if not in their own order.
    """

    table: Dataset
    numbers: list[int]
    field: str
    source: str
    places: list[int] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def selected(self) -> Dataset:
        """Return just these rows as a table."""
        if len(self.numbers) == len(self.table):
            return self.table
        return self.table.select(self.numbers)

    def where(self, row: int) -> str:
        """Say where a row stands, to begin an error message with."""
        return f"{self.field} {self.source!r}, row {self.places[row] if self.places else row + 1}"


class LitDataModule(pl.LightningDataModule):
    """Text from files, installed packages or the hub, as padded batches of tokens.

    Splits: a file (or hub split) given for `validation` or `test` is used whole. Where none is given, a
    fixed part of `train` is taken out, by `validation_fraction` and `test_fraction`; duplicates are removed
    first, so that no text stands on both sides. Keep `seed`, `test_fraction` and `where` the same between
    training and testing: they decide which rows were held out.

    Args:
        base: the base model, whose tokenizer is used unless `tokenizer` is given.
        train: training file (csv, tsv, json, jsonl, parquet, txt), 'pkg:DISTRIBUTION/path' for a file in an
            installed package, or, with `dataset`, the name of a split.
        validation: the same, for validation.
        test: the same, for testing.
        predict: the same, for prediction; its rows keep their order and need no answers.
        dataset: hub id of a dataset to take the splits from.
        dataset_config: configuration of that dataset.
        tokenizer: hub id, folder or packaged model whose tokenizer to use instead of the base model's.
        batch_size: examples per batch and device.
        max_length: longest example, in tokens; longer ones are cut and counted.
        num_workers: processes that prepare batches; 0: the main process.
        num_proc: processes that tokenize; unset: the main process. What they made is kept on disk for the next run.
        group_by_length: make training batches of examples of similar lengths, so that little of them is padding.
        streaming: read the training rows while training goes on, for what is too large to be read first. Needs
            `trainer.max_steps`, and `labels` where the task has some; no rows are held out or left out, and of a hub
            dataset the first `limit_validation` (`limit_test`) rows are evaluated.
        shuffle_buffer: rows to draw the next one from when streaming; 1: the order of the file.
        seed: of the split, the limits and the order of training; the same seed gives the same of each.
        limit_train: use at most this many training rows, drawn at random.
        limit_validation: the same, for validation.
        limit_test: the same, for testing.
        validation_fraction: share of the training rows to validate on where `validation` is not given.
        test_fraction: share of the training rows to test on where `test` is not given.
        where: keep only rows whose columns have these values (a list: one of them); not for `predict`.
        padding_side: 'right' or 'left'; unset: right, and left for prompts to generate from.
        pad_to_multiple_of: round the length of each batch up to a multiple of this.
        revision: branch, tag or commit of `base`, for its tokenizer; on the command line the model's when unset.

    Raises:
        LitPeftError: a setting is out of range.
    """

    # A text that stands in the training file and in a test file is removed from training.
    drops_overlap: bool = True
    # What one row of a txt file is.
    text_unit: str = "line"
    # For tsv files whose quotes are part of the text, see `read_file`.
    tsv: tuple[str, ...] | None = None

    def __init__(
        self,
        base: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        tokenizer: str | None = None,
        batch_size: int = 16,
        max_length: int = 256,
        num_workers: int = 0,
        num_proc: int | None = None,
        group_by_length: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        seed: int = 0,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        limit_test: int | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.0,
        where: dict[str, Any] | None = None,
        padding_side: Literal["right", "left"] | None = None,
        pad_to_multiple_of: int | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.revision = revision
        self.sources: dict[Split, str | None] = {
            "train": train,
            "validation": validation,
            "test": test,
            "predict": predict,
        }
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.tokenizer_name = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
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
        self.fractions: dict[Split, float] = {"test": test_fraction, "validation": validation_fraction}
        self.where = dict(where or {})
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of
        self._tokenizer: Any = None
        self._encoded: dict[Split, Any] = {}
        self._said: set[str] = set()
        self._train_loader: StatefulLoader | StreamLoader | None = None
        self._place: dict[str, Any] = {}
        # Row numbers that need no prediction any more.
        self.finished: set[int] = set()
        self._check_settings()

    def _check_settings(self) -> None:
        least: dict[str, tuple[int | None, int]] = {
            "batch_size": (self.batch_size, 1),
            "max_length": (self.max_length, 2),
            "num_workers": (self.num_workers, 0),
            "num_proc": (self.num_proc, 1),
            "shuffle_buffer": (self.shuffle_buffer, 1),
            "pad_to_multiple_of": (self.pad_to_multiple_of, 1),
            **{f"limit_{split}": (limit, 1) for split, limit in self.limits.items()},
        }
        for name, (value, minimum) in least.items():
            if value is not None and value < minimum:
                raise LitPeftError(f"data.{name} is {value}; it must be at least {minimum}.")
        for split, fraction in self.fractions.items():
            if not 0 <= fraction < 1:
                raise LitPeftError(f"data.{split}_fraction is {fraction}; it must be at least 0 and less than 1.")
        if sum(self.fractions.values()) >= 1:
            raise LitPeftError(
                f"data.validation_fraction + data.test_fraction is {sum(self.fractions.values())}; "
                "less than 1 is needed, or nothing is left to train on."
            )
        together = {
            "group_by_length": self.group_by_length,
            "num_proc": self.num_proc,
            "limit_train": self.limits["train"],
            "test_fraction": self.fractions["test"],
            "where": self.where,
        }
        clash = next((name for name, value in together.items() if value), None)
        if self.streaming and clash:
            raise LitPeftError(
                f"data.streaming and data.{clash} are both set, and rows that are read while training goes on are not "
                f"known before: leave {clash} out, or streaming."
            )
        refuse_unread("without data.dataset", {"dataset_config": self.dataset_config and not self.dataset})
        refuse_unread("with data.tokenizer", {"revision": self.revision and self.tokenizer_name})
        if self.padding_side not in (None, "left", "right"):
            raise LitPeftError(f"data.padding_side is {self.padding_side!r}; use 'left' or 'right'.")

    # ------------------------------------------------------------------------- what tasks on text share

    def text_key(self, table: Dataset, columns: Iterable[str | None]) -> Callable[[int], Hashable]:
        """Return a function row number -> the texts of those columns (None: no column), normalized."""
        values = [column_values(table, column) for column in columns if column]
        return lambda row: tuple(normalized(str(column[row])) for column in values)

    def require_text(self, rows: Rows, columns: Iterable[str | None], may_be_empty: bool = False) -> None:
        """Check that every row has a text in each of those columns (None: no column).

        Raises:
            LitPeftError: names the first row with none (unless `may_be_empty`), or with another thing than a text.
        """
        for column in filter(None, columns):
            texts = column_values(rows.table, column)
            for row in rows.numbers:
                if not may_be_empty and (texts[row] is None or not str(texts[row]).strip()):
                    raise LitPeftError(f"{rows.where(row)} has no text in column {column!r}; remove the row.")
                if isinstance(texts[row], (dict, list, bytes)):
                    raise LitPeftError(
                        f"{rows.where(row)}: column {column!r} holds {brief(texts[row])}, not a text; correct it."
                    )

    # ----------------------------------------------------------------------- what a task must provide

    @abstractmethod
    def columns(self, split: Split) -> dict[str, str | None]:
        """Return the columns a split must have: setting's name -> column's name, None for those unused."""

    @abstractmethod
    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """Return a function row number -> what makes the row unique."""

    def group_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """Return a function row number -> what must not stand on both sides of a split."""
        return self.duplicate_key(table)

    def read(self, value: str, field: str, split: Split) -> Dataset:
        """Read a file.

        Args:
            value: the path, or `"pkg:DISTRIBUTION/path"`.
            field: the setting's name, for messages ("data.train").
            split: what it is for.
        """
        text = next((column for column in self.columns(split).values() if column), "text")
        return read_file(value, field, text_column=text, text_unit=self._unit(split), tsv=self.tsv)

    def prepared(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """Bring a table just read to the columns that `columns` names; `translation.en` is a field in a column."""
        for column in filter(None, self.columns(split).values()):
            if column not in table.column_names and column.split(".")[0] in table.column_names:
                return table.flatten()
        return table

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Check the values of a split; return it, without rows that are to be passed over.

        Raises:
            LitPeftError: names the first bad row.
        """
        return rows

    @abstractmethod
    def encode(self, rows: Rows, split: Split) -> Any:
        """Turn rows into a map-style dataset of examples that `PadCollator` takes."""

    # ----------------------------------------------------------------------------------------- tokens

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use; set it to use one that is not on disk."""
        if self._tokenizer is None:
            name = self.tokenizer_name or self.base
            if name is None:
                raise LitPeftError("data.tokenizer is not set, nor data.base; name the base model.")
            field = "data.tokenizer" if self.tokenizer_name else "data.base"
            self._tokenizer = load_tokenizer(name, field, self.revision)
            # Tokenizers that know no limit say so by a huge number.
            limit = getattr(self._tokenizer, "model_max_length", None)
            if limit is not None and self.max_length > limit:
                self.say(f"data.max_length {self.max_length} is more than the {limit} tokens {name!r} was made for.")
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = with_padding(tokenizer, str(getattr(tokenizer, "name_or_path", "")))

    def tokenized(
        self, rows: Rows, function: Callable[..., dict[str, list[Any]]], description: str, **settings: Any
    ) -> Dataset:
        """Run a tokenizing function over rows in batches, or read the result of an earlier run.

        Args:
            rows: what to tokenize.
            function: columns of a batch -> columns of the result, which may have fewer rows; called with
                `tokenizer` and `settings` as keywords.
            description: for the progress bar.
            settings: plain values the function takes; part of the cache's key.

        Returns:
            A table with the result's columns only.
        """
        table = rows.selected()
        key = (
            table,
            f"{function.__module__}.{function.__qualname__}",
            sorted(settings.items()),
            tokenizer_digest(self.tokenizer),
        )
        encoded = table.map(
            function,
            batched=True,
            fn_kwargs={"tokenizer": self.tokenizer, **settings},
            remove_columns=table.column_names,
            new_fingerprint=fingerprint(*key),
            num_proc=self.num_proc,
            desc=description,
        )
        if len(encoded) == len(rows):
            self._refuse_empty(encoded, rows)
        return encoded

    def _refuse_empty(self, encoded: Dataset, rows: Rows) -> None:
        import pyarrow.compute as pc

        for name, what in {"input_ids": "tokens", "labels": "tokens to learn"}.items():
            column = encoded.data.column(name) if name in encoded.column_names else None
            if column is None or not str(column.type).startswith(("list", "large_list")):
                continue
            empty = pc.index(pc.list_value_length(column), 0).as_py()
            if empty >= 0:
                raise LitPeftError(
                    f"{rows.where(rows.numbers[empty])} has no {what}: the tokenizer knows none in its text; remove "
                    "the row."
                )

    def collator(self, split: Split) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what joins the examples of a split into batches."""
        return self.padding()

    def padding(self) -> PadCollator:
        """Return what pads the tokens of examples."""
        return PadCollator(
            pad_token_id=self.tokenizer.pad_token_id,
            padding_side=self.padding_side or "right",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )

    # ------------------------------------------------------------------------------------------- rows

    def without_cuts(
        self,
        table: Dataset,
        split: Split,
        what: str,
        *,
        column: str = "cut",
        units: str = "tokens",
        limit: str = "max_length",
    ) -> Dataset:
        """Say how much was cut from a table's rows, and take the column that tells it out.

        Args:
            table: what was tokenized.
            split: which split it is.
            what: what its rows are ("texts").
            column: how much was cut from each row.
            units: what that column counts.
            limit: the setting that rows were cut to.
        """
        cuts = [cut for cut in column_values(table, column) if cut]
        if cuts:
            self.say(
                f"data.{split}: {len(cuts)} of {len(table)} {what} cut to {getattr(self, limit)} tokens "
                f"(data.{limit}); {sum(cuts)} {units} were cut away."
            )
        return table.remove_columns(column)

    def say(self, message: str) -> None:
        """Print a line once, on the first process only."""
        # Of the blocks of a stream, the first that has something to say speaks for all.
        kind = re.sub(r"[\d.,]+", "#", message) if self.streaming else message
        if kind not in self._said:
            self._said.add(kind)
            rank_zero_info(message)

    @cached_property
    def _hub_splits(self) -> dict[str, Any]:
        return read_hub(self.dataset, self.dataset_config, streaming=self.streaming) if self.dataset else {}

    def _named(self, split: Split) -> str | None:
        """The file or hub split that is to be read; None if there is none."""
        field, value = f"data.{split}", self.sources[split]
        if value is None and self.dataset is not None and split != "predict":
            names = _VALIDATION_NAMES if split == "validation" else (split,)
            value = next((name for name in names if name in self._hub_splits), None)
            if value is None and split == "train":
                raise LitPeftError(
                    f"data.dataset {self.dataset!r} has no split 'train'; name one by data.train: "
                    f"{', '.join(map(repr, self._hub_splits))}."
                )
        if value is not None and self.dataset is not None and not is_file(value) and value not in self._hub_splits:
            raise LitPeftError(
                f"{field} {value!r} is neither a file nor a split of {self.dataset!r}; nearest: "
                f"{closest(value, self._hub_splits)}."
            )
        return value

    def _read(self, split: Split) -> Rows | None:
        """Read the rows a setting names, filtered by `where`; None if nothing is named."""
        field, value = f"data.{split}", self._named(split)
        if value is None:
            return None
        needed = self.columns(split)
        if self.dataset is not None and not is_file(value):
            table, source = self._hub_splits[value], f"{self.dataset}:{value}"
            if self.streaming:
                table = self._first(table, split)
        else:
            table, source = self.read(value, field, split), value
        table = self.prepared(table, split, field, source)
        require_columns(table, needed, field, source)
        numbers = list(range(len(table)))
        if split != "predict":
            for column, wanted in self.where.items():
                require_columns(table, {"data.where": column}, field, source)
                numbers = matching(numbers, column_values(table, column), wanted, column, field)
        return Rows(table, numbers, field, source)

    def _first(self, stream: Any, split: Split) -> Dataset:
        """The first rows of a stream, as many as the split's limit says."""
        import datasets

        limit = self.limits.get(split)
        if limit is None:
            raise LitPeftError(f"data.streaming is set, and data.limit_{split} says not how many rows to read; set it.")
        return datasets.Dataset.from_list(list(stream.take(limit)), features=stream.features)

    def _unit(self, split: Split) -> str:
        # Prompts to continue stand one to a line whatever the training text looks like.
        return "line" if split == "predict" else self.text_unit

    @cached_property
    def _to_predict(self) -> Rows | None:
        # Predicting reads no other split, unless it needs to know their labels.
        return self._read("predict")

    @cached_property
    def rows(self) -> Mapping[Split, Rows]:
        """The rows of every split there is, before their values are checked."""
        found: dict[Split, Rows] = {}
        for split in self.sources:
            if split == "train" and self.streaming:
                continue
            rows = self._to_predict if split == "predict" else self._read(split)
            if rows is not None:
                found[split] = rows
        if "train" in found:
            if self.drops_overlap:
                found["train"] = self._without_overlap(found)
            found.update(self._carved(found))
        for split, limit in self.limits.items():
            if split in found:
                kept = limited(found[split].numbers, limit, self.seed)
                found[split] = replace(found[split], numbers=kept)
        return found

    def _carved(self, found: Mapping[Split, Rows]) -> dict[Split, Rows]:
        """Take what was not given out of the training rows."""
        train = found["train"]
        fractions = {split: part for split, part in self.fractions.items() if split not in found and part > 0}
        if not fractions:
            return {}
        train = self.check_rows(train, "train")
        kept = first_of_each(train.numbers, self.duplicate_key(train.table))
        if len(kept) < len(train):
            self.say(f"{train.field}: {len(train) - len(kept)} duplicate row(s) removed before splitting.")
        parts = carve(
            kept,
            {str(split): part for split, part in fractions.items()},
            self.group_key(train.table),
            self.seed,
        )
        return {split: replace(train, numbers=parts[split]) for split in self.sources if split in parts}

    def _without_overlap(self, found: Mapping[Split, Rows]) -> Rows:
        train = found["train"]
        held_out: set[Hashable] = set()
        for split in ("validation", "test"):
            if split in found:
                key = self.group_key(found[split].table)
                held_out.update(key(row) for row in found[split].numbers)
        if not held_out:
            return train
        key = self.group_key(train.table)
        kept = [row for row in train.numbers if key(row) not in held_out]
        if not kept:
            raise LitPeftError(
                f"{train.field} {train.source!r}: every row also stands in data.validation or data.test; "
                "give each split its own rows."
            )
        if len(kept) < len(train):
            self.say(f"{train.field}: {len(train) - len(kept)} row(s) that also stand in validation or test removed.")
        return replace(train, numbers=kept)

    # -------------------------------------------------------------------------------- Lightning's hooks

    def prepare_data(self) -> None:
        """Fill the caches on one process per machine, so that the others only read them."""
        self.setup((self.trainer.state.fn if self.trainer is not None else None) or "fit")

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize what a stage needs; calling it again does nothing.

        Args:
            stage: "fit", "validate", "test" or "predict"; None: all that is given.

        Raises:
            LitPeftError: data is missing or wrong.
        """
        # The Trainer passes an enumeration's member, whose text is not its value.
        stage = getattr(stage, "value", stage)
        wanted = _STAGES.get(str(stage), tuple(self.sources)) if stage else tuple(self.sources)
        for split in wanted:
            if split in self._encoded:
                continue
            if split == "train" and self.streaming:
                # Wrong settings show in the first rows.
                if not self._stream_block(next(blocks(self._stream, 8), {})):
                    raise LitPeftError(
                        f"data.train {self.sources['train'] or self.dataset!r}: none of its first rows has tokens to "
                        f"learn within data.max_length {self.max_length}; raise it."
                    )
                continue
            rows = self._to_predict if split == "predict" else self.rows.get(split)
            if rows is None:
                # Training goes on without validation; nothing else does without its data.
                if stage is None or (stage == "fit" and split == "validation"):
                    continue
                raise LitPeftError(self._missing(split))
            self._encoded[split] = self.encode(self.check_rows(rows, split), split)

    def _missing(self, split: Split) -> str:
        other = f" or data.{split}_fraction" if split in self.fractions else ""
        return f"data.{split} is not given; set data.{split} to a file{other}."

    def examples(self, split: Split) -> Any:
        """Return the examples of a split: a map-style dataset of dicts of lists, before padding."""
        if split not in self._encoded:
            self.setup({"train": "fit", "validation": "validate"}.get(split, split))
        return self._encoded[split]

    def extent(self, split: Split) -> tuple[int, int]:
        """Return the length of a split's longest row, and its largest token; zeros where they are not known."""
        table = getattr(self._encoded.get(split), "data", None)
        if table is None or "input_ids" not in table.column_names:
            return 0, 0
        import pyarrow.compute as pc

        longest, largest = 0, 0
        for rows in table.column("input_ids").chunks:
            # The rows of a question are its choices or windows.
            while str(rows.type.value_type).startswith(("list", "large_list")):
                rows = rows.flatten()
            longest = max(longest, pc.max(pc.list_value_length(rows)).as_py() or 0)
            largest = max(largest, pc.max(rows.flatten()).as_py() or 0)
        return longest, largest

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of training examples, in an order given by the seed and the epoch."""
        if self.streaming:
            return self._stream_loader()
        if getattr(self.trainer, "overfit_batches", 0):
            return self._loader("train")
        examples = self.examples("train")
        processes = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        loader = StatefulLoader(
            ByBatch(examples),
            batch_size=None,
            sampler=SeededBatches(len(examples), self.batch_size, self.seed, **self._grouping(), **processes),
            collate_fn=self._train_collator(),
            generator=torch.Generator().manual_seed(self.seed),
            **self._loading(),
        )
        loader.pending = self._pending
        self._train_loader = loader
        if self._place:
            loader.load_state_dict(self._place)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """The place in the training examples, for the trainer's checkpoint."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the middle of an epoch. Lightning's own way comes too late for a loader that the schedule asked for.

        Raises:
            LitPeftError: the settings now make other batches of the examples.
        """
        self._place = state_dict
        if self._train_loader is not None:
            self._train_loader.load_state_dict(state_dict)

    # ------------------------------------------------------------------------------------- streaming

    @cached_property
    def _stream(self) -> Any:
        """The training rows, a `datasets.IterableDataset`.

        Raises:
            LitPeftError: no training data is named, or the file is missing or of an unknown kind.
        """
        value = self._named("train")
        if value is None:
            raise LitPeftError(self._missing("train"))
        if self.dataset is not None and not is_file(value):
            return self._hub_splits[value]
        text = next((column for column in self.columns("train").values() if column), "text")
        return stream_file(value, "data.train", text, self._unit("train"), self.tsv)

    def _stream_block(self, block: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """Check and tokenize a few rows, as a file that holds nothing else."""
        import datasets

        source, field = self.sources["train"] or str(self.dataset), "data.train"
        shown = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            features = self._stream.features
            table = table_of(block) if features is None else datasets.Dataset.from_dict(block, features=features)
            places = None
            if ROW in block:
                places, table = block[ROW], table.remove_columns(ROW)
            table = self.prepared(table, "train", field, source)
            if places is None or len(places) != len(table):
                # Of rows from a hub, and of those that were unfolded, the numbers are not known.
                field, places = "a streamed block of data.train", None
            require_columns(table, self.columns("train"), field, source)
            rows = Rows(table, list(range(len(table))), field, source, places)
            return list(self.encode(self.check_rows(rows, "train"), "train"))
        finally:
            if shown:
                datasets.enable_progress_bars()

    def _stream_loader(self) -> StreamLoader:
        if self.trainer is not None and (self.trainer.max_steps == -1 or self.trainer.max_epochs not in (None, -1)):
            raise LitPeftError(
                "data.streaming is set, and how many rows an epoch has is not known: set trainer.max_steps, and leave "
                "max_epochs out."
            )
        processes = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        stream = Stream(
            self._stream,
            self._stream_block,
            self.collator("train"),
            self.batch_size,
            self.seed,
            self.shuffle_buffer,
            **processes,
        )
        # Workers are told the epoch when they start.
        loading = {**self._loading(), "persistent_workers": False}
        generator = torch.Generator().manual_seed(self.seed)
        loader = StreamLoader(stream, batch_size=None, generator=generator, **loading)
        loader.epoch = lambda: 0 if self.trainer is None else self.trainer.current_epoch
        loader.trained = self._trained
        self._train_loader = loader
        if self._place:
            loader.load_state_dict(self._place)
        return loader

    def _trained(self) -> int | None:
        """How many batches of the epoch the trainer is done with: it has fetched one more."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)

    def _grouping(self) -> dict[str, Any]:
        """What `SeededBatches` is told of how training examples go into batches."""
        return {"lengths": lengths_of(self.examples("train"))} if self.group_by_length else {}

    def _train_collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        return self.collator("train")

    def _pending(self) -> int:
        """How many batches the trainer holds that it has not trained on yet: it may save on an exception."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.ready - progress.processed

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches of validation examples in order; an empty list if there are none."""
        if "validation" not in self.rows:
            return []
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of test examples in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the rows to predict, in the order of the file, without those in `finished`."""
        every = range(len(self.examples("predict")))
        rows = [row for row in every if row not in self.finished]
        # Every process needs a batch, or prediction would not come to its end; the last row is cheap to run again.
        rows += [every[-1]] * (max(getattr(self.trainer, "world_size", 1), 1) - len(rows))
        return self._loader("predict", sampler=rows if len(rows) != len(every) or self.finished else None)

    def identity(self, split: Split) -> str:
        """Return a hash of a split's examples: the same file, tokenizer and settings give the same."""
        return str(getattr(self.examples(split), "_fingerprint", ""))

    def _loader(self, split: Split, sampler: Iterable[int] | None = None) -> DataLoader[Any]:
        examples, collate = self.examples(split), self.collator(split)
        processes = getattr(self.trainer, "world_size", 1)
        if split in ("validation", "test") and processes > 1:
            examples, collate = Evened(examples, processes), RealOnly(collate)
        return DataLoader(
            examples,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=collate,
            **self._loading(),
        )

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def refuse_unread(where: str, given: Mapping[str, Any]) -> None:
    """Refuse settings that nothing would read.

    Args:
        where: when they are not read, e.g. "without data.dataset".
        given: the settings that are not, by name; those that are false were not given.

    Raises:
        LitPeftError: names the first that was given.
    """
    name = next((name for name, value in given.items() if value), None)
    if name is not None:
        raise LitPeftError(f"data.{name} is set, and has no effect {where}: leave it out.")


def lengths_of(examples: Any) -> list[int]:
    """Return how many tokens each example has; of several texts, the longest."""
    if not hasattr(examples, "with_format"):
        return [len(example["input_ids"]) for example in examples]
    import pyarrow.compute as compute

    lengths: list[int] = []
    for block in examples.select_columns("input_ids").with_format("arrow").iter(10_000):
        column = block["input_ids"]
        if hasattr(column.type.value_type, "value_type"):  # lists of lists
            lengths += [max(map(len, texts)) for texts in column.to_pylist()]
        else:
            lengths += compute.list_value_length(column).to_pylist()
    return lengths
