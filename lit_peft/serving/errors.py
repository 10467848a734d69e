"""Errors over HTTP: one sentence, as an object of OpenAI's API under `/v1/`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastapi.responses import Response
from pydantic import BaseModel

from lit_peft.serving.generate_request import Request
from lit_peft.serving.openai_requests import ChatRequest, CompletionRequest
from lit_peft.util.type_checks import brief

OPENAI_PATH = "/v1/"
COMPLETIONS, CHAT_COMPLETIONS, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"
_OPENAI_FORMS: dict[str, type[BaseModel]] = {COMPLETIONS: CompletionRequest, CHAT_COMPLETIONS: ChatRequest}
# Codes that clients of OpenAI's API test for.
TOO_LONG, UNKNOWN_MODEL = "context_length_exceeded", "model_not_found"


@dataclass
class Refusal(Exception):
    """Why a request in OpenAI's form is not answered.

    Args:
        message: one sentence.
        status: the HTTP status.
        param: the field that is wrong.
        code: a code that clients know.
    """

    message: str
    status: int = 400
    param: str | None = None
    code: str | None = None

    def body(self) -> dict[str, Any]:
        """Return the error object of OpenAI's API."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the answer."""
        return Response(json.dumps(self.body()), self.status, media_type="application/json")


def json_response(status: int, error: str) -> Response:
    """Return an answer with an error. Its JSON is ASCII, so that it can quote any string."""
    return Response(json.dumps({"error": error}), status, media_type="application/json")


def error_response(path: str, status: int, error: str) -> Response:
    """Return an answer with an error, in the form of its path.

    Args:
        path: the path of the request.
        status: the HTTP status.
        error: one sentence.
    """
    return Refusal(error, status).response() if path.startswith(OPENAI_PATH) else json_response(status, error)


def answer_invalid(request: Any, problem: Any) -> Response:
    """Answer a body that is no valid request with the first thing that is wrong."""
    path = request.url.path
    first = problem.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    kind = first["type"]
    if kind == "extra_forbidden":
        fields = _OPENAI_FORMS.get(path, Request).model_fields
        known = f": a request has {', '.join(fields)}" if field.count(".") == 0 else ""
        text = f"There is no field {brief(field)}{known}."
    elif kind == "json_invalid":
        text = f"The body is not valid JSON: {first['ctx']['error']} at character {field}."
    elif kind == "missing":
        text = f"{field or 'The body'} is missing."
    elif kind == "string_unicode":
        text = f"{field or 'A name'} is not valid Unicode: it has half of a surrogate pair."
    elif kind == "value_error":
        text = f"{first['ctx']['error']}."
    elif path == COMPLETIONS and field.startswith("prompt."):
        text = f"prompt={brief(problem.body['prompt'])}: give a text, token ids, or a list of texts or of token ids."
    else:
        text = f"{field or 'body'}={brief(first['input'])}: {first['msg']}."
    if path.startswith(OPENAI_PATH):
        param = None if kind == "json_invalid" else field.partition(".")[0] or None
        return Refusal(text, param=param).response()
    return json_response(422, text)


def answer_http_error(request: Any, problem: Any) -> Response:
    """Answer errors of LitServe and FastAPI in the form of all others."""
    return error_response(request.url.path, problem.status_code, str(problem.detail))
