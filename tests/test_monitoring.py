"""Callbacks that measure, guard and average: on a module that knows nothing of lit_peft, and on ours."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lit_peft.callbacks import (
    AdapterCheckpoint,
    AdapterEMA,
    AdapterNorms,
    FrozenWeightsGuard,
    LearningCurve,
    NonFiniteGuard,
    PrecisionReport,
    SampleGenerations,
    Throughput,
)
from models import QUIET
from safetensors import safe_open
from safetensors.torch import load_file
from test_callbacks import WEIGHTS, Plain

import lit_peft
from lit_peft import CausalLMData, LitPeftError
from lit_peft.util.memory import process_memory


def run(*callbacks: Any, module: Any = None, epochs: int = 2, where: Path, resume: Any = None, **options: Any) -> Any:
    """Train eight rows, two a step, for some epochs, a step at a time logged."""
    module = module or Plain((1,) * 9)
    settings = {**QUIET, "default_root_dir": where, "log_every_n_steps": 1, "enable_checkpointing": False, **options}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **settings)
    trainer.fit(module, ckpt_path=resume)
    return trainer


def ours(decoder: Path, reviews: Path, *callbacks: Any, where: Path, steps: int = 4, **settings: Any) -> Any:
    pl.seed_everything(0)
    data = CausalLMData(base=str(decoder), train=str(reviews), batch_size=8)
    module = lit_peft.LoRA(base=str(decoder), learning_rate=1e-2, **settings)
    options = {**QUIET, "default_root_dir": where, "log_every_n_steps": 1, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=steps, callbacks=list(callbacks), val_check_interval=2, **options)
    trainer.fit(module, data)
    return trainer


# ------------------------------------------------------------------------------------------- PrecisionReport


def test_the_report_counts_every_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = PrecisionReport()
    run(report, where=tmp_path)
    trained = 5 * 4  # 4 weights and a bias in fp32
    assert report.report["base"] == {"float32": 20 * 4}
    assert report.report["adapter"] == report.report["gradients"] == {"float32": trained}
    # AdamW: two moments, and a step count for each of two parameters.
    assert report.report["optimizer"] == {"float32": 2 * trained + 2 * 4}
    # relu's result, which the layer after it keeps as well (2 × 4), and the squared output (2 × 1).
    assert report.report["activations"] == {"float32": (8 + 2) * 4}
    assert "base:        0.00 MB float32" in capsys.readouterr().out
    assert torch.autograd.graph.saved_tensors_hooks is not None and _hooks_are_off()


def _hooks_are_off() -> bool:
    x = torch.randn(2, requires_grad=True)
    return bool(x.exp().grad_fn._saved_result.equal(x.exp()))  # type: ignore[union-attr]


def test_the_report_of_a_quantized_base_in_bf16(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    report = PrecisionReport()
    pl.seed_everything(0)
    data = CausalLMData(base=str(decoder), train=str(reviews), batch_size=8)
    module = lit_peft.LoRA(base=str(decoder), quantization="int8", adapter_dtype="float32")
    trainer = pl.Trainer(max_steps=1, precision="bf16-true", callbacks=[report], enable_checkpointing=False, **QUIET)
    trainer.fit(module, data)
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert report.report["base"]["int8"] == linear
    assert set(report.report["adapter"]) == set(report.report["gradients"]) == {"float32"}
    assert report.report["activations"].get("bfloat16", 0) > 0


# ------------------------------------------------------------------------------------------------ Throughput


def test_throughput_is_work_over_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr("lit_peft.callbacks.throughput.time.perf_counter", lambda: float(next(clock)))
    callback = Throughput(every_n_steps=3, peak_flops=10.0)
    trainer = run(callback, where=tmp_path, epochs=1, limit_val_batches=0)
    # Of four batches of two the first is counted, and the clock moves two seconds between two looks at it.
    assert trainer.callback_metrics["samples_per_second"] == 3 * 2 / 2
    # Forward of both layers, and of the backward pass the trained layer's weight: two FLOPs a multiplication.
    flops = 2 * 4 * 4 + 2 * 4 + 2 * 4
    assert callback.flops_per_sample == flops
    assert trainer.callback_metrics["mfu"].item() == pytest.approx(flops * 3 / 10)
    assert "tokens_per_second" not in trainer.callback_metrics
    assert trainer.callback_metrics["peak_memory_mb"] > 10


def test_tokens_are_those_of_the_mask(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    trainer = ours(decoder, reviews, Throughput(every_n_steps=1), where=tmp_path, steps=3)
    metrics = trainer.callback_metrics
    # Every row has five tokens and an end.
    ratio = (metrics["tokens_per_second"] / metrics["samples_per_second"]).item()
    assert ratio == pytest.approx(5, abs=1.01) and "mfu" not in metrics


# ----------------------------------------------------------------------------------------------- AdapterNorms


def test_norms_are_the_plain_formulas(tmp_path: Path) -> None:
    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            own = list(module.trained.parameters())
            self.grad = torch.cat([p.grad.flatten() for p in own]).norm().item()
            self.param = torch.cat([p.detach().flatten() for p in own]).norm().item()

    look = Look()
    trainer = run(AdapterNorms(every_n_steps=1, per_adapter=True), look, where=tmp_path)
    for kind, value in (("grad", look.grad), ("param", look.param)):
        assert trainer.callback_metrics[f"{kind}_norm"].item() == pytest.approx(value)
        assert trainer.callback_metrics[f"{kind}_norm/trained"].item() == pytest.approx(value)
    assert "grad_norm/frozen" not in trainer.callback_metrics


# ----------------------------------------------------------------------------------------- FrozenWeightsGuard


class Mover(pl.Callback):
    def __init__(self, change: Any) -> None:
        self.change = change

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            self.change(module.frozen.weight)


def one_bit(weight: Any) -> None:
    weight.data.view(torch.int32)[1, 2] ^= 1


def swap_rows(weight: Any) -> None:
    weight.data.copy_(weight.data.flip(0).clone())


@pytest.mark.parametrize("change", [one_bit, swap_rows, lambda weight: weight.requires_grad_(True)])
def test_a_frozen_weight_that_moves_stops_training(change: Any, tmp_path: Path) -> None:
    with pytest.raises(LitPeftError, match=r"frozen\.weight"):
        run(FrozenWeightsGuard(every_n_steps=1), Mover(change), where=tmp_path)
    with pytest.raises(LitPeftError, match="between steps 0 and 8"):  # at the end at the latest
        run(FrozenWeightsGuard(), Mover(change), where=tmp_path)


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_what_does_not_move_is_let_through(
    quantization: str | None, decoder: Path, reviews: Path, tmp_path: Path
) -> None:
    if quantization:
        pytest.importorskip("torchao" if quantization == "int8" else "bitsandbytes")
    guard = FrozenWeightsGuard(every_n_steps=1)
    ours(decoder, reviews, guard, where=tmp_path, quantization=quantization)
    assert len(guard._sums) > 10 and guard._checked == 4


# ------------------------------------------------------------------------------------------ SampleGenerations


def test_samples_are_what_the_model_generates(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    prompts = ["the film", "a story is"]
    callback = SampleGenerations(prompts, {"max_new_tokens": 4, "do_sample": False})
    trainer = ours(decoder, reviews, callback, where=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(at, p) for at in (2, 4) for p in prompts]
    module = trainer.lightning_module.eval()
    ids = module.tokenizer(prompts[1], return_tensors="pt")["input_ids"]
    out = module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert rows[-1]["output"] == module.tokenizer.decode(out[0][ids.shape[1] :], skip_special_tokens=True)


def test_sampling_changes_nothing_of_the_run(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    def weights(*callbacks: Any) -> dict[str, torch.Tensor]:
        module = ours(decoder, reviews, *callbacks, where=tmp_path, lora_dropout=0.5).lightning_module
        return module.state_dict()

    plain = weights()
    sampled = weights(SampleGenerations(["the film"], {"do_sample": True}))
    assert all(torch.equal(plain[name], value) for name, value in sampled.items())


def test_no_tokenizer_or_nothing_that_generates_is_said(tmp_path: Path) -> None:
    with pytest.raises(LitPeftError, match="list of at least one text"):
        SampleGenerations("the film")
    with pytest.raises(LitPeftError, match="generate"):
        run(SampleGenerations(["the film"]), where=tmp_path)
    module = Plain()
    module.generate = lambda **values: values  # type: ignore[assignment]
    with pytest.raises(LitPeftError, match="tokenizer"):
        run(SampleGenerations(["the film"]), module=module, where=tmp_path)


def test_prompts_without_tokens_and_tokenizers_with_code_are_refused(
    decoder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LitPeftError, match="prompts has ''"):
        ours(decoder, reviews, SampleGenerations(["the film", ""]), where=tmp_path)
    named = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    with pytest.raises(LitPeftError, match="tokenizer=") as caught:
        ours(decoder, reviews, SampleGenerations(["the film"], tokenizer=str(tmp_path)), where=tmp_path)
    assert not asked and not (tmp_path / "ran").exists() and "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------- NonFiniteGuard


class Bad(Plain):
    """Its loss is not a number in the third batch."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 else loss


def test_a_loss_that_is_not_a_number_takes_no_step(tmp_path: Path) -> None:
    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            self.batch = batch.clone()
            self.before = {name: value.clone() for name, value in module.state_dict().items()}

    keep, guard, module = Keep(), NonFiniteGuard(), Bad((1,) * 9)
    with pytest.warns(UserWarning, match="not finite at step 2"):
        trainer = run(guard, keep, module=module, where=tmp_path)
    assert trainer.should_stop and not trainer.interrupted and trainer.current_epoch <= 1
    assert all(torch.equal(keep.before[name], value) for name, value in module.state_dict().items())
    assert guard.saved == tmp_path / "nonfinite-step=2-rank=0.safetensors"
    assert torch.equal(load_file(guard.saved)["batch"], keep.batch)
    with safe_open(guard.saved, "pt") as file:
        assert file.metadata() == {"step": "2", "batch_idx": "2", "loss": "nan"}


def test_finite_losses_are_let_through_and_nested_batches_have_names(tmp_path: Path) -> None:
    guard = NonFiniteGuard()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not finite.*")
        assert run(guard, where=tmp_path).global_step == 8
    from lit_peft.callbacks.non_finite_guard import _tensors

    assert guard.saved is None
    nested = {"a": torch.ones(1), "b": [torch.zeros(2), {"c": torch.ones(3)}], "text": "x"}
    assert {name: value.numel() for name, value in _tensors(nested).items()} == {"a": 1, "b.0": 2, "b.1.c": 3}


# ---------------------------------------------------------------------------------------------- LearningCurve


def test_the_curve_is_drawn_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    losses = (3.0, 1.0, 2.0, 0.5)

    def curve(epochs: int, resume: Any) -> LearningCurve:
        callback = LearningCurve(every_n_steps=2)
        run(callback, ModelCheckpoint(tmp_path / "c", save_last=True), module=Plain(losses), epochs=epochs,
            resume=resume, where=tmp_path, enable_checkpointing=True)  # fmt: skip
        return callback

    curve(2, None)
    whole = curve(4, "last")
    assert whole.points["val_loss"] == [(4, 3.0), (8, 1.0), (12, 2.0), (16, 0.5)]
    assert [at for at, _ in whole.points["train_loss"]] == [1, 2, 4, 6, 8, 10, 12, 14, 16]
    picture = (tmp_path / "learning_curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


# ------------------------------------------------------------------------------------------------- AdapterEMA


class Record(pl.Callback):
    """The trained weight after every step, and what validation saw."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.seen: list[torch.Tensor] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.steps.append(module.trained.weight.detach().clone())

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.steps.append(module.trained.weight.detach().clone())

    def on_validation_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.seen.append(module.trained.weight.detach().clone())


def average(steps: list[torch.Tensor], decay: float) -> torch.Tensor:
    value = steps[0]
    for step in steps[1:]:
        value = decay * value + (1 - decay) * step
    return value


def test_the_average_is_the_formula_and_stands_in_where_it_is_used(tmp_path: Path) -> None:
    ema, record, module = AdapterEMA(0.8, warmup=False), Record(), Plain((1,) * 9)
    keep = AdapterCheckpoint(str(tmp_path / "a"), "{epoch}", save_top_k=-1)
    checkpoint = ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_top_k=-1)
    run(keep, ema, record, checkpoint, module=module, where=tmp_path, enable_checkpointing=True)
    for epoch, seen in enumerate(record.seen):
        expected = average(record.steps[: 4 * (epoch + 1) + 1], 0.8)
        torch.testing.assert_close(seen, expected)
        assert not torch.allclose(seen, record.steps[4 * (epoch + 1)])
        stored = torch.load(tmp_path / "c" / f"epoch={epoch}.ckpt", weights_only=True)
        torch.testing.assert_close(stored["state_dict"]["trained.weight"], expected)
        own = stored["adapter_ema"]["parameters"]["trained.weight"]
        torch.testing.assert_close(own, record.steps[4 * (epoch + 1)])
        torch.testing.assert_close(load_file(tmp_path / "a" / f"epoch={epoch}" / WEIGHTS)["trained.weight"], expected)
    torch.testing.assert_close(module.trained.weight.detach(), record.seen[-1])
    assert set(ema._average) == {"trained.weight", "trained.bias"}


def test_training_itself_does_not_see_the_average(tmp_path: Path) -> None:
    plain, averaged = Record(), Record()
    run(plain, where=tmp_path)
    run(AdapterEMA(0.8), averaged, where=tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(plain.steps, averaged.steps, strict=True))


def test_a_resumed_average_goes_on_exactly(tmp_path: Path) -> None:
    def trained(where: Path, *epochs: int) -> Any:
        for number, until in enumerate(epochs):
            module = Plain((1,) * 9)
            last = ModelCheckpoint(where, save_last=True)
            run(AdapterEMA(0.9), last, module=module, epochs=until, resume="last" if number else None, where=where,
                enable_checkpointing=True)  # fmt: skip
        return module, torch.load(where / "last.ckpt", weights_only=True)

    whole, stored = trained(tmp_path / "whole", 3)
    parts, again = trained(tmp_path / "parts", 1, 2, 3)
    assert torch.equal(whole.trained.weight, parts.trained.weight)
    one, other = (state["adapter_ema"]["parameters"]["trained.weight"] for state in (stored, again))
    assert torch.equal(one, other) and stored["adapter_ema"]["updates"] == again["adapter_ema"]["updates"] == 12


def test_bad_settings_are_said() -> None:
    for make, words in (
        (lambda: AdapterEMA(1.0), "decay=1.0"),
        (lambda: AdapterNorms(0), "every_n_steps=0"),
        (lambda: FrozenWeightsGuard(0), "every_n_steps=0"),
        (lambda: Throughput(peak_flops=-1), "peak_flops=-1"),
    ):
        with pytest.raises(LitPeftError, match=words):
            make()


def test_all_of_them_from_yaml(decoder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_peft.cli import main

    names = ("PrecisionReport", "Throughput", "AdapterNorms", "FrozenWeightsGuard", "NonFiniteGuard", "LearningCurve")
    listed = "".join(f"    - class_path: lit_peft.callbacks.{name}\n" for name in (*names, "AdapterEMA"))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model:\n  class_path: LoRA\n  init_args: {{base: {decoder}}}\n"
        f"data:\n  class_path: CausalLMData\n  init_args: {{train: {reviews}, batch_size: 8}}\n"
        "trainer:\n  max_steps: 4\n  val_check_interval: 2\n"
        f"  log_every_n_steps: 1\n  accelerator: cpu\n  default_root_dir: {tmp_path}\n"
        f"  enable_progress_bar: false\n  callbacks:\n{listed}"
        "    - class_path: lit_peft.callbacks.SampleGenerations\n      init_args: {prompts: [the film]}\n"
    )
    monkeypatch.setattr("sys.argv", ["lit-peft"])
    assert main(["fit", "--config", str(config)]) == 0
    (written,) = tmp_path.rglob("metrics.csv")
    columns = written.read_text().splitlines()[0].split(",")
    assert {"tokens_per_second", "samples_per_second", "peak_memory_mb", "grad_norm", "param_norm"} <= set(columns)
    assert list(tmp_path.rglob("samples.jsonl")) and list(tmp_path.rglob("learning_curve.png"))


def test_metrics_reach_the_logger(tmp_path: Path) -> None:
    run(AdapterNorms(1), Throughput(1), where=tmp_path, logger=CSVLogger(tmp_path))
    (written,) = tmp_path.rglob("metrics.csv")
    assert "grad_norm" in written.read_text() and "samples_per_second" in written.read_text()


@pytest.mark.skipif(not process_memory("VmRSS"), reason="memory is read from /proc")
def test_the_peak_is_this_processs_own() -> None:
    """`getrusage` tells the peak of the process that started it, if that is higher."""
    code = "from lit_peft.util.memory import peak_memory as m; before = m(); x = b'x' * 2**26; print(before, m())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < (process_memory("VmRSS") or 0) / 2
    assert 2**26 * 0.9 < after - before < 2**26 * 1.2
