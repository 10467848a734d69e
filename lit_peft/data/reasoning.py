"""LLM-Adapters' two benchmarks, math and commonsense reasoning: tuning on answers, and testing by generation."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import Rows, Split
from lit_peft.data.collate import PadCollator
from lit_peft.data.files import column_values, fingerprint
from lit_peft.data.instruction import InstructionData
from lit_peft.tasks.answers import MATH, find_benchmark, gold_text, kind_of, kind_of_benchmark
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset

# How the benchmarks' own files, and LLM-Adapters' copies of them, call the question, the gold answer and its working.
_QUESTIONS = ("original_text", "sQuestion", "question", "Question")
_ANSWERS = ("ans", "lSolutions", "answer", "Answer", "correct")
_WORKINGS = ("chain-of-thought",)
# Other parts of a question, whose files need columns of their own to be named.
_PARTS = ("passage", "context", "choices", "goal", "ctx", "endings", "option1")


class ReasoningData(InstructionData):
    """Questions with a short answer, in LLM-Adapters' JSON form: instruction, input, output (the solution), answer.

    Training and validation are instruction tuning on `output`; where a file has none, on "The answer is …". Testing
    generates, reads the answer out of the text and compares it with the gold one (see `lit_peft.tasks.answers`).
    The benchmarks' own files are taken, too: GSM8K's (`question`, `answer` with "####"), MAWPS' (`original_text`,
    `ans`), those of AddSub, MultiArith and SingleEq (`sQuestion`, `lSolutions`), SVAMP's (`Body`, `Question`,
    `Answer`), AQuA's (`question`, `options`, `correct`), and LLM-Adapters' copies of them (`chain-of-thought`).

    Differences from LLM-Adapters' scripts: the prompt is Alpaca's, without the 16 spaces and the comment of their
    source (`template: llm_adapters` has them); decoding is greedy, theirs has 4 beams
    (`--model.generation '{num_beams: 4}'`); rows of training that also stand in the test file are removed.

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
        """As `LitDataModule.prepared`; the benchmarks' own files get the usual columns, besides those they have."""
        names = table.column_names
        question = next((name for name in _QUESTIONS if name in names), None)
        if self.instruction_column in names or question is None or set(_PARTS) & set(names):
            return super().prepared(table, split, field, source)
        columns = {
            "question": question,
            "answer": next((name for name in (self.answer_column, *_ANSWERS) if name in names), None),
            "working": next((name for name in (self.output_column, *_WORKINGS) if name in names), None),
        }
        targets = (self.instruction_column, self.answer_column, self.output_column)
        return table.map(
            usual_columns,
            batched=True,
            fn_kwargs={**columns, "targets": targets},
            remove_columns=[name for name in columns.values() if name is not None],
            new_fingerprint=fingerprint(table, columns, targets),
        )

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


def usual_columns(
    batch: dict[str, list[Any]],
    *,
    question: str,
    answer: str | None,
    working: str | None,
    targets: tuple[str, str, str],
) -> dict[str, list[Any]]:
    """Make questions of their text, SVAMP's body and AQuA's options; answers become texts.

    Args:
        batch: the columns of a file.
        question: the question's column.
        answer: the gold answer's column; its solutions in GSM8K's own form are workings, too.
        working: the worked out answer's column.
        targets: what the three are to be called.
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
        if working is None and all(solved):
            out[output] = [str(value) for value in batch[answer]]
    if working is not None:
        out[output] = list(batch[working])
    return out
