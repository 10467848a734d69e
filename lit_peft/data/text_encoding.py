"""Tokens of texts, or of pairs of texts, with their labels."""

from __future__ import annotations

from typing import Any

from lit_peft.data.labels import Label, canonical_label, parse_number


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
    """Tokenize a batch of texts; `cut` is the number of tokens that were cut."""
    texts = [str(text) for text in batch[text_column]]
    pairs = [str(text) for text in batch[text_pair_column]] if text_pair_column else None
    # Tokenized without a limit to count; only long texts are tokenized again.
    encoded = tokenizer(texts, pairs, truncation=False, verbose=False)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    out: dict[str, list[Any]] = {key: list(encoded[key]) for key in keys}
    out["cut"] = [max(0, len(ids) - max_length) for ids in out["input_ids"]]
    long = [index for index, cut in enumerate(out["cut"]) if cut]
    if long:
        shortened = tokenizer(
            [texts[index] for index in long],
            [pairs[index] for index in long] if pairs else None,
            truncation=True,
            max_length=max_length,
        )
        for key in keys:
            for index, ids in zip(long, shortened[key], strict=True):
                out[key][index] = ids
    if label_column is not None and label_ids is None:
        out["labels"] = [parse_number(value) for value in batch[label_column]]
    elif label_column is not None and label_ids is not None:
        labels = batch[label_column]
        known = [declared[label] if declared else canonical_label(label) for label in labels]
        out["labels"] = [label_ids[label] for label in known if label is not None]
    return out
