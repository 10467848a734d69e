"""Examples with images to one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_peft.data.collate import PadCollator
from lit_peft.data.images import ImageSource, read_image
from lit_peft.data.vision_encoding import ImageReader
from lit_peft.util.errors import LitPeftError


@dataclass(frozen=True)
class ImageCollator:
    """Pads tokens, and lets the processor make the tensors of the images.

    Attributes:
        pad: pads the tokens.
        reader: has the processor.
        cuts_start: whether `max_length` has cut examples at their start, not at their end.
    """

    pad: PadCollator
    reader: ImageReader
    cuts_start: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate a batch.

        Args:
            examples: each with `input_ids`, `text`, `image_files`, and `labels` unless it is a prompt.

        Returns:
            The tensors of `PadCollator`, and those of the processor. What the processor returns for each token, such as
            `token_type_ids`, is cut and padded like the tokens.

        Raises:
            LitPeftError: an image is not what it was when the row was tokenized.
        """
        import torch
        import torch.nn.functional as F

        images = [
            [
                read_image(source)
                for source in (ImageSource(image["path"], image["data"]) for image in row)
                if any(source)
            ]
            for row in (example["image_files"] for example in examples)
        ]
        texts = [example["text"] for example in examples]
        found = dict(self.reader.call(texts, images, padding=True, return_tensors="pt"))
        batch = self.pad(examples)
        shape, mask = found["input_ids"].shape, found["attention_mask"].bool()
        sizes, longest = [len(example["input_ids"]) for example in examples], batch["input_ids"].shape[1]
        for name, values in found.items():
            is_per_token = values.shape[:2] == shape and name.endswith(("_ids", "_mask")) and "pixel" not in name
            if not is_per_token:
                batch[name] = values
                continue
            rows = []
            for row, size in enumerate(sizes):
                whole = values[row][mask[row]]
                part = whole[len(whole) - size :] if self.cuts_start else whole[:size]
                room = (longest - size, 0) if self.pad.padding_side == "left" else (0, longest - size)
                value = self.pad.pad_token_id if name == "input_ids" else 0
                rows.append(F.pad(part, (*(0, 0) * (part.dim() - 1), *room), value=value))
            stacked = torch.stack(rows)
            if name == "input_ids" and not torch.equal(stacked, batch["input_ids"]):
                raise LitPeftError(
                    "An image has changed since its row was tokenized, so that its tokens differ: start the run again."
                )
            batch[name] = stacked
        if "reference" in examples[0]:
            batch["references"] = [example["reference"] for example in examples]
        return batch
