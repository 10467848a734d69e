"""Generate sample texts during training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lit_peft.models.audio_features import AUDIO
from lit_peft.util.errors import LitPeftError, first_line


class SampleGenerations(Callback):
    """Generates text from the same prompts at every validation, and writes it to a file.

    Each text is a line of `samples.jsonl` in the run's folder (`step`, `prompt`, `output`), and is sent to every logger
    that accepts text (TensorBoard, Weights & Biases). Sampling does not affect the random numbers of training.

    Args:
        prompts: texts to continue.
        generation: arguments for `generate`, e.g. `{max_new_tokens: 64, do_sample: true}`.
        tokenizer: model folder or hub id of the tokenizer; if unset, that of the module or of the data module.
        every_n_validations: validations between samples.
        filename: name of the file.

    Raises:
        LitPeftError: there are no prompts; or, when fitting starts, there is no tokenizer, a prompt has no tokens, or
            no module has `generate`.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        generation: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        every_n_validations: int = 1,
        filename: str = "samples.jsonl",
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise LitPeftError(f"prompts={prompts!r}: give a list of at least one text.")
        if every_n_validations < 1:
            raise LitPeftError(f"every_n_validations={every_n_validations}: give a positive number, e.g. 1.")
        self.prompts, self.generation = list(prompts), {"max_new_tokens": 32, **(generation or {})}
        self.tokenizer, self.every_n_validations, self.filename = tokenizer, every_n_validations, filename
        self._loaded: Any = None
        self._validations = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _generator(pl_module)
        if self.tokenizer is not None:
            from transformers import AutoTokenizer

            try:
                self._loaded = AutoTokenizer.from_pretrained(self.tokenizer, trust_remote_code=False)
            except (OSError, ValueError) as problem:
                raise LitPeftError(
                    f"tokenizer={self.tokenizer!r} could not be loaded: {first_line(problem)}"
                ) from problem
        else:
            found = (getattr(of, "tokenizer", None) for of in (pl_module, getattr(trainer, "datamodule", None)))
            self._loaded = next((tokenizer for tokenizer in found if callable(tokenizer)), None)
        if self._loaded is None:
            raise LitPeftError(
                "SampleGenerations found no tokenizer on the module or the data module: name one, e.g. "
                "SampleGenerations(prompts, tokenizer='path/to/model')."
            )
        for prompt in self.prompts:
            if not len(self._loaded(prompt)["input_ids"]):
                raise LitPeftError(f"prompts has {prompt!r}, which has no tokens: leave it out.")

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations:
            return
        device = pl_module.device
        rows = []
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # One by one, since not every model handles padding on the left. Sharded models need every process here.
            for prompt in self.prompts:
                ids = self._loaded(prompt, return_tensors="pt")["input_ids"].to(device)
                out = _generator(pl_module)(input_ids=ids, attention_mask=torch.ones_like(ids), **self.generation)
                # An encoder-decoder returns only the new text.
                new = out[0][ids.shape[1] :] if torch.equal(out[0][: ids.shape[1]], ids[0]) else out[0]
                text = self._loaded.decode(new, skip_special_tokens=True)
                rows.append({"step": trainer.global_step, "prompt": prompt, "output": text})
        if trainer.is_global_zero:
            self._write(trainer, rows)

    def _write(self, trainer: pl.Trainer, rows: list[dict[str, Any]]) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / self.filename).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for logger in trainer.loggers:
            if hasattr(logger, "log_text"):
                values = [[row["step"], row["prompt"], row["output"]] for row in rows]
                logger.log_text("samples", ["step", "prompt", "output"], values)
            elif hasattr(logger.experiment, "add_text"):  # type: ignore[attr-defined]
                for row in rows:
                    logger.experiment.add_text(f"samples/{row['prompt']}", row["output"], row["step"])  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]


def _generator(module: pl.LightningModule) -> Any:
    """Return the `generate` of the module, or of the first module inside it that has one."""
    found = next((inner.generate for inner in module.modules() if callable(getattr(inner, "generate", None))), None)
    if found is None:
        raise LitPeftError(
            f"SampleGenerations needs a `generate` method, but {type(module).__name__} and the modules inside it have "
            "none: leave the callback out."
        )
    if any(getattr(inner, "main_input_name", None) in AUDIO for inner in module.modules()):
        raise LitPeftError(
            "SampleGenerations writes answers to texts, and the model takes audio: leave the callback out; testing "
            "writes the transcripts of a file."
        )
    return found
