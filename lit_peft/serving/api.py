"""The model side of the server: prompts and requests in OpenAI's form, answered with the adapters that they name."""

# Annotations are not postponed in this file: LitServe and FastAPI read the type of a request from them.
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import litserve
import torch

from lit_peft.commands.options import base_options, check_generates, load_base_from_options
from lit_peft.serving.batches import batches
from lit_peft.serving.completions import Reply, complete
from lit_peft.serving.endpoints import Endpoints
from lit_peft.serving.errors import json_response
from lit_peft.serving.generate_request import Request
from lit_peft.serving.loop import ServingLoop
from lit_peft.serving.openai_requests import OpenAIRequest
from lit_peft.util.errors import LitPeftError, closest, first_line
from lit_peft.util.type_checks import brief

# Text has 4 to 5 characters per token, and code about 10 with its indentation.
_CHARACTERS_PER_TOKEN = 32
logger = logging.getLogger("lit_peft.serving")


class AdapterAPI(litserve.LitAPI):
    """Generates text for prompts, each with the adapter that its request names.

    LitServe collects requests into batches. Adapters that can share a batch (see `lit_peft.row_adapters`) are computed
    in one forward pass. Prompts and prefixes, which make every row longer, are computed in batches of their own. If a
    batch fails, it is computed again in halves, so that only the requests that fail alone get an error.

    Args:
        base: the base model, in any form that `lit-peft generate --base` accepts.
        adapters: the adapters' folders by name.
        max_new_tokens: the maximum number of tokens to generate, and the number for requests that give none.
        max_prompt_tokens: the maximum number of tokens of a prompt. The model's positions may allow fewer.
        max_batch_size: the maximum number of requests in a batch.
        batch_timeout: how many seconds to wait for more requests before a batch is computed.
        **options: other options of `lit-peft generate` for loading the base: `revision`, `task`, `num_labels`, `dtype`,
            `quantization`, `force`.

    Attributes:
        max_prompt_characters: the maximum number of characters of a prompt, which is checked before it is tokenized.

    Raises:
        LitPeftError: a number is out of range, or an option is unknown.
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
        if base in adapters:
            raise LitPeftError(
                f"An adapter has the name of the base, {base!r}, so requests could not tell them apart: give it "
                "another name, as in --adapter NAME=FOLDER."
            )
        super().__init__(
            max_batch_size=max_batch_size, batch_timeout=batch_timeout, spec=Endpoints("/generate"), loop=ServingLoop()
        )
        self.options = base_options(base, **options)
        self.adapters = dict(adapters)
        self.max_new_tokens, self.max_prompt_tokens = max_new_tokens, max_prompt_tokens
        self.max_prompt_characters = _CHARACTERS_PER_TOKEN * max_prompt_tokens

    def setup(self, device: str) -> None:
        """Load the base and all adapters. LitServe calls this in the process that runs the model.

        Raises:
            LitPeftError: one of them cannot be loaded, or `max_new_tokens` leaves no position for a prompt.
        """
        from lit_peft.formats.folder import load_adapter
        from lit_peft.methods.adapters import set_adapter
        from lit_peft.methods.prompt_room import prompt_room
        from lit_peft.models.tokenization import adapter_tokenizer

        # LitServe logs an error of `setup` there before it stops.
        logging.getLogger("litserve.loops.loops").addFilter(_without_traceback)
        self.tokenizer = adapter_tokenizer(self.adapters.values(), self.options.base, "--base", self.options.revision)
        self.model = load_base_from_options(self.options).to(device)
        check_generates(self.model)
        # A decoder's tokens must follow the prompt directly. An encoder's positions must not be moved by padding.
        self.tokenizer.padding_side = "right" if self.model.config.is_encoder_decoder else "left"
        for name, folder in self.adapters.items():
            load_adapter(self.model, folder, check_base=not self.options.force, name=name)
        set_adapter(self.model, None)
        self.model.eval()
        self.rooms = {name: prompt_room(self.model, name) for name in (None, *self.adapters)}
        for adapter, room in self.rooms.items():
            if not room.fits(1, self.max_new_tokens):
                raise LitPeftError(
                    f"--max_new_tokens {self.max_new_tokens} leaves no position for a prompt (adapter: {adapter}): the "
                    f"model has {room.answer} positions beside the virtual tokens. Give a smaller number."
                )

    def decode_request(self, request: Request) -> Request:
        """Return the request as it is. `predict` checks it, because an error here would fail the whole batch."""
        return request

    def batch(self, inputs: Sequence[Request]) -> list[Request]:
        """Return the requests of a batch as a list."""
        return list(inputs)

    def unbatch(self, output: Sequence[Any]) -> Sequence[Any]:
        """Return the answers, which are a list already."""
        return output

    def predict(self, x: Request | list[Request]) -> Any:
        """Answer one request, or each request of a batch.

        Returns:
            `{"text": ..., "adapter": ...}` for each request, or `{"error": ..., "status": ...}` with an HTTP status.
        """
        if isinstance(x, Request):
            # LitServe passes single requests if max_batch_size is 1.
            return self.predict([x])[0]
        found = [self._count_tokens(request) for request in x]
        answers: list[dict[str, Any]] = [{"error": problem, "status": 422} for problem in found]
        counts = {place: count for place, count in enumerate(found) if isinstance(count, int)}
        wanted = {place: (x[place].adapter, count, self._new_tokens(x[place])) for place, count in counts.items()}
        for places in batches(self, wanted):
            for place, answer in zip(places, self._answers([x[place] for place in places]), strict=True):
                answers[place] = answer
        return answers

    def complete(self, asked: Sequence[tuple[OpenAIRequest, Reply]]) -> None:
        """Answer requests in OpenAI's form.

        Args:
            asked: the requests, each with a function that takes the messages of its answer.
        """
        complete(self, asked)

    def encode_response(self, output: dict[str, Any]) -> Any:
        """Return the answer as JSON, with its HTTP status if it is an error."""
        return json_response(output["status"], output["error"]) if "error" in output else output

    def _count_tokens(self, request: Request) -> int | str:
        """Return the number of tokens of a prompt, or one sentence that says why it cannot be answered."""
        if request.adapter is not None and request.adapter not in self.adapters:
            known = f"the closest are {closest(request.adapter[:100], self.adapters)}" if self.adapters else "none"
            return f"There is no adapter {brief(request.adapter)}: {known}."
        if (excess := self.find_excess_characters(len(request.prompt))) is not None:
            return excess
        try:
            count = len(self.tokenizer(request.prompt).input_ids)
        except Exception as problem:  # tokenizers raise errors of many kinds
            return f"The tokenizer cannot read the prompt ({first_line(problem)})."
        found = self.find_excess_tokens(count, request.adapter, self._new_tokens(request))
        return count if found is None else found

    def find_excess_characters(self, count: int) -> str | None:
        """Return one sentence if a prompt has too many characters to be tokenized, else None.

        Args:
            count: the number of its characters.
        """
        if count <= self.max_prompt_characters:
            return None
        return (
            f"The prompt has {count} characters; the maximum is {self.max_prompt_characters} "
            f"({self.max_prompt_tokens} tokens)."
        )

    def find_excess_tokens(self, count: int, adapter: str | None, new_tokens: int) -> str | None:
        """Return one sentence if a prompt has no tokens or too many, else None.

        Args:
            count: the number of its tokens.
            adapter: the adapter to use, which may need positions for virtual tokens; None for the base.
            new_tokens: the maximum number of tokens to generate.
        """
        if count == 0:
            return "The prompt has no tokens: the tokenizer knows none of its text."
        if count > self.max_prompt_tokens:
            return f"The prompt has {count} tokens; the maximum is {self.max_prompt_tokens}."
        longest = self.rooms[adapter].longest_prompt(new_tokens)
        if longest is not None and count > longest:
            return (
                f"The prompt has {count} tokens; with max_new_tokens={new_tokens}, the model's positions allow at most "
                f"{longest}."
            )
        return None

    def _new_tokens(self, request: Request) -> int:
        return min(request.max_new_tokens or self.max_new_tokens, self.max_new_tokens)

    def _answers(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Answer a batch. If it fails, answer its halves, down to single requests."""
        try:
            texts = self._generate(requests)
        except Exception as problem:  # out of memory, or whatever a model raises for an unusual input
            reason = first_line(problem)
            level = logging.ERROR if len(requests) == 1 else logging.WARNING
            logger.log(level, "A batch of %d requests failed: %s", len(requests), reason, exc_info=len(requests) == 1)
        else:
            return [{"text": text, "adapter": each.adapter} for text, each in zip(texts, requests, strict=True)]
        # Outside the handler, whose traceback would keep the tensors of the failed batch.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(requests) == 1:
            return [{"error": f"The model failed on this request ({reason}).", "status": 500}]
        half = len(requests) // 2
        return [*self._answers(requests[:half]), *self._answers(requests[half:])]

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request]) -> list[str]:
        """Return the generated texts of a batch."""
        from lit_peft.methods.adapters import use_adapter
        from lit_peft.methods.rows import can_share, row_adapters

        prompts, names = [each.prompt for each in requests], [each.adapter for each in requests]
        new_tokens = [self._new_tokens(each) for each in requests]
        inputs = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.model.device)
        inputs.pop("token_type_ids", None)
        settings = {"do_sample": False, "max_new_tokens": max(new_tokens), "pad_token_id": self.tokenizer.pad_token_id}
        shared = all(name is None or can_share(self.model, name) for name in names)
        with row_adapters(self.model, names) if shared else use_adapter(self.model, names[0]):
            out = self.model.generate(**inputs, **settings)
        # The output of an encoder-decoder begins with the decoder's start token.
        start = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        rows = [row[start : start + count] for row, count in zip(out, new_tokens, strict=True)]
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts


def _without_traceback(record: logging.LogRecord) -> bool:
    """Logging filter that keeps only the message of a `LitPeftError`."""
    problem = record.exc_info[1] if record.exc_info else None
    if isinstance(problem, LitPeftError):
        record.msg, record.args, record.exc_info, record.exc_text = f"lit-peft: error: {problem}", (), None, None
    return True
