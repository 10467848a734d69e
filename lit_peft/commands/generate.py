"""`lit-peft generate`: generates text from a prompt and prints it as it is generated."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lit_peft.commands.conversation import Conversation, encode_messages
from lit_peft.commands.options import Options, adapter_folders, check_counts, check_generates, load_base_from_options
from lit_peft.models.generation import check_generation
from lit_peft.util.errors import LitPeftError, closest
from lit_peft.util.type_checks import brief


def run(arguments: list[str]) -> None:
    """Generate text from one prompt, interactively on a terminal, or in a conversation.

    Raises:
        LitPeftError: the input is wrong.
    """
    parser = Options("lit-peft generate", description="Generate text, with one of several adapters.")
    parser.takes_base()
    parser.add_argument("--adapter", action="append", default=[], help="[NAME=]FOLDER; repeat for several adapters")
    parser.add_argument("--use", default=None, help="name of the adapter to use; the first one when unset")
    parser.add_argument(
        "--prompt", default=None, help="the prompt; read from standard input, or asked for on a terminal, when unset"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="apply the tokenizer's chat template; without --prompt, a conversation with one line for each message",
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="maximum number of generated tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the most likely token")
    parser.add_argument(
        "--top_p", type=float, help="sample from the most likely tokens whose probabilities add up to this"
    )
    parser.add_argument("--top_k", type=int, help="sample from this many of the most likely tokens; 0 for all")
    options = parser.parse_args(arguments)
    check_counts(options, "max_new_tokens")
    if not 0 <= options.temperature < math.inf:
        raise LitPeftError(
            f"--temperature {options.temperature}: give 0 to always take the most likely token, or a positive number."
        )
    given = {name: value for name in ("top_p", "top_k") if (value := getattr(options, name)) is not None}
    options.sampling = {"do_sample": False}
    if options.temperature:
        options.sampling = {"do_sample": True, "temperature": options.temperature, **given}
        check_generation(options.sampling, "The command line")
    elif given:
        raise LitPeftError(f"--{next(iter(given))} has no effect without sampling: add --temperature, e.g. 0.7.")
    folders = adapter_folders(options.adapter)
    if options.use is not None and options.use not in folders:
        known = f"the closest are {closest(options.use, folders)}" if folders else "none is given with --adapter"
        raise LitPeftError(f"--use {options.use} is not the name of an adapter: {known}.")

    from lit_peft.formats.folder import load_adapter
    from lit_peft.methods.adapters import set_adapter
    from lit_peft.models.tokenization import adapter_tokenizer

    tokenizer = adapter_tokenizer(folders.values(), options.base, "--base", options.revision)
    if options.chat and not getattr(tokenizer, "chat_template", None):
        raise LitPeftError(
            f"--chat: the tokenizer of {options.base!r} has no chat template; leave --chat out, or use an "
            "instruction-tuned version of the model."
        )
    asks = options.prompt is None and (options.chat or sys.stdin.isatty())
    if not asks:
        inputs = _encoded(tokenizer, sys.stdin.read() if options.prompt is None else options.prompt, options.chat)

    model = load_base_from_options(options)
    check_generates(model)
    for name, folder in folders.items():
        load_adapter(model, folder, check_base=not options.force, name=name)
    if folders:
        set_adapter(model, options.use if options.use is not None else next(iter(folders)))
    if not asks:
        _answer(model, tokenizer, inputs, options)
        return
    if sys.stdin.isatty():
        forgets = " /new begins a new conversation," if options.chat else ""
        names = ", ".join(folders) or "none"
        print(f"adapters: {names}. /use NAME switches, /base uses none,{forgets} an empty line quits.")
    chat = Conversation(
        tokenizer,
        lambda inputs: _answer(model, tokenizer, inputs, options),
        lambda: _longest_prompt(model, options.max_new_tokens),
    )
    for text in _lines():
        try:
            if text == "/base":
                set_adapter(model, None)
            elif text.startswith("/use "):
                set_adapter(model, text.removeprefix("/use ").strip())
            elif options.chat and text == "/new":
                chat.messages.clear()
            elif not options.chat:
                _answer(model, tokenizer, _encoded(tokenizer, text, False), options)
            elif (note := chat.say(text)) is not None:
                print(note, file=sys.stderr)
        except LitPeftError as problem:
            print(problem)


def _longest_prompt(model: Any, new_tokens: int) -> int | None:
    """The maximum number of tokens of a prompt with the adapter that is set; None if there is no limit."""
    from lit_peft.methods.adapters import active_adapter
    from lit_peft.methods.prompt_room import prompt_room

    name = active_adapter(model)
    return prompt_room(model, name if isinstance(name, str) else None).longest_prompt(new_tokens)


def _lines() -> Iterator[str]:
    """Read lines up to the end of the input. On a terminal, an empty one ends it; in a file, it is left out."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return
        if text:
            yield text
        elif sys.stdin.isatty():
            return


def _encoded(tokenizer: Any, prompt: str, chat: bool) -> Mapping[str, Any]:
    """Tokenize a prompt into tensors of shape [1, length].

    Raises:
        LitPeftError: the prompt has no tokens.
    """
    if not prompt.strip():
        raise LitPeftError("The prompt is empty: give a text with --prompt or on standard input.")
    if chat:
        inputs = encode_messages(tokenizer, [{"role": "user", "content": prompt}])
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[1]:
        raise LitPeftError(f"The prompt {brief(prompt)} has no tokens: use a text that the tokenizer knows.")
    return {name: value for name, value in inputs.items() if name != "token_type_ids"}


def _answer(model: Any, tokenizer: Any, inputs: Mapping[str, Any], options: Any) -> str:
    """Generate an answer, print it while it is generated, and return it."""
    import torch
    from transformers import TextStreamer

    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        out = model.generate(
            **inputs,
            **options.sampling,
            max_new_tokens=options.max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id,
        )
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    text: str = tokenizer.decode(out[0, start:], skip_special_tokens=True)
    return text
