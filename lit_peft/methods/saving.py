"""`model.save_pretrained` of a model that has a method attached."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from lit_peft.util.errors import LitPeftError


class SaveAdapter:
    """Replaces a model's `save_pretrained` and writes the adapter's folder instead.

    The original method would save the weights of adapted layers under names that `from_pretrained` does not know, and
    loading would leave those layers with random weights. The folder also gets a `model.safetensors` with the trained
    tensors, from which transformers' `Trainer` can resume.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the adapter's files. Other files in the folder are kept.

        Args:
            save_directory: the folder, which is created if necessary.
            is_main_process: whether to write anything.
            push_to_hub: not supported.
            **kwargs: other arguments of transformers' `save_pretrained`. They concern the base's weights and are
                ignored.

        Raises:
            LitPeftError: `push_to_hub` is set, or the adapter cannot be written.
        """
        # Imported by its public name, because lit_peft.formats is a layer above lit_peft.methods.
        import lit_peft

        if push_to_hub:
            raise LitPeftError(
                "push_to_hub=True is not supported for an adapter: save it without, then run `lit-peft push`."
            )
        if not is_main_process:
            return
        from safetensors.torch import save_file

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            adapter = lit_peft.save_adapter(self.model, Path(temporary) / "adapter")
            trained = {
                name: parameter.detach().contiguous()
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }
            save_file(trained, adapter / "model.safetensors", metadata={"format": "pt"})
            for file in adapter.iterdir():
                file.replace(folder / file.name)
