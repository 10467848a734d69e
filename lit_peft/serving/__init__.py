"""A server for a base model and its adapters, built on LitServe. One forward pass serves several adapters.

Needs the extra `serve`. `lit-peft serve` starts the server; `make_server` and `AdapterAPI` are for servers of your own.
"""

from lit_peft.serving.api import AdapterAPI
from lit_peft.serving.errors import json_response
from lit_peft.serving.generate_request import Request
from lit_peft.serving.http import BodyLimit, make_server

__all__ = ["AdapterAPI", "BodyLimit", "Request", "json_response", "make_server"]
