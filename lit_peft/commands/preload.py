"""Imports what every run of `lit-peft compare` needs, once, in the process that they are forked from."""

from __future__ import annotations

import datasets
import lightning.pytorch
import transformers
import transformers.modeling_utils

import lit_peft.commands.recorder
import lit_peft.formats.folder
import lit_peft.modules

lit_peft.modules.LoRA  # noqa: B018

__all__ = ["datasets", "lightning", "lit_peft", "transformers"]
