"""Noise on the input embeddings (NEFTune), against transformers' own hook."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lit_peft.callbacks import ActivationCache
from models import ALL, QUIET, batch, make
from transformers.integrations.neftune import neftune_post_forward_hook

import lit_peft
from lit_peft import CausalLMData, LitPeftError
from lit_peft.training.neftune import embedding_noise

ALPHA = 5.0
METHODS: dict[str, Any] = {
    "LoRA": lit_peft.LoRASettings(),
    "LoRA on the embeddings": lit_peft.LoRASettings(target_modules=["embed_tokens"]),
    "IA3": lit_peft.IA3Settings(),
    "AdapterH": lit_peft.AdapterHSettings(),
    "PrefixTuning": lit_peft.PrefixTuningSettings(num_virtual_tokens=3),
    "PTuning": lit_peft.PTuningSettings(num_virtual_tokens=3),
    "PromptTuning": lit_peft.PromptTuningSettings(num_virtual_tokens=3),
}


def test_the_noise_is_that_of_transformers() -> None:
    ours, theirs = make("llama").train(), make("llama").train()
    table = theirs.get_input_embeddings()
    table.neftune_noise_alpha = ALPHA
    table.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(0)
    expected = theirs(**batch("llama")).logits
    torch.manual_seed(0)
    with embedding_noise(ours, ALPHA):
        found = ours(**batch("llama")).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, ours(**batch("llama")).logits)


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_architecture_has_noise_of_the_papers_size_while_it_trains(name: str) -> None:
    model, inputs = make(name), batch(name)
    parts = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model]
    seen: list[torch.Tensor] = []
    for part in parts:
        part.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))

    def embeddings(alpha: float | None) -> list[torch.Tensor]:
        seen.clear()
        torch.manual_seed(0)
        with embedding_noise(model, alpha):
            model(**inputs)
        return list(seen)

    model.train()
    for noisy, plain in zip(embeddings(ALPHA), embeddings(None), strict=True):
        noise, most = (noisy - plain).abs(), ALPHA / math.sqrt(plain.shape[-2] * plain.shape[-1])
        assert 0.9 * most < noise.max() <= most * 1.001
        assert noise.mean().item() == pytest.approx(most / 2, rel=0.15)
    model.eval()
    for still, plain in zip(embeddings(ALPHA), embeddings(None), strict=True):
        assert torch.equal(still, plain)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_with_it_and_its_virtual_tokens_have_none(name: str) -> None:
    model = lit_peft.attach(make("llama"), METHODS[name]).train()
    layers: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: layers.append(args[0]))

    def run(alpha: float | None) -> torch.Tensor:
        torch.manual_seed(0)
        with embedding_noise(model, alpha):
            loss = model(**batch("llama")).loss
        loss.backward()
        return layers.pop()

    plain, noisy = run(None), run(ALPHA)
    virtual = plain.shape[1] - 7
    assert torch.equal(plain[:, :virtual], noisy[:, :virtual]) and (plain != noisy)[:, virtual:].float().mean() > 0.99
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert torch.equal(run(None), plain)


def test_a_model_without_a_table_of_tokens_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(LitPeftError, match=r"neftune_noise_alpha=5.0: Linear"), embedding_noise(model, ALPHA):
        model(torch.zeros(1, 2))
    with pytest.raises(LitPeftError, match="neftune_noise_alpha=-1"):
        lit_peft.LoRA(base="nowhere", neftune_noise_alpha=-1)


def fit(decoder: Path, reviews: Path, folder: Path, resume: Any = None, epochs: int = 2, **settings: Any) -> Path:
    pl.seed_everything(0)
    data = CausalLMData(base=str(decoder), train=str(reviews), max_length=16, limit_train=16, batch_size=4)
    callbacks = settings.pop("callbacks", [])
    module = lit_peft.LoRA(base=str(decoder), lr_scheduler="constant", learning_rate=1e-2, **settings)
    length = {"max_epochs": epochs, "limit_val_batches": 1}
    trainer = pl.Trainer(**length, default_root_dir=folder, enable_checkpointing=False, callbacks=callbacks, **QUIET)
    trainer.fit(module, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return folder / f"{epochs}.ckpt"


def test_a_resumed_run_draws_the_same_noise_and_nothing_of_it_is_saved(
    decoder: Path, reviews: Path, tmp_path: Path
) -> None:
    whole, half, none = (tmp_path / name for name in ("whole", "half", "none"))
    first = fit(decoder, reviews, half, epochs=1, neftune_noise_alpha=ALPHA)
    stored = [
        fit(decoder, reviews, whole, neftune_noise_alpha=ALPHA),
        fit(decoder, reviews, half, first, neftune_noise_alpha=ALPHA),
        fit(decoder, reviews, none),
    ]
    states = [torch.load(path, weights_only=True)["state_dict"] for path in stored]
    assert states[0].keys() == states[2].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())
    with pytest.raises(LitPeftError, match=r"model.neftune_noise_alpha was 5.0 and is None now"):
        fit(decoder, reviews, half, first)


def test_activations_with_noise_are_not_cached(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    with pytest.raises(LitPeftError, match="ActivationCache would keep the noise"):
        fit(decoder, reviews, tmp_path, neftune_noise_alpha=ALPHA, callbacks=[ActivationCache()])
