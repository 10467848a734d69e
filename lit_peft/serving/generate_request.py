"""The body of a request for `/generate`."""

from pydantic import BaseModel, ConfigDict, Field


class Request(BaseModel):
    """The body of a request.

    Args:
        prompt: the text to continue.
        adapter: the name of the adapter to use; None for the base model alone.
        max_new_tokens: the maximum number of tokens to generate; None for the server's own limit, which also applies
            to larger numbers.
    """

    # With a misspelled field, the base model would answer instead of the adapter.
    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)
    adapter: str | None = None
    max_new_tokens: int | None = Field(default=None, gt=0)
