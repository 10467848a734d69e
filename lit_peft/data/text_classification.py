"""One label per text, or per pair of texts."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import LitDataModule, Rows, Split, refuse_unread
from lit_peft.data.benchmarks import fill_in, find_benchmark
from lit_peft.data.collate import PadCollator
from lit_peft.data.files import column_values, fingerprint, require_columns
from lit_peft.data.original_files import hub_form, tsv_columns
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset

Label = int | str


class TextClassificationData(LitDataModule):
    """Texts (or pairs of texts) with one label each.

    Labels may be numbers or names; their sorted list in the training rows is what the model predicts. A
    number written as text ("1", "1.0") is the same label as the number. Batches: `input_ids`,
    `attention_mask`, `token_type_ids` if the tokenizer has them, all [batch, length], and `labels` [batch].

    With `benchmark`, dataset, columns, pairs, labels and the metric that tells the best checkpoint are that
    benchmark's; `validation` and `test` are its validation split, since the labels of its test split are hidden, and
    its splits stay as they are. `dataset` names another place to take it from; files of the same columns are read
    where `train`, `validation` or `test` names one. MultiRC's batches to evaluate have `questions` [batch], which
    question each row is an answer to.

    Args:
        text_column: column of the text.
        text_pair_column: column of a second text, for tasks on pairs.
        label_column: column of the label.
        labels: all labels, in the order the model is to number them; unset: those of the training rows,
            sorted. Needed to predict or test without the training file.
        regression: labels are numbers to predict, not classes; without `labels`.
        benchmark: one of GLUE or SuperGLUE by name, such as "glue/mrpc" or "super_glue/boolq".
        **common: see `LitDataModule`.
    """

    def __init__(
        self,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        labels: list[str] | None = None,
        regression: bool = False,
        benchmark: str | None = None,
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
            }
            refuse_unread(f"with data.benchmark {benchmark!r}, which says that itself", own)
            fill_in(known, common, known.validation)
            self._config = known.config
            self.tsv = tsv_columns(known.config)
            self._question = known.question
            self.regression, self.monitor, self.drops_overlap = known.regression, (known.monitor, "max"), False
            text_column = self._column_of("text", known.text)
            text_pair_column = known.text_pair and self._column_of("pair", known.text_pair)
            label_column = "label"
        if self.regression:
            refuse_unread("in regression, whose labels are numbers", {"labels": labels is not None})
        super().__init__(**common)
        self.text_column = text_column
        self.text_pair_column = text_pair_column
        self.label_column = label_column
        self.labels = labels

    # ----------------------------------------------------------------------------------------- labels

    @cached_property
    def _label_ids(self) -> dict[Label, int]:
        if self.labels is not None:
            names = [canonical_label(label) for label in self.labels]
            if None in names or len(set(names)) < len(names) or len(names) < 2:
                raise LitPeftError(f"data.labels is {self.labels}; give at least two different labels.")
            return {label: at for at, label in enumerate(names) if label is not None}
        if "train" not in self.rows:
            raise LitPeftError("data.train is not given, so the labels are not known; give data.train or data.labels.")
        rows = self.rows["train"]
        declared = getattr(rows.table.features[self.label_column], "names", None)
        if declared:
            return {name: at for at, name in enumerate(declared)}
        values = self._labels_of(rows)
        seen = {self._label(rows, values, row) for row in rows.numbers}
        if len(seen) < 2:
            raise LitPeftError(
                f"{rows.field} {rows.source!r}: column {self.label_column!r} holds only the label "
                f"{next(iter(seen))!r}; at least two are needed to classify."
            )
        # Numbers by value, before names by alphabet.
        ordered = sorted(seen, key=lambda label: (isinstance(label, str), label))
        return {label: at for at, label in enumerate(ordered)}

    @property
    def label_names(self) -> list[str] | None:
        """The labels as text; a label's position is the class the model predicts. None in regression."""
        return None if self.regression else [str(label) for label in self._label_ids]

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 in regression."""
        return 1 if self.regression else len(self._label_ids)

    def _labels_of(self, rows: Rows) -> list[Any]:
        """Return the labels of the rows' table in one form; None where there is none."""
        table = rows.table
        if self.regression:
            return [number(value) for value in column_values(table, self.label_column)]
        names = getattr(table.features[self.label_column], "names", None)
        values = column_values(table, self.label_column)
        if names:
            # Hub datasets hide the labels of their test split as -1.
            return [None if value is None or value < 0 else names[value] for value in values]
        labels = []
        for row, value in enumerate(values):
            try:
                labels.append(canonical_label(value))
            except LitPeftError as exc:
                raise LitPeftError(f"{rows.where(row)}: {exc}") from exc
        return labels

    def _label(self, rows: Rows, values: list[Any], row: int) -> Any:
        value = values[row]
        if value is None and self.regression:
            raise LitPeftError(f"{rows.where(row)} has no number in column {self.label_column!r}; correct it.")
        if value is None:
            raise LitPeftError(f"{rows.where(row)} has no label in column {self.label_column!r}; add it.")
        return value

    # ------------------------------------------------------------------------------------------- rows

    def _column_of(self, name: str, template: str) -> str:
        """The column a template names, or the one to make from it."""
        if template.count("{") == 1 and template[0] == "{" and template[-1] == "}":
            return template[1:-1]
        self._templates[f"{name} of the benchmark"] = template
        return f"{name} of the benchmark"

    def prepared(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """Put together the texts of benchmarks that have them in several columns."""
        if self._config:
            table = hub_form(table, self._config, self.label_column, split, f"{field} {source!r}")
        table = super().prepared(table, split, field, source)
        for column, template in self._templates.items():
            names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
            require_columns(table, {f"column {name!r} of the benchmark": name for name in names}, field, source)
            table = table.map(
                fill_template,
                batched=True,
                fn_kwargs={"column": column, "template": template, "names": names},
                new_fingerprint=fingerprint(table, template),
            )
        own_file = self.tsv is not None and source.lower().endswith(".tsv")
        return self._whole_lines(table, split, field) if own_file else table

    def _whole_lines(self, table: Dataset, split: Split, field: str) -> Dataset:
        """Leave out what line breaks within a cell have torn apart in GLUE's files."""
        names = [name for name in self.columns(split).values() if name and name in table.column_names]
        columns = [column_values(table, name) for name in names]
        kept = [row for row, cells in enumerate(zip(*columns, strict=True)) if all(cells)]
        if not 0 < len(kept) < len(table):
            return table
        self.say(f"{field}: {len(table) - len(kept)} line(s) that lack cells passed over.")
        return table.select(kept)

    def columns(self, split: Split) -> dict[str, str | None]:
        """The text column(s), and the label column except for prediction."""
        needed = {"data.text_column": self.text_column, "data.text_pair_column": self.text_pair_column}
        if split != "predict":
            needed["data.label_column"] = self.label_column
        return needed

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The text or the pair, whatever its label."""
        return self.text_key(table, (self.text_column, self.text_pair_column))

    def group_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """As `duplicate_key`; of a benchmark with several answers to a question, the text it is about."""
        return self.text_key(table, self._question[:1]) if self._question else super().group_key(table)

    def _questions(self, rows: Rows) -> list[int]:
        """Number the rows' questions: those of the same texts, and of the same `idx` where there is one."""
        columns = [column_values(rows.table, name) for name in self._question]
        if "idx" in rows.table.column_names:
            places = column_values(rows.table, "idx")
            columns.append([(at.get("paragraph"), at.get("question")) if isinstance(at, dict) else 0 for at in places])
        numbers: dict[Hashable, int] = {}
        return [numbers.setdefault(tuple(map(str, (c[row] for c in columns))), len(numbers)) for row in rows.numbers]

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a text, and a label that training has seen."""
        self.require_text(rows, (self.text_column, self.text_pair_column))
        if split != "predict":
            values = self._labels_of(rows)
            for row in rows.numbers:
                self._label(rows, values, row)
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens, cut to `max_length`, and the label's number."""
        label_column = None if split == "predict" else self.label_column
        if label_column is not None:
            values = self._labels_of(rows)
            for row in rows.numbers:
                label = self._label(rows, values, row)
                if not self.regression and label not in self._label_ids:
                    known = [str(name) for name in self._label_ids]
                    listed = (
                        ", ".join(map(repr, known)) if len(known) <= 10 else f"{closest(str(label), known)} and more"
                    )
                    raise LitPeftError(
                        f"{rows.where(row)}: label {label!r} does not occur in training, which has {listed}; "
                        "correct it, or list all in data.labels."
                    )
        names = getattr(rows.table.features[label_column], "names", None) if label_column else None
        table = self.tokenized(
            rows,
            encode_texts,
            f"Tokenizing {split}",
            text_column=self.text_column,
            text_pair_column=self.text_pair_column,
            label_column=label_column,
            declared=names,
            label_ids=self._label_ids if label_column and not self.regression else None,
            max_length=self.max_length,
        )
        table = self.without_cuts(table, split, "texts")
        return table.add_column("questions", self._questions(rows)) if self._judged(split) else table

    def collator(self, split: Split) -> PadCollator:
        """As `LitDataModule.collator`; to evaluate, the questions' numbers go along."""
        return replace(self.padding(), passed=("questions",) if self._judged(split) else ())

    def _judged(self, split: Split) -> bool:
        """Whether the answers to a question are also judged together."""
        return bool(self._question) and split in ("validation", "test")


def canonical_label(value: Any) -> Label | None:
    """Bring a label to one form: whole numbers as int, however they are written; all else as text.

    Args:
        value: a cell.

    Returns:
        The label; None for an empty cell.

    Raises:
        LitPeftError: a number with a fraction, or a list.
    """
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
        raise LitPeftError(f"{value} in data.label_column is not a class; labels are whole numbers or names.")
    if isinstance(value, str):
        text = value.strip()
        number = re.fullmatch(r"(0|-?[1-9]\d*)(\.0+)?", text)
        return int(number.group(1)) if number else text or None
    raise LitPeftError(f"{brief(value)} in data.label_column is not a class; labels are whole numbers or names.")


def number(value: Any) -> float | None:
    """Return a cell as a number; None where it is none."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def fill_template(batch: dict[str, list[Any]], column: str, template: str, names: list[str]) -> dict[str, list[Any]]:
    """Return a column of texts made from a template and the columns it names."""
    rows = zip(*(batch[name] for name in names), strict=True)
    return {column: [template.format(**dict(zip(names, row, strict=True))) for row in rows]}


def encode_texts(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    text_column: str,
    text_pair_column: str | None,
    label_column: str | None,
    declared: list[str] | None,
    label_ids: dict[Label, int] | None,
    max_length: int,
) -> dict[str, list[Any]]:
    """Tokenize a batch of texts; `cut` is how many tokens were cut away."""
    texts = [str(text) for text in batch[text_column]]
    pairs = [str(text) for text in batch[text_pair_column]] if text_pair_column else None
    # Once without a limit to count, and only the long ones again.
    encoded = tokenizer(texts, pairs, truncation=False, verbose=False)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    out: dict[str, list[Any]] = {key: list(encoded[key]) for key in keys}
    out["cut"] = [max(0, len(ids) - max_length) for ids in out["input_ids"]]
    long = [at for at, cut in enumerate(out["cut"]) if cut]
    if long:
        cut = tokenizer(
            [texts[at] for at in long],
            [pairs[at] for at in long] if pairs else None,
            truncation=True,
            max_length=max_length,
        )
        for key in keys:
            for at, ids in zip(long, cut[key], strict=True):
                out[key][at] = ids
    if label_column is not None and label_ids is None:
        out["labels"] = [number(value) for value in batch[label_column]]
    elif label_column is not None and label_ids is not None:
        labels = batch[label_column]
        known = [declared[label] if declared else canonical_label(label) for label in labels]
        out["labels"] = [label_ids[label] for label in known if label is not None]
    return out
