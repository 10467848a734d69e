"""The `lit-peft` command. Heavy packages are imported only when a command needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lit_peft.util.errors import LitPeftError, causes, closest

DEBUG_VARIABLE = "LIT_PEFT_DEBUG"

_COMMANDS = {
    "fit": "train a method on a base model and data",
    "validate": "compute the metrics on the validation data",
    "test": "compute the metrics on the test data",
    "predict": "write predictions for the rows of a file as JSON lines",
    "export": "write an adapter's folder from a training checkpoint",
    "merge": "merge a LoRA into its base: a plain transformers folder",
    "info": "show what is in an adapter's folder or a checkpoint",
    "generate": "generate text with a base and adapters",
    "serve": "answer prompts over HTTP, each by the adapter that it names",
    "push": "upload an adapter's folder to the hub",
    "pull": "download an adapter from the hub",
    "compare": "run every method on one base and data, and report which to use",
    "doctor": "show what is installed, what works, and what fits in memory",
    "init": "write a commented configuration to start from",
}
# Those that are no part of Lightning's command line: a module of `lit_peft.commands` each.
_OWN = {"export", "merge", "info", "generate", "serve", "push", "pull", "compare", "doctor", "init"}
_EXAMPLES = """\
examples:
  lit-peft fit --config configs/quickstart.yaml
  lit-peft fit --model LoRA --model.base BASE --data CausalLMData --data.train FILE --trainer.max_steps 100
  lit-peft fit --model LoRA --print_config           every setting with its meaning, as YAML
  lit-peft fit --model.help LoRA                     the settings of a method
  lit-peft compare --config configs/compare.yaml     all methods on the same task, as a table and plots
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; those of the process when None.

    Returns:
        The exit status: 0, 2 on bad input (one paragraph on stderr; the traceback only with `--debug` or
        `LIT_PEFT_DEBUG=1`), 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in arguments:
        arguments.remove("--debug")
        os.environ[DEBUG_VARIABLE] = "1"
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_usage())
            return 0
        if arguments[0] == "--version":
            import lit_peft

            print(f"lit-peft {lit_peft.__version__}")
            return 0
        if arguments[0] not in _COMMANDS:
            raise LitPeftError(
                f"{arguments[0]!r} is not a command of lit-peft: the closest are {closest(arguments[0], _COMMANDS)}."
            )
        if arguments[0] in _OWN:
            import_module(f"lit_peft.commands.{arguments[0]}").run(arguments[1:])
            return 0
        from lit_peft.commands.lightning_cli import run

        run(arguments)
    except ValueError as problem:
        # jsonargparse wraps what a class raises while it is built.
        ours = next((cause for cause in causes(problem) if isinstance(cause, LitPeftError)), None)
        if ours is None or os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"lit-peft: error: {ours}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in _COMMANDS.items())
    return (
        "usage: lit-peft COMMAND [options]        (lit-peft COMMAND --help lists them)\n\n"
        "Parameter-efficient fine-tuning of language models.\n\n"
        f"commands:\n{commands}\n\n{_EXAMPLES}\n"
        "options of every command:\n"
        "  --debug    show the whole traceback of an error (so does LIT_PEFT_DEBUG=1)\n"
        "  --version  print the version"
    )
