"""The functions for adapters as methods of a LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch

from lit_peft.formats.folder import load_adapter, save_adapter
from lit_peft.methods import adapters, merging
from lit_peft.methods.attachment import MethodSettings
from lit_peft.methods.stack import Stack


class AdapterMethods:
    """Saves, loads, switches and merges the adapters of a `BaseLM`'s model. A mixin of `BaseLM`."""

    model: Any

    def configure_model(self) -> None:
        """Build the model."""
        raise NotImplementedError

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the adapted model; arguments as in transformers' `generate`."""
        with torch.no_grad():
            return self.model.generate(*args, **kwargs)

    def save_adapter(self, folder: str | Path, format: Literal["peft", "adapterhub"] | None = None) -> Path:
        """Write the active adapter to a folder; see `lit_peft.save_adapter`."""
        return save_adapter(self.model, folder, format)

    def load_adapter(
        self, folder: str | Path, name: str, check_base: bool = True, with_head: bool = True, **options: Any
    ) -> None:
        """Load another adapter and make it the active one; arguments as those of `lit_peft.load_adapter`."""
        self.configure_model()
        load_adapter(self.model, folder, check_base, name, with_head, **options)

    def add_adapter(self, name: str, settings: MethodSettings) -> None:
        """Attach another new adapter and make it the active one; see `lit_peft.add_adapter`."""
        self.configure_model()
        adapters.add_adapter(self.model, name, settings)

    def set_adapter(self, name: str | Stack | Sequence[str] | None) -> None:
        """Make an adapter, a `Stack` or a list of LoRAs active, or none if `name` is None.

        The module's own adapter is called `default`.
        """
        adapters.set_adapter(self.model, name)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which no adapter is active."""
        return adapters.disable_adapter(self.model)

    def merge(self) -> None:
        """Merge the active LoRA into the base weights, until `unmerge`."""
        merging.merge_adapter(self.model)

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        merging.unmerge_adapter(self.model)

    def merge_and_unload(self) -> Any:
        """Merge the active LoRA into the base weights for good and return the plain transformers model."""
        return merging.merge_and_unload(self.model)
