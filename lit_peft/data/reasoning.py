"""LLM-Adapters' two benchmarks, math and commonsense reasoning: tuning on answers, and testing by generation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import Rows, Split
from lit_peft.data.collate import PadCollator
from lit_peft.data.files import column_values
from lit_peft.data.instruction import InstructionData
from lit_peft.errors import LitPeftError
from lit_peft.tasks.answers import MATH, find_benchmark, gold_text, kind_of, kind_of_benchmark

if TYPE_CHECKING:
    from datasets import Dataset

# How MAWPS' own files call the question and the answer.
_OWN_NAMES = {"original_text": "instruction", "ans": "answer"}


class ReasoningData(InstructionData):
    """Questions with a short answer, in LLM-Adapters' JSON form: instruction, input, output (the solution), answer.

    Training and validation are instruction tuning on `output`; where a file has none, on "The answer is …". Testing
    generates, reads the answer out of the text and compares it with the gold one (see `lit_peft.tasks.answers`).
    Files in MAWPS' own form (`original_text`, `ans`) are taken, too. Differences from LLM-Adapters' scripts: the prompt
    is Alpaca's, without the 16 spaces and the comment of their source (`template: llm_adapters` has them); decoding is
    greedy, theirs has 4 beams (`--model.generation '{num_beams: 4}'`); rows of training that also stand in the test
    file are removed.

    Args:
        benchmark: `gsm8k`, `aqua`, `svamp`, `mawps`, `addsub`, `multiarith`, `singleeq`, `boolq`, `piqa`, `siqa`,
            `hellaswag`, `winogrande`, `arc-e`, `arc-c` or `openbookqa`: the form of the answers; unset, that of each
            row's gold answer, for files that mix several.
        answer_column: column of the gold answer.
        max_new_tokens: longest generated answer, in tokens; unset: 32 for commonsense, 256 for math and mixed files.
        **common: see `InstructionData`, `SupervisedData` and `LitDataModule`.
    """

    def __init__(
        self,
        benchmark: str | None = None,
        answer_column: str = "answer",
        max_new_tokens: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.benchmark = find_benchmark(benchmark) if benchmark is not None else None
        self.answer_column = answer_column
        if max_new_tokens is not None and max_new_tokens < 1:
            raise LitPeftError(f"data.max_new_tokens is {max_new_tokens}; it must be at least 1.")
        self.max_new_tokens = max_new_tokens or (256 if self.benchmark is None or self.benchmark in MATH else 32)
        if self.messages_column is not None:
            raise LitPeftError(
                "data.messages_column is set, but ReasoningData takes instructions; use InstructionData."
            )

    def generates(self, split: Split) -> bool:
        """Tests generate, too."""
        return split in ("test", "predict")

    def prepared(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepared`; MAWPS' own column names become the usual ones."""
        if self.instruction_column in table.column_names:
            return super().prepared(table, split, field, source)
        names = {own: name for own, name in _OWN_NAMES.items() if own in table.column_names}
        return table.rename_columns(names) if len(names) == len(_OWN_NAMES) else table

    def columns(self, split: Split) -> dict[str, str | None]:
        """The instruction, and the gold answer except for prediction."""
        needed: dict[str, str | None] = {"data.instruction_column": self.instruction_column}
        if split != "predict":
            needed["data.answer_column"] = self.answer_column
        return needed

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a question, and a gold answer of the benchmark's form; to train, a worked out answer.

        Rows to train on whose `output` is empty are passed over: LLM-Adapters' files hold some.
        """
        self.require_text(rows, [self.instruction_column])
        if split == "predict":
            return rows
        gold = column_values(rows.table, self.answer_column)
        for row in rows.numbers:
            kind = kind_of(gold[row])
            wanted = kind_of_benchmark(self.benchmark) if self.benchmark else kind
            if kind is None or kind != wanted:
                raise LitPeftError(
                    f"{rows.where(row)}: {gold[row]!r} in column {self.answer_column!r} is no answer of "
                    f"{self.benchmark or 'any benchmark'}; correct it, or data.benchmark, or data.answer_column."
                )
        if self.generates(split) or self.output_column not in rows.table.column_names:
            return rows
        outputs = column_values(rows.table, self.output_column)
        kept = [row for row in rows.numbers if outputs[row] is not None and str(outputs[row]).strip()]
        if not kept:
            raise LitPeftError(f"{rows.field} {rows.source!r}: column {self.output_column!r} is empty in every row.")
        if len(kept) < len(rows):
            self.say(
                f"{rows.field}: {len(rows) - len(kept)} row(s) without text in {self.output_column!r} passed over."
            )
        return replace(rows, numbers=kept)

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens and labels; for tests, prompts with their kind of answer and the gold one."""
        if not self.generates(split):
            return super().encode(rows if self.output_column in rows.table.column_names else self._worded(rows), split)
        table = super().encode(rows, split)
        gold = column_values(rows.selected(), self.answer_column) if self._judged(rows) else None
        if gold is not None:
            table = table.add_column("gold", [gold_text(answer) for answer in gold])
        if self.benchmark is not None:
            kinds = [kind_of_benchmark(self.benchmark)] * len(table)
        elif gold is not None:
            kinds = [kind_of(answer) or "number" for answer in gold]
        else:
            return table
        return table.add_column("kind", kinds)

    def collator(self, split: Split) -> PadCollator:
        """As `InstructionData.collator`, with the answers that tests compare."""
        passed = [
            name for name in ("gold", "kind") if self.generates(split) and name in self.examples(split).column_names
        ]
        return replace(super().collator(split), passed=tuple(passed))

    def _judged(self, rows: Rows) -> bool:
        if self.answer_column not in rows.table.column_names:
            return False
        answers = column_values(rows.table, self.answer_column)
        return all(kind_of(answers[row]) is not None for row in rows.numbers)

    def _worded(self, rows: Rows) -> Rows:
        """Give rows without a worked out answer one that says the gold answer."""
        opening = (
            "The answer is {}." if self.benchmark is None or self.benchmark in MATH else "the correct answer is {}"
        )
        answers = column_values(rows.table, self.answer_column)
        said = [opening.format(gold_text(answer).removesuffix(".0")) for answer in answers]
        return replace(rows, table=rows.table.add_column(self.output_column, said))
