"""Imports what every run of `lit-peft compare` needs, once, in the process that they are forked from."""

from __future__ import annotations

from lit_peft.util.quiet import quiet_libraries

quiet_libraries()

import datasets  # noqa: E402
import lightning.pytorch  # noqa: E402
import transformers  # noqa: E402
import transformers.modeling_utils  # noqa: E402

import lit_peft.commands.recorder  # noqa: E402
import lit_peft.formats.folder  # noqa: E402
import lit_peft.modules  # noqa: E402

lit_peft.modules.LoRA  # noqa: B018

__all__ = ["datasets", "lightning", "lit_peft", "transformers"]
