"""The paths of the server: `/generate`, and OpenAI's under `/v1/`."""

# Annotations are not postponed in this file: FastAPI reads the types of a request from them.
import asyncio
import inspect
import json
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import HTTPException
from fastapi.responses import Response, StreamingResponse
from litserve.callbacks import CallbackRunner, EventTypes
from litserve.specs.base import LitSpec
from litserve.utils import ResponseBufferItem

from lit_peft.serving.errors import CHAT_COMPLETIONS, COMPLETIONS, MODELS, UNKNOWN_MODEL, Refusal
from lit_peft.serving.openai_answers import ChatForm, CompletionForm, Form, usage_of
from lit_peft.serving.openai_requests import ChatRequest, CompletionRequest, OpenAIRequest
from lit_peft.util.errors import closest
from lit_peft.util.type_checks import brief


class Endpoints(LitSpec):
    """Takes the requests of all paths to the one model.

    LitServe's own `OpenAISpec` has chat completions only, without log probabilities, reasons why an answer ends or
    errors in OpenAI's form.

    Args:
        generate_path: the path of the server's own requests.

    Attributes:
        callbacks: LitServe's callbacks, told of each request and answer.
    """

    def __init__(self, generate_path: str) -> None:
        super().__init__()
        self.api_path = generate_path
        self.callbacks = CallbackRunner(None)
        self.models: list[str] = []
        self.started = int(time.time())

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the process of the model does not need and cannot get."""
        return {**super().__getstate__(), "_endpoints": [], "response_buffer": None, "data_streamer": None}

    @property
    def stream(self) -> bool:
        return True

    def pre_setup(self, lit_api: Any) -> None:
        """Add the paths. LitServe calls this with the `AdapterAPI`."""
        self.models = [lit_api.options.base, *lit_api.adapters]
        kind = inspect.signature(lit_api.decode_request).parameters["request"].annotation

        async def generate(request: kind) -> Any:  # type: ignore[valid-type]
            return await self._generate(request)

        self.add_endpoint(self.api_path, generate, ["POST"])
        self.add_endpoint(COMPLETIONS, self.completions, ["POST"])
        self.add_endpoint(CHAT_COMPLETIONS, self.chat_completions, ["POST"])
        self.add_endpoint(MODELS, self.list_models, ["GET"])
        # A base may be a path.
        self.add_endpoint(MODELS + "/{model:path}", self.find_model, ["GET"])

    def decode_request(self, request: Any, context_kwargs: Any = None) -> Any:
        return request

    def encode_response(self, output: Any, context_kwargs: Any = None) -> Any:
        return output

    async def completions(self, request: CompletionRequest) -> Response:
        """Answer a request for text completions."""
        return await self._answer(request, CompletionForm(request.model))

    async def chat_completions(self, request: ChatRequest) -> Response:
        """Answer a request for chat completions."""
        return await self._answer(request, ChatForm(request.model))

    async def list_models(self) -> dict[str, Any]:
        """List the base and the adapters."""
        return {"object": "list", "data": [self._model(name) for name in self.models]}

    async def find_model(self, model: str) -> Any:
        """Describe one of them."""
        return self._model(model) if model in self.models else self._unknown_model(model).response()

    def _model(self, name: str) -> dict[str, Any]:
        base = self.models[0]
        described = {"id": name, "object": "model", "created": self.started, "owned_by": "lit-peft"}
        return described if name == base else {**described, "parent": base}

    def _unknown_model(self, name: str) -> Refusal:
        text = f"There is no model {brief(name)}: the closest are {closest(name[:100], self.models)}."
        return Refusal(text, 404, "model", UNKNOWN_MODEL)

    async def _generate(self, request: Any) -> Any:
        async with aclosing(self._messages(request)) as messages:
            answer = await anext(messages)
        if isinstance(answer, Refusal):
            raise HTTPException(answer.status, answer.message)
        return answer

    async def _answer(self, request: OpenAIRequest, form: Form) -> Response:
        if request.model not in self.models:
            return self._unknown_model(request.model).response()
        messages = self._messages(request)
        # A refusal has a status of its own, so it must come before a stream begins.
        first = await anext(messages)
        if isinstance(first, Refusal):
            await messages.aclose()
            return first.response()
        if request.stream:
            return StreamingResponse(self._events(request, form, first, messages), media_type="text/event-stream")
        parts = [first]
        async with aclosing(messages):
            async for message in messages:
                if isinstance(message, Refusal):
                    return message.response()
                parts.append(message)
        return Response(json.dumps(form.whole(parts[:-1], parts[-1])), media_type="application/json")

    async def _events(self, request: OpenAIRequest, form: Form, first: Any, messages: Any) -> AsyncIterator[str]:
        """The events of a stream."""
        with_usage = request.stream_options is not None and request.stream_options.include_usage
        async with aclosing(messages):
            for chunk in form.opening(range(request.choices * len(request.prompts))):
                yield _event(chunk)
            message = first
            while not isinstance(message, Refusal):
                if form.is_last(message):
                    if with_usage:
                        yield _event({**form.chunk([]), "usage": usage_of(message)})
                    yield "data: [DONE]\n\n"
                    return
                yield _event(form.chunk([form.delta(message)]))
                message = await anext(messages)
            yield _event(message.body())

    async def _messages(self, request: Any) -> Any:
        """Send a request to the process of the model and return its messages."""
        server = self._server
        self.callbacks.trigger_event(
            EventTypes.ON_REQUEST.value, active_requests=server.active_requests, litserver=server
        )
        uid, event, messages = str(uuid.uuid4()), asyncio.Event(), deque[Any]()
        self.response_buffer[uid] = ResponseBufferItem(event=event, response_queue=messages)
        self.request_queue.put((self.response_queue_id, uid, time.monotonic(), request))
        try:
            async for message, _ in self.data_streamer(messages, event, send_status=True):
                yield message
                if isinstance(message, Refusal) or Form.is_last(message):
                    break
            self.callbacks.trigger_event(EventTypes.ON_RESPONSE.value, litserver=server)
        finally:
            self.response_buffer.pop(uid, None)


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"
