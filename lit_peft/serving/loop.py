"""The loop of the process that runs the model: it takes requests in batches and answers each of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastapi import HTTPException
from litserve.callbacks import EventTypes
from litserve.loops import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from lit_peft.serving.errors import Refusal
from lit_peft.serving.openai_requests import OpenAIRequest

_LATE = "The request waited for too long."
logger = logging.getLogger("lit_peft.serving")


class ServingLoop(LitLoop):
    """Answers prompts with one message each, and requests in OpenAI's form with as many as their streams have."""

    def __call__(
        self,
        lit_api: Any,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: dict[int, str],
        callback_runner: Any,
    ) -> None:
        """Answer requests until the process is stopped. LitServe calls this."""
        try:
            while True:
                self._answer_batch(lit_api, request_queue, transport, callback_runner)
        except KeyboardInterrupt:
            self.kill()

    def _answer_batch(self, api: Any, request_queue: Any, transport: Any, callback_runner: Any) -> None:
        batch, late = self.get_batch_requests(api, request_queue, transport)
        for consumer, uid in late:
            self._send(transport, consumer, uid, Refusal(_LATE, 504))
        if not batch:
            if not api.batch_timeout:
                time.sleep(0.001)  # LitServe waits for requests only as long as the timeout
            return
        asked = [(request, partial(self._send, transport, consumer, uid)) for consumer, uid, request in batch]
        prompts = [each for each in asked if not isinstance(each[0], OpenAIRequest)]
        requests = [each for each in asked if isinstance(each[0], OpenAIRequest)]

        def notify(event: EventTypes) -> None:
            callback_runner.trigger_event(event.value, lit_api=api)

        if prompts:
            _guard(prompts, lambda: _answer_prompts(api, prompts, notify))
        if requests:
            notify(EventTypes.BEFORE_PREDICT)
            _guard(requests, lambda: api.complete(requests))
            notify(EventTypes.AFTER_PREDICT)

    def _send(self, transport: Any, consumer: int, uid: str, message: Any) -> None:
        self.put_response(transport, consumer, uid, message, LitAPIStatus.OK, LoopResponseType.STREAMING)


def _answer_prompts(api: Any, asked: Sequence[tuple[Any, Callable[[Any], None]]], notify: Any) -> None:
    """Call the methods of a `LitAPI` in LitServe's order."""
    notify(EventTypes.BEFORE_DECODE_REQUEST)
    inputs = [api.decode_request(request) for request, _ in asked]
    notify(EventTypes.AFTER_DECODE_REQUEST)
    inputs = api.batch(inputs)
    notify(EventTypes.BEFORE_PREDICT)
    outputs = api.predict(inputs)
    notify(EventTypes.AFTER_PREDICT)
    outputs = api.unbatch(outputs)
    notify(EventTypes.BEFORE_ENCODE_RESPONSE)
    answers = [api.encode_response(output) for output in outputs]
    notify(EventTypes.AFTER_ENCODE_RESPONSE)
    for (_, reply), answer in zip(asked, answers, strict=True):
        reply(answer)


def _guard(asked: Sequence[tuple[Any, Callable[[Any], None]]], answer: Callable[[], None]) -> None:
    """Answer requests; if that fails, each of them gets the error."""
    try:
        answer()
    except HTTPException as problem:  # of a server of one's own
        refusal = Refusal(str(problem.detail), problem.status_code)
    except Exception:
        logger.exception("A batch of %d requests failed.", len(asked))
        refusal = Refusal("The server failed; its log has the reason.", 500)
    else:
        return
    for _, reply in asked:
        reply(refusal)
