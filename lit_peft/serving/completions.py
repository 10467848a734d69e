"""Requests in OpenAI's form, from their prompts to the messages that answer them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lit_peft.serving.batches import batches
from lit_peft.serving.decoding import Decoder, Row, TokenLogprob
from lit_peft.serving.errors import TOO_LONG, Refusal
from lit_peft.serving.openai_requests import ChatMessage, OpenAIRequest
from lit_peft.serving.text_stream import TextStream
from lit_peft.util.errors import first_line

# A request may ask for as many answers as this number of full batches has.
_MAX_BATCHES = 16


@dataclass
class Part:
    """A part of an answer.

    Args:
        index: the answer's number.
        text: the new text.
        logprobs: the log probabilities of its tokens; None if they were not asked for.
        finish: why the answer has ended; None if it has not.
    """

    index: int
    text: str
    logprobs: list[TokenLogprob] | None
    finish: str | None


@dataclass
class Usage:
    """The numbers of tokens, which are the last message.

    Args:
        prompt_tokens: the tokens of all prompts.
        completion_tokens: the tokens of all answers, with those that end them.
    """

    prompt_tokens: int
    completion_tokens: int


Message = Part | Usage | Refusal
Reply = Callable[[Message], None]


def complete(api: Any, asked: Sequence[tuple[OpenAIRequest, Reply]]) -> None:
    """Answer requests in OpenAI's form, with rows of several requests and adapters in one forward pass.

    Args:
        api: the `AdapterAPI` whose model answers.
        asked: the requests, each with what takes its messages.
    """
    jobs = []
    for request, reply in asked:
        try:
            jobs.append(_Job(api, request, reply))
        except Refusal as refusal:
            reply(refusal)
    owned = [(row, job) for job in jobs for row in job.rows]
    wanted = {place: (row.adapter, len(row.prompt), row.max_new_tokens) for place, (row, _) in enumerate(owned)}
    decoder = Decoder(api.model, api.tokenizer)
    for places in batches(api, wanted):
        decoder.run([owned[place][0] for place in places])
        for place in places:
            row, job = owned[place]
            job.check(row)


class _Job:
    """One request that is being answered.

    Raises:
        Refusal: it cannot be answered.
    """

    def __init__(self, api: Any, request: OpenAIRequest, reply: Reply) -> None:
        self.api, self.request, self.reply = api, request, reply
        self.adapter = request.model if request.model in api.adapters else None
        self._check_counts()
        prompts = [self._encode(prompt) for prompt in request.prompts]
        self.prompt_tokens = sum(map(len, prompts))
        repeated = [prompt for prompt in prompts for _ in range(request.choices)]
        self.rows = [self._row(index, prompt) for index, prompt in enumerate(repeated)]
        self.parts: list[list[Part]] = [[] for _ in self.rows]
        self.open, self.is_over = len(self.rows), False

    def _check_counts(self) -> None:
        request, most = self.request, self.api.max_batch_size
        if request.choices > most:
            raise Refusal(f"n={request.choices}: the server's maximum is {most} (--max_batch_size).", param="n")
        answers = request.choices * len(request.prompts)
        if not 0 < answers <= _MAX_BATCHES * most:
            raise Refusal(
                f"The request has {len(request.prompts)} prompts with n={request.choices}, which asks for {answers} "
                f"answers: the server gives 1 to {_MAX_BATCHES * most}.",
                param="prompt",
            )
        given = request.new_tokens
        if given is not None and given > self.api.max_new_tokens:
            raise Refusal(
                f"max_tokens={given}: the server's maximum is {self.api.max_new_tokens} (--max_new_tokens).",
                param="max_tokens",
            )
        if request.echoes and self.api.model.config.is_encoder_decoder:
            raise Refusal(
                "echo=true needs a decoder: the prompt of an encoder-decoder is not part of its answer.", param="echo"
            )

    def _row(self, index: int, prompt: list[int]) -> Row:
        request = self.request

        def send(text: str, logprobs: list[TokenLogprob], finish: str | None) -> None:
            self._take(Part(index, text, logprobs if request.top_logprobs_count is not None else None, finish))

        return Row(
            adapter=self.adapter,
            prompt=prompt,
            max_new_tokens=self._new_tokens(prompt),
            stream=TextStream(self.api.tokenizer, request.stop or ()),
            send=send,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=request.top_p or 1.0,
            seed=None if request.seed is None else request.seed + index,
            top_count=request.top_logprobs_count,
            echoes=request.echoes,
        )

    def _new_tokens(self, prompt: list[int]) -> int:
        """The number of tokens to generate for a prompt."""
        wanted = self.request.new_tokens
        if wanted is None:
            # A request that gives no number gets as many as the positions leave, but at least one is needed.
            room = self.api.rooms[self.adapter]
            wanted = min(self.request.default_new_tokens or self.api.max_new_tokens, self.api.max_new_tokens)
            if room.prompt is not None and room.is_shared:
                wanted = max(min(wanted, room.prompt - len(prompt)), 1)
        problem = self.api.find_excess_tokens(len(prompt), self.adapter, wanted)
        if problem is not None:
            raise Refusal(problem, param=self._field, code=TOO_LONG if prompt else None)
        return int(wanted)

    @property
    def _field(self) -> str:
        """The field with the prompt."""
        return "prompt" if "prompt" in type(self.request).model_fields else "messages"

    def _encode(self, prompt: Any) -> list[int]:
        """Return the token ids of a prompt."""
        if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], ChatMessage)):
            return self._check_ids(prompt)
        tokenizer = self.api.tokenizer
        messages = None if isinstance(prompt, str) else [message.rendered() for message in prompt]
        texts = [prompt] if messages is None else [message["content"] for message in messages]
        problem = self.api.find_excess_characters(sum(map(len, texts)))
        if problem is not None:
            raise Refusal(problem, param=self._field, code=TOO_LONG)
        if messages is not None and not getattr(tokenizer, "chat_template", None):
            raise Refusal(
                "The base's tokenizer has no chat template: use /v1/completions, or serve an instruction-tuned base.",
                param="messages",
            )
        try:
            if messages is None:
                return list(tokenizer(prompt).input_ids)
            found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # tokenizers and templates raise errors of many kinds
            what = "The tokenizer cannot read the prompt" if messages is None else "The chat template refuses this"
            raise Refusal(f"{what} ({first_line(error)}).", param=self._field) from error
        return list(found["input_ids"])

    def _check_ids(self, ids: list[int]) -> list[int]:
        size = self.api.model.get_input_embeddings().weight.shape[0]
        wrong = next((token for token in ids if not 0 <= token < size), None)
        if wrong is not None:
            raise Refusal(f"prompt has the token id {wrong}: give ids from 0 to {size - 1}.", param="prompt")
        return ids

    def check(self, row: Row) -> None:
        """Send why a row failed, if it did."""
        if row.problem is not None:
            self._finish(Refusal(row.problem, 500))

    def _take(self, part: Part) -> None:
        if self.is_over:
            return
        if self.request.stream:
            self.reply(part)
        else:
            self.parts[part.index].append(part)
        if part.finish is None:
            return
        self.open -= 1
        if not self.open:
            for parts in self.parts:
                if parts:
                    self.reply(_joined(parts))
            self._finish(Usage(self.prompt_tokens, sum(len(row.tokens) for row in self.rows)))

    def _finish(self, message: Usage | Refusal) -> None:
        if not self.is_over:
            self.is_over = True
            self.reply(message)


def _joined(parts: Sequence[Part]) -> Part:
    """One part for a whole answer."""
    logprobs = None
    if parts[0].logprobs is not None:
        logprobs = [each for part in parts for each in part.logprobs or ()]
    return Part(parts[0].index, "".join(part.text for part in parts), logprobs, parts[-1].finish)
