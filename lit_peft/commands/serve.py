"""`lit-peft serve`: serves a base with several adapters over HTTP."""

from __future__ import annotations

from importlib.util import find_spec

from lit_peft.commands.options import Options, adapter_folders
from lit_peft.util.errors import LitPeftError


def run(arguments: list[str]) -> None:
    """Serve until interrupted.

    Raises:
        LitPeftError: the input is wrong, or the extra `serve` is not installed.
    """
    parser = Options("lit-peft serve", description="Serve OpenAI's API over HTTP; each request names its adapter.")
    parser.takes_base()
    parser.add_argument("--adapter", action="append", default=[], help="[NAME=]FOLDER; repeat for several adapters")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument(
        "--accelerator", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="device to run on"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="maximum number of generated tokens")
    parser.add_argument(
        "--max_prompt_tokens",
        type=int,
        default=4096,
        help="maximum number of tokens of a prompt; longer ones are refused",
    )
    parser.add_argument("--max_batch_size", type=int, default=8, help="maximum number of requests in a batch")
    parser.add_argument("--batch_timeout", type=float, default=0.02, help="seconds to wait for more requests")
    parser.add_argument("--timeout", type=float, default=120, help="seconds until a request is abandoned")
    options = vars(parser.parse_args(arguments))
    if not options["timeout"] > 0:
        raise LitPeftError(f"--timeout {options['timeout']}: give a positive number of seconds.")
    if not 0 < options["port"] < 2**16:
        raise LitPeftError(f"--port {options['port']}: give a number from 1 to 65535.")
    if find_spec("litserve") is None:
        raise LitPeftError("`lit-peft serve` needs LitServe: run `pip install 'lit-peft[serve]'`.")

    from lit_peft.models.sources import resolve_base
    from lit_peft.serving import AdapterAPI, make_server

    resolve_base(options["base"])
    host, port, accelerator, timeout = (options.pop(name) for name in ("host", "port", "accelerator", "timeout"))
    api = AdapterAPI(adapters=adapter_folders(options.pop("adapter")), **options)
    server = make_server(api, accelerator=accelerator, devices=1, timeout=timeout)
    try:
        server.run(host=host, port=port, num_api_servers=1, generate_client_file=False)
    except RuntimeError as problem:  # LitServe raises it when the process of the model could not start
        raise LitPeftError(f"The server did not start; the reason is in the log above ({problem}).") from problem
