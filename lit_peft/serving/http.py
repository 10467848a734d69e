"""The HTTP side of the server: it refuses large bodies and answers every error in the form of its path."""

# Annotations are not postponed in this file: LitServe and FastAPI read the types of a request from them.
from typing import Any

import litserve
from fastapi.exceptions import RequestValidationError
from litserve.callbacks import CallbackRunner
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_peft.serving.api import AdapterAPI
from lit_peft.serving.errors import answer_http_error, answer_invalid, error_response

# JSON may write a character with 12 bytes (two `\uXXXX`); the rest of a request is short.
_BYTES_PER_CHARACTER, _OTHER_BYTES = 12, 64 * 1024


def make_server(api: AdapterAPI, **settings: Any) -> litserve.LitServer:
    """Return a server that refuses large bodies before it parses them and answers every error with one sentence.

    Args:
        api: what to serve.
        **settings: arguments of `litserve.LitServer`.

    Returns:
        The server; `run` starts it.
    """
    most = _BYTES_PER_CHARACTER * api.max_prompt_characters + _OTHER_BYTES
    # LitServe leaves compression out where an answer may be streamed; this one leaves streams as they are.
    own = [(BodyLimit, {"max_bytes": most}), (GZipMiddleware, {"minimum_size": 1000})]
    server = litserve.LitServer(api, middlewares=[*settings.pop("middlewares", ()), *own], **settings)
    api.spec.callbacks = CallbackRunner(settings.get("callbacks"))
    server.app.add_exception_handler(RequestValidationError, answer_invalid)
    server.app.add_exception_handler(HTTPException, answer_http_error)
    return server


class BodyLimit:
    """ASGI middleware that reads the body of a request and answers 413 if it is larger than `max_bytes`.

    Args:
        app: the application behind it.
        max_bytes: the maximum size of a body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return None
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            chunks.append(message.get("body", b""))
            if size > self.max_bytes:
                # The rest is read and dropped: many clients read no answer while they are sending.
                chunks.clear()
                if size > 64 * self.max_bytes:
                    break
        if size > self.max_bytes:
            answer = error_response(scope["path"], 413, f"The request is larger than {self.max_bytes} bytes.")
            return await answer(scope, receive, send)
        body: Message | None = {"type": "http.request", "body": b"".join(chunks), "more_body": False}

        async def replay() -> Message:
            nonlocal body
            message, body = body, None
            return await receive() if message is None else message

        return await self.app(scope, replay, send)
