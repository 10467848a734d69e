"""Pairs of similar texts, with negatives or scores, to train embeddings on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lit_peft.data.base import LitDataModule, pad_collator
from lit_peft.data.collate import PadCollator
from lit_peft.data.encoding import tokenize
from lit_peft.data.files import column_values
from lit_peft.data.loaders import Collate
from lit_peft.data.notes import drop_cut_column, share_of
from lit_peft.data.rows import ROW_NUMBER, Rows, Split, require_text, text_key
from lit_peft.data.settings import refuse_unused
from lit_peft.data.text_columns import (
    ANCHOR,
    ANCHORS,
    POSITIVE,
    POSITIVES,
    SCORE,
    SCORES,
    TEXT,
    TEXTS,
    encode_rows,
    find_column,
    find_negatives,
    negative_columns,
    negative_texts,
    one_positive_per_row,
    rename,
)
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from datasets import Dataset

_ROLES = (ANCHOR, POSITIVE, "negative", TEXT)
# So many bits of a hash tell texts apart; metrics keep them as float32 numbers.
_KEY_BITS = 48


class EmbeddingData(LitDataModule):
    """Rows of an anchor and a positive, with any number of negatives, or with a score of their similarity.

    The columns are found by their names, which are noted: anchor, query, question, sentence1, text1 or title; positive,
    pos, document, passage, answer, response, sentence2, text2, context, body or abstract; negative, neg, hard_negative,
    negative_1, …; score or similarity. A column of negatives may hold lists, and so may that of the positives, each of
    which then gives a row; an empty list gives none, which is noted. With `pairs`, each row is one text, of which the
    pair is made. Prediction reads one text per row.

    Batches: `input_ids`, `attention_mask`, `token_type_ids` if the tokenizer has them, all [texts, length]: the anchors
    of all rows, their positives, then all negatives; `texts`, the numbers of the three; `lengths`, the number of tokens
    of each text; `owners` [negatives], the row of each negative; `keys` [texts], equal numbers for equal texts; and
    `scores` [rows] if the rows have scores. In prediction, [batch, length] and `lengths` only.

    Args:
        anchor_column: column of the anchor (the query); unset: it is found.
        positive_column: column of the positive (the document); unset: it is found.
        negative_columns: columns of the negatives; unset: they are found. An empty list: none is read.
        score_column: column of the score; unset: it is found. An empty text: none is read.
        text_column: column of the text in prediction, and with `pairs`; unset: it is found.
        prefixes: what is put before each text, by its place in the row: {anchor: "query: ", positive: "passage: "}.
            Negatives have the positive's unless `negative` is given. In prediction, a column that is that of the
            anchor or the positive in training has its prefix, and any other has that of `text`.
        pairs: make pairs of single texts. `halves`: the first half of the words is the anchor, the second half the
            positive. `same`: both are the whole text, and dropout makes them differ (SimCSE). Validation and test files
            may have pairs of their own, whose columns are found.
        **common: see `LitDataModule`.
    """

    task = "embedding"

    def __init__(
        self,
        anchor_column: str | None = None,
        positive_column: str | None = None,
        negative_columns: list[str] | None = None,
        score_column: str | None = None,
        text_column: str | None = None,
        prefixes: dict[str, str] | None = None,
        pairs: Literal["halves", "same"] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.anchor_column = anchor_column
        self.positive_column = positive_column
        self.negative_columns = negative_columns
        self.score_column = score_column
        self.text_column = text_column
        self.prefixes = dict(prefixes or {})
        self.pairs = pairs
        # With `pairs`, the splits whose rows are pairs already.
        self._given: set[Split] = set()
        # The first row of each kind, see `refuse_rows`, and the kinds that the task refuses.
        self._kinds: dict[tuple[Split, str], str] = {}
        self._refused: dict[tuple[Split, str], str] = {}
        # The place in a row that the text of prediction has.
        self._predicted = TEXT
        if pairs not in (None, "halves", "same"):
            raise LitPeftError(f"data.pairs is {brief(pairs)}; use 'halves' or 'same'.")
        for role in self.prefixes:
            if role not in _ROLES:
                raise LitPeftError(
                    f"data.prefixes has {brief(role)}, which is not known: use {closest(role, _ROLES, n=len(_ROLES))}."
                )
        if pairs is not None:
            given: dict[str, Any] = {"anchor_column": anchor_column, "positive_column": positive_column}
            given |= {"negative_columns": negative_columns, "score_column": score_column}
            refuse_unused("with data.pairs, because the rows are single texts", given)
        named = (anchor_column, positive_column, score_column, text_column, *(negative_columns or ()))
        known = (*ANCHORS, *POSITIVES, *SCORES, *TEXTS, "negative", "negatives", "neg", "hard_negative")
        self.optional_columns = tuple(dict.fromkeys(name for name in (*named, *known) if name))

    def columns(self, split: Split) -> dict[str, str | None]:
        """The columns of a prepared table, which have the same names whatever those of the file are."""
        if split == "predict" or self._makes_pairs(split):
            return {"data.text_column": TEXT}
        return {"data.anchor_column": ANCHOR, "data.positive_column": POSITIVE}

    def _makes_pairs(self, split: Split) -> bool:
        """Tell whether a split's rows are single texts, of which pairs are made."""
        return self.pairs is not None and split not in self._given

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """Find the columns, note them, and give them the names that the other methods know."""
        if self.pairs is not None and split in ("validation", "test"):
            has_both = all(set(known) & set(table.column_names) for known in (ANCHORS, POSITIVES))
            (self._given.add if has_both else self._given.discard)(split)
        if split == "predict" or self._makes_pairs(split):
            found = find_column(table, "data.text_column", self.text_column, TEXTS, field, source)
            if split == "predict" and self.prefixes:
                self._note_prefix(found)
            # Without columns that would be taken for pairs.
            stray = [name for name in (ANCHOR, POSITIVE) if name in table.column_names and name != found]
            return rename(table.remove_columns(stray), {found: TEXT})
        anchor = find_column(table, "data.anchor_column", self.anchor_column, ANCHORS, field, source)
        positive = find_column(table, "data.positive_column", self.positive_column, POSITIVES, field, source)
        negatives = find_negatives(table, self.negative_columns, field, source)
        score = self.score_column
        if score is None:
            score = next((name for name in SCORES if name in table.column_names), "")
        elif score:
            find_column(table, "data.score_column", score, (), field, source)
        roles = {ANCHOR: [anchor], POSITIVE: [positive], "negatives": negatives, SCORE: [score] if score else []}
        used = [name for names in roles.values() for name in names]
        if len(set(used)) < len(used):
            raise LitPeftError(
                f"{field} {source!r}: one column has two places in the row ({', '.join(used)}); set "
                "data.anchor_column, data.positive_column, data.negative_columns and data.score_column."
            )
        said = ", ".join(f"{role} {', '.join(map(repr, names))}" for role, names in roles.items() if names)
        known = {*ANCHORS, *POSITIVES, *SCORES, "label", "labels"}
        unread = [repr(name) for name in table.column_names if name not in used and name.lower() in known]
        more = f"; not read: {', '.join(unread)}" if unread else ""
        self.notes.add(f"{field}: {said}{more}.", once=True)
        names = {anchor: ANCHOR, positive: POSITIVE, **({score: SCORE} if score else {})}
        names |= {name: f"negative_{index}" for index, name in enumerate(negatives, start=1)}
        table = rename(table, names)
        # Unread columns that happen to have such a name.
        others = (*negative_columns(table.column_names), SCORE)
        stray = [name for name in others if name in table.column_names and name not in names.values()]
        return self._one_positive_per_row(table.remove_columns(stray), field, source)

    def _one_positive_per_row(self, table: Dataset, field: str, source: str) -> Dataset:
        """Make a row of each positive; rows without one are noted."""
        rows = one_positive_per_row(table)
        if ROW_NUMBER not in rows.column_names:
            return rows
        dropped = len(table) - len(set(column_values(rows, ROW_NUMBER)))
        if dropped and dropped == len(table) and not self.streaming:
            raise LitPeftError(f"{field} {source!r}: no row has a positive; each list of positives is empty.")
        if dropped:
            of_all = share_of(dropped, len(table), "rows")
            self.notes.add(f"{field} {source!r}: {of_all} dropped, because their list of positives is empty.")
        return rows

    def _note_prefix(self, column: str) -> None:
        anchors = ANCHORS if self.anchor_column is None else (self.anchor_column,)
        positives = POSITIVES if self.positive_column is None else (self.positive_column,)
        self._predicted = ANCHOR if column in anchors else POSITIVE if column in positives else TEXT
        prefix = self.prefixes.get(self._predicted)
        what = "no prefix; data.prefixes.text gives one" if prefix is None else f"the prefix {prefix!r}"
        self.notes.add(f"data.predict: the texts of column {column!r} get {what}.", once=True)

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The anchor and the positive, or the only text."""
        return text_key(table, (ANCHOR, POSITIVE) if ANCHOR in table.column_names else (TEXT,))

    def group_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The anchor: a query's documents are all in one split."""
        return text_key(table, (ANCHOR,) if ANCHOR in table.column_names else (TEXT,))

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs its texts; negatives may be missing."""
        require_text(rows, self.columns(split).values())
        if split == "predict":
            return rows
        if self._makes_pairs(split):
            return self._without_short_texts(rows, split) if self.pairs == "halves" else rows
        for name in negative_columns(rows.table.column_names):
            cells = column_values(rows.table, name)
            for index in rows.indices:
                texts = cells[index] if isinstance(cells[index], list) else [cells[index]]
                if any(isinstance(text, (dict, list, bytes)) for text in texts):
                    raise LitPeftError(
                        f"{rows.locate(index)}: a negative is {brief(cells[index])}; give a text or a list of texts."
                    )
        return rows

    def _without_short_texts(self, rows: Rows, split: Split) -> Rows:
        texts = column_values(rows.table, TEXT)
        kept = [index for index in rows.indices if len(str(texts[index]).split()) > 1]
        if len(kept) == len(rows):
            return rows
        if not kept and not self.streaming:
            raise LitPeftError(f"{rows.field} {rows.source!r}: no text has two words, so there are no halves.")
        dropped = share_of(len(rows) - len(kept), len(rows), "rows")
        self.notes.add(f"data.{split}: {dropped} dropped, because a text of one word has no halves.")
        return replace(rows, indices=kept)

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens of each text, cut to `max_length`, and the score."""
        if not len(rows):  # a block of a stream may have none left
            return []
        prefixes, has_scores = self.prefixes, False
        if split == "predict":
            prefixes = {TEXT: self.prefixes.get(self._predicted, "")}
        elif not self._makes_pairs(split) and SCORE in rows.table.column_names:
            # Of several sets, some may have none; their rows are encoded one set after the other.
            scores = column_values(rows.table, SCORE)
            has_scores = any(scores[index] is not None for index in rows.indices)
        if split != "predict":
            self._find_kinds(rows, split, has_scores)
        table = tokenize(
            rows,
            encode_rows,
            self.tokenizer,
            f"Tokenizing {split}",
            self.num_proc,
            pairs=self.pairs if split != "predict" and self._makes_pairs(split) else None,
            prefixes=dict(sorted(prefixes.items())),
            has_scores=has_scores,
            max_length=self.max_length,
        )
        return drop_cut_column(table, self.notes, split, "rows", self.max_length)

    def _find_kinds(self, rows: Rows, split: Split, has_scores: bool) -> None:
        """Note the first row of each kind.

        Raises:
            LitPeftError: the task refuses it.
        """
        found = {"score" if has_scores else "no score": rows.indices[0]}
        columns = [column_values(rows.table, name) for name in negative_columns(rows.table.column_names)]
        for index in rows.indices:
            negatives = negative_texts([cells[index] for cells in columns])
            # Rows with scores only have the metric of scores, which compares no negatives.
            if negatives or not has_scores:
                found.setdefault("negative" if negatives else "no negative", index)
        for kind, index in found.items():
            self._kinds.setdefault((split, kind), rows.locate(index))
        self.refuse_rows(self._refused)

    def refuse_rows(self, kinds: Mapping[tuple[Split, str], str]) -> None:
        """Refuse rows of some kinds: those that were encoded, and those that will be.

        Args:
            kinds: (split, kind) -> why. The kinds are `score`, `no score`, `negative` and `no negative`.

        Raises:
            LitPeftError: names the first such row.
        """
        self._refused = dict(kinds)
        for (split, kind), why in kinds.items():
            if (split, kind) in self._kinds:
                what = kind if kind.startswith("no ") else f"a {kind}"
                raise LitPeftError(f"{self._kinds[split, kind]} has {what}. {why}")

    def collator(self, split: Split) -> Collate:
        """As `LitDataModule.collator`, for all texts of all rows."""
        return TextsCollator(pad_collator(self))


@dataclass(frozen=True)
class TextsCollator:
    """Makes a row of each text: anchors, then positives, then negatives.

    Attributes:
        pad: pads the rows.
    """

    pad: PadCollator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        places = [(row, 0) for row in range(len(examples))]
        several = [len(example["input_ids"]) for example in examples]
        is_pairs = min(several) > 1
        if is_pairs:
            places += [(row, 1) for row in range(len(examples))]
            places += [(row, text) for row, count in enumerate(several) for text in range(2, count)]
        names = [name for name in ("input_ids", "token_type_ids") if name in examples[0]]
        texts: list[dict[str, Any]] = [{name: examples[row][name][text] for name in names} for row, text in places]
        batch: dict[str, Any] = dict(self.pad(texts))
        batch["lengths"] = [len(text["input_ids"]) for text in texts]
        if not is_pairs:
            return batch
        count = len(examples)
        batch["texts"] = [count, count, len(texts) - 2 * count]
        batch["owners"] = torch.tensor([row for row, _ in places[2 * count :]], dtype=torch.long)
        # Texts with the same tokens are the same to the model. Hashes of integers are those of every process.
        batch["keys"] = torch.tensor([hash(tuple(text["input_ids"])) % 2**_KEY_BITS for text in texts])
        scores = [example.get("scores") for example in examples]
        if None not in scores:
            batch["scores"] = torch.tensor(scores, dtype=torch.float32)
        elif any(score is not None for score in scores):
            raise LitPeftError(
                "A batch has rows with scores and rows without: give data.train files of one form (data.score_column)."
            )
        return batch
