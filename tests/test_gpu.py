"""What must hold on a GPU: `python -m pytest -n 0 tests/test_gpu.py`, in less than four minutes.

Without a GPU all of it is skipped. `LIT_PEFT_GPU_TESTS_ON_CPU=1` runs what does not need one on the CPU, in place of
the GPU, which shows that the tests themselves work.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS
from models import QUIET, batch, checkpointing, make, scramble, trained_of
from test_changes import SETTINGS
from test_packing import examples
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import lit_peft
from lit_peft import LoRASettings
from lit_peft.data.collate import PadCollator
from lit_peft.data.loaders import default_workers
from lit_peft.data.packing import PackCollator
from lit_peft.models.varlen_attention import NAME, register
from lit_peft.nn.cross_entropy import head_cross_entropy
from lit_peft.nn.float8 import Float8Linear
from lit_peft.tasks.causal_lm import CausalLM

HAS_GPU = torch.cuda.is_available()
ON_CPU = os.environ.get("LIT_PEFT_GPU_TESTS_ON_CPU") == "1"
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
pytestmark = pytest.mark.skipif(
    not (HAS_GPU or ON_CPU), reason="there is no GPU (LIT_PEFT_GPU_TESTS_ON_CPU=1 runs them on the CPU)"
)
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="only a GPU has this kernel")
ARCHITECTURES = ("llama", "gemma", "gpt2", "t5", "bert")
METHODS = [name for name in SETTINGS if name != "PiSSA"]
# For the trainers; the same device as DEVICE.
TRAINER: dict[str, Any] = {**QUIET, "accelerator": "gpu" if HAS_GPU else "cpu", "devices": 1}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fp32 products in fp32, and repeatable ones; nothing compiled is left over."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    # Dynamo warns about what it does itself with every autograd function.
    warn = warnings.warn
    monkeypatch.setattr(
        warnings, "warn", lambda message, *rest, **more: "instantiated" in str(message) or warn(message, *rest, **more)
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch.set_float32_matmul_precision(before)


def attached(method: str, architecture: str) -> Any:
    torch.manual_seed(0)
    model = lit_peft.attach(make(architecture), SETTINGS[method])
    scramble(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def moved(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}


def gradients(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The loss and all gradients of a step in one row, on the CPU."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = [p.grad.flatten().float() for p in trained_of(model).values() if p.grad is not None]
    return torch.cat([loss.detach().float()[None], *found]).cpu()


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    found, wanted = found.detach(), wanted.detach()
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


# ----------------------------------------------------------------------------------------- beside the CPU


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_loss_gradients_and_generation_are_those_of_the_cpu(method: str, architecture: str) -> None:
    model = attached(method, architecture)
    inputs = batch(architecture)
    prompt = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generates = architecture != "bert"
    # T5 drops out by a function of its own.
    modes = (False,) if architecture == "t5" else (True, False)
    wanted = {mode: gradients(model.train(mode), inputs) for mode in modes}
    texts = model.generate(inputs["input_ids"], **prompt) if generates else None
    model.to(DEVICE)
    for mode, values in wanted.items():
        near(gradients(model.train(mode), moved(inputs)), values, 2e-4)
    if texts is not None:
        assert torch.equal(model.generate(inputs["input_ids"].to(DEVICE), **prompt).cpu(), texts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    """By autocast, and with a base in it under adapters in fp32."""
    model, inputs = attached(method, "llama"), moved(batch("llama"))
    exact_loss = gradients(model, batch("llama"))[0]
    model.to(DEVICE).train()
    with torch.autocast(DEVICE.type, dtype):
        found = gradients(model, inputs)
        with torch.no_grad():  # other code, without a backward pass
            evaluated = model(**inputs).loss.float().cpu()
    assert found.isfinite().all() and abs(found[0] - exact_loss) < 0.05
    assert abs(evaluated - exact_loss) < 0.05
    if method == "AdapterH":
        return  # its norms are trained, and have the type of the base
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    found = gradients(model, inputs)
    assert found.isfinite().all() and abs(found[0] - exact_loss) < 0.08


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_loss_of_the_head_in_blocks(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(700, 32, device=DEVICE, requires_grad=True)
    weight, targets = torch.randn(5000, 32, device=DEVICE), torch.randint(5000, (700,), device=DEVICE)
    mine = head_cross_entropy(hidden, weight, targets, softcap=softcap)
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    theirs = F.cross_entropy(logits, targets, reduction="sum")
    near(mine, theirs, 1e-5)
    near(torch.autograd.grad(mine, hidden)[0], torch.autograd.grad(theirs, hidden)[0], 1e-4)


def test_float8_is_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    layer, x = (
        Float8Linear(torch.randn(64, 32).bfloat16(), torch.randn(64).bfloat16()),
        torch.randn(3, 16, 32).bfloat16(),
    )
    found = []
    for device in (torch.device("cpu"), DEVICE):
        layer.to(device)
        inputs = x.detach().to(device).requires_grad_()
        out = layer(inputs)
        out.float().square().sum().backward()
        assert inputs.grad is not None
        found.append((out.detach().float().cpu(), inputs.grad.float().cpu()))
    for mine, theirs in zip(found[1], found[0], strict=True):
        near(mine, theirs, 2e-2)


# ---------------------------------------------------------------------------------- compiled, checkpointed


@pytest.mark.parametrize("method", METHODS)
def test_compiled_layers(method: str) -> None:
    model, inputs = attached(method, "llama").to(DEVICE).train(), moved(batch("llama"))
    wanted = gradients(model, inputs)
    # Inductor takes long on a CPU, and other tests run it there.
    lit_peft.compile_layers(model, backend="inductor" if HAS_GPU else "eager")
    near(gradients(model, inputs), wanted, 1e-4)
    longer = {name: torch.cat([value, value], 1) for name, value in inputs.items()}
    compiled = gradients(model, longer)
    lit_peft.restore_layers(model)
    near(compiled, gradients(model, longer), 1e-4)
    assert not counters["graph_break"]


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_compiled_layers_of_a_quantized_base(quantization: str) -> None:
    if quantization == "int8" and find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    from lit_peft.models.quantization import quantize

    model = wide_llama().to(DEVICE)
    quantize(model, quantization)
    lit_peft.attach(model, LoRASettings(r=4, target_modules="all-linear"))
    scramble(model)
    inputs = moved(batch("llama"))
    wanted = gradients(model.train(), inputs)
    lit_peft.compile_layers(model, backend="inductor" if HAS_GPU else "eager")
    near(gradients(model, inputs), wanted, 5e-2)
    assert not counters["graph_break"]


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing(method: str) -> None:
    model, inputs = attached(method, "llama").to(DEVICE).train(), moved(batch("llama"))
    wanted = gradients(model, inputs)
    checkpointing(model, True)
    near(gradients(model, inputs), wanted, 1e-5)


# ---------------------------------------------------------------------------------------------- packed rows


def wide_llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_packed_rows_have_no_dense_mask(dtype: torch.dtype, compiled: bool) -> None:
    """By torch's kernel in bf16, by flex attention in fp32; the loss and the gradients of the examples apart."""
    model = lit_peft.attach(wide_llama(dtype), LoRASettings(r=4)).to(DEVICE).train()
    scramble(model)
    rows = examples(9, 40, 33, 17, 60, 1)
    packs = moved(PackCollator(0)([[rows[0], rows[1], rows[3]], [rows[2], rows[5]], [rows[4]]]))
    apart = moved(PadCollator(0)(rows))
    wanted = gradients(model, {**apart, "use_cache": False})
    masks: list[Any] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    task = CausalLM()
    if not HAS_GPU:
        register()
        model.set_attn_implementation(NAME)
    task.run(model, packs)  # the first batch chooses the kernel
    assert model.config._attn_implementation == NAME
    if compiled and HAS_GPU:
        for layer in model.model.layers:
            layer.self_attn._forward_pre_hooks.clear()
        lit_peft.compile_layers(model)
    model.zero_grad()
    loss = task.run(model, packs).loss
    loss.backward()
    found = [p.grad.flatten().float() for p in trained_of(model).values() if p.grad is not None]
    near(torch.cat([loss.detach().float()[None], *found]).cpu(), wanted, 3e-2 if dtype == torch.bfloat16 else 1e-4)
    assert masks and not any(isinstance(mask, torch.Tensor) and mask.dim() == 4 for mask in masks[-4:])


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": " ".join(draw.choices(WORDS[:6], k=draw.randrange(9, 16)))} for _ in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, inputs: Any, index: int) -> None:
        self.seen.append(float(out["loss"]))


def fit(
    base: Path,
    texts: Path,
    steps: int,
    method: str = "LoRA",
    resumed: Path | None = None,
    trainer: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Any, Any, list[float]]:
    """A run on 24 rows of about 16 tokens: the trainer, the module and the losses."""
    common = {"learning_rate": 5e-3, "lr_scheduler": "constant", "warmup_steps": 0}
    module = getattr(lit_peft, method)(base=str(base), **common, **settings)
    data = lit_peft.CausalLMData(base=str(base), train=str(texts), max_length=16, batch_size=4, validation_fraction=0.0)
    losses = Losses()
    given = trainer or {}
    given["callbacks"] = [losses, *given.get("callbacks", [])]
    pl.seed_everything(0)
    made = pl.Trainer(max_steps=steps, enable_checkpointing=False, **{**TRAINER, **given})
    made.fit(module, data, ckpt_path=resumed)
    assert module.device.type == DEVICE.type
    return made, module, losses.seen


def needs(library: str) -> Any:
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")


QUANTIZED = [
    pytest.param(None),
    pytest.param("fp8"),
    *(pytest.param(name, marks=needs("torchao")) for name in ("int8", "int4")),
    *(pytest.param(name, marks=needs("bitsandbytes")) for name in ("nf4", "nf4-dq", "fp4", "llm-int8")),
]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_quantized_bases_learn(quantization: str | None, precision: str, decoder: Path, texts: Path) -> None:
    if precision == "16-mixed" and not HAS_GPU:
        pytest.skip("fp16 by a scaler is for GPUs")
    settings: dict[str, Any] = {"adapter_dtype": "float32"} if precision == "bf16-true" else {}
    if quantization and precision != "16-mixed":
        settings["dtype"] = "bfloat16"
    given = {"precision": precision}
    _, _, losses = fit(decoder, texts, 12, trainer=given, quantization=quantization, compile=False, **settings)
    assert sum(losses[-3:]) < sum(losses[:3]), losses


@pytest.mark.parametrize("method", ["AdapterP", "PrefixTuning", "PTuning"])
def test_other_methods_learn_on_a_quantized_base(method: str, decoder: Path, texts: Path) -> None:
    settings = {} if method == "AdapterP" else {"num_virtual_tokens": 4}
    given = {"precision": "bf16-mixed"}
    _, _, losses = fit(decoder, texts, 12, method, trainer=given, quantization="fp8", compile=False, **settings)
    assert sum(losses[-3:]) < sum(losses[:3]), losses


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_is_the_same_to_the_bit(precision: str, decoder: Path, texts: Path, tmp_path: Path) -> None:
    class Saved(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "third.ckpt")

    settings: dict[str, Any] = {"lora_dropout": 0.1, "compile": False}
    given = {"precision": precision, "callbacks": [Saved()]}
    _, whole, losses = fit(decoder, texts, 8, trainer=given, **settings)
    given = {"precision": precision}
    _, again, rest = fit(decoder, texts, 8, resumed=tmp_path / "third.ckpt", trainer=given, **settings)
    assert losses[3:] == rest
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_optimizer_is_fused_where_it_can_be(clip: float | None, decoder: Path, texts: Path) -> None:
    given = {"precision": "bf16-mixed", "gradient_clip_val": clip}
    trainer, _, _ = fit(decoder, texts, 2, trainer=given, compile=False)
    fused = [group.get("fused") for group in trainer.optimizers[0].param_groups]
    assert fused == [True if HAS_GPU and clip is None else None] * len(fused)


def test_compiled_layers_in_a_run(decoder: Path, texts: Path) -> None:
    """`compile: auto` on a GPU: no warning, and the losses of the eager run."""
    _, _, plain = fit(decoder, texts, 6, compile=False)
    _, module, compiled = fit(decoder, texts, 6)
    assert plain == pytest.approx(compiled, rel=1e-3)
    assert bool(counters["frames"]["ok"]) == HAS_GPU and not counters["graph_break"]
    assert module.hparams.compile == "auto"


@needs_gpu
def test_batches_are_pinned_and_prepared_by_other_processes(decoder: Path, texts: Path) -> None:
    class Pinned(pl.Callback):
        seen = False

        def on_train_start(self, trainer: Any, module: Any) -> None:
            loader = trainer.train_dataloader
            assert loader.num_workers == default_workers(trainer) > 0 and loader.pin_memory
            self.seen = True

    callback = Pinned()
    fit(decoder, texts, 2, compile=False, trainer={"callbacks": [callback]})
    assert callback.seen


# ---------------------------------------------------------------------------------------------------- merging


def test_a_merge_is_undone_to_the_bit() -> None:
    model = wide_llama(torch.bfloat16).to(DEVICE)
    before = copy.deepcopy(model.state_dict())
    lit_peft.attach(model, LoRASettings(r=4, target_modules="all-linear"))
    scramble(model)
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    adapted = model(ids).logits
    lit_peft.merge_adapter(model)
    near(model(ids).logits.float(), adapted.float(), 5e-2)
    lit_peft.unmerge_adapter(model)
    assert torch.equal(model(ids).logits, adapted)
    lit_peft.detach(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
