"""What every run of `lit-peft compare` needs, imported once in the process that they start from."""

from __future__ import annotations

import datasets
import lightning.pytorch
import transformers
import transformers.modeling_utils

import lit_peft.commands.recorder
import lit_peft.formats.folder
import lit_peft.modules

__all__ = ["datasets", "lightning", "lit_peft", "transformers"]
