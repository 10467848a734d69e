"""A base and its adapters behind HTTP, by LitServe: requests for different adapters share one forward.

Needs the extra `serve`. `lit-peft serve` starts it; `AdapterAPI` is for a LitServe server of your own.
"""

# No annotations from the future here: LitServe reads what a request is from the annotation itself.
from collections.abc import Mapping, Sequence
from typing import Any

import litserve
import torch
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from lit_peft.commands.options import base_options, check_generates, load_base_from_options
from lit_peft.util.errors import LitPeftError


class Request(BaseModel):
    """What a client posts: the prompt, the adapter's name (the base's own answer when unset), and how much to write."""

    # A misspelt name would have the base answer.
    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)
    adapter: str | None = None
    max_new_tokens: int | None = Field(default=None, gt=0)


class AdapterAPI(litserve.LitAPI):
    """Answers prompts with the adapters that they name.

    LitServe gathers the requests of `batch_timeout` seconds; each row of that batch goes through its own adapter, in a
    single forward. Prompts and prefixes, which make the whole batch longer, answer theirs after the others.

    Args:
        base: the base model, in any form that `lit-peft generate --base` takes.
        adapters: the adapters' folders by name.
        max_new_tokens: tokens to write where a request does not say, and at most.
        max_prompt_tokens: longer prompts are refused.
        max_batch_size: requests in one batch at most.
        batch_timeout: seconds to wait for further requests.
        **options: further options of `lit-peft generate` that say how to load the base: `revision`, `task`,
            `num_labels`, `dtype`, `quantization`, `force`.

    Raises:
        LitPeftError: a number is out of range, or an option is not known.
    """

    def __init__(
        self,
        base: str,
        adapters: Mapping[str, str],
        max_new_tokens: int = 256,
        max_prompt_tokens: int = 4096,
        max_batch_size: int = 8,
        batch_timeout: float = 0.02,
        **options: Any,
    ) -> None:
        numbers = {
            "max_new_tokens": max_new_tokens,
            "max_prompt_tokens": max_prompt_tokens,
            "max_batch_size": max_batch_size,
        }
        for name, value in numbers.items():
            if value < 1:
                raise LitPeftError(f"{name}={value}: give a whole number of at least 1.")
        if not batch_timeout >= 0:
            raise LitPeftError(f"batch_timeout={batch_timeout}: give seconds, 0 for none.")
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout, api_path="/generate")
        self.options = base_options(base, **options)
        self.adapters = dict(adapters)
        self.max_new_tokens, self.max_prompt_tokens = max_new_tokens, max_prompt_tokens

    def setup(self, device: str) -> None:
        """Load the base and every adapter, in the process that answers."""
        from lit_peft.formats.folder import load_adapter
        from lit_peft.methods.adapters import set_adapter
        from lit_peft.models.tokenization import adapter_tokenizer

        self.tokenizer = adapter_tokenizer(self.adapters.values(), self.options.base, "--base", self.options.revision)
        self.model = load_base_from_options(self.options).to(device)
        check_generates(self.model)
        # The new tokens follow the prompt's last one.
        self.tokenizer.padding_side = "left"
        for name, folder in self.adapters.items():
            load_adapter(self.model, folder, check_base=not self.options.force, name=name)
        set_adapter(self.model, None)
        self.model.eval()

    def decode_request(self, request: Request) -> Request:
        """Every check that needs the model is made in `predict`, where one bad request does not fail the others."""
        return request

    def batch(self, inputs: Sequence[Request]) -> list[Request]:
        """A batch is the list of its requests."""
        return list(inputs)

    def unbatch(self, output: Sequence[Any]) -> Sequence[Any]:
        """The answers are a list already."""
        return output

    def predict(self, x: Request | list[Request]) -> Any:
        """Each request's answer: `{"text": ..., "adapter": ...}`, or `{"error": ...}`."""
        if isinstance(x, Request):
            # LitServe does not batch where max_batch_size is 1.
            return self.predict([x])[0]
        answers: list[dict[str, Any]] = [{"error": problem} if (problem := self._problem(each)) else {} for each in x]
        for places in self._groups(x, [place for place, answer in enumerate(answers) if not answer]):
            for place, text in zip(places, self._generate([x[place] for place in places]), strict=True):
                answers[place] = {"text": text, "adapter": x[place].adapter}
        return answers

    def encode_response(self, output: dict[str, Any]) -> Any:
        """An error is one for its own client alone."""
        return JSONResponse(output, status_code=422) if "error" in output else output

    def _problem(self, request: Request) -> str | None:
        if request.adapter is not None and request.adapter not in self.adapters:
            return f"There is no adapter {request.adapter!r}: there are {', '.join(self.adapters) or 'none'}."
        count = len(self.tokenizer(request.prompt).input_ids)
        if count == 0:
            return "The prompt has no tokens: the tokenizer knows none in its text."
        if count > self.max_prompt_tokens:
            return f"The prompt has {count} tokens, and at most {self.max_prompt_tokens} are taken."
        return None

    def _groups(self, requests: Sequence[Request], places: Sequence[int]) -> list[list[int]]:
        """The rows that share a batch: all whose adapters can, and those of each other adapter."""
        from lit_peft.methods.rows import can_share

        groups: dict[str | None, list[int]] = {}
        for place in places:
            name = requests[place].adapter
            alone = name is not None and not can_share(self.model, name)
            groups.setdefault(name if alone else None, []).append(place)
        return list(groups.values())

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request]) -> list[str]:
        from lit_peft.methods.adapters import set_adapter
        from lit_peft.methods.rows import can_share, row_adapters

        prompts, names = [each.prompt for each in requests], [each.adapter for each in requests]
        wanted = [min(each.max_new_tokens or self.max_new_tokens, self.max_new_tokens) for each in requests]
        inputs = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.model.device)
        inputs.pop("token_type_ids", None)
        settings = {"do_sample": False, "max_new_tokens": max(wanted), "pad_token_id": self.tokenizer.pad_token_id}
        if all(name is None or can_share(self.model, name) for name in names):
            with row_adapters(self.model, names):
                out = self.model.generate(**inputs, **settings)
        else:
            set_adapter(self.model, names[0])
            out = self.model.generate(**inputs, **settings)
            set_adapter(self.model, None)
        start = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        rows = [row[start : start + count] for row, count in zip(out, wanted, strict=True)]
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts
