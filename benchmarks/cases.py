"""The four ways to take one step: lit_peft, peft, full fine-tuning, and the floor; same base, same batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from measure import Step
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lit_peft
from lit_peft import LoRASettings, supervised_loss

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """A Llama, a batch and LoRA's settings.

    Args:
        hidden: hidden size.
        layers: number of layers.
        vocabulary: number of tokens.
        rows: examples in the batch.
        length: tokens of each.
        supervised: share of each example that is supervised, at its end.
        r: rank, on all linear layers.
        dropout: LoRA's dropout.
        dtype: of the base.
        top: adapt only this many of the highest layers; all when None.
    """

    hidden: int = 512
    layers: int = 8
    vocabulary: int = 32_000
    rows: int = 4
    length: int = 256
    supervised: float = 0.5
    r: int = 16
    dropout: float = 0.0
    dtype: str = "float32"
    top: int | None = None

    def base(self) -> Any:
        """The base model, the same each time."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        return LlamaForCausalLM(config).to(getattr(torch, self.dtype)).train()

    def batch(self) -> dict[str, Tensor]:
        """Token ids and labels; the first part of each row is not supervised."""
        ids = torch.randint(0, self.vocabulary, (self.rows, self.length), generator=torch.Generator().manual_seed(1))
        labels = ids.clone()
        labels[:, : round(self.length * (1 - self.supervised))] = -100
        return {"input_ids": ids, "labels": labels}


def runs(shape: Shape, full: bool = True, only: str | None = None) -> dict[str, tuple[nn.Module, Step]]:
    """Return each way's model, and a function from nothing to its loss. Ours and peft's adapters are equal."""
    base, batch = shape.base(), shape.batch()
    adapted = None if shape.top is None else list(range(shape.layers - shape.top, shape.layers))
    ours = lit_peft.attach(
        copy.deepcopy(base),
        LoRASettings(
            r=shape.r,
            lora_alpha=2 * shape.r,
            lora_dropout=shape.dropout,
            target_modules=LINEAR,
            layers_to_transform=adapted,
        ),
    )
    config = LoraConfig(
        r=shape.r,
        lora_alpha=2 * shape.r,
        lora_dropout=shape.dropout,
        target_modules=LINEAR,
        layers_to_transform=adapted,
    )
    theirs = get_peft_model(copy.deepcopy(base), config)
    _copy_adapters(ours, theirs)
    frozen = copy.deepcopy(base).requires_grad_(False)

    def our_step() -> Tensor:
        with supervised_loss(ours):
            return ours(**batch).loss

    def floor() -> Tensor:
        """The least there is to do: the frozen model, its input's gradient, the loss of the supervised tokens."""
        embedded = frozen.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        with supervised_loss(frozen):
            return frozen(inputs_embeds=embedded, labels=batch["labels"]).loss

    made = {
        "lit_peft": (ours, our_step),
        "peft": (theirs, lambda: theirs(**batch).loss),
        "floor": (frozen, floor),
    }
    if full:
        tuned = copy.deepcopy(base)
        made["full fine-tuning"] = (tuned, lambda: tuned(**batch).loss)
    if only is not None:
        made = {only: made[only]}
    for _, step in made.values():
        step()  # the first call finds out what the model does with its logits
    return made


def parity(made: dict[str, tuple[nn.Module, Step]]) -> float:
    """The largest difference of a gradient between lit_peft and peft, by the largest gradient."""
    gradients = {}
    for name in ("lit_peft", "peft"):
        model, step = made[name]
        model.zero_grad()
        step().backward()
        gradients[name] = {_plain(path): p.grad for path, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
    ours, theirs = gradients["lit_peft"], gradients["peft"]
    assert ours.keys() == theirs.keys()
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours) / scale


def _plain(path: str) -> str:
    return path.removeprefix("base_model.model.").removesuffix(".default.weight")


@torch.no_grad()
def _copy_adapters(ours: nn.Module, theirs: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    values = {}
    for path, parameter in ours.named_parameters():
        if parameter.requires_grad:
            if path.endswith("lora_B"):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            values[path] = parameter
    for path, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(values[_plain(path)])
