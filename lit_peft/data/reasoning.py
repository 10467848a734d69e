"""LLM-Adapters' two benchmarks, math and commonsense reasoning: training on solutions, testing by generation."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_peft.data.collate import PadCollator
from lit_peft.data.datasets_internals import get_fingerprint
from lit_peft.data.files import column_values, fingerprint
from lit_peft.data.instruction import InstructionData
from lit_peft.data.notes import share_of
from lit_peft.data.rows import Rows, Split, require_text
from lit_peft.tasks.answers import MATH, find_benchmark, gold_text, kind_of, kind_of_benchmark
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset

# Column names of the question, the gold answer and its solution in the benchmarks' own files and LLM-Adapters' copies.
_QUESTIONS = ("original_text", "sQuestion", "question", "Question")
_ANSWERS = ("ans", "lSolutions", "answer", "Answer", "correct")
_SOLUTIONS = ("chain-of-thought",)
# Other parts of a question; files with them need explicit column settings.
_PARTS = ("passage", "context", "choices", "goal", "ctx", "endings", "option1")


class ReasoningData(InstructionData):
    """Questions with a short answer, in LLM-Adapters' JSON form: instruction, input, output (the solution), answer.

    Training and validation are instruction tuning on `output` or, if a file has none, on "The answer is …". Testing
    generates text, extracts the answer and compares it with the gold answer (see `lit_peft.tasks.answers`). The
    benchmarks' own files can be read too: those of GSM8K (`question`, `answer` with "####"), MAWPS (`original_text`,
    `ans`), AddSub, MultiArith and SingleEq (`sQuestion`, `lSolutions`), SVAMP (`Body`, `Question`, `Answer`), AQuA
    (`question`, `options`, `correct`), and LLM-Adapters' copies of them (`chain-of-thought`).

    Differences from LLM-Adapters' scripts: the prompt is Alpaca's, without the 16 spaces and the comment of their
    source code (`template: llm_adapters` adds them); decoding is greedy, while theirs uses 4 beams
    (`--model.generation '{num_beams: 4}'`); training rows that also occur in the test file are removed.

    Args:
        benchmark: `gsm8k`, `aqua`, `svamp`, `mawps`, `addsub`, `multiarith`, `singleeq`, `boolq`, `piqa`, `siqa`,
            `hellaswag`, `winogrande`, `arc-e`, `arc-c` or `openbookqa`: the form of the answers; unset: the form of
            each row's gold answer, for files that mix several benchmarks.
        answer_column: column of the gold answer.
        max_new_tokens: maximum number of generated tokens; unset: 32 for commonsense, 256 for math and mixed files.
        **common: see `InstructionData`, `SupervisedData` and `LitDataModule`.
    """

    def __init__(
        self,
        benchmark: str | None = None,
        answer_column: str = "answer",
        max_new_tokens: int | None = None,
        **common: Any,
    ) -> None:
        # LLM-Adapters' prompts, also for bases with a chat template.
        common["template"] = common.get("template") or "alpaca"
        super().__init__(**common)
        self.benchmark = find_benchmark(benchmark) if benchmark is not None else None
        self.answer_column = answer_column
        if max_new_tokens is not None and max_new_tokens < 1:
            raise LitPeftError(f"data.max_new_tokens is {max_new_tokens}; it must be at least 1.")
        self.max_new_tokens = max_new_tokens or (256 if self.benchmark is None or self.benchmark in MATH else 32)
        for name, value in {"messages_column": self.messages_column, "format": self.format}.items():
            if value not in (None, "alpaca"):
                raise LitPeftError(
                    f"data.{name} is {value!r}, but ReasoningData reads instructions; use InstructionData for chats."
                )

    def generates(self, split: Split) -> bool:
        """Tell whether a split's examples are prompts to continue: those of the test split are too."""
        return split in ("test", "predict")

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `LitDataModule.prepare_table`; the benchmarks' own files also get the columns of LLM-Adapters' files."""
        names = table.column_names
        question = next((name for name in _QUESTIONS if name in names), None)
        if self.instruction_column in names or question is None or set(_PARTS) & set(names):
            return super().prepare_table(table, split, field, source)
        columns = {
            "question": question,
            "answer": next((name for name in (self.answer_column, *_ANSWERS) if name in names), None),
            "solution": next((name for name in (self.output_column, *_SOLUTIONS) if name in names), None),
        }
        targets = (self.instruction_column, self.answer_column, self.output_column)
        return table.map(
            to_instruction_columns,
            batched=True,
            fn_kwargs={**columns, "targets": targets},
            remove_columns=[name for name in columns.values() if name is not None],
            new_fingerprint=fingerprint(get_fingerprint(table), columns, targets),
        )

    def columns(self, split: Split) -> dict[str, str | None]:
        """The instruction and, except for prediction, the gold answer."""
        needed: dict[str, str | None] = {"data.instruction_column": self.instruction_column}
        if split != "predict":
            needed["data.answer_column"] = self.answer_column
        return needed

    def check_rows(self, rows: Rows, split: Split) -> Rows:
        """Every row needs a question, and a gold answer in the benchmark's form.

        Training and validation rows with an empty `output` are skipped: LLM-Adapters' files contain some.
        """
        require_text(rows, [self.instruction_column])
        if split == "predict":
            return rows
        gold = column_values(rows.table, self.answer_column)
        for index in rows.indices:
            kind = kind_of(gold[index])
            expected = kind_of_benchmark(self.benchmark) if self.benchmark else kind
            if kind is None or kind != expected:
                raise LitPeftError(
                    f"{rows.locate(index)}: {gold[index]!r} in column {self.answer_column!r} is not an answer of "
                    f"{self.benchmark or 'any benchmark'}; correct it, or data.benchmark, or data.answer_column."
                )
        if self.generates(split) or self.output_column not in rows.table.column_names:
            return rows
        outputs = column_values(rows.table, self.output_column)
        kept = [index for index in rows.indices if outputs[index] is not None and str(outputs[index]).strip()]
        if not kept:
            raise LitPeftError(
                f"{rows.field} {rows.source!r}: column {self.output_column!r} is empty in every row; fill it."
            )
        if len(kept) < len(rows):
            self.notes.add(
                f"{rows.field}: {share_of(len(rows) - len(kept), len(rows), 'rows')} skipped, because column "
                f"{self.output_column!r} is empty."
            )
        return replace(rows, indices=kept)

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens and labels; for tests, prompts with the gold answers and their form."""
        if not self.generates(split):
            has_outputs = self.output_column in rows.table.column_names
            return super().encode(rows if has_outputs else self._add_outputs(rows), split)
        table = super().encode(rows, split)
        gold = column_values(rows.to_table(), self.answer_column) if self._has_gold(rows) else None
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
        """As `InstructionData.collator`, with the gold answers and their form for tests."""
        extra = [
            name for name in ("gold", "kind") if self.generates(split) and name in self.examples(split).column_names
        ]
        return replace(super().collator(split), extra_keys=tuple(extra))

    def _has_gold(self, rows: Rows) -> bool:
        if self.answer_column not in rows.table.column_names:
            return False
        answers = column_values(rows.table, self.answer_column)
        return all(kind_of(answers[index]) is not None for index in rows.indices)

    def _add_outputs(self, rows: Rows) -> Rows:
        """Give rows without a solution a sentence with the gold answer."""
        sentence = (
            "The answer is {}." if self.benchmark is None or self.benchmark in MATH else "the correct answer is {}"
        )
        answers = column_values(rows.table, self.answer_column)
        outputs = [sentence.format(gold_text(answer).removesuffix(".0")) for answer in answers]
        return replace(rows, table=rows.table.add_column(self.output_column, outputs))


def to_instruction_columns(
    batch: dict[str, list[Any]],
    *,
    question: str,
    answer: str | None,
    solution: str | None,
    targets: tuple[str, str, str],
) -> dict[str, list[Any]]:
    """Join a question with SVAMP's body and AQuA's options, and turn answers into text.

    Args:
        batch: the columns of a file.
        question: column of the question.
        answer: column of the gold answer; GSM8K's own contains the solution as well.
        solution: column of the solution.
        targets: new names of the three columns.
    """
    instruction, gold, output = targets
    texts = [str(text or "").strip() for text in batch[question]]
    if "Body" in batch:
        bodies = [str(body or "").strip() for body in batch["Body"]]
        texts = [
            f"{body}{'' if body.endswith(('.', '?', '!', ',')) else '.'} {text}" if body else text
            for body, text in zip(bodies, texts, strict=True)
        ]
    if "options" in batch:
        lists = [options if isinstance(options, list) else [] for options in batch["options"]]
        choices = [[re.sub(r"^\(?([A-E])\s?\)\s*", r"(\1) ", str(option)) for option in options] for options in lists]
        texts = [
            f"{text} Answer Choices: {' '.join(options)}" if options else text
            for text, options in zip(texts, choices, strict=True)
        ]
    out: dict[str, list[Any]] = {instruction: texts}
    if answer is not None:
        out[gold] = [None if value is None else gold_text(value) for value in batch[answer]]
        solved = [isinstance(value, str) and "####" in value for value in batch[answer]]
        if solution is None and all(solved):
            out[output] = [str(value) for value in batch[answer]]
    if solution is not None:
        out[output] = list(batch[solution])
    return out
