"""Texts, or pairs of texts, with labels."""

from __future__ import annotations

import string
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_peft.data import label_sets
from lit_peft.data.base import LitDataModule, pad_collator
from lit_peft.data.benchmark_files import join_columns, to_hub_columns, tsv_columns
from lit_peft.data.benchmarks import apply_benchmark, find_benchmark
from lit_peft.data.collate import PadCollator
from lit_peft.data.datasets_internals import get_fingerprint
from lit_peft.data.encoding import tokenize
from lit_peft.data.files import column_values, fingerprint, require_columns
from lit_peft.data.labels import Label, canonical_label, check_hidden_labels, parse_number
from lit_peft.data.notes import drop_cut_column, share_of
from lit_peft.data.rows import Rows, Split, require_text, text_key
from lit_peft.data.settings import refuse_unused
from lit_peft.data.streaming import training_sample
from lit_peft.data.text_encoding import encode_texts
from lit_peft.util.errors import LitPeftError, closest

if TYPE_CHECKING:
    from datasets import Dataset


class TextClassificationData(LitDataModule):
    """Texts (or pairs of texts) with one label each, or several.

    Labels may be numbers or names; the classes are the sorted labels of the training rows. A number written as text
    ("1", "1.0") is the same label as the number. Batches: `input_ids`, `attention_mask`, `token_type_ids` if the
    tokenizer has them, all [batch, length], and `labels` [batch].

    Rows have several labels if the label column has lists (of names or numbers; [] for no label), if
    `label_separator` divides its text, or if `label_columns` names a column for each label. `labels` of a batch are
    then 0 or 1 [batch, labels], float32. With `regression`, `label_columns` are the numbers to predict.

    With `benchmark`, the dataset, the columns, the labels and the metric that selects the best checkpoint are those of
    the benchmark. `validation` and `test` are its validation split, because the labels of its test split are hidden.
    Its splits stay as they are: nothing is removed from them. Set `dataset` to read it from another place, or `train`,
    `validation` or `test` to read files with the same columns. MultiRC's evaluation batches have `questions` [batch]:
    the number of the question that each row answers.

    Args:
        text_column: column of the text.
        text_pair_column: column of a second text, for tasks on pairs.
        label_column: column of the label; `labels` if there is no `label`.
        labels: all labels, in the order of the classes; unset: those of the training rows, sorted. Needed to predict or
            test without the training file.
        regression: labels are numbers to predict, not classes; not with `labels`.
        label_columns: a column of 0 and 1 for each label, instead of `label_column`; with `regression`, the columns of
            the numbers to predict.
        label_separator: what separates the labels in a text such as "sports, politics", e.g. ",".
        benchmark: a task of GLUE or SuperGLUE by name, such as "glue/mrpc" or "super_glue/boolq".
        **common: see `LitDataModule`.
    """

    task = "sequence_classification"

    def __init__(
        self,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        labels: list[str] | None = None,
        regression: bool = False,
        benchmark: str | None = None,
        label_columns: list[str] | None = None,
        label_separator: str | None = None,
        **common: Any,
    ) -> None:
        self.regression = regression
        self.monitor: tuple[str, str] | None = ("val_pearson", "max") if regression else None
        self._templates: dict[str, str] = {}
        self._question: tuple[str, ...] = ()
        self._config = ""
        if benchmark is not None:
            known = find_benchmark(benchmark)
            own = {
                "text_column": text_column != "text",
                "text_pair_column": text_pair_column is not None,
                "label_column": label_column != "label",
                "regression": regression and not known.regression,
                "label_columns": label_columns is not None,
                "label_separator": label_separator is not None,
            }
            refuse_unused(f"with data.benchmark {benchmark!r}, which sets it", own)
            apply_benchmark(known, common, known.validation)
            self._config = known.config
            self.tsv = tsv_columns(known.config)
            self._question = known.question
            self.regression, self.monitor, self.drops_overlap = known.regression, (known.monitor, "max"), False
            text_column = self._column_of("text", known.text)
            text_pair_column = known.text_pair and self._column_of("pair", known.text_pair)
            label_column = "label"
        if self.regression:
            given = {"labels": labels is not None, "label_separator": label_separator is not None}
            refuse_unused("with data.regression, because labels are then numbers", given)
        if label_columns is not None:
            label_sets.check_columns(label_columns, self.regression)
            separate = {"label_separator": label_separator is not None, "label_column": label_column != "label"}
            refuse_unused("with data.label_columns", {**separate, "labels": labels is not None})
        super().__init__(**common)
        self.text_column = text_column
        self.text_pair_column = text_pair_column
        self.label_column = label_column
        self.labels = labels
        self.label_columns = label_columns
        self.label_separator = label_separator
        # How the rows write several labels; None: each has one, or no table has been read.
        self._sets: label_sets.LabelSets | None = None
        self._is_read = False
        self.optional_columns = ("labels",) if label_column == "label" else ()

    # ----------------------------------------------------------------------------------------- labels

    @property
    def problem_type(self) -> str | None:
        """`single_label`, `multi_label`, or `regression` for several numbers; None for one, or if it is unknown."""
        if self.regression:
            return None if self.label_columns is None else "regression"
        if self.label_columns is not None or self.label_separator is not None:
            return "multi_label"
        if not self._is_read and not self._config:
            # With `labels`, prediction does without the training file, which may be gone.
            with suppress(*([] if self.labels is None else [LitPeftError])):
                training_sample(self)
        if self._sets is not None:
            return "multi_label"
        return "single_label" if self._is_read or self._config else None

    @cached_property
    def _label_ids(self) -> dict[Label, int]:
        if self.label_columns is not None:
            return {name: index for index, name in enumerate(self.label_columns)}
        if self.labels is not None:
            names = [canonical_label(label) for label in self.labels]
            if None in names or len(set(names)) < len(names) or len(names) < 2:
                raise LitPeftError(f"data.labels is {self.labels}; give at least two different labels.")
            return {label: index for index, label in enumerate(names) if label is not None}
        if "train" not in self.rows:
            raise LitPeftError("data.train is not given, so the labels are unknown; give data.train or data.labels.")
        rows = self.rows["train"]
        feature = rows.table.features[self.label_column]
        declared = getattr(feature if self._sets is None else getattr(feature, "feature", None), "names", None)
        if declared:
            return {name: index for index, name in enumerate(declared)}
        if self._sets is not None:
            present = {label for labels in self._sets.read(rows).values() for label in labels}
        else:
            values = self._labels_of(rows)
            present = {self._label(rows, values, index) for index in rows.indices}
        if len(present) < 2:
            raise LitPeftError(
                f"{rows.field} {rows.source!r}: column {self.label_column!r} has only the label "
                f"{next(iter(present), None)!r}; classification needs at least two."
            )
        # Numbers by value, then names by alphabet.
        ordered = sorted(present, key=lambda label: (isinstance(label, str), label))
        return {label: index for index, label in enumerate(ordered)}

    @property
    def label_names(self) -> list[str] | None:
        """The labels as text, in the order of the classes; the columns of several targets. None for one target."""
        return None if self.regression and self.label_columns is None else [str(label) for label in self._label_ids]

    @property
    def num_labels(self) -> int:
        """The number of classes; in regression, of targets."""
        return 1 if self.regression and self.label_columns is None else len(self._label_ids)

    def _labels_of(self, rows: Rows) -> list[Any]:
        """Return the labels of the rows' table in one form; None for an empty cell."""
        table = rows.table
        if self.regression:
            return [parse_number(value) for value in column_values(table, self.label_column)]
        names = getattr(table.features[self.label_column], "names", None)
        values = column_values(table, self.label_column)
        if names:
            # Hub datasets hide the labels of their test split as -1.
            return [None if value is None or value < 0 else names[value] for value in values]
        labels = []
        for index, value in enumerate(values):
            try:
                labels.append(canonical_label(value))
            except LitPeftError as exc:
                raise LitPeftError(f"{rows.locate(index)}: {exc}") from exc
        return labels

    def _label(self, rows: Rows, values: list[Any], index: int) -> Any:
        value = values[index]
        if value is None and self.regression:
            raise LitPeftError(f"{rows.locate(index)} has no number in column {self.label_column!r}; correct it.")
        if value is None:
            raise LitPeftError(f"{rows.locate(index)} has no label in column {self.label_column!r}; add it.")
        return value

    # ------------------------------------------------------------------------------------------- rows

    def _column_of(self, name: str, template: str) -> str:
        """Return the column that a template consists of, or the name of the one to make from it."""
        if template.count("{") == 1 and template[0] == "{" and template[-1] == "}":
            return template[1:-1]
        self._templates[f"{name} of the benchmark"] = template
        return f"{name} of the benchmark"

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepare_table`; texts that a benchmark keeps in several columns are joined."""
        self._find_labels(table, split, field)
        if self._config:
            table = to_hub_columns(table, self._config, self.label_column, split, f"{field} {source!r}")
        table = super().prepare_table(table, split, field, source)
        for column, template in self._templates.items():
            names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
            require_columns(table, {f"column {name!r} of the benchmark": name for name in names}, field, source)
            table = table.map(
                join_columns,
                batched=True,
                fn_kwargs={"column": column, "template": template, "names": names},
                new_fingerprint=fingerprint(get_fingerprint(table), template),
            )
        is_benchmark_tsv = self.tsv is not None and source.lower().endswith(".tsv")
        return self._drop_broken_lines(table, split, field) if is_benchmark_tsv else table

    def _find_labels(self, table: Dataset, split: Split, field: str) -> None:
        """Find the column of the labels, and whether each row has several; note it if so."""
        if split == "predict" or self._config or self.regression:
            return
        names = table.column_names
        if self.label_column == "label" and "label" not in names and "labels" in names:
            self.label_column = "labels"
        found = label_sets.find_label_sets(table, self.label_column, self.label_columns, self.label_separator)
        # Once lists are found, all files must have them; reading a row without one is an error.
        self._sets, self._is_read = found or self._sets, True
        if found is not None:
            self.notes.add(f"{field}: {found.describe()}.", once=True)

    def _drop_broken_lines(self, table: Dataset, split: Split, field: str) -> Dataset:
        """Drop the lines of GLUE's files that a line break within a cell has split."""
        names = [name for name in self.columns(split).values() if name and name in table.column_names]
        columns = [column_values(table, name) for name in names]
        kept = [index for index, cells in enumerate(zip(*columns, strict=True)) if all(cells)]
        if not 0 < len(kept) < len(table):
            return table
        lines = share_of(len(table) - len(kept), len(table), "lines")
        self.notes.add(f"{field}: {lines} skipped, because they lack cells.")
        return table.select(kept)

    def columns(self, split: Split) -> dict[str, str | None]:
        """The text column(s), and the label column except for prediction."""
        needed = {"data.text_column": self.text_column, "data.text_pair_column": self.text_pair_column}
        if split != "predict" and self.label_columns is not None:
            needed.update({f"data.label_columns {name!r}": name for name in self.label_columns})
        elif split != "predict":
            needed["data.label_column"] = self.label_column
        return needed

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The text or the pair, whatever its label."""
        return text_key(table, (self.text_column, self.text_pair_column))

    def group_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """As `duplicate_key`; for a benchmark with several answers to a question, the text the question is about."""
        return text_key(table, self._question[:1]) if self._question else super().group_key(table)

    def _questions(self, rows: Rows) -> list[int]:
        """Number the rows' questions; rows with the same texts, and `idx` if there is one, share a question."""
        columns = [column_values(rows.table, name) for name in self._question]
        if "idx" in rows.table.column_names:
            cells = column_values(rows.table, "idx")
            columns.append(
                [(cell.get("paragraph"), cell.get("question")) if isinstance(cell, dict) else 0 for cell in cells]
            )
        numbers: dict[Hashable, int] = {}
        keys = [tuple(str(column[index]) for column in columns) for index in rows.indices]
        return [numbers.setdefault(key, len(numbers)) for key in keys]

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a text and, except for prediction, a label."""
        require_text(rows, (self.text_column, self.text_pair_column))
        if split != "predict" and self._several:
            # Without the labels' numbers, which are known once the training rows are.
            _ = self._sets.read(rows) if self._sets is not None else self._vectors(rows)
        elif split != "predict":
            self._check_hidden_labels(rows, split)
            values = self._labels_of(rows)
            for index in rows.indices:
                self._label(rows, values, index)
        return rows

    @property
    def _several(self) -> bool:
        """Whether each row has several labels, or several numbers to predict."""
        return self._sets is not None or self.label_columns is not None

    def _vectors(self, rows: Rows) -> list[list[float]]:
        """Return the numbers to predict, or 0 or 1 for each label, of each row."""
        if self._sets is None:
            return label_sets.read_targets(rows, self.label_columns or ())
        return label_sets.to_vectors(rows, self._sets.read(rows), self._label_ids)

    def _check_hidden_labels(self, rows: Rows, split: Split) -> None:
        if self.regression:
            return
        declared = getattr(rows.table.features[self.label_column], "names", None)
        # Of declared classes the table has numbers, and the hidden ones are none of them.
        labels = column_values(rows.table, self.label_column) if declared else self._labels_of(rows)
        given = declared or self.labels
        known = None if given is None else [] if declared else [canonical_label(label) for label in given]
        if known is None and split != "train" and "train" in self.rows:
            known = list(self._label_ids)
        check_hidden_labels(rows, labels, self.notes, known)

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens, cut to `max_length`, and the label's number."""
        label_column = None if split == "predict" or self._several else self.label_column
        vectors = self._vectors(rows) if self._several and split != "predict" else None
        if label_column is not None:
            values = self._labels_of(rows)
            for index in rows.indices:
                label = self._label(rows, values, index)
                if not self.regression and label not in self._label_ids:
                    known = [str(name) for name in self._label_ids]
                    listed = (
                        ", ".join(map(repr, known)) if len(known) <= 10 else f"{closest(str(label), known)} and more"
                    )
                    raise LitPeftError(
                        f"{rows.locate(index)}: label {label!r} does not occur in training, which has {listed}; "
                        "correct it, or list all in data.labels."
                    )
        names = getattr(rows.table.features[label_column], "names", None) if label_column else None
        table = tokenize(
            rows,
            encode_texts,
            self.tokenizer,
            f"Tokenizing {split}",
            self.num_proc,
            text_column=self.text_column,
            text_pair_column=self.text_pair_column,
            label_column=label_column,
            declared=names,
            label_ids=self._label_ids if label_column and not self.regression else None,
            max_length=self.max_length,
        )
        table = drop_cut_column(table, self.notes, split, "texts", self.max_length)
        if vectors is not None:
            label_sets.note_label_sets(
                self.notes, split, vectors, None if self._sets is None else list(self._label_ids)
            )
            return table.add_column("labels", vectors)
        return table.add_column("questions", self._questions(rows)) if self._scores_questions(split) else table

    def collator(self, split: Split) -> PadCollator:
        """As `LitDataModule.collator`; evaluation batches keep the numbers of the questions."""
        return replace(pad_collator(self), extra_keys=("questions",) if self._scores_questions(split) else ())

    def _scores_questions(self, split: Split) -> bool:
        """Tell whether the answers to a question are also scored together."""
        return bool(self._question) and split in ("validation", "test")
