"""What Prompt Tuning and P-Tuning share: virtual tokens among the input embeddings of any transformers model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_peft.methods.attachment import Attachment, MethodSettings
from lit_peft.methods.positions import check_length, count_positions, left_padding
from lit_peft.models.architectures import counts_over_mask, is_causal, room_for
from lit_peft.models.call_arguments import by_name, cache_of, has_fixed_size, is_filled
from lit_peft.models.token_inputs import decoder_of, ordinary_token_id, token_embeddings
from lit_peft.models.towers import reads_images
from lit_peft.models.transformers_internals import is_model_of
from lit_peft.nn.call_state import CallState
from lit_peft.nn.prompt import PromptEncoder, SoftPrompt
from lit_peft.util.errors import LitPeftError
from lit_peft.util.type_checks import brief

_NAME = "prompt_encoder"


@dataclass(frozen=True)
class SoftPromptSettings(MethodSettings):
    """The settings that Prompt Tuning and P-Tuning share.

    Args:
        num_virtual_tokens: number v of virtual tokens.
        prompt_token_id: id of a placeholder token. Each row of `input_ids` must contain it v times, anywhere in the
            template, and the virtual tokens replace it in order. None puts all virtual tokens in front.
        positions: how positions are counted. `mask` counts only the tokens that the attention mask shows, so that
            padding has no effect on either side. `sequence` counts padding too and passes embeddings instead of ids to
            the model, as peft does. Adapters saved by peft are loaded with `sequence`.
        num_transformer_submodules: 2 stores twice as many embeddings, as peft does for encoder-decoders. The encoder
            uses the first half.

    Raises:
        LitPeftError: a setting is invalid or contradicts another.
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
            raise LitPeftError(
                f"num_transformer_submodules={self.num_transformer_submodules}: give 1, or 2 for an encoder-decoder in "
                "peft's format."
            )
        if self.prompt_token_id is not None and self.positions == "sequence":
            raise LitPeftError(
                f"prompt_token_id={self.prompt_token_id} cannot be combined with positions='sequence', which puts all "
                "virtual tokens in front as peft does: leave one of them out."
            )

    @property
    def rows(self) -> int:
        """The number of stored embeddings."""
        return self.num_virtual_tokens * self.num_transformer_submodules

    def make_prompt(self, model: nn.Module, embeddings: nn.Module) -> SoftPrompt | PromptEncoder:
        """Build the module that computes the virtual tokens.

        Args:
            model: the frozen model.
            embeddings: its input embeddings, with a weight of shape (vocabulary, hidden size).

        Returns:
            A module whose output is the virtual tokens, of shape (`rows`, hidden size).

        Raises:
            LitPeftError: the settings do not fit the model.
        """
        raise NotImplementedError

    def attach_to(self, model: nn.Module, attachment: Attachment) -> None:
        """Add the prompt, and the hooks that insert it into the model's input.

        Args:
            model: the frozen model.
            attachment: makes and records the changes.

        Raises:
            LitPeftError: the settings do not fit the model, or the model has no token embeddings as its input.
        """
        insertion = _PromptInsertion(model, self)
        prompt = self.make_prompt(model, insertion.embeddings)
        attachment.add(_NAME, prompt)
        insertion.register(prompt, attachment)


class _PromptCall(CallState):
    is_pending = False  # the hook on the embeddings must insert the virtual tokens
    is_extended = False  # the host's input has been extended
    num_extra_logits = 0
    is_placeholder: Tensor | None = None
    mask: Tensor | None = None


class _PromptInsertion:
    """Inserts the virtual tokens into a model's input and removes them from its output.

    The host is the module whose input is extended and whose output is trimmed again:

    - in an encoder-decoder, the encoder. Its output is not trimmed, because cross-attention uses the virtual tokens.
    - in a sequence classifier, the whole model if it is an encoder, or with `positions="sequence"`. Its head pools over
      the extended sequence, so the first position of an encoder is a virtual token, as in peft.
    - in all other models, the part without the head, so that heads and losses only see the user's tokens. The loss of a
      causal model sees one more position: the last virtual token predicts the first token, as in peft.

    Once a cache holds tokens, it holds the virtual tokens too, and only the mask and the positions are extended.
    """

    def __init__(self, model: nn.Module, settings: SoftPromptSettings) -> None:
        self.settings = settings
        # The number of virtual tokens in front; 0 if they replace placeholder tokens.
        self.num_in_front = 0 if settings.prompt_token_id is not None else settings.num_virtual_tokens
        config: Any = getattr(model, "config", None)
        if not hasattr(model, "get_input_embeddings") or config is None:
            raise LitPeftError(
                f"{type(model).__name__} is not a transformers model, so its input embeddings cannot be found: attach "
                "the method to the transformers model that it contains."
            )
        top: Any = model
        causal, is_classifier = is_causal(config), is_model_of("AutoModelForSequenceClassification", model)
        self.decoder: nn.Module | None = None
        self.host: Any
        if getattr(config, "is_encoder_decoder", False):
            self.host, self.decoder = top.get_encoder(), top.get_decoder()
            if self.host is top:
                raise LitPeftError(
                    f"{type(model).__name__} has no encoder to put virtual tokens in front of: use a method that "
                    "adapts layers, e.g. LoRASettings()."
                )
        elif is_classifier and (settings.positions == "sequence" or not causal):
            self.host = top
        else:
            # Some heads call the decoder inside the model without the head. A model that reads images finds their
            # places among the tokens of its input, which virtual tokens must join before.
            self.host = top.base_model if reads_images(top) else decoder_of(top)
        # An encoder's classifier pools the first position, which must be a virtual token even before padding.
        self.skips_padding = settings.positions == "mask" and (causal or self.decoder is not None)
        self.trims_output = self.decoder is None and not (is_classifier and self.host is top)
        self.extends_labels = self.trims_output and self.host is not top and top.can_generate()
        self.counts_positions = settings.positions == "mask" and counts_over_mask(self.host, config)
        embeddings = token_embeddings(self.host, by_value=settings.positions == "sequence")
        if embeddings is None:
            raise LitPeftError(
                f"{type(model).__name__} has no plain table of token embeddings at its input, so it cannot take "
                "virtual tokens: use a method that adapts layers, e.g. LoRASettings()."
            )
        self.embeddings: Any = embeddings
        self.ordinary_token_id = ordinary_token_id(config)
        self.max_positions = room_for(self.num_in_front, self.host, model)
        self.call = _PromptCall()

    def register(self, prompt: SoftPrompt | PromptEncoder, attachment: Attachment) -> None:
        """Register the hooks.

        Args:
            prompt: computes the virtual tokens.
            attachment: makes and records the changes.
        """
        self.prompt = prompt
        paths = {id(module): path for path, module in attachment.model.named_modules()}
        host, embeddings = paths[id(self.host)], paths[id(self.embeddings)]
        if self.extends_labels:
            attachment.forward_pre_hook("", self._extend_labels, with_kwargs=True)
            attachment.forward_hook("", self._trim_logits, always_call=True)
        attachment.forward_pre_hook(host, self._extend_input, with_kwargs=True)
        attachment.forward_hook(host, self._trim_output, always_call=True)
        attachment.forward_pre_hook(embeddings, self._find_placeholders)
        attachment.forward_hook(embeddings, self._insert_prompt)
        if self.decoder is None and self.num_in_front and hasattr(attachment.model, "prepare_inputs_for_generation"):
            attachment.set("", "prepare_inputs_for_generation", _PrepareInputs(attachment.model, self.num_in_front))
        if self.decoder is not None and self.num_in_front:
            attachment.forward_pre_hook(paths[id(self.decoder)], self._extend_encoder_mask, with_kwargs=True)

    # ---------------------------------------------------------------------------------- hooks on the host's input

    def _extend_input(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = by_name(module, args, kwargs)
        self.call.is_pending = self.call.is_extended = False
        cached = is_filled(cache_of(kwargs))
        if self.num_in_front:
            self._extend_front(kwargs, cached)
        elif not cached or self._has_placeholders(kwargs):
            self.call.is_pending = True
        return (), kwargs

    def _extend_front(self, kwargs: dict[str, Any], cached: bool) -> None:
        as_peft = self.settings.positions == "sequence"
        ids, embeds, mask = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        tokens = ids if ids is not None else embeds
        if tokens is None:
            return
        if has_fixed_size(cache_of(kwargs)):
            raise LitPeftError(
                "A static cache has the size of the input and no room for virtual tokens in front: use the dynamic "
                "cache (leave cache_implementation out), or prompt_token_id."
            )
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise LitPeftError(
                "attention_mask does not have the shape [batch, length] (packed rows have another), so virtual tokens "
                "cannot be added in front: do not pack rows, or use prompt_token_id."
            )
        length = tokens.shape[1]
        self.call.mask = None if as_peft else mask
        if mask is not None:
            kwargs["attention_mask"] = mask = self._skip_padding(self._put_in_front(mask, 1), self.call.mask)
        if as_peft:
            kwargs.pop("position_ids", None)
        elif kwargs.get("position_ids") is not None:
            positions = kwargs["position_ids"] + self.num_in_front
            if not cached:
                first = torch.arange(self.num_in_front, device=positions.device).expand(*positions.shape[:-1], -1)
                positions = torch.cat([first, positions], -1)
                positions = positions.expand(*positions.shape[:-2], tokens.shape[0], -1)
                if positions.dim() == 3:  # a model that places images on a grid has several positions for each token
                    positions = torch.stack([self._skip_padding(plane, self.call.mask) for plane in positions])
                else:
                    positions = self._skip_padding(positions, self.call.mask)
            kwargs["position_ids"] = positions
        elif self.counts_positions and mask is not None:
            num_positions = length if cached else length + self.num_in_front
            kwargs["position_ids"] = count_positions(mask)[:, -num_positions:]
        if cached:
            return
        check_length(length, self.num_in_front, self.max_positions)
        self.call.is_extended = True
        for name in ("token_type_ids", "mm_token_type_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = self._skip_padding(self._put_in_front(kwargs[name], 0), self.call.mask)
        if ids is not None and embeds is None and not as_peft:
            # The hook on the embeddings replaces what the model reads for these ids.
            kwargs["input_ids"] = self._skip_padding(self._put_in_front(ids, self.ordinary_token_id), self.call.mask)
            self.call.is_pending = True
            return
        embeds = self.embeddings(ids) if embeds is None else embeds
        kwargs.pop("input_ids", None)
        kwargs["inputs_embeds"] = self._with_prompt(embeds)

    def _extend_encoder_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = by_name(module, args, kwargs)
        mask = kwargs.get("encoder_attention_mask")
        if mask is not None:
            kwargs["encoder_attention_mask"] = self._skip_padding(self._put_in_front(mask, 1), mask)
        return (), kwargs

    def _put_in_front(self, tensor: Tensor, value: int) -> Tensor:
        """(batch, length) → (batch, v + length), with `value` for the virtual tokens."""
        return torch.cat([tensor.new_full((tensor.shape[0], self.num_in_front), value), tensor], 1)

    def _with_prompt(self, embeds: Tensor) -> Tensor:
        """(batch, length, hidden size) → (batch, v + length, hidden size)."""
        prompt = self.prompt()[: self.num_in_front].to(embeds)
        return self._skip_padding(torch.cat([prompt.expand(embeds.shape[0], -1, -1), embeds], 1), self.call.mask)

    def _skip_padding(self, extended: Tensor, mask: Tensor | None) -> Tensor:
        """Move the virtual tokens from the front of each row to between its left padding and its text.

        Padding between the virtual tokens and the text would change the result in models with sliding windows,
        distances (ALiBi, relative positions) or a recurrent state that padding resets.

        Args:
            extended: shape (batch, v + length, ...), with the virtual tokens in front.
            mask: the attention mask without virtual tokens, shape (batch, length); None leaves `extended` unchanged.
        """
        if mask is None or not self.skips_padding:
            return extended
        padding = left_padding(mask)
        index = torch.arange(extended.shape[1], device=extended.device)[None]
        source = (index - padding).where(index < padding + self.num_in_front, index)
        return _take(extended, torch.where(index < padding, index + self.num_in_front, source))

    def _without_prompt(self, extended: Tensor) -> Tensor:
        """(batch, v + length, ...) → (batch, length, ...), without the virtual tokens."""
        if self.call.mask is None or not self.skips_padding:
            return extended[:, self.num_in_front :]
        index = torch.arange(extended.shape[1] - self.num_in_front, device=extended.device)[None]
        return _take(extended, torch.where(index < left_padding(self.call.mask), index, index + self.num_in_front))

    # ------------------------------------------------------------------------------------ hooks on the embeddings

    def _has_placeholders(self, kwargs: dict[str, Any]) -> bool:
        ids = kwargs.get("input_ids")
        return ids is not None and bool((ids == self.settings.prompt_token_id).any())

    def _find_placeholders(self, module: nn.Module, args: Any) -> Any:
        if not self.call.is_pending or self.num_in_front:
            return None
        ids = args[0]
        self.call.is_placeholder = ids == self.settings.prompt_token_id
        counts = self.call.is_placeholder.sum(1)
        if counts.device.type == "cpu" and not bool((counts == self.settings.num_virtual_tokens).all()):
            raise LitPeftError(
                f"prompt_token_id={self.settings.prompt_token_id} is in the rows of input_ids {counts.tolist()} times: "
                f"each row must contain it {self.settings.num_virtual_tokens} times, once for each virtual token."
            )
        # The placeholder's id may be outside the vocabulary.
        return (ids.masked_fill(self.call.is_placeholder, self.ordinary_token_id), *args[1:])

    def _insert_prompt(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self.call.is_pending:
            return None
        self.call.is_pending = False
        if self.num_in_front:
            return self._with_prompt(self._without_prompt(output))
        is_placeholder, self.call.is_placeholder = self.call.is_placeholder, None
        assert is_placeholder is not None
        index = (is_placeholder.cumsum(1) - 1).clamp(0, self.settings.num_virtual_tokens - 1)
        return torch.where(is_placeholder[..., None], self.prompt().to(output)[index], output)

    # ---------------------------------------------------------------------------------------- hooks on the outputs

    def _trim_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        is_extended, self.call.is_pending, self.call.is_extended = self.call.is_extended, False, False
        if not (is_extended and self.trims_output) or output is None:
            return None
        start = self.num_in_front - self.call.num_extra_logits
        if isinstance(output, tuple):
            return (output[0][:, start:], *output[1:])
        output["last_hidden_state"] = output["last_hidden_state"][:, start:]
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(state[:, self.num_in_front :] for state in output["hidden_states"])
        return output

    def _extend_labels(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = by_name(module, args, kwargs)
        self.call.num_extra_logits = 0
        labels = kwargs.get("labels")
        logits_to_keep = kwargs.get("logits_to_keep", 0)
        keeps_all_logits = isinstance(logits_to_keep, int) and not logits_to_keep
        cached = is_filled(cache_of(kwargs))
        if (
            self.num_in_front
            and labels is not None
            and keeps_all_logits
            and not cached
            and kwargs.get("shift_labels") is None
        ):
            kwargs["labels"] = torch.cat([labels.new_full((labels.shape[0], 1), -100), labels], 1)
            self.call.num_extra_logits = 1
        return (), kwargs

    def _trim_logits(self, module: nn.Module, args: Any, output: Any) -> Any:
        num_extra_logits, self.call.num_extra_logits = self.call.num_extra_logits, 0
        if not num_extra_logits or output is None:
            return None
        if isinstance(output, tuple):
            return (output[0], output[1][:, num_extra_logits:], *output[2:])
        output["logits"] = output["logits"][:, num_extra_logits:]
        return output


class _PrepareInputs:
    """Replaces a model's `prepare_inputs_for_generation`.

    With the cache of an earlier turn, `generate` skips as many tokens as the cache holds. The cache also holds the
    virtual tokens, which `input_ids` does not contain.
    """

    def __init__(self, model: nn.Module, num_in_front: int) -> None:
        self.model, self.num_in_front = model, num_in_front

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the original, whose arguments `generate` accepts (xLSTM's forward takes no attention mask)."""
        model_class: Any = type(self.model)
        return inspect.signature(model_class.prepare_inputs_for_generation.__get__(self.model))

    def __call__(self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any) -> dict[str, Any]:
        if kwargs.get("is_first_iteration") and next_sequence_length is not None and is_filled(cache_of(kwargs)):
            next_sequence_length += self.num_in_front
        model_class: Any = type(self.model)
        inputs: dict[str, Any] = model_class.prepare_inputs_for_generation(
            self.model, input_ids, next_sequence_length=next_sequence_length, **kwargs
        )
        return inputs


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """Reorder the positions of each row: (batch, positions, ...) by (batch, new positions)."""
    columns = index.view(*index.shape, *[1] * (tensor.dim() - 2))
    return tensor.gather(1, columns.expand(*index.shape, *tensor.shape[2:]))
