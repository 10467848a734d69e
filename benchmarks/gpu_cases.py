"""What benchmarks/gpu.py measures: shapes, ways to take a step on them, and what each is compared with."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cases import LINEAR, plain_name
from measure import Step
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lit_peft
from lit_peft import LoRASettings, supervised_loss
from lit_peft.data.packing import PackCollator
from lit_peft.methods.attachment import MethodSettings
from lit_peft.models.loading import BaseSettings, load_base, load_config
from lit_peft.models.quantization import quantize
from lit_peft.tasks.causal_lm import CausalLM

Made = tuple[nn.Module, Step]


@dataclass(frozen=True)
class Shape:
    """A Llama in bf16 (the tiny one in fp32), and a batch of which the second half of each row is supervised."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    rows: int
    length: int
    short: int
    r: int = 16
    dtype: torch.dtype = torch.bfloat16

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=8192,
            rope_theta=5e5,
            tie_word_embeddings=False,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 512, 2, 64, 16, 4, torch.float32),
    "1b": Shape(2048, 8192, 16, 32, 8, 128_256, 4, 2048, 260),
    "8b": Shape(4096, 14_336, 32, 32, 8, 128_256, 4, 2048, 260),
}


class Workbench:
    """Makes models and batches of one shape on one device.

    Args:
        shape: the shape.
        device: where everything is.
        folder: where the base is saved, once, for ways that load it.
        backend: of `torch.compile`.
    """

    def __init__(self, shape: Shape, device: torch.device, folder: Path, backend: str) -> None:
        self.shape, self.device, self.folder, self.backend = shape, device, folder, backend

    def base(self) -> Any:
        """The base, with the same random weights each time, in training mode."""
        torch.manual_seed(0)
        torch.set_default_dtype(self.shape.dtype)
        try:
            with self.device:
                return LlamaForCausalLM(self.shape.config).train()
        finally:
            torch.set_default_dtype(torch.float32)

    def saved(self) -> Path:
        """The base as a folder."""
        if not (self.folder / "config.json").exists():
            self.base().save_pretrained(self.folder)
        return self.folder

    def batch(self, rows: int | None = None, length: int | None = None) -> dict[str, Any]:
        """Token ids and labels on the device."""
        size = rows or self.shape.rows, length or self.shape.length
        ids = torch.randint(0, self.shape.vocabulary, size, generator=torch.Generator().manual_seed(1))
        labels = ids.clone()
        labels[:, : size[1] // 2] = -100
        return {"input_ids": ids.to(self.device), "labels": labels.to(self.device)}

    def packed(self) -> dict[str, Any]:
        """As many tokens, in examples of about a quarter of a row's length."""
        ids = self.batch()["input_ids"].tolist()
        rows = []
        for row in ids:
            cuts = [0, len(row) // 7, len(row) // 3, len(row) // 2, len(row) * 5 // 6, len(row)]
            parts = [row[start:end] for start, end in pairwise(cuts)]
            labels = [[-100] * (len(part) // 2) + part[len(part) // 2 :] for part in parts]
            rows.append([{"input_ids": part, "labels": own} for part, own in zip(parts, labels, strict=True)])
        batch = PackCollator(0)(rows)
        return {name: v.to(self.device) if isinstance(v, Tensor) else v for name, v in batch.items()}

    def lora(self, **settings: Any) -> LoRASettings:
        r = self.shape.r
        return LoRASettings(**{"r": r, "lora_alpha": 2 * r, "target_modules": LINEAR, **settings})

    def attached(self, settings: MethodSettings | None = None, quantization: str | None = None) -> Any:
        """The base with a method of ours."""
        if quantization is None:
            model = self.base()
        elif quantization == "fp8":
            model = self.base()
            quantize(model, "fp8")
        else:
            source = BaseSettings(str(self.saved()), quantization=quantization)
            model, _ = load_base(source, load_config(source), AutoModelForCausalLM, self.shape.dtype)
            model.train().to(self.device)
        model = lit_peft.attach(model, settings or self.lora())
        seed_adapters(model)
        return model

    # ------------------------------------------------------------------------------------------------- ways

    def ours(
        self,
        settings: MethodSettings | None = None,
        *,
        quantization: str | None = None,
        compiled: bool = False,
        checkpointed: bool = False,
        batch: Callable[[], dict[str, Any]] | None = None,
    ) -> Made:
        """A method of ours, fp32 adapters on the base as it is."""
        model = self.attached(settings, quantization)
        if checkpointed:
            renamed = hasattr(model, "activation_checkpointing_enable")
            getattr(model, f"{'activation' if renamed else 'gradient'}_checkpointing_enable")()
        if compiled:
            lit_peft.compile_layers(model, backend=self.backend)
        inputs = (batch or self.batch)()
        task = CausalLM()
        task.prepare(model)

        def step() -> Tensor:
            with task.loss_only(model):
                loss: Tensor = task.forward(model, inputs).loss
            return loss

        return model, step

    def peft(self, *, autocast: bool = False, liger: bool = False, **how: Any) -> Made:
        """peft's LoRA: adapters in the base's dtype, or in fp32 under autocast, as transformers' Trainer runs it."""
        from peft import LoraConfig, get_peft_model

        model = self.base()
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=model)
        if how.pop("checkpointed", False):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = how.pop("batch", self.batch)()
        r = self.shape.r
        settings = {"r": r, "lora_alpha": 2 * r, "target_modules": LINEAR, **how}
        adapted: Any = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=autocast)
        seed_adapters(adapted)
        context = partial(torch.autocast, self.device.type, torch.bfloat16) if autocast else nullcontext

        def step() -> Tensor:
            with context():
                loss: Tensor = adapted(**batch).loss
            return loss

        return adapted, step

    def floor(self, compiled: bool = False, batch: Callable[[], dict[str, Any]] | None = None) -> Made:
        """The least there is to do: the frozen model, its input's gradient, the loss of the supervised tokens."""
        model = self.base().requires_grad_(False)
        if compiled:
            lit_peft.compile_layers(model, backend=self.backend)
        inputs = (batch or self.batch)()

        def step() -> Tensor:
            embedded = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
            with supervised_loss(model):
                loss: Tensor = model(inputs_embeds=embedded, labels=inputs["labels"]).loss
            return loss

        return model, step


@torch.no_grad()
def seed_adapters(model: nn.Module) -> None:
    """Give LoRA's matrices the same small values in ours and in peft's model."""
    found = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    generator = torch.Generator().manual_seed(2)
    for name in sorted(found):
        value = 0.02 * torch.randn(found[name].shape, generator=generator)
        if "magnitude" not in name:
            found[name].copy_(value)


def free(device: torch.device) -> None:
    """Free what the last model held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
