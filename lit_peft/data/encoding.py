"""Rows to examples: run a tokenizing function over rows, through the cache, and measure the result."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lit_peft.data.datasets_internals import get_fingerprint
from lit_peft.data.files import fingerprint
from lit_peft.data.rows import RowError, Rows
from lit_peft.models.processing import processor_digest
from lit_peft.models.tokenization import tokenizer_digest
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset


def tokenize(
    rows: Rows,
    function: Callable[..., dict[str, list[Any]]],
    tokenizer: Any,
    description: str,
    num_proc: int | None = None,
    **settings: Any,
) -> Dataset:
    """Run a tokenizing function over rows in batches, or read the result of an earlier run from the cache.

    Args:
        rows: the rows to tokenize.
        function: maps the columns of a batch to the columns of the result, which may have fewer rows. It is called
            with `tokenizer` and `settings` as keywords.
        tokenizer: the tokenizer, or a processor.
        description: text of the progress bar.
        num_proc: number of processes; None: this process.
        **settings: plain values for `function`; they are part of the cache key.

    Returns:
        A table with the result's columns only.

    Raises:
        LitPeftError: `function` refuses a row, or a row has no tokens, or no labels.
    """
    table = rows.to_table()
    key = (
        get_fingerprint(table),
        f"{function.__module__}.{function.__qualname__}",
        sorted(settings.items()),
        processor_digest(tokenizer) if hasattr(tokenizer, "tokenizer") else tokenizer_digest(tokenizer),
    )
    try:
        with _default_sigterm() if num_proc else contextlib.nullcontext():
            encoded = table.map(
                _call_with_indices,
                batched=True,
                with_indices=True,
                fn_kwargs={"function": function, "tokenizer": tokenizer, **settings},
                remove_columns=table.column_names,
                new_fingerprint=fingerprint(*key),
                num_proc=num_proc,
                desc=description,
            )
    except RowError as exc:
        raise LitPeftError(f"{rows.locate(rows.indices[exc.index])}: {exc.problem}") from exc
    if len(encoded) == len(rows):
        _refuse_empty_examples(encoded, rows)
    return encoded


@contextlib.contextmanager
def _default_sigterm() -> Iterator[None]:
    """Let SIGTERM end the processes that are started: they inherit the handler, and a trainer's ignores the signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)


def _call_with_indices(
    batch: dict[str, list[Any]], indices: list[int], *, function: Callable[..., Any], **settings: Any
) -> Any:
    try:
        return function(batch, **settings)
    except RowError as exc:
        raise RowError(indices[exc.index], exc.problem) from exc


def _refuse_empty_examples(encoded: Dataset, rows: Rows) -> None:
    import pyarrow.compute as pc

    for name, content in {"input_ids": "tokens", "labels": "tokens to learn"}.items():
        column = encoded.data.column(name) if name in encoded.column_names else None
        if column is None or not str(column.type).startswith(("list", "large_list")):
            continue
        empty = pc.index(pc.list_value_length(column), 0).as_py()
        if empty >= 0:
            raise LitPeftError(
                f"{rows.locate(rows.indices[empty])} has no {content}: the tokenizer knows none of its characters; "
                "remove the row."
            )


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep `datasets` from drawing a progress bar."""
    import datasets

    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def token_counts(examples: Any) -> list[int]:
    """Return the number of tokens of each example; of an example with several texts, that of the longest."""
    if not hasattr(examples, "with_format"):
        texts = (example["input_ids"] for example in examples)
        return [max(map(len, ids)) if ids and isinstance(ids[0], (list, tuple)) else len(ids) for ids in texts]
    import pyarrow.compute as pc

    counts: list[int] = []
    for block in examples.select_columns("input_ids").with_format("arrow").iter(10_000):
        column = block["input_ids"]
        if hasattr(column.type.value_type, "value_type"):  # a list of lists
            counts += [max(map(len, texts)) for texts in column.to_pylist()]
        else:
            counts += pc.list_value_length(column).to_pylist()
    return counts


def longest_and_largest(examples: Any) -> tuple[int, int]:
    """Return the length of the longest text and the largest token id; (0, 0) if `examples` is not a table."""
    table = getattr(examples, "data", None)
    if table is None or "input_ids" not in table.column_names:
        return 0, 0
    import pyarrow.compute as pc

    longest, largest = 0, 0
    for chunk in table.column("input_ids").chunks:
        # The choices or windows of a question are lists within a list.
        while str(chunk.type.value_type).startswith(("list", "large_list")):
            chunk = chunk.flatten()
        longest = max(longest, pc.max(pc.list_value_length(chunk)).as_py() or 0)
        largest = max(largest, pc.max(chunk.flatten()).as_py() or 0)
    return longest, largest
