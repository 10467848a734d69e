"""Transcripts to tokens: the tokens that they start with in a model's decoder, and the one that ends them."""

from __future__ import annotations

from typing import Any

from lit_peft.data.audio import AudioError, audio_length
from lit_peft.data.rows import RowError
from lit_peft.util.errors import LitPeftError, first_line


def set_language(tokenizer: Any, language: str | None, speech_task: str | None) -> None:
    """Let a Whisper tokenizer begin transcripts with the tokens of a language and of a task.

    Raises:
        LitPeftError: the tokenizer does not know the language, or is not Whisper's.
    """
    if language is None:
        return
    if not hasattr(tokenizer, "set_prefix_tokens"):
        raise LitPeftError(
            f"data.language is {language!r}, but transcripts of {type(tokenizer).__name__} do not begin with a "
            "language, as Whisper's do: leave data.language out."
        )
    try:
        tokenizer.set_prefix_tokens(language=language, task=speech_task or "transcribe", predict_timestamps=False)
    except ValueError as problem:
        raise LitPeftError(f"data.language is {language!r}: {first_line(problem)}") from problem
    missing = [token for token in tokenizer.prefix_tokens if token is None or token == tokenizer.unk_token_id]
    if missing:
        raise LitPeftError(
            f"data.language is {language!r}, and the tokenizer {tokenizer.name_or_path!r} has no token for it or for "
            "the task: leave data.language out, as for an English-only Whisper."
        )


def first_tokens(tokenizer: Any, start: int | None) -> list[int]:
    """Return the tokens with which every transcript begins, without the one that starts the decoder.

    Args:
        tokenizer: the tokenizer.
        start: the model's `decoder_start_token_id`, which the model puts in front by itself; None if unknown.
    """
    ids = _without_end(list(tokenizer("")["input_ids"]), tokenizer)
    first = ids[0] if start is None and hasattr(tokenizer, "set_prefix_tokens") else start
    return ids[1:] if ids and ids[0] == first else ids


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_speech(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    audio_column: str,
    text_column: str | None,
    start: int | None,
    max_length: int,
    with_references: bool,
    files: str,
) -> dict[str, list[Any]]:
    """Tokenize transcripts, and measure their recordings, which stay as they are.

    Args:
        batch: the columns of the rows.
        tokenizer: the tokenizer.
        audio_column: column of the recordings.
        text_column: column of the transcripts; None: there are none, and `input_ids` are what the decoder starts with.
        start: see `first_tokens`.
        max_length: maximum number of tokens of a transcript, with those that it begins and ends with.
        with_references: also return the transcripts as text.
        files: the state of the files, for the cache key.

    Raises:
        RowError: a recording cannot be read.
    """
    audio = batch[audio_column]
    out: dict[str, list[Any]] = {"audio": audio, "seconds": [], "rate": []}
    for row, cell in enumerate(audio):
        try:
            seconds, rate = audio_length(cell)
            if not seconds:
                raise AudioError("has no samples; remove the row")
        except AudioError as problem:
            raise RowError(row, f"column {audio_column!r} {problem}.") from problem
        out["seconds"].append(seconds)
        out["rate"].append(rate)
    before = first_tokens(tokenizer, start)
    if text_column is None:
        first = tokenizer.bos_token_id if start is None else start
        out["input_ids"] = [[first, *before]] * len(audio)
        return out
    texts = [str(text) for text in batch[text_column]]
    bare = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    whole = [[*before, *ids, *end] for ids in bare]
    out["cut"] = [max(0, len(ids) - max_length) for ids in whole]
    # The end token is kept, so that the model learns to stop.
    out["input_ids"] = [[*ids[: max_length - len(end)], *end] if len(ids) > max_length else ids for ids in whole]
    if with_references:
        out["reference"] = texts
    return out
