"""`lit-peft doctor`: what is installed, what works, and what fits in memory."""

from __future__ import annotations

import contextlib
import platform
from importlib import import_module, metadata
from pathlib import Path

from lit_peft.commands.options import Options, check_counts
from lit_peft.methods.registry import METHODS
from lit_peft.util.errors import LitPeftError, closest, first_line

# Purpose and installation command of each optional package.
_OPTIONAL = {
    "matplotlib": ("plots of compare", "pip install 'lit-peft[plots]'"),
    "peft": ("tests that compare with it", "pip install peft"),
    "bitsandbytes": ("4 and 8 bit bases, 8 bit optimizers", "pip install 'lit-peft[quantization]'"),
    "torchao": ("quantized bases", "pip install 'lit-peft[quantization]'"),
    "gguf": ("bases in .gguf files", "pip install 'lit-peft[demo]'"),
    "flash_attn": ("attn_implementation: flash_attention_2", "pip install flash-attn --no-build-isolation"),
    "deepspeed": ("the trainer's strategy deepspeed", "pip install deepspeed"),
}
_REQUIRED = ("lit-peft", "torch", "lightning", "transformers", "torchmetrics", "datasets", "jsonargparse")


def run(arguments: list[str]) -> None:
    """Print versions, devices and optional packages; with a base, also the memory that training it takes.

    Raises:
        LitPeftError: the method is unknown, or the base has no configuration.
    """
    parser = Options("lit-peft doctor", description="Show what is installed, what works, and what fits in memory.")
    parser.add_argument("--base", help="also estimate the memory of training this base")
    parser.add_argument("--method", default="LoRA", help=", ".join(METHODS))
    parser.add_argument("--task", default="causal_lm", help="task of the model")
    parser.add_argument("--batch_size", type=int, default=8, help="examples per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per example")
    options = parser.parse_args(arguments)
    if options.method not in METHODS:
        near = closest(options.method, METHODS)
        raise LitPeftError(f"--method {options.method!r} is unknown: the closest are {near}.")
    check_counts(options, "batch_size", "length")
    need = None
    if options.base is not None:
        need = training_memory(options.base, options.method, options.task, options.batch_size, options.length)
    print(f"{'python':<14}{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in _REQUIRED:
        print(f"{name:<14}{metadata.version(name)}")
    devices = free_memory()
    for device, free in devices.items():
        print(f"{device:<14}{_size(free)} free")
    for name, (purpose, install) in _OPTIONAL.items():
        state, works = package_state(name)
        print(f"{name:<14}{state}  ({purpose})" + ("" if works else f"  ->  {install}"))
    if need is not None:
        print(f"\n{options.method} on {options.base}, {options.batch_size} x {options.length} tokens, float32:")
        for part, size in need.items():
            print(f"  {part:<22}{_size(size)}")
        total = sum(need.values())
        print(f"  {'total':<22}{_size(total)}")
        for device, free in devices.items():
            verdict = (
                "fits" if total <= free else "does not fit: reduce --batch_size or --length, or use a smaller dtype"
            )
            print(f"  {device:<22}{verdict}")


def training_memory(base: str, method: str, task: str, batch_size: int, length: int) -> dict[str, int]:
    """Estimate the memory of training in float32 with AdamW, without reading weights.

    Returns:
        Bytes of parameters, gradients and the two moments of Adam, which are exact, and of activations, which are
        estimated: 34 values of hidden size per token and layer, and 2.5 scores per head and pair of tokens. Korthikanti
        et al. (2022, arXiv:2205.05198, section 4.1) count these in bytes of half precision.
    """
    import lit_peft
    from lit_peft.methods.attachment import trainable_parameters
    from lit_peft.models.audio_features import AUDIO
    from lit_peft.training.building import build_empty_model

    settings = {} if task == "causal_lm" or task == "seq2seq" else {"num_labels": 2}
    module = getattr(lit_peft, method)(base=base, task=task, **settings)
    model = build_empty_model(module)
    trained = 4 * trainable_parameters(model)
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    text = model.config.get_text_config()
    if model.main_input_name in AUDIO:  # Whisper's encoder sees a recording of the greatest length
        length = max(length, getattr(model.config, "max_source_positions", length))
    hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    # The paper counts two bytes per value; in float32 it is four.
    activations = 2 * layers * batch_size * length * (34 * hidden + 5 * heads * length)
    exact = {"parameters": parameters, "gradients": trained, "Adam's moments": 2 * trained}
    return {**exact, "activations, about": activations}


def free_memory() -> dict[str, int]:
    """Return the free bytes of each device."""
    import torch

    found = {}
    with contextlib.suppress(OSError):  # without /proc, the free memory is unknown
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found["cpu"] = int(lines["MemAvailable"].split()[0]) * 1024
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index} {torch.cuda.get_device_name(index)}"] = torch.cuda.mem_get_info(index)[0]
    return found


def package_state(name: str) -> tuple[str, bool]:
    """Return a package's version, "missing", or why its import fails; and whether it can be imported."""
    try:
        version = metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "missing", False
    try:
        import_module(name)
    except Exception as problem:
        return f"{version} does not work: {first_line(problem)}", False
    return version, True


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
