"""How long an example may be: the default of `max_length`, and what happens to longer examples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lit_peft.data.collate import IGNORE
from lit_peft.data.datasets_internals import get_fingerprint
from lit_peft.data.encoding import no_progress_bars, token_counts
from lit_peft.data.files import fingerprint
from lit_peft.data.joined import groups_of
from lit_peft.data.notes import Notes, share_of
from lit_peft.data.rows import Rows, Split
from lit_peft.data.sampling import Mixture
from lit_peft.data.splits import sample_rows
from lit_peft.models.sources import resolve_base
from lit_peft.util.errors import LitPeftError

# The share of the measured examples that fit the default.
_SHARE = 0.99
# More tokens than any text has: nothing is cut.
_NO_LIMIT = 2**30


class MaxLength:
    """The attribute `max_length` of a data module, which is chosen when it is first needed if the setting is unset.

    Args:
        sample: returns training rows of a data module to measure; None if there are none.
    """

    def __init__(self, sample: Callable[[Any], Rows | None]) -> None:
        self.sample = sample

    def __get__(self, data: Any, owner: Any = None) -> Any:
        if data is None:
            return self
        if data.known_length is None:
            choose_max_length(data, self.sample(data))
        return data.known_length

    def __set__(self, data: Any, value: int | None) -> None:
        data.known_length = value


def choose_max_length(data: Any, rows: Rows | None) -> None:
    """Set `data.max_length`, and note what was chosen and why.

    It is the length that 99 % of the training examples have at most, but not more than the model's maximum or 2,048.

    Args:
        data: the data module.
        rows: the training rows; None: they are not read, and the largest value is taken.
    """
    most, why = _most_tokens(data)
    data.max_length = most
    if rows is None or not len(rows):
        return
    sample = replace(rows, indices=sample_rows(rows.indices, data.measured_rows, data.seed))
    # A copy, because what is noted of a sample is not what happens to the data.
    probe = copy.copy(data)
    probe.notes = Notes(silent=True)
    with no_progress_bars():
        lengths = sorted(token_counts(probe.encode(probe.check_rows(sample, "train"), "train")))
    chosen = lengths[math.ceil(_SHARE * len(lengths)) - 1] if lengths else most
    # A multiple of 8, as kernels like it.
    data.max_length = max(min(chosen + -chosen % 8, most), 2)
    if data.max_length < most:
        data.notes.add(
            f"data.max_length is {data.max_length}: 99 % of the training examples have no more tokens.", once=True
        )
    else:
        full = sum(length >= most for length in lengths)
        data.notes.add(
            f"data.max_length is {most}, {why}; {share_of(full, len(lengths), 'training examples')} have that many "
            "tokens or more.",
            once=True,
        )


def _most_tokens(data: Any) -> tuple[int, str]:
    limits = {data.most_tokens: "the most that is chosen without a setting"}
    own = getattr(data.tokenizer, "model_max_length", None)
    if own is not None:
        limits.setdefault(int(min(own, _NO_LIMIT)), "the most that the tokenizer's model was made for")
    if data.base is not None:
        from transformers import AutoConfig

        # A tokenizer's folder has no configuration, and the model's own code is not run for this.
        with suppress(OSError, ValueError, LitPeftError):
            config = AutoConfig.from_pretrained(resolve_base(data.base).path, trust_remote_code=False)
            for name in ("max_position_embeddings", "max_target_positions"):  # of a decoder, in speech models
                positions = getattr(config.get_text_config(), name, None)
                if isinstance(positions, int) and positions > 1:
                    limits.setdefault(positions, "the number of the base model's positions")
    least = min(limits)
    return least, limits[least]


def encode_split(data: Any, rows: Rows, split: Split) -> tuple[Any, dict[str, int], Mixture | None]:
    """Check and encode the rows of a split.

    Returns:
        The examples; the number of those of each named set, in order, or an empty dict; and, for training rows from
        sources with weights, how to mix them.

    Raises:
        LitPeftError: a row is wrong, or a source has no examples.
    """
    rows = data.check_rows(rows, split)
    if split == "predict" and data.known_length is None:
        # Prediction reads no other rows, and cuts as little as possible.
        choose_max_length(data, None)
    groups = groups_of(rows)
    weights = tuple(weight for _, weight, _ in groups if weight is not None)
    if weights and split != "train":
        groups = [("", None, rows)]
    if len(groups) == 1:
        return encode_to_length(data, rows, split), {groups[0][0]: -1} if groups[0][0] and not weights else {}, None
    for name, _, part in groups:
        if not len(part):
            raise LitPeftError(
                f"data.{split} {name!r} has no rows left: those that other splits have too were removed. Give it "
                "other rows, or leave it out."
            )
    parts = [encode_to_length(data, part, split) for _, _, part in groups]
    sizes = [len(part) for part in parts]
    for (name, _, _), size in zip(groups, sizes, strict=True):
        if not size:
            raise LitPeftError(f"data.{split} {name!r} has no examples left; give it more rows, or leave it out.")
    examples = join_examples(parts)
    if not weights:
        return examples, {name: size for (name, _, _), size in zip(groups, sizes, strict=True)}, None
    mixture = Mixture(tuple(sizes), weights)
    for (name, _, _), size, count in zip(groups, sizes, mixture.counts, strict=True):
        times = f"each {count / size:.3g} times" if count >= size else "others in each epoch"
        data.notes.add(
            f"data.train: {share_of(count, sum(sizes), 'examples of an epoch')} from {name!r}, which has {size:,} "
            f"({times})."
        )
    return examples, {}, mixture


def join_examples(parts: list[Any]) -> Any:
    """Return the examples of several datasets as one."""
    import datasets

    if all(isinstance(part, datasets.Dataset) for part in parts):
        return datasets.concatenate_datasets(parts)
    return [example for part in parts for example in part]


def encode_to_length(data: Any, rows: Rows, split: Split) -> Any:
    """Encode rows whose values were checked; what happens to too long ones is `data.truncation_side`'s to say.

    Raises:
        LitPeftError: no training example is left.
    """
    limit = data.max_length
    cuts = split == "train" and data.truncation_side == "drop"
    cuts = cuts or (data.truncation_side == "left" and data.cuts_tokens)
    if not cuts:
        return data.encode(rows, split)
    try:
        data.max_length = _NO_LIMIT
        examples = data.encode(rows, split)
    finally:
        data.max_length = limit
    lengths = token_counts(examples)
    if data.truncation_side == "left":
        return _cut_at_start(data, examples, lengths, split) if max(lengths, default=0) > limit else examples
    return _without_long(data, examples, lengths, rows)


def _without_long(data: Any, examples: Any, lengths: list[int], rows: Rows) -> Any:
    kept = [index for index, length in enumerate(lengths) if length <= data.max_length]
    if len(kept) == len(lengths):
        return examples
    # Other blocks of a stream may have examples that fit.
    if not kept and not data.streaming:
        raise LitPeftError(
            f"{rows.field}: every example has more than data.max_length {data.max_length} tokens, and "
            "data.truncation_side 'drop' drops them; raise max_length (the shortest has "
            f"{min(lengths)} tokens)."
        )
    data.notes.add(
        f"data.train: {share_of(len(lengths) - len(kept), len(lengths), 'examples')} dropped, because they have more "
        f"than {data.max_length} tokens (data.max_length)."
    )
    return _select(examples, kept)


def _cut_at_start(data: Any, examples: Any, lengths: list[int], split: Split) -> Any:
    limit, per_token = data.max_length, ("input_ids", "labels", "token_type_ids")
    settings = {"limit": limit, "names": per_token}
    key = fingerprint(get_fingerprint(examples), sorted(settings.items()))
    cut = examples.map(_last_tokens, batched=True, fn_kwargs=settings, new_fingerprint=key, desc="Cutting")
    over = [length - limit for length in lengths if length > limit]
    data.notes.add(
        f"data.{split}: {share_of(len(over), len(lengths), 'examples')} cut to {limit} tokens at the start "
        f"(data.max_length); {share_of(sum(over), sum(lengths), 'tokens')} lost."
    )
    # The first token is not predicted.
    kept = [
        index
        for index, example in enumerate(cut)
        if "labels" not in example or any(label != IGNORE for label in example["labels"][1:])
    ]
    if len(kept) == len(cut):
        return cut
    if not kept and not data.streaming:
        raise LitPeftError(
            f"data.max_length is {limit}, and cutting data.{split} at the start leaves nothing to learn; raise it."
        )
    data.notes.add(
        f"data.{split}: {share_of(len(cut) - len(kept), len(cut), 'examples')} dropped, because nothing to learn is "
        f"left of them within data.max_length {limit}."
    )
    return _select(cut, kept)


def _last_tokens(batch: dict[str, list[Any]], *, limit: int, names: tuple[str, ...]) -> dict[str, list[Any]]:
    lengths = [len(ids) for ids in batch["input_ids"]]
    return {
        name: [
            cell[-limit:] if name in names and isinstance(cell, list) and len(cell) == length else cell
            for cell, length in zip(cells, lengths, strict=True)
        ]
        for name, cells in batch.items()
    }


def _select(examples: Any, kept: list[int]) -> Any:
    return examples.select(kept) if hasattr(examples, "select") else [examples[index] for index in kept]
