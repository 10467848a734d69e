"""`lit-peft generate`: a prompt in, streamed text out."""

from __future__ import annotations

import sys
from typing import Any

from lit_peft.commands.options import Options, load_base
from lit_peft.errors import LitPeftError


def run(arguments: list[str]) -> None:
    """Generate text from prompts, one after the other on a terminal.

    Raises:
        LitPeftError: bad input.
    """
    parser = Options("lit-peft generate", description="Generate text, with one of several adapters.")
    parser.takes_base()
    parser.add_argument("--adapter", action="append", default=[], help="[NAME=]FOLDER; repeat for several adapters")
    parser.add_argument("--use", default=None, help="name of the adapter to use; the first one when unset")
    parser.add_argument("--prompt", default=None, help="the prompt; standard input, or asked for on a terminal")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    options = parser.parse_args(arguments)

    from lit_peft.data.tokenization import load_tokenizer
    from lit_peft.formats.folder import load_adapter
    from lit_peft.methods.adapters import adapter_names, set_adapter

    model, tokenizer = load_base(options), load_tokenizer(options.base, "--base")
    for number, given in enumerate(options.adapter):
        name, _, folder = given.rpartition("=")
        load_adapter(model, folder, check_base=not options.force, name=name or f"adapter{number}")
    names = adapter_names(model)
    if names or options.use is not None:
        set_adapter(model, options.use if options.use is not None else names[0])
    if options.prompt is not None:
        _answer(model, tokenizer, options.prompt, options)
    elif not sys.stdin.isatty():
        _answer(model, tokenizer, sys.stdin.read(), options)
    else:
        print(f"adapters: {', '.join(names) or 'none'}. /use NAME switches, /base uses none, an empty line ends.")
        while text := input("> ").strip():
            try:
                if text == "/base":
                    set_adapter(model, None)
                elif text.startswith("/use "):
                    set_adapter(model, text.removeprefix("/use ").strip())
                else:
                    _answer(model, tokenizer, text, options)
            except LitPeftError as problem:
                print(problem)


def _answer(model: Any, tokenizer: Any, prompt: str, options: Any) -> None:
    import torch
    from transformers import TextStreamer

    if options.chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: value.to(model.device) for name, value in inputs.items() if name != "token_type_ids"}
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature > 0 else {}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        model.generate(
            **inputs,
            **({"do_sample": False} | sampling),
            max_new_tokens=options.max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id,
        )
