"""The bodies of OpenAI's requests for completions: which fields they have, and which values can be served."""

# Annotations are not postponed in this file: FastAPI reads the types of a request from them.
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lit_peft.util.type_checks import brief

# The number of new tokens of a text completion that asks for none, as in OpenAI's API.
_COMPLETION_TOKENS = 16
_MAX_STOPS, _MAX_LOGPROBS = 16, 20
# Fields that do not change an answer.
_NOTES = ("user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# Fields that the server cannot follow, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0,)),
    **dict.fromkeys(("tools", "functions"), ([],)),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


class StreamOptions(BaseModel):
    """What a stream has beside its text.

    Args:
        include_usage: whether a last chunk has the numbers of tokens.
    """

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class OpenAIRequest(BaseModel):
    """The fields that chat and text completions share.

    Args:
        model: the name of an adapter, or the base as in `--base`.
        temperature: divides the logits before a token is sampled; 0 always takes the most likely token.
        top_p: sample from the most likely tokens whose probabilities add up to this.
        n: the number of answers for each prompt.
        seed: makes sampling repeatable; answer number i of a request uses `seed + i`.
        stop: the texts at which an answer ends. They are not part of it.
        stream: whether to send the answer while it is generated.
        stream_options: what else to send.
    """

    # An ignored field would give another answer than the one that was asked for.
    model_config = ConfigDict(extra="forbid")

    model: str
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**62), le=2**62)
    stop: list[str] | None = Field(default=None, max_length=_MAX_STOPS)
    max_tokens: int | None = Field(default=None, ge=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: Any) -> Any:
        """Remove fields that ask for nothing; refuse those that cannot be served."""
        if not isinstance(body, dict):
            return body
        kept = {name: value for name, value in body.items() if name not in _NOTES}
        for name in _NEUTRAL.keys() & kept.keys():
            value = kept.pop(name)
            if value is not None and value not in _NEUTRAL[name]:
                raise ValueError(f"{name}={brief(value)} is not supported by this server; leave it out")
        return kept

    @field_validator("stop", mode="before")
    @classmethod
    def _list_stops(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list) and "" in stops:
            raise ValueError("a stop text must not be empty")
        return stops

    @property
    def choices(self) -> int:
        """The number of answers for each prompt."""
        return self.n or 1

    @property
    def prompts(self) -> list[Any]:
        """The prompts: texts, lists of token ids, or one list of messages."""
        raise NotImplementedError

    @property
    def new_tokens(self) -> int | None:
        """The maximum number of tokens to generate, if the request gives it."""
        return self.max_tokens

    @property
    def default_new_tokens(self) -> int | None:
        """The same for a request that does not; None: as many as fit."""
        return None

    @property
    def top_logprobs_count(self) -> int | None:
        """How many alternatives to give for each token; None for no log probabilities."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        """Whether an answer begins with its prompt."""
        return False


class CompletionRequest(OpenAIRequest):
    """The body of a request for text completions.

    Args:
        prompt: a text, a list of texts, token ids, or a list of lists of token ids.
        max_tokens: the maximum number of tokens to generate; 16 when unset.
        logprobs: how many of the most likely tokens to give for each token of the answer.
        echo: whether the answer begins with the prompt.
    """

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 needs echo=true: without it there is nothing to answer")
        return self

    @property
    def prompts(self) -> list[Any]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)

    @property
    def default_new_tokens(self) -> int:
        return _COMPLETION_TOKENS

    @property
    def top_logprobs_count(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)


class TextPart(BaseModel):
    """A part of a message.

    Args:
        type: `text`, the only kind that the server reads.
        text: the text.
    """

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation.

    Args:
        role: `system`, `user`, `assistant`, or another role that the chat template knows.
        content: the text, or its parts.
        name: who wrote it, for templates that use it.
    """

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, message: Any) -> Any:
        """Remove fields without a value, which clients send back with an answer."""
        if not isinstance(message, dict):
            return message
        return {name: value for name, value in message.items() if value is not None and value != []}

    def rendered(self) -> dict[str, str]:
        """Return the message for the chat template."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **named}


class ChatRequest(OpenAIRequest):
    """The body of a request for chat completions.

    Args:
        messages: the conversation.
        max_tokens: the maximum number of tokens to generate; as many as fit when unset.
        max_completion_tokens: the newer name of `max_tokens`.
        logprobs: whether to give the log probability of each token of the answer.
        top_logprobs: how many of the most likely tokens to give for each token.
    """

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def prompts(self) -> list[Any]:
        return [self.messages]

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_logprobs_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
