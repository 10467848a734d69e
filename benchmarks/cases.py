"""The ways to take one step: lit_peft, peft, full fine-tuning, the floor; same base, same batch, same adapters."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from lit_peft.callbacks import ActivationCache
from measure import Step
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lit_peft
from lit_peft import (
    AdapterHSettings,
    AdapterPSettings,
    LoRASettings,
    ParallelSettings,
    PrefixTuningSettings,
    PromptTuningSettings,
    PTuningSettings,
    supervised_loss,
)
from lit_peft.methods.attachment import MethodSettings
from lit_peft.nn import Bottleneck

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


# From the second epoch on, with the frozen layers' states kept.
CACHED = "lit_peft, cached"
Runs = dict[str, tuple[nn.Module, Step]]

# Each other method of ours, and peft's settings of the same; None where peft does not have it.
METHODS: dict[str, tuple[MethodSettings, PeftConfig | None]] = {
    "Prompt Tuning v=20": (
        PromptTuningSettings(num_virtual_tokens=20),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    ),
    "P-Tuning v=20, LSTM": (
        PTuningSettings(num_virtual_tokens=20, encoder_hidden_size=256),
        PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=20,
            encoder_hidden_size=256,
            encoder_reparameterization_type="LSTM",
        ),
    ),
    "Prefix Tuning v=30, projected": (
        PrefixTuningSettings(num_virtual_tokens=30, prefix_projection_size=512),
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=30,
            prefix_projection=True,
            encoder_hidden_size=512,
        ),
    ),
    "Prefix Tuning v=30, direct": (
        PrefixTuningSettings(num_virtual_tokens=30, prefix_projection=False),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30),
    ),
    "AdapterH, reduction 16": (AdapterHSettings(), None),
    "AdapterP, reduction 16": (AdapterPSettings(), None),
    "Parallel, bottleneck 128": (ParallelSettings(bottleneck_size=128), None),
}


def runs(shape: Shape, full: bool = True, only: str | None = None) -> Runs:
    """Return LoRA each way: its model, and a function from nothing to its loss. Ours and peft's adapters are equal."""
    base = shape.base()
    adapted = None if shape.top is None else list(range(shape.layers - shape.top, shape.layers))
    settings: dict[str, Any] = {
        "r": shape.r,
        "lora_alpha": 2 * shape.r,
        "lora_dropout": shape.dropout,
        "target_modules": LINEAR,
        "layers_to_transform": adapted,
    }
    made = {}
    if only in (None, "lit_peft", "peft"):
        ours = lit_peft.attach(copy.deepcopy(base), LoRASettings(**settings))
        theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
        _copy_adapters(ours, theirs)
        made = {"lit_peft": _ours(ours, shape), "peft": _theirs(theirs, shape)}
    if shape.top is not None and only in (None, CACHED):
        kept = lit_peft.attach(copy.deepcopy(base), LoRASettings(**settings))
        if only is None:
            kept.load_state_dict(made["lit_peft"][0].state_dict())
        ActivationCache().on_fit_start(SimpleNamespace(global_rank=0, precision="32-true"), kept)  # type: ignore[arg-type]
        made[CACHED] = _ours(kept, shape)
    if only in (None, "floor"):
        made["floor"] = _floor(base if only else copy.deepcopy(base), shape)
    if full and only in (None, "full fine-tuning"):
        made["full fine-tuning"] = _theirs(base, shape)
    return _warm(made if only is None else {only: made[only]})


def method_runs(shape: Shape, method: str) -> Runs:
    """Return another method each way, as `runs`.

    A bottleneck is beside the floor, which never changes, and its adapters' own two products, forward and backward.
    """
    settings, config = METHODS[method]
    base = shape.base()
    ours = lit_peft.attach(copy.deepcopy(base), settings)
    made = {"lit_peft": _ours(ours, shape)}
    if config is None:
        made["matmuls"] = (ours, _matmuls(ours, shape))
    else:
        theirs = get_peft_model(copy.deepcopy(base), config)
        mine, others = ([p for p in model.parameters() if p.requires_grad] for model in (ours, theirs))
        with torch.no_grad():
            for parameter, value in zip(others, mine, strict=True):
                parameter.copy_(value)
        made["peft"] = _theirs(theirs, shape)
    made["floor"] = _floor(base, shape)
    return _warm(made)


def _ours(model: Any, shape: Shape) -> tuple[nn.Module, Step]:
    batch = shape.batch()

    def step() -> Tensor:
        with supervised_loss(model):
            return model(**batch).loss

    return model, step


def _theirs(model: Any, shape: Shape) -> tuple[nn.Module, Step]:
    batch = shape.batch()
    return model, lambda: model(**batch).loss


def _floor(model: Any, shape: Shape) -> tuple[nn.Module, Step]:
    """The least there is to do: the frozen model, its input's gradient, the loss of the supervised tokens."""
    batch = shape.batch()
    model.requires_grad_(False)

    def step() -> Tensor:
        embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        with supervised_loss(model):
            return model(inputs_embeds=embedded, labels=batch["labels"]).loss

    return model, step


def _matmuls(model: nn.Module, shape: Shape) -> Step:
    """The products of every bottleneck of the model, nothing around them."""
    adapters = [module for module in model.modules() if isinstance(module, Bottleneck)]
    x = torch.randn(shape.rows * shape.length, shape.hidden).requires_grad_()

    def step() -> Tensor:
        return torch.stack([adapter.up(adapter.down(x))[0, 0] for adapter in adapters]).sum()

    return step


def _warm(made: Runs) -> Runs:
    for _, step in made.values():
        step()  # the first call finds out what the model does with its logits
    return made


def parity(made: Runs) -> float:
    """The largest difference of a gradient between lit_peft and peft, by the largest gradient; dropout is off."""
    gradients = []
    for name in ("lit_peft", "peft"):
        model, step = made[name]
        model.eval()
        step().backward()
        trained = {plain_name(path): p.grad for path, p in model.named_parameters() if p.requires_grad}
        gradients.append(trained if "lora_A" in "".join(trained) else dict(enumerate(trained.values())))
        model.zero_grad()
        model.train()
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours) / scale


def plain_name(path: str) -> str:
    """A parameter's name in the base, whether it is lit_peft's or peft's."""
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
            parameter.copy_(values[plain_name(path)])
