"""Generating the answers of OpenAI's API: a batch whose rows have their own adapters, sampling, ends and limits."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_peft.serving.sampling import choose_tokens
from lit_peft.serving.text_stream import TextStream
from lit_peft.util.errors import LitPeftError, first_line

# OpenAI's API writes this for a token that cannot occur: JSON has no infinity.
_IMPOSSIBLE = -9999.0
logger = logging.getLogger("lit_peft.serving")


@dataclass
class TokenLogprob:
    """A token of an answer, with its probability.

    Args:
        token: its text.
        logprob: the log probability before temperature and `top_p`; None for the first token of a prompt.
        top: the most likely tokens in its place, with theirs.
        offset: where it begins in the text of the answer.
    """

    token: str
    logprob: float | None
    top: list[tuple[str, float]]
    offset: int


@dataclass
class Row:
    """One answer that is being generated.

    Args:
        adapter: the name of its adapter; None for the base.
        prompt: the token ids of the prompt.
        max_new_tokens: the maximum number of tokens to generate.
        stream: decodes the tokens.
        send: called with each new part of the text, its tokens' log probabilities, and `finish`.
        temperature: see `choose_tokens`.
        top_p: see `choose_tokens`.
        seed: of its random numbers; None for any.
        top_count: the number of alternatives to give for each token; None for no log probabilities.
        echoes: whether the answer begins with the prompt.

    Attributes:
        tokens: the token ids of the answer.
        finish: why it has ended: `stop`, `length`, or None before its end.
        problem: why it failed; None if it did not.
    """

    adapter: str | None
    prompt: list[int]
    max_new_tokens: int
    stream: TextStream
    send: Callable[[str, list[TokenLogprob], str | None], None]
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_count: int | None = None
    echoes: bool = False
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    problem: str | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._pending: list[TokenLogprob] = []
        # The length of the prompt in the text of an answer that begins with it.
        self._shift = 0
        self._is_echoed = False

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to compute."""
        return self.finish is not None or self.problem is not None

    @property
    def must_score_prompt(self) -> bool:
        """Whether the log probabilities of the prompt are still to be computed."""
        return self.echoes and self.top_count is not None and not self._is_echoed

    def echo(self, text: str, found: list[TokenLogprob]) -> None:
        """Send the prompt as the beginning of the answer."""
        if self._is_echoed:
            return
        self._is_echoed, self._shift = True, len(text)
        if not self.max_new_tokens:
            self.finish = "length"
        self.send(text, found, self.finish)

    def add(self, token: int, found: tuple[str, float, list[tuple[str, float]]] | None, is_end: bool) -> None:
        """Add a token to the answer and send what can be sent.

        Args:
            token: its id.
            found: its text, log probability and alternatives; None if they were not asked for.
            is_end: whether it ends the answer and is not part of it.
        """
        self.tokens.append(token)
        if is_end:
            return self._end("stop")
        text = self.stream.add(token)
        if found is not None:
            self._pending.append(TokenLogprob(*found, self._shift + self.stream.starts[-1]))
        if self.stream.is_stopped or len(self.tokens) == self.max_new_tokens:
            return self._end("stop" if self.stream.is_stopped else "length", text)
        self._send(text, len(self.stream.text) - self.stream.held)

    def _end(self, reason: str, text: str = "") -> None:
        text += self.stream.finish()
        is_stopped = self.stream.is_stopped
        # The last tokens may complete a stop text only when they are decoded to the end.
        self.finish = "stop" if is_stopped else reason
        self._send(text, len(self.stream.text) if is_stopped else None)

    def _send(self, text: str, end: int | None) -> None:
        """Send a text with the tokens that begin before `end`; all for None."""
        found = [each for each in self._pending if end is None or each.offset - self._shift < end]
        self._pending = self._pending[len(found) :]
        if text or found or self.finish:
            self.send(text, found, self.finish)


class Decoder:
    """Generates the answers of rows.

    Args:
        model: the base with its adapters, in evaluation mode.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.end_tokens = {ends} if isinstance(ends, int) else set(ends or ())
        self.pad = tokenizer.pad_token_id or 0

    def run(self, rows: Sequence[Row]) -> None:
        """Answer the rows of a batch. If it fails, its halves go on from where they are, down to single rows."""
        rows = [row for row in rows if not row.is_done]
        if not rows:
            return
        reason = None
        try:
            self._generate(rows)
        except Exception as problem:  # out of memory, or whatever a model raises for an unusual input
            reason = first_line(problem)
            level = logging.ERROR if len(rows) == 1 else logging.WARNING
            logger.log(level, "A batch of %d rows failed: %s", len(rows), reason, exc_info=len(rows) == 1)
        if reason is None:
            return
        # Outside the handler, whose traceback would keep the tensors of the failed batch.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) == 1:
            rows[0].problem = f"The model failed on this request ({reason})."
            return
        self.run(rows[: len(rows) // 2])
        self.run(rows[len(rows) // 2 :])

    @torch.inference_mode()
    def _generate(self, rows: list[Row]) -> None:
        with self._adapters(rows):
            self._echo([row for row in rows if row.must_score_prompt], rows)
        rows = [row for row in rows if not row.is_done]
        if not rows:
            return
        settings: dict[str, Any] = {
            "max_new_tokens": max(row.max_new_tokens - len(row.tokens) for row in rows),
            "pad_token_id": self.pad,
            # The rows' tokens are chosen by `_choose`.
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
        }
        if self.model.config.is_encoder_decoder:
            inputs = self._inputs([row.prompt for row in rows], on_left=False)
            if rows[0].tokens:
                # All rows that are left have generated equally many tokens.
                inputs["decoder_input_ids"] = torch.tensor([row.tokens for row in rows], device=self.model.device)
        else:
            inputs = self._inputs([row.prompt + row.tokens for row in rows], on_left=True)

        def choose(input_ids: Tensor, scores: Tensor) -> Tensor:
            return self._choose(rows, scores)

        def is_done(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.tensor([row.is_done for row in rows], device=input_ids.device)

        with self._adapters(rows):
            self.model.generate(**inputs, **settings, logits_processor=[choose], stopping_criteria=[is_done])

    @contextmanager
    def _adapters(self, rows: Sequence[Row]) -> Iterator[None]:
        from lit_peft.methods.adapters import use_adapter
        from lit_peft.methods.rows import can_share, row_adapters

        names = [row.adapter for row in rows]
        shared = all(name is None or can_share(self.model, name) for name in names)
        with row_adapters(self.model, names) if shared else use_adapter(self.model, names[0]):
            yield

    def _inputs(self, prompts: Sequence[list[int]], on_left: bool) -> dict[str, Tensor]:
        """Pad prompts to one length."""
        longest = max(map(len, prompts))
        ids, mask = [], []
        for prompt in prompts:
            padding = longest - len(prompt)
            ids.append([self.pad] * padding + prompt if on_left else prompt + [self.pad] * padding)
            mask.append([0] * padding + [1] * len(prompt) if on_left else [1] * len(prompt) + [0] * padding)
        device = self.model.device
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}

    def _choose(self, rows: Sequence[Row], scores: Tensor) -> Tensor:
        """Choose each row's next token, and return scores in which nothing else can be chosen.

        Raises:
            LitPeftError: the scores are not finite.
        """
        logprobs = scores.float().log_softmax(-1)
        if not bool((logprobs.isfinite().any(-1) & ~logprobs.isnan().any(-1)).all()):
            raise LitPeftError("the model's logits are not finite")
        tokens = choose_tokens(
            logprobs,
            [row.temperature for row in rows],
            [row.top_p for row in rows],
            [0.0 if row.is_done else row.random.random() for row in rows],
        )
        ids = tokens.tolist()
        most = max((row.top_count or 0 for row in rows if row.top_count is not None), default=None)
        if most is not None:
            chosen = logprobs.gather(1, tokens[:, None]).squeeze(1).tolist()
            top = _top(logprobs, most)
        for place, row in enumerate(rows):
            if row.is_done:
                continue
            found = None
            if row.top_count is not None:
                alternatives = self._named(top[place][: row.top_count])
                found = (self._text(ids[place]), _number(chosen[place]), alternatives)
            row.add(ids[place], found, ids[place] in self.end_tokens)
        return torch.full_like(scores, -math.inf).scatter(1, tokens[:, None], 0.0)

    def _echo(self, scored: Sequence[Row], rows: Sequence[Row]) -> None:
        """Send the prompts of rows that begin with them; those of `scored` with log probabilities."""
        if scored:
            # Padding is on the right, where it changes neither positions nor what a token sees. Virtual tokens come
            # first. All rows are computed, since the adapters are set for them.
            inputs = self._inputs([row.prompt for row in rows], on_left=False)
            logits = self.model(**inputs, use_cache=False).logits[:, -inputs["input_ids"].shape[1] :]
            for place, row in enumerate(rows):
                if row.must_score_prompt:
                    logprobs = logits[place, : len(row.prompt) - 1].float().log_softmax(-1)
                    row.echo(*self._scored(row, logprobs))
        for row in rows:
            if row.echoes:
                row.echo(self.tokenizer.decode(row.prompt, skip_special_tokens=True), [])

    def _scored(self, row: Row, logprobs: Tensor) -> tuple[str, list[TokenLogprob]]:
        """Return the text of a prompt and its tokens with their log probabilities.

        Args:
            row: whose prompt it is.
            logprobs: those of the token after each one of the prompt but the last, of shape [length - 1, vocabulary].
        """
        text = TextStream(self.tokenizer)
        whole = "".join([*map(text.add, row.prompt), text.finish()])
        found = [TokenLogprob(self._text(row.prompt[0]), None, [], 0)]
        tokens = row.prompt[1:]
        if tokens:
            own = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None]).squeeze(1).tolist()
            top = _top(logprobs, row.top_count or 0)
            for token, value, others, start in zip(tokens, own, top, text.starts[1:], strict=True):
                found.append(TokenLogprob(self._text(token), _number(value), self._named(others), start))
        return whole, found

    def _text(self, token: int) -> str:
        text: str = self.tokenizer.decode([token])
        return text

    def _named(self, found: Sequence[tuple[int, float]]) -> list[tuple[str, float]]:
        return [(self._text(token), _number(value)) for token, value in found]


def _top(logprobs: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """The `count` most likely tokens of each row, with their log probabilities."""
    values, tokens = logprobs.topk(min(count, logprobs.shape[-1]), -1)
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return [list(zip(ids, numbers, strict=True)) for ids, numbers in pairs]


def _number(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)
