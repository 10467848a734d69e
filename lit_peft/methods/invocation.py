"""aLoRA: how the updates that act from invocation tokens on get to know the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment
from lit_peft.models.call_arguments import by_name, cache_of, is_filled
from lit_peft.nn.invocation import Invocation, InvokedLoRALinear
from lit_peft.nn.linear import stores_transposed
from lit_peft.util.errors import LitPeftError


class _Hooks:
    """Hooks of the model that tell an invocation what is computed."""

    def __init__(self, invocation: Invocation) -> None:
        self.invocation = invocation

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        values = by_name(module, args, kwargs)
        ids = values.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise LitPeftError(
                "alora_invocation_tokens are looked for in input_ids, of shape (batch, length), and the model was "
                "called without them: call it with input_ids, not with inputs_embeds."
            )
        cache = cache_of(values)
        self.invocation.begin(ids, values.get("position_ids"), cache, is_filled(cache), module.training)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook."""
        named = isinstance(output, dict)
        self.invocation.end(cache_of(output) if named else None, output.values() if named else [])


def add_invocation(attachment: Attachment, tokens: Sequence[int] | None) -> Invocation | None:
    """Register hooks on the model that look for invocation tokens; None if there are none to look for.

    Raises:
        LitPeftError: the model has an encoder and a decoder, whose layers see different tokens.
    """
    if tokens is None:
        return None
    config: Any = getattr(attachment.model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise LitPeftError(
            "alora_invocation_tokens need a model with one sequence of tokens, and "
            f"{type(attachment.model).__name__} has an encoder and a decoder: leave them out."
        )
    invocation = Invocation(tokens)
    hooks = _Hooks(invocation)
    attachment.forward_pre_hook("", hooks.before, with_kwargs=True)
    attachment.forward_hook("", hooks.after)
    return invocation


def invoked_layer(path: str, base: nn.Module, invocation: Invocation, settings: dict[str, Any]) -> InvokedLoRALinear:
    """Return the LoRA layer of a linear layer that acts from invocation tokens on.

    Raises:
        LitPeftError: the layer is not linear.
    """
    if not (isinstance(base, nn.Linear) or stores_transposed(base)):
        raise LitPeftError(
            f"alora_invocation_tokens: {path} is of type {type(base).__name__}, and such an update works on linear "
            "layers alone, as in peft: leave it out of target_modules."
        )
    return InvokedLoRALinear(base, invocation=invocation, **settings)
