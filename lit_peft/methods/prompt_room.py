"""How many tokens of a prompt have a position in a model, beside virtual tokens and the tokens to generate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_peft.methods.adapters import adapters_of
from lit_peft.methods.prefix import PrefixSettings
from lit_peft.methods.soft_prompt import SoftPromptSettings
from lit_peft.models.architectures import max_positions


@dataclass(frozen=True)
class PromptRoom:
    """The positions that an adapter leaves for prompts and answers.

    Args:
        prompt: the number of positions for the tokens of a prompt; None if there is no limit.
        answer: the same for the tokens of an answer.
        is_shared: whether both take the same positions, as in a decoder without an encoder.
    """

    prompt: int | None
    answer: int | None
    is_shared: bool

    def longest_prompt(self, new_tokens: int) -> int | None:
        """Return the maximum number of tokens of a prompt whose answer has `new_tokens` tokens; None: no limit."""
        if self.prompt is None:
            return None
        return self.prompt - new_tokens if self.is_shared else self.prompt

    def fits(self, prompt_tokens: int, new_tokens: int) -> bool:
        """Return whether a prompt of this length has positions for an answer of this length."""
        longest = self.longest_prompt(new_tokens)
        answer_fits = self.is_shared or self.answer is None or new_tokens <= self.answer
        return answer_fits and (longest is None or prompt_tokens <= longest)


def prompt_room(model: Any, name: str | None) -> PromptRoom:
    """Return how many positions a model has for prompts and answers with one of its adapters.

    Args:
        model: a transformers model that generates text.
        name: the adapter; None for the base.

    Raises:
        LitPeftError: there is no adapter of that name.
    """
    in_prompt = in_prefix = 0
    settings = None if name is None else adapters_of(model).find(name).settings
    if isinstance(settings, SoftPromptSettings) and settings.prompt_token_id is None:
        in_prompt = settings.num_virtual_tokens
    elif isinstance(settings, PrefixSettings) and settings.positions != "adapterhub":
        in_prefix = settings.num_virtual_tokens
    if not getattr(model.config, "is_encoder_decoder", False):
        room = _less(max_positions(model), in_prompt + in_prefix)
        return PromptRoom(room, room, True)
    # Virtual tokens of a prompt join the encoder's input. Only in a decoder do those of a prefix shift positions.
    encoder, decoder = model.get_encoder(), model.get_decoder()
    return PromptRoom(_less(max_positions(encoder), in_prompt), _less(max_positions(decoder), in_prefix), False)


def _less(positions: int | None, taken: int) -> int | None:
    return None if positions is None else positions - taken
