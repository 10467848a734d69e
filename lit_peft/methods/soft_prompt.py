"""What Prompt Tuning and P-Tuning share: virtual tokens among the input embeddings of any transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment, MethodSettings
from lit_peft.models.architectures import counts_over_mask, is_causal, room_for
from lit_peft.models.call_arguments import arguments, by_name, cache_of, has_fixed_size, is_filled
from lit_peft.models.transformers_internals import is_model_of
from lit_peft.nn.prompt import PromptEncoder, SoftPrompt
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

_NAME = "prompt_encoder"


@dataclass(frozen=True)
class SoftPromptSettings(MethodSettings):
    """Settings of the methods that put virtual tokens among the input embeddings.

    Args:
        num_virtual_tokens: v, how many virtual tokens.
        prompt_token_id: the id of a token that stands for a virtual token. Each row of `input_ids` then holds it v
            times, wherever the template has a virtual token, and the virtual tokens take these places in their order.
            None puts all of them in front.
        positions: `mask` counts positions over the tokens that the attention mask shows, so that padding on either
            side changes nothing; `sequence` does as peft, which counts the padding too and hides the ids from the
            model. Folders that peft wrote are read with `sequence`.
        num_transformer_submodules: 2 keeps twice the rows, as peft does for encoder-decoders. The encoder uses the
            first half.
    """

    num_virtual_tokens: int = 20
    prompt_token_id: int | None = None
    positions: Literal["mask", "sequence"] = "mask"
    num_transformer_submodules: int = 1
    learning_rate: ClassVar[float] = 1e-2
    packs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens <= 0:
            raise LitPeftError(f"num_virtual_tokens={self.num_virtual_tokens}: give a positive number, e.g. 20.")
        if self.positions not in ("mask", "sequence"):
            raise LitPeftError(f"positions={brief(self.positions)} is not known: use 'mask' or 'sequence'.")
        if self.num_transformer_submodules not in (1, 2):
            raise LitPeftError(f"num_transformer_submodules={self.num_transformer_submodules}: give 1, or 2 as peft.")
        if self.prompt_token_id is not None and self.positions == "sequence":
            raise LitPeftError(
                f"prompt_token_id={self.prompt_token_id} marks the places of the virtual tokens, and peft, whose "
                "positions='sequence' are, only has them in front: leave positions out."
            )

    @property
    def rows(self) -> int:
        """How many embeddings are stored."""
        return self.num_virtual_tokens * self.num_transformer_submodules

    def make_prompt(self, model: nn.Module, embeddings: nn.Module) -> SoftPrompt | PromptEncoder:
        """The module that gives the virtual tokens' embeddings, [rows, d], for these input embeddings."""
        raise NotImplementedError

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Add the prompt, and the hooks that let the model see it."""
        placement = _Placement(model, self)
        prompt = self.make_prompt(model, placement.embeddings)
        attachment.add(_NAME, prompt)
        placement.register(prompt, attachment)


class _Placement:
    """Shows the virtual tokens to a model, and hides from its caller that its sequences are longer inside.

    The host is the module whose inputs are made longer, and whose output is cut back: the encoder of an
    encoder-decoder, whose output stays long for the cross-attention; a sequence classifier itself, whose head pools
    over the long sequence (an encoder's first position is then a virtual token, as in peft); of other models, and of
    decoders that classify, the part without the head, so that any head and loss sees the user's tokens alone. Only a
    causal model's own loss sees one position more: the last virtual token predicts the first token, as in peft.

    With a cache that has entries the virtual tokens are among them, and only the mask and positions are extended.
    """

    def __init__(self, model: nn.Module, settings: SoftPromptSettings) -> None:
        self.settings = settings
        self.front = 0 if settings.prompt_token_id is not None else settings.num_virtual_tokens
        config: Any = getattr(model, "config", None)
        if not hasattr(model, "get_input_embeddings") or config is None:
            raise LitPeftError(
                f"{type(model).__name__} is not a transformers model, so its input embeddings are not known: attach to "
                "the transformers model inside of it."
            )
        top: Any = model
        causal, pools = is_causal(config), is_model_of("AutoModelForSequenceClassification", model)
        self.decoder: nn.Module | None = None
        self.host: Any
        if getattr(config, "is_encoder_decoder", False):
            self.host, self.decoder = top.get_encoder(), top.get_decoder()
            if self.host is top:
                raise LitPeftError(f"{type(model).__name__} has no encoder to put virtual tokens in front of.")
        elif pools and (settings.positions == "sequence" or not causal):
            self.host = top
        else:
            # Some heads call the inner decoder of the headless model.
            self.host = _decoder_of(top)
        # An encoder's classifier pools the first position, which is to be a virtual token.
        self.beside_text = settings.positions == "mask" and (causal or self.decoder is not None)
        self.cuts = self.decoder is None and not (pools and self.host is top)
        self.loses = self.cuts and self.host is not top and top.can_generate()
        self.counts = settings.positions == "mask" and counts_over_mask(self.host, config)
        embeddings = self.host.get_input_embeddings()
        text = getattr(self.host, "main_input_name", "input_ids") == "input_ids"
        if not text or not isinstance(getattr(embeddings, "weight", None), Tensor):
            raise LitPeftError(
                f"{type(model).__name__} embeds no tokens at its input ({type(embeddings).__name__}), so virtual "
                "tokens have no place there: use a method that adapts layers, e.g. LoRASettings()."
            )
        self.embeddings: Any = embeddings
        self.placeholder = _ordinary_token(config)
        self.limit = room_for(self.front, self.host, model)
        self.pending = self.inserted = False
        self.extra = 0
        self.marks: Tensor | None = None
        self.mask: Tensor | None = None

    def register(self, prompt: SoftPrompt | PromptEncoder, attachment: Attachment) -> None:
        """Register the hooks, noted for their removal."""
        self.prompt = prompt
        paths = {id(module): path for path, module in attachment.model.named_modules()}
        host, embeddings = paths[id(self.host)], paths[id(self.embeddings)]
        if self.loses:
            attachment.forward_pre_hook("", self._take_labels, with_kwargs=True)
            attachment.forward_hook("", self._cut_logits, always_call=True)
        attachment.forward_pre_hook(host, self._extend, with_kwargs=True)
        attachment.forward_hook(host, self._cut, always_call=True)
        attachment.forward_pre_hook(embeddings, self._look_up_marks)
        attachment.forward_hook(embeddings, self._insert)
        if self.decoder is None and self.front and hasattr(attachment.model, "prepare_inputs_for_generation"):
            attachment.set("", "prepare_inputs_for_generation", _ContinueGeneration(attachment.model, self.front))
        if self.decoder is not None and self.front:
            attachment.forward_pre_hook(paths[id(self.decoder)], self._extend_encoder_mask, with_kwargs=True)

    # ------------------------------------------------------------------------------------- the host's inputs

    def _extend(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = by_name(module, args, kwargs)
        self.pending = self.inserted = False
        cached = is_filled(cache_of(kwargs))
        if self.front:
            self._extend_front(kwargs, cached)
        elif not cached or self._marked(kwargs):
            self.pending = True
        return (), kwargs

    def _extend_front(self, kwargs: dict[str, Any], cached: bool) -> None:
        sequence = self.settings.positions == "sequence"
        ids, embeds, mask = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        given = ids if ids is not None else embeds
        if given is None:
            return
        if has_fixed_size(cache_of(kwargs)):
            raise LitPeftError(
                "A static cache is made for the tokens of the input, and has no room for virtual tokens in front: use "
                "the dynamic cache (leave cache_implementation out), or prompt_token_id."
            )
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise LitPeftError(
                "attention_mask is not of shape [batch, length], as with packed rows, and virtual tokens in front "
                "cannot be added to it: leave the rows unpacked, or mark the virtual tokens' places by prompt_token_id."
            )
        length = given.shape[1]
        self.mask = None if sequence else mask
        if mask is not None:
            kwargs["attention_mask"] = mask = self._arrange(self._in_front(mask, 1), self.mask)
        if sequence:
            kwargs.pop("position_ids", None)
        elif kwargs.get("position_ids") is not None:
            moved = kwargs["position_ids"] + self.front
            if not cached:
                first = torch.arange(self.front, device=moved.device).expand(*moved.shape[:-1], -1)
                moved = self._arrange(torch.cat([first, moved], -1).expand(given.shape[0], -1), self.mask)
            kwargs["position_ids"] = moved
        elif self.counts and mask is not None:
            counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = counted[:, -(length if cached else length + self.front) :]
        if cached:
            return
        if self.limit is not None and length + self.front > self.limit:
            raise LitPeftError(
                f"{length} tokens and {self.front} virtual tokens are more than the {self.limit} positions the model "
                f"has: shorten the texts to {self.limit - self.front} tokens (data.max_length)."
            )
        self.inserted = True
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = self._in_front(kwargs["token_type_ids"], 0)
        if ids is not None and embeds is None and not sequence:
            kwargs["input_ids"] = self._in_front(ids, self.placeholder)
            self.pending = True
            return
        embeds = self.embeddings(ids) if embeds is None else embeds
        kwargs.pop("input_ids", None)
        kwargs["inputs_embeds"] = self._join(embeds)

    def _extend_encoder_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = by_name(module, args, kwargs)
        mask = kwargs.get("encoder_attention_mask")
        if mask is not None:
            kwargs["encoder_attention_mask"] = self._arrange(self._in_front(mask, 1), mask)
        return (), kwargs

    def _in_front(self, tensor: Tensor, value: int) -> Tensor:
        return torch.cat([tensor.new_full((tensor.shape[0], self.front), value), tensor], 1)

    def _join(self, embeds: Tensor) -> Tensor:
        prompt = self.prompt()[: self.front].to(embeds)
        return self._arrange(torch.cat([prompt.expand(embeds.shape[0], -1, -1), embeds], 1), self.mask)

    def _arrange(self, joined: Tensor, mask: Tensor | None) -> Tensor:
        """Move the virtual tokens behind the padding on the left, next to the text.

        Attention may reach only so far back (sliding windows), count distances (ALiBi, relative positions), or be a
        recurrence that padding resets: padding between the virtual tokens and the text would change the result.
        """
        if mask is None or not self.beside_text:
            return joined
        padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
        index = torch.arange(joined.shape[1], device=joined.device)[None]
        prompt = (index - padding).where(index < padding + self.front, index)
        source = torch.where(index < padding, index + self.front, prompt)
        return joined.gather(1, source.view(*source.shape, *[1] * (joined.dim() - 2)).expand_as(joined))

    # --------------------------------------------------------------------------------------- the embeddings

    def _marked(self, kwargs: dict[str, Any]) -> bool:
        ids = kwargs.get("input_ids")
        return ids is not None and bool((ids == self.settings.prompt_token_id).any())

    def _look_up_marks(self, module: nn.Module, args: Any) -> Any:
        if not self.pending or self.front:
            return None
        ids = args[0]
        self.marks = ids == self.settings.prompt_token_id
        found = self.marks.sum(1)
        if found.device.type == "cpu" and not bool((found == self.settings.num_virtual_tokens).all()):
            raise LitPeftError(
                f"prompt_token_id={self.settings.prompt_token_id} is in the rows of input_ids {found.tolist()} times: "
                f"each row needs it {self.settings.num_virtual_tokens} times, once for each virtual token."
            )
        # The mark may lie outside of the vocabulary.
        return (ids.masked_fill(self.marks, self.placeholder), *args[1:])

    def _insert(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self.pending:
            return None
        self.pending = False
        if self.front:
            return self._join(output[:, self.front :])
        marks, self.marks = self.marks, None
        assert marks is not None
        number = (marks.cumsum(1) - 1).clamp(0, self.settings.num_virtual_tokens - 1)
        return torch.where(marks[..., None], self.prompt().to(output)[number], output)

    # ----------------------------------------------------------------------------------------- the outputs

    def _cut(self, module: nn.Module, args: Any, output: Any) -> Any:
        inserted, self.pending, self.inserted = self.inserted, False, False
        if not (inserted and self.cuts) or output is None:
            return None
        start = self.front - self.extra
        if isinstance(output, tuple):
            return (output[0][:, start:], *output[1:])
        output["last_hidden_state"] = output["last_hidden_state"][:, start:]
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(state[:, self.front :] for state in output["hidden_states"])
        return output

    def _take_labels(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = by_name(module, args, kwargs)
        self.extra = 0
        labels = kwargs.get("labels")
        cached = is_filled(cache_of(kwargs))
        whole = isinstance(kwargs.get("logits_to_keep", 0), int) and not kwargs.get("logits_to_keep", 0)
        if self.front and labels is not None and whole and not cached and kwargs.get("shift_labels") is None:
            kwargs["labels"] = torch.cat([labels.new_full((labels.shape[0], 1), -100), labels], 1)
            self.extra = 1
        return (), kwargs

    def _cut_logits(self, module: nn.Module, args: Any, output: Any) -> Any:
        extra, self.extra = self.extra, 0
        if not extra or output is None:
            return None
        if isinstance(output, tuple):
            return (output[0], output[1][:, extra:], *output[2:])
        output["logits"] = output["logits"][:, extra:]
        return output


class _ContinueGeneration:
    """Takes the place of a model's `prepare_inputs_for_generation`.

    `generate` with the cache of an earlier turn skips as many tokens as the cache holds, and counts the virtual tokens
    among them, though `input_ids` has none.
    """

    def __init__(self, model: nn.Module, front: int) -> None:
        self.model, self.front = model, front

    def __call__(self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any) -> dict[str, Any]:
        if kwargs.get("is_first_iteration") and next_sequence_length is not None and is_filled(cache_of(kwargs)):
            next_sequence_length += self.front
        kind: Any = type(self.model)
        original = kind.prepare_inputs_for_generation
        found: dict[str, Any] = original(self.model, input_ids, next_sequence_length=next_sequence_length, **kwargs)
        return found


def _decoder_of(model: Any) -> Any:
    """The part of a model that embeds the tokens and runs the layers, without the head."""
    decoder = model.base_model.get_decoder()
    if decoder is not model:
        return decoder
    # Some models' `base_model_prefix` names no module of theirs (Llama 4).
    inner = (child for child in model.children() if hasattr(child, "get_input_embeddings"))
    return next((child for child in inner if "inputs_embeds" in arguments(child)), model)


def _ordinary_token(config: Any) -> int:
    """The lowest token id that is not a special one. Some configs name several end tokens."""
    special: set[Any] = set()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(config, name, None)
        special.update(value if isinstance(value, (list, tuple)) else [value])
    return next(number for number in range(len(special) + 1) if number not in special)
