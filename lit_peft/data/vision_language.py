"""Conversations about images."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_peft.data.base import pad_collator
from lit_peft.data.chats import TEMPLATE_COLUMNS
from lit_peft.data.conversations import Form
from lit_peft.data.files import column_values
from lit_peft.data.image_batches import ImageCollator
from lit_peft.data.image_messages import is_empty, place_images, without_images
from lit_peft.data.images import ImageSource, image_source, require_pillow
from lit_peft.data.instruction import InstructionData, filled_columns
from lit_peft.data.notes import share_of
from lit_peft.data.processors import ProcessorData
from lit_peft.data.rows import Rows, Split, text_key
from lit_peft.data.settings import refuse_unused
from lit_peft.data.source_files import is_saved_dataset
from lit_peft.data.vision_encoding import FOLDER_COLUMN, ImageReader, encode_image_chats
from lit_peft.models.sources import PACKAGE_PREFIX, resolve_packaged_file
from lit_peft.util.errors import LitPeftError

if TYPE_CHECKING:
    from datasets import Dataset

# Columns of images, in the order in which they are looked for.
_COLUMNS = ("images", "image")
_PAIR = ("question", "answer")


class VisionLanguageData(ProcessorData, InstructionData):
    """Chats, or prompts with their answers, about images, with the loss on the answers only.

    The forms are those of `InstructionData`, or a question and an answer. Images are paths, bytes, `data:` URIs, or the
    images of a dataset; addresses are fetched if `image_urls` is set. A part of a message's content names its image
    (`{"type": "image", "path": "a.png"}`, OpenAI's `image_url`), or stands for the next image of the row's own column,
    as `<image>` in a text does. Without such places, the images of the column come first in the user's first message.

    The processor of the base model renders chats with its chat template, writes the tokens of the images, and makes
    their tensors, whatever their form. The tokens of images are never learned. An image is never cut: rows in which
    `max_length` would cut one are dropped, which is counted.

    Batches: `input_ids`, `attention_mask`, `labels` [batch, length], and what the processor makes of the images, such
    as `pixel_values`.

    Args:
        image_column: column of a row's image or images; unset: `images` or `image`, if there is one.
        image_folder: where relative paths of images start; unset: in the folder of the data file.
        image_urls: fetch images from http and https addresses. An image may have 32 MiB.
        score_answers: in testing, generate the last answers and compare them with the file's (`exact_match`,
            `rougeL`), instead of computing the loss.
        max_new_tokens: number of tokens to generate, if the model's `generation` does not say; unset: 64.
        **common: see `ProcessorData`, `InstructionData`, `SupervisedData` and `LitDataModule`.
    """

    task = "image_text_to_text"
    truncation_sides = ("right", "drop")
    packs = False
    takes_template = False
    # Images take hundreds of tokens, and time to read.
    most_tokens = 8_192
    measured_rows = 100

    def __init__(
        self,
        image_column: str | None = None,
        image_folder: str | None = None,
        image_urls: bool = False,
        score_answers: bool = False,
        max_new_tokens: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.image_column = image_column
        self.image_folder = image_folder
        self.image_urls = image_urls
        self.score_answers = score_answers
        self.max_new_tokens = max_new_tokens
        if max_new_tokens is not None and max_new_tokens < 1:
            raise LitPeftError(f"data.max_new_tokens is {max_new_tokens}; it must be at least 1.")
        refuse_unused("with images, which the processor's chat template renders", {"template": self.template})
        if self.packing:
            raise LitPeftError(
                "data.packing is set, but rows with images are not packed: models compute the places of an image's "
                "tokens from one example in a row. Leave packing out; group_by_length also saves padding."
            )
        if image_folder is not None and not Path(image_folder).expanduser().is_dir():
            raise LitPeftError(f"data.image_folder {image_folder!r} is no folder; correct it.")
        require_pillow()

    @property
    def encoder(self) -> Any:
        """The processor."""
        return self.processor

    def generates(self, split: Split) -> bool:
        """Tell whether a split's examples are prompts to continue."""
        return split == "predict" or (split == "test" and self.score_answers)

    def style(self, form: Form) -> str:
        """Return `chat`: the processor's chat template renders all forms."""
        return "chat"

    def form_of(self, table: Dataset) -> Form:
        """As `InstructionData.form_of`; also questions with their answers."""
        form, names = super().form_of(table), set(table.column_names)
        if self.format is None and form.first not in names and _PAIR[0] in names:
            return Form("prompt_completion", *_PAIR, system=self.system_column)
        return form

    def prepare_table(self, table: Dataset, split: Split, field: str, source: str) -> Dataset:
        """As `InstructionData.prepare_table`; images stay as they are in the file until they are needed."""
        self.images_in(table)
        table = super().prepare_table(undecoded(table), split, field, source)
        folder = self.image_folder or _folder_of(source)
        # Without its columns, the table is refused with the names of those it has.
        if (
            folder
            and FOLDER_COLUMN not in table.column_names
            and set(self.columns(split).values()) <= set(table.column_names)
        ):
            table = table.add_column(FOLDER_COLUMN, [str(Path(folder).expanduser().absolute())] * len(table))
        return table

    def _optional_columns(self, form: Form) -> tuple[str, ...]:
        images = _COLUMNS if self.image_column is None else (self.image_column,)
        return (*super()._optional_columns(form), *images)

    def images_in(self, table: Dataset) -> str | None:
        """Return the column of a table's images; None if it has none.

        Raises:
            LitPeftError: the column that `image_column` names is not there, or there are two and it names none.
        """
        names = table.column_names
        if self.image_column is not None and self.image_column not in names:
            raise LitPeftError(
                f"data.image_column is {self.image_column!r}, and there is no such column; there are "
                f"{', '.join(map(repr, names))}."
            )
        found = [name for name in _COLUMNS if name in names]
        if self.image_column is None and len(found) > 1:
            raise LitPeftError(
                f"The data have columns {' and '.join(map(repr, found))}: name the one to read in data.image_column."
            )
        return self.image_column or next(iter(found), None)

    def duplicate_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The prompt or the chat, with its images."""
        form, images = self.form_of(table), self._image_key(table)
        needed = [form.first] if not form.others else [part.first for part in (form, *form.others)]
        optional = (*form.optional, *TEMPLATE_COLUMNS)
        text = text_key(table, [*needed, *(name for name in optional if name in table.column_names)])
        return lambda index: (text(index), images(index))

    def group_key(self, table: Dataset) -> Callable[[int], Hashable]:
        """The images, so that all that is said of an image is in one split; the text of rows without any."""
        images, whole = self._image_key(table), self.duplicate_key(table)
        return lambda index: images(index) or whole(index)

    def _image_key(self, table: Dataset) -> Callable[[int], tuple[str, ...]]:
        column = self.images_in(table)
        cells = None if column is None else table.select_columns([column])
        form = self.form_of(table)
        chats = column_values(table, form.first) if form.has_messages else None

        def key(index: int) -> tuple[str, ...]:
            cell = None if cells is None or column is None else cells[index][column]
            values = cell if isinstance(cell, list) else [cell]
            if chats is not None:
                values = [*values, *_named_in(chats[index])]
            found = []
            for value in values:
                if not is_empty(value):
                    try:
                        found.append(image_source(value, urls=False).digest())
                    except ValueError:  # an address, or what `encode` refuses with the row's number
                        found.append(str(value))
            return tuple(found)

        return key

    def _chats(self, rows: Rows, form: Form, needs_answer: bool) -> dict[int, Any]:
        """As `InstructionData._chats`, with the text of the messages only."""
        chats = super()._chats(rows, form, needs_answer)
        column = self.images_in(rows.table)
        cells = None if column is None else rows.table.select_columns([column])
        for index, messages in chats.items():
            if not isinstance(messages, list):
                continue
            cell = None if cells is None or column is None else cells[index][column]
            try:
                chats[index] = without_images(place_images(messages, cell, _anywhere)[0])
            except ValueError as problem:
                raise LitPeftError(f"{rows.locate(index)}: {problem}.") from problem
        return chats

    def encode(self, rows: Rows, split: Split) -> Any:
        """Tokens, labels and images, at most `max_length` tokens per example."""
        form, column = self.form_of(rows.table), self.images_in(rows.table)
        if not self.tokenizer.chat_template:
            raise LitPeftError(
                f"The processor of {self.tokenizer_name or self.base!r} has no chat template, so the places of images "
                "in a text are unknown; set data.chat_template, or use the instruct version of the base model."
            )
        names = [name for name in TEMPLATE_COLUMNS if name in rows.table.column_names]
        self._note_template(rows, split, form, names)
        with_references = self.generates(split) and split == "test"
        table = self.encode_supervised(
            rows,
            split,
            encode_image_chats,
            form=form,
            image_column=column,
            image_urls=self.image_urls,
            template_columns=names,
            filled_columns=filled_columns(rows.table),
            learn=self.learn,
            with_references=with_references,
        )
        if "cut_image" in table.column_names:
            table = self._without_cut_images(table, split)
        self._note_images(table, split)
        return table

    def _without_cut_images(self, table: Dataset, split: Split) -> Dataset:
        cut = column_values(table, "cut_image")
        kept = [index for index, is_cut in enumerate(cut) if not is_cut]
        # Other blocks of a stream may have rows that fit.
        if not kept and not self.streaming:
            raise LitPeftError(
                f"data.max_length is {self.max_length}, which would cut an image in every row of data.{split}; raise "
                "it, or make images smaller with data.processor_args."
            )
        if len(kept) < len(cut):
            self.notes.add(
                f"data.{split}: {share_of(len(cut) - len(kept), len(cut), 'examples')} dropped, because "
                f"data.max_length {self.max_length} would cut an image.",
                warn=True,
            )
            table = table.select(kept)
        return table.remove_columns("cut_image")

    def _note_images(self, table: Dataset, split: Split) -> None:
        """Note how many images the examples have, and how many tokens these take."""
        if not len(table):
            return
        counts = [sum(bool(image["path"] or image["data"]) for image in images) for images in table["image_files"]]
        ids, reader = column_values(table, "input_ids"), ImageReader(self.processor)
        tokens = sum(token in reader.token_ids for row in ids for token in row)
        without = sum(not count for count in counts)
        line = f"data.{split}: {sum(counts):,} images in {len(table):,} examples"
        line += f", {share_of(tokens, sum(map(len, ids)), 'tokens')} are theirs"
        if without == len(table) and not self.streaming:
            self.notes.add(
                f"data.{split}: no example has an image; name the column of the images in data.image_column.", warn=True
            )
            return
        self.notes.add(f"{line}; {share_of(without, len(table), 'examples')} have no image." if without else f"{line}.")

    def collator(self, split: Split) -> Any:
        """As `SupervisedData.collator`, with the tensors of the images."""
        side = self.padding_side or ("left" if self.generates(split) else "right")
        pad = replace(pad_collator(self), padding_side=side)
        return ImageCollator(pad, ImageReader(self.processor), self.generates(split))

    def to_show(self, example: dict[str, Any]) -> dict[str, Any]:
        """As `LitDataModule.to_show`; of the tokens of an image, only the first of each run."""
        image = getattr(self.processor, "image_token_id", None)
        soft = getattr(self.tokenizer, "image_token_id", image)
        ids = example["input_ids"]
        kept = [at for at, token in enumerate(ids) if token not in (image, soft) or not at or ids[at - 1] != token]
        per_token = [name for name in ("input_ids", "labels") if name in example]
        return {**example, **{name: [example[name][at] for at in kept] for name in per_token}}


def undecoded(table: Dataset) -> Dataset:
    """Return a table whose images, also those within lists and messages, are their bytes or paths."""
    for name, feature in table.features.items():
        if (plain := _undecoded(feature)) != feature:
            table = table.cast_column(name, plain)
    return table


def _undecoded(feature: Any) -> Any:
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(mode=feature.mode, decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(member) for name, member in feature.items()}
    if isinstance(feature, (list, datasets.List)):
        inner = feature[0] if isinstance(feature, list) else feature.feature
        return datasets.List(_undecoded(inner))
    return feature


def _anywhere(value: Any) -> ImageSource:
    """Stand for an image that is looked for later."""
    return ImageSource("", b"")


def _named_in(messages: Any) -> list[Any]:
    """Return the parts of messages that name images."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)] if messages else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, dict) and part.get("type", "text") != "text"]


def _folder_of(source: str) -> str:
    """Return the folder of a data file; "" of a dataset or an address."""
    if source.startswith(PACKAGE_PREFIX):
        return str(resolve_packaged_file(source, "data").parent)
    path = Path(source).expanduser()
    return str(path.parent) if path.is_file() and not is_saved_dataset(source) else ""
