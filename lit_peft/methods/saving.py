"""`model.save_pretrained` while a method is attached."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from lit_peft.util.errors import LitPeftError


class SaveAdapter:
    """Takes the place of a model's `save_pretrained`, and writes the adapter's folder.

    The model's own would write the base's weights under names that `from_pretrained` does not know: adapted layers
    would be read back at random. Beside the adapter's files stands `model.safetensors` with the trained tensors alone,
    from which transformers' `Trainer` resumes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the files into a folder, which may hold others.

        Args:
            save_directory: the folder; it is made if need be.
            is_main_process: False writes nothing.
            push_to_hub: refused.
            **kwargs: arguments of transformers' `save_pretrained` that are about weights of the base.

        Raises:
            LitPeftError: `push_to_hub` is set, or the adapter cannot be written.
        """
        # The public function, by its public name: folders are a layer above methods.
        import lit_peft

        if push_to_hub:
            raise LitPeftError("push_to_hub=True is not supported by an adapter: save it, then run `lit-peft push`.")
        if not is_main_process:
            return
        from safetensors.torch import save_file

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            written = lit_peft.save_adapter(self.model, Path(temporary) / "adapter")
            trained = {
                name: parameter.detach().contiguous()
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }
            save_file(trained, written / "model.safetensors", metadata={"format": "pt"})
            for file in written.iterdir():
                file.replace(folder / file.name)
