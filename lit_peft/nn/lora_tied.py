"""The LoRA of a head that shares its weight with an embedding, and its update with the LoRA of the embedding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lit_peft.nn.lora import LoRAEmbedding, LoRALinear


class TiedLoRALinear(LoRALinear):
    """`h = W x + s · (B A)ᵀ x`, where A and B are those of the embedding whose weight W the head shares.

    It has no parameters of its own, and W is merged with the embedding's layer.

    Args:
        base_layer: the head.
        source: the embedding's layer.
        **settings: see `LoRALayer`.

    Shapes:
        input (..., embedding_dim) → output (..., num_embeddings)
    """

    source: LoRAEmbedding

    def __init__(self, base_layer: nn.Module, source: LoRAEmbedding, **settings: Any) -> None:
        super().__init__(base_layer, **settings)
        del self.lora_A, self.lora_B
        # Not a submodule: it is the embedding's.
        object.__setattr__(self, "source", source)

    def __getattr__(self, name: str) -> Any:
        if name in ("lora_A", "lora_B") and "source" in vars(self):
            return (self.source.lora_B if name == "lora_A" else self.source.lora_A).T
        return super().__getattr__(name)

    @property
    def merged(self) -> bool:
        return self.source.merged

    def _is_plain(self, x: Tensor, base: nn.Module, weight: Tensor) -> bool:
        return not self.merged and super()._is_plain(x, base, weight)

    def check_mergeable(self) -> None:
        """Nothing to check: the embedding's layer is merged."""

    def merge(self, check: bool = True) -> None:
        self.source.merge(check)

    def unmerge(self) -> None:
        self.source.unmerge()

    def keep_merged(self) -> None:
        """Nothing to keep: the embedding's layer has the copy of W."""

    def restore_base(self) -> nn.Module:
        return self.base_layer

    def follow_weight(self) -> None:
        """Nothing to move: A and B are the embedding's."""
