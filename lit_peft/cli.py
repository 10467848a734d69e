"""The `lit-peft` command. Large packages are imported only when a command needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lit_peft.util.errors import LitPeftError, causes, closest, printable
from lit_peft.util.quiet import quiet_libraries
from lit_peft.util.write_errors import write_error

DEBUG_VARIABLE = "LIT_PEFT_DEBUG"

_COMMANDS = {
    "fit": "train a method on a base model and data",
    "validate": "compute the metrics on the validation data",
    "test": "compute the metrics on the test data",
    "predict": "write predictions for the rows of a file as JSON lines",
    "data": "show examples with what is learned marked, and the figures of each split",
    "export": "write an adapter's folder from a training checkpoint",
    "merge": "merge a LoRA into its base and write a transformers folder",
    "info": "show what is in an adapter's folder or a checkpoint",
    "generate": "generate text with a base and adapters",
    "serve": "answer prompts over HTTP, each with the adapter that it names",
    "push": "upload an adapter's folder to the hub",
    "pull": "download an adapter from the hub",
    "compare": "compare the methods on one base and data set",
    "doctor": "show what is installed, what works, and what fits in memory",
    "init": "write a commented configuration to start from",
}
# Commands with a module of their own in `lit_peft.commands`; the others belong to LightningCLI.
_OWN = {"data", "export", "merge", "info", "generate", "serve", "push", "pull", "compare", "doctor", "init"}
_EXAMPLES = """\
examples:
  lit-peft fit --config configs/quickstart.yaml
  lit-peft fit --model LoRA --model.base BASE --data CausalLMData --data.train FILE --trainer.max_steps 100
  lit-peft fit --model LoRA --print_config           every setting with its meaning, as YAML
  lit-peft fit --model.help LoRA                     the settings of a method
  lit-peft compare --config configs/compare.yaml     all methods on one task, as a table and plots
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; `sys.argv` when None.

    Returns:
        The exit status: 0; 2 for wrong input, and 1 for what the operating system refuses, which are reported on stderr
        in one paragraph (with the traceback only by `--debug` or `LIT_PEFT_DEBUG=1`); 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in arguments:
        arguments.remove("--debug")
        os.environ[DEBUG_VARIABLE] = "1"
    quiet_libraries()
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
                f"{arguments[0]!r} is not a lit-peft command: the closest are {closest(arguments[0], _COMMANDS)}."
            )
        if arguments[0] in _OWN:
            import_module(f"lit_peft.commands.{arguments[0]}").run(arguments[1:])
            return 0
        from lit_peft.commands.lightning_cli import run

        run(arguments)
    except BrokenPipeError:
        # Whoever reads the output, e.g. `head`, has enough. Python would complain when it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as problem:
        wrong_input = _wrong_input(problem)
        # A disk that is full, a folder that may not be written, a file that may not be read.
        refused = write_error(problem) or (str(problem) if isinstance(problem, OSError) else None)
        if (wrong_input is None and refused is None) or os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"lit-peft: error: {wrong_input or printable(str(refused))}", file=sys.stderr)
        return 2 if wrong_input else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _wrong_input(problem: Exception) -> str | None:
    """Return what is wrong with the input; None if that is not the reason of the error."""
    if not isinstance(problem, ValueError):
        return None
    # jsonargparse wraps errors that a class raises in its __init__.
    ours = next((cause for cause in causes(problem) if isinstance(cause, LitPeftError)), None)
    missing = next((cause for cause in causes(problem) if isinstance(cause, ModuleNotFoundError)), None)
    if ours is None and missing is not None:
        # A logger, callback or plugin that the configuration names.
        return f"A class in the configuration needs a package that is not installed: {missing}"
    return None if ours is None else str(ours)


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in _COMMANDS.items())
    return (
        "usage: lit-peft COMMAND [options]        (lit-peft COMMAND --help lists them)\n\n"
        "Parameter-efficient fine-tuning of language models.\n\n"
        f"commands:\n{commands}\n\n{_EXAMPLES}\n"
        "options of every command:\n"
        "  --debug    show the traceback of an error (as LIT_PEFT_DEBUG=1 does)\n"
        "  --version  print the version"
    )
