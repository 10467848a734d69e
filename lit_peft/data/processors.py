"""The processor of a data module: its tokenizer, with what reads images or sounds."""

from __future__ import annotations

from typing import Any

from lit_peft.data.base import LitDataModule
from lit_peft.data.tokenizers import adapted
from lit_peft.models.processing import load_processor
from lit_peft.util.errors import LitPeftError


class ProcessorData(LitDataModule):
    """A data module with a processor, whose tokenizer is the data module's.

    Args:
        processor_args: settings of the processor to use instead of the saved ones, e.g. `{do_image_splitting: false}`.
        **common: see `LitDataModule`. `tokenizer` names the model whose processor to use instead of the base model's.
    """

    def __init__(self, processor_args: dict[str, Any] | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.processor_args = dict(processor_args or {})
        self._processor: Any = None

    @property
    def processor(self) -> Any:
        """The processor, loaded on first use; set it to use one that is not on disk."""
        if self._processor is None:
            name = self.tokenizer_name or self.base
            if name is None:
                raise LitPeftError("Neither data.tokenizer nor data.base is set; name the base model.")
            field = "data.tokenizer" if self.tokenizer_name else "data.base"
            self.processor = load_processor(name, field, self.revision, self.processor_args)
        return self._processor

    @processor.setter
    def processor(self, processor: Any) -> None:
        template = getattr(processor, "chat_template", None)
        if template is not None:
            # A processor keeps the chat template that its tokenizer may lack; the data's own setting comes first.
            processor.tokenizer.chat_template = template
        adapted(processor.tokenizer, self)
        processor.chat_template = processor.tokenizer.chat_template
        self._processor = processor

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        raise LitPeftError("The tokenizer is the processor's: set `processor` instead.")
