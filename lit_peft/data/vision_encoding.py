"""Chats with images: rendered by the chat template, read by the processor, with the loss on the answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from typing import Any

from lit_peft.data.chat_rendering import ChatRenderer, Span, left_out
from lit_peft.data.chats import is_learned, learned_turns, read_row, template_arguments, template_problem, without_nulls
from lit_peft.data.collate import IGNORE
from lit_peft.data.conversations import Form
from lit_peft.data.image_messages import IMAGE_PART, count_images, place_images
from lit_peft.data.images import ImageSource, image_source, read_image
from lit_peft.data.rows import RowError
from lit_peft.data.supervised import add_supervised
from lit_peft.util.errors import LitPeftError, first_line

# A column that `VisionLanguageData` adds to a table: the folder where relative paths of a row's images start.
FOLDER_COLUMN = "folder_of_images"
# The attributes of a processor or its tokenizer that hold ids of tokens which stand for images, or around them.
_TOKEN_IDS = ("image_token_id", "boi_token_id", "eoi_token_id", "vision_start_token_id", "vision_end_token_id")
# The same tokens, where no attribute has their ids.
_TOKENS = ("<|vision_start|>", "<|vision_end|>")


class ImageRenderer(ChatRenderer):
    """Renders chats with images. An image is a part of a message, in the place that it has in the chat template.

    Args:
        processor: a processor whose tokenizer has its chat template.
    """

    def __init__(self, processor: Any) -> None:
        super().__init__(processor.tokenizer)
        self.image_token: str = getattr(processor, "image_token", None) or ""

    @cached_property
    def shows_images(self) -> bool:
        """Whether the template writes something for a part that is an image."""
        text = {"type": "text", "text": "PROBE"}
        chats = [[{"role": "user", "content": [*parts, text]}] for parts in ([], [IMAGE_PART])]
        without, with_image = (self._probe(*chat) for chat in chats)
        return "PROBE" in with_image and len(with_image) > len(without) and "'image'" not in with_image

    def clean_content(self, content: Any) -> Any:
        """Return a message's content as the template reads it."""
        if not isinstance(content, list) or IMAGE_PART not in content:
            return super().clean_content(content)
        if self.shows_images:
            return [part if part == IMAGE_PART else {"type": "text", "text": part["text"]} for part in content]
        # The template reads text only, in which the image's own token marks its place.
        return "".join(self.image_token if part == IMAGE_PART else part["text"] for part in content)


class ImageReader:
    """Turns a text and its images into tokens with a processor.

    Args:
        processor: the processor.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        tokenizer = processor.tokenizer
        ids = {getattr(owner, name, None) for owner in (processor, tokenizer) for name in _TOKEN_IDS}
        vocabulary = tokenizer.get_vocab()
        ids |= {vocabulary.get(token) for token in _TOKENS}
        self.token_ids = {token for token in ids if isinstance(token, int)}

    def call(self, texts: list[str], images: list[list[Any]], **settings: Any) -> Any:
        """Call the processor on texts and the images of each."""
        # A template that writes the token which opens a text writes it in every text.
        opening = self.processor.tokenizer.bos_token or "\0"
        settings["add_special_tokens"] = not all(text.startswith(opening) for text in texts)
        return self.processor(text=texts, images=images if any(images) else None, **settings)

    def read(self, text: str, images: list[Any], spans: Iterable[Span], inverted: bool) -> tuple[list[int], list[int]]:
        """Return the tokens of a text with its images, and labels.

        Args:
            text: the rendered text, with a token in the place of each image.
            images: the images.
            spans: characters of the text.
            inverted: learn all but the spans.

        Returns:
            The ids; and the labels, -100 for what is not learned, and `IMAGE` for what belongs to an image.

        Raises:
            ValueError: the processor refuses them; the text says why.
        """
        try:
            found = self.call([text], [images], return_text_replacement_offsets=True, return_offsets_mapping=True)
        except Exception as problem:  # whatever a processor raises
            raise ValueError(f"the processor refuses the row ({first_line(problem)})") from problem
        ids, offsets = list(found["input_ids"][0]), found["offset_mapping"][0]
        replaced = (found.get("text_replacement_offsets") or [[]])[0]
        if len(replaced) != len(images):
            raise LitPeftError(
                f"{type(self.processor).__name__} does not say where it puts images into a text, so what is learned "
                "cannot be told from them; use a base model whose processor does."
            )
        spans = [(_moved(start, replaced), _moved(end, replaced)) for start, end in spans]
        images_at = [tuple(place["new_span"]) for place in replaced]
        labels = []
        for token, offset in zip(ids, offsets, strict=True):
            if token in self.token_ids or _overlaps(offset, images_at):
                labels.append(IMAGE)
            else:
                labels.append(token if _overlaps(offset, spans) != inverted else IGNORE)
        return ids, labels


# The label of a token that belongs to an image, before it becomes -100.
IMAGE = -101


def _moved(position: int, replaced: Sequence[dict[str, Any]]) -> int:
    """Return where a character of the text is once the images' tokens are in it."""
    return position + sum(
        (place["new_span"][1] - place["new_span"][0]) - (place["span"][1] - place["span"][0])
        for place in replaced
        if place["span"][1] <= position
    )


def _overlaps(offset: Sequence[int], spans: Iterable[Sequence[int]]) -> bool:
    return any(offset[0] < end and offset[1] > start for start, end in spans)


def encode_image_chats(
    batch: dict[str, list[Any]],
    *,
    tokenizer: Any,
    form: Form,
    image_column: str | None,
    image_urls: bool,
    template_columns: Sequence[str],
    filled_columns: Sequence[str],
    learn: str | Sequence[str],
    max_length: int,
    train_on_inputs: bool,
    prompts_only: bool,
    with_references: bool,
) -> dict[str, list[Any]]:
    """Render chats with images, and put the loss on the tokens of the turns to learn.

    Args:
        batch: the columns of the rows.
        tokenizer: the processor.
        form: how the conversations are written.
        image_column: the column of a row's images; None: only messages name images.
        image_urls: images may be fetched from http and https addresses.
        template_columns: see `encode_chats`.
        filled_columns: see `encode_chats`.
        learn: see `learned_turns`.
        max_length: maximum number of tokens.
        train_on_inputs: put the loss on all text but that of messages with `weight`, `train` or `training` 0.
        prompts_only: return prompts, without the assistant's last turn.
        with_references: return the text of that turn as well.

    Returns:
        See `encode_chats`. `text` is the rendered text and `image_files` its images, at least one entry, empty in a
        row without images; `cut_image` is whether `max_length` would cut an image.

    Raises:
        RowError: an image cannot be read, or the row cannot be rendered.
    """
    renderer, reader = ImageRenderer(tokenizer), ImageReader(tokenizer)
    learning = () if prompts_only else ("labels", "supervised", "lost", "kept", "left_out", "cut_image")
    names = ("input_ids", "length", "text", "image_files", *learning, *(("reference",) if with_references else ()))
    out: dict[str, list[Any]] = {name: [] for name in names}
    for row in range(len(next(iter(batch.values())))):
        cells = {name: batch[name][row] for name in template_columns}
        cells = {name: without_nulls(cell) if name in filled_columns else cell for name, cell in cells.items()}
        extra = template_arguments(cells, row)
        try:
            given = read_row(batch, row, form, filled_columns, with_answer=not prompts_only or with_references)
            folder = batch[FOLDER_COLUMN][row] if FOLDER_COLUMN in batch else ""
            column = batch[image_column][row] if image_column in batch else None
            given, sources = place_images(given, column, partial(image_source, folder=folder or "", urls=image_urls))
            images = [read_image(source) for source in sources]
        except ValueError as problem:
            if isinstance(problem, LitPeftError):
                raise
            raise RowError(row, f"{problem}.") from problem
        try:
            messages = renderer.clean(given)
            if prompts_only:
                answers = []
                while messages[-1]["role"] == "assistant":
                    answers.append(messages.pop()["content"])
                count = count_images(given[: len(messages)])
                text = renderer.render(messages, True, **extra)
                ids, labels = reader.read(text, images[:count], [], inverted=False)
                if IMAGE in labels[: max(0, len(ids) - max_length)]:
                    raise ValueError(
                        f"the prompt has {len(ids)} tokens with its images, and data.max_length {max_length} would cut "
                        "an image; raise data.max_length, or make the image smaller with data.processor_args"
                    )
                out["input_ids"].append(ids[-max_length:])
                out["length"].append(len(ids))
                _add_images(out, text, sources[:count])
                if with_references:
                    out["reference"].append(_answer(answers))
                continue
            if train_on_inputs:
                muted = [index for index, message in enumerate(given) if not is_learned(message)]
                spans = renderer.unlearned_spans(messages, muted, **extra)
                text = renderer.render(messages, **extra)
                missing = [name for m in messages if m["role"] == "assistant" for name in left_out(m, text)]
                _add(out, reader, text, images, sources, spans, max_length, inverted=True)
                out["left_out"].append(",".join(dict.fromkeys(missing)))
                continue
            for part in renderer.examples(messages, learned_turns(given, learn), **extra):
                found = "".join(part.text[start:end] for start, end in part.spans)
                missing = [name for index in part.turns for name in left_out(messages[index], found)]
                missing += [] if part.continues_prompt else ["generation prompt"]
                # The text ends with its last turn.
                count = count_images(given[: max(part.turns) + 1])
                _add(out, reader, part.text, images[:count], sources[:count], part.spans, max_length)
                out["left_out"].append(",".join(dict.fromkeys(missing)))
        except LitPeftError:
            raise
        except ValueError as problem:
            raise RowError(row, f"{problem}.") from problem
        except Exception as problem:  # jinja's errors, and those of what the template computes
            raise RowError(row, template_problem(problem)) from problem
    return out


def _add(
    out: dict[str, list[Any]],
    reader: ImageReader,
    text: str,
    images: list[Any],
    sources: list[ImageSource],
    spans: Sequence[Span],
    max_length: int,
    inverted: bool = False,
) -> None:
    ids, labels = reader.read(text, images, spans, inverted)
    add_supervised(out, ids, [IGNORE if label == IMAGE else label for label in labels], max_length)
    out["cut_image"].append(IMAGE in labels[max_length:])
    _add_images(out, text, sources)


def _add_images(out: dict[str, list[Any]], text: str, sources: list[ImageSource]) -> None:
    out["text"].append(text)
    # An empty entry gives the column its type if the first rows have no images.
    out["image_files"].append([{"path": path, "data": data} for path, data in sources or [ImageSource("", b"")]])


def _answer(contents: list[Any]) -> str:
    """Return the text of the assistant's last turn, given its contents in reverse order."""
    texts = ["".join(part.get("text", "") for part in c) if isinstance(c, list) else str(c) for c in contents]
    return texts[0] if texts else ""
