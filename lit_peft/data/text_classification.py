"""One label per text, or per pair of texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import LitDataModule, Rows, Split
from lit_peft.data.files import column_values
from lit_peft.errors import LitPeftError, closest

if TYPE_CHECKING:
    from datasets import Dataset

Label = int | str


class TextClassificationData(LitDataModule):
    """Texts (or pairs of texts) with one label each.

    Labels may be numbers or names; their sorted list in the training rows is what the model predicts. A
    number written as text ("1", "1.0") is the same label as the number. Batches: `input_ids`,
    `attention_mask`, `token_type_ids` if the tokenizer has them, all [batch, length], and `labels` [batch].

    Args:
        text_column: column of the text.
        text_pair_column: column of a second text, for tasks on pairs.
        label_column: column of the label.
        labels: all labels, in the order the model is to number them; unset: those of the training rows,
            sorted. Needed to predict or test without the training file.
        **common: see `LitDataModule`.
    """

    def __init__(
        self,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        labels: list[str] | None = None,
        **common: Any,
    ) -> None:
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
        values = self._labels_of(rows.table)
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
    def label_names(self) -> list[str]:
        """The labels as text; a label's position is the class the model predicts."""
        return [str(label) for label in self._label_ids]

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self._label_ids)

    def _labels_of(self, table: Dataset) -> list[Label | None]:
        """Return a table's labels in one form; None where there is none."""
        names = getattr(table.features[self.label_column], "names", None)
        values = column_values(table, self.label_column)
        if names:
            # Hub datasets hide the labels of their test split as -1.
            return [None if value is None or value < 0 else names[value] for value in values]
        return [canonical_label(value) for value in values]

    def _label(self, rows: Rows, values: list[Label | None], row: int) -> Label:
        value = values[row]
        if value is None:
            raise LitPeftError(f"{rows.where(row)} has no label in column {self.label_column!r}; add it.")
        return value

    # ------------------------------------------------------------------------------------------- rows

    def columns(self, split: Split) -> dict[str, str | None]:
        """The text column(s), and the label column except for prediction."""
        needed = {"data.text_column": self.text_column, "data.text_pair_column": self.text_pair_column}
        if split != "predict":
            needed["data.label_column"] = self.label_column
        return needed

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The text or the pair, whatever its label."""
        return self.text_key(table, (self.text_column, self.text_pair_column))

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a text, and a label that training has seen."""
        self.require_text(rows, (self.text_column, self.text_pair_column))
        if split != "predict":
            values = self._labels_of(rows.table)
            for row in rows.numbers:
                self._label(rows, values, row)
        return rows

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens, cut to `max_length`, and the label's number."""
        label_column = None if split == "predict" else self.label_column
        if label_column is not None:
            values = self._labels_of(rows.table)
            for row in rows.numbers:
                label = self._label(rows, values, row)
                if label not in self._label_ids:
                    raise LitPeftError(
                        f"{rows.where(row)}: label {label!r} does not occur in training, which has "
                        f"{closest(str(label), self.label_names)}; correct it, or list all in data.labels."
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
            label_ids=self._label_ids if label_column else None,
            max_length=self.max_length,
        )
        cut = sum(length > self.max_length for length in column_values(table, "length"))
        if cut:
            self.say(f"data.{split}: {cut} of {len(table)} texts cut to {self.max_length} tokens (data.max_length).")
        return table.remove_columns("length")


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
        raise LitPeftError(f"data.label_column: {value} is not a class; labels are whole numbers or names.")
    if isinstance(value, str):
        text = value.strip()
        number = re.fullmatch(r"(0|-?[1-9]\d*)(\.0+)?", text)
        return int(number.group(1)) if number else text or None
    raise LitPeftError(f"data.label_column: {value!r} is not a class; labels are whole numbers or names.")


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
    """Tokenize a batch of texts; `length` is the length in tokens before cutting."""
    texts = [str(text) for text in batch[text_column]]
    pairs = [str(text) for text in batch[text_pair_column]] if text_pair_column else None
    # Once without a limit to count, and only the long ones again.
    encoded = tokenizer(texts, pairs, truncation=False, verbose=False)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    out: dict[str, list[Any]] = {key: list(encoded[key]) for key in keys}
    out["length"] = [len(ids) for ids in out["input_ids"]]
    long = [at for at, length in enumerate(out["length"]) if length > max_length]
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
    if label_column is not None and label_ids is not None:
        labels = batch[label_column]
        known = [declared[label] if declared else canonical_label(label) for label in labels]
        out["labels"] = [label_ids[label] for label in known if label is not None]
    return out
