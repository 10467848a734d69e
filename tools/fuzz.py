"""Fuzzing of everything that reads files which somebody else wrote.

    python tools/fuzz.py adapters 10000
    python tools/fuzz.py checkpoints 10000 --seed 1 --keep faults
    python tools/fuzz.py configs 10000
    python tools/fuzz.py data 10000
    python tools/fuzz.py data 500 --first 6000

Real files are mutated: bytes, and the values inside of JSON, YAML, safetensors, pickles and tables. Each case must end
in a result or in `LitPeftError`, within `SECONDS`, without reading or writing elsewhere, importing anything new,
starting a process or taking more than `MEMORY`; a model that refused an adapter must be what it was.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from fuzz_gguf import Gguf
from models import GOLDEN, make, scramble

import lit_peft
from lit_peft import LitPeftError
from lit_peft.util.errors import causes
from lit_peft.util.memory import peak_memory, process_memory

SOURCE = str(Path(__file__).parents[1])
# Limits of each case: processor time, since the machine may do other things as well, and memory.
SECONDS = 2
MEMORY = 500 * 2**20
# What takes the place of a value.
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 17, 2**31, -(2**63), 2**64, 10**30, 0.0, -0.5, 1e-9, 1e308, float("inf")),
    *("", "0", "1", "x", "a" * 5000, "../../etc/passwd", "/etc/passwd", "(a+)+$", "(", "\x00", "é\u2028\U0001f600"),
    *("os.system", "torch.nn.Linear", "{0.__class__}", "{x}", "%s", "NaN", "null", "*", ".*", "lora", "all-linear"),
    *([], {}, [[]], [None], [0], ["q_proj"], [{}], {"a": 1}, {"": ""}, {"default": 4}, [1, "a", None], [0] * 1000),
]
SMALL = [-1.0, 0.0, 1.0, 3.0, float("nan"), float("inf"), 1e38]


# ---------------------------------------------------------------------------------------------- what is forbidden


class Watch:
    """Python's audit events while a case runs: what it opens, imports and starts."""

    def __init__(self) -> None:
        self.active, self.trusted = False, False
        self.allowed: tuple[str, ...] = ()
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "socket.connect"):
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "import" and not self.trusted and args[0].partition(".")[0] not in self.modules:
            self.seen.append(f"import {args[0]}")
        elif event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            flags = args[2] if isinstance(args[2], int) else 0
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR)) or (isinstance(args[1], str) and args[1] != "r")
            # Tracebacks and warnings read the source.
            places = (sys.prefix, sys.base_prefix, "/dev", "/proc", "/etc/localtime", SOURCE, *sys.path[1:])
            readable = () if writes else places
            if not path.startswith((*self.allowed, *readable, "/dev/null")) and (writes or not self.trusted):
                self.seen.append(f"open {path} {args[1]} {flags}")

    @contextlib.contextmanager
    def over(self, *allowed: Path, trusted: bool = False) -> Iterator[list[str]]:
        self.modules = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)
        self.allowed = tuple(str(path.resolve()) for path in allowed)
        self.seen, self.active, self.trusted = [], True, trusted
        try:
            yield self.seen
        finally:
            self.active = False


WATCH = Watch()


class Hang(BaseException):
    """A case took longer than it may."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Stop what takes too long, and fail what asks for too much memory."""

    def late(*_: Any) -> None:
        raise Hang

    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, ((process_memory("VmSize") or 0) + MEMORY, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


# ------------------------------------------------------------------------------------------------------ mutations


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 64, 1000))
        way = rng.randrange(7)
        if way == 0:
            del out[at : at + size]
        elif way == 1:
            out[at:at] = rng.randbytes(size)
        elif way == 2:
            out[at : at + size] = rng.randbytes(len(out[at : at + size]))
        elif way == 3:
            out[at:at] = out[at : at + size]
        elif way == 4 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif way == 5:
            out[at : at + 8] = rng.choice(
                (b"\xff" * 8, b"\x00" * 8, struct.pack("<Q", 2**62), b"\r\n", b"\xef\xbb\xbf")
            )
        else:
            del out[at:]
    return bytes(out)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """One to three changes anywhere in nested plain data and tensors."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        value = _changed(value, rng)
    return value


def _changed(value: Any, rng: random.Random) -> Any:
    inner = value if isinstance(value, (dict, list)) else ()
    if not inner or rng.random() < 0.05:
        return mutate_tensor(value, rng) if isinstance(value, torch.Tensor) else copy.deepcopy(rng.choice(ODD))
    if isinstance(value, list):
        at = rng.randrange(len(value))
        way = rng.randrange(6)
        if way == 0:
            del value[at]
        elif way == 1:
            value.insert(at, copy.deepcopy(rng.choice([*ODD, value[at]])))
        else:
            value[at] = _changed(value[at], rng)
        return value
    key = rng.choice(list(value))
    way = rng.randrange(8)
    if way == 0:
        del value[key]
    elif way == 1:
        value[str(rng.choice(ODD))[:50]] = copy.deepcopy(rng.choice(ODD))
    elif way == 2:
        value[str(key) + rng.choice("x_. 1")] = value.pop(key)
    elif way == 3:
        other = rng.choice(list(value))
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = _changed(value[key], rng)
    return value


def mutate_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Other numbers, shape or type."""
    way = rng.randrange(6)
    if way == 0:
        return tensor.flatten()
    if way == 1:
        return tensor[..., : rng.randrange(tensor.shape[-1] + 1)].clone() if tensor.dim() else tensor[None]
    if way == 2:
        return tensor.to(
            rng.choice((torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.int8))
        )
    if way == 3:
        return tensor.new_full(tensor.shape, rng.choice(SMALL)) if tensor.is_floating_point() else tensor[None]
    if way == 4:
        return tensor.unsqueeze(rng.randrange(tensor.dim() + 1))
    return torch.zeros(rng.choice(((), (0,), (1,), (0, 4), (1, 1, 1, 1), (3, 5))))


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(mutate_value(json.loads(data), rng)).encode()


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Another header before the same bytes, or other tensors."""
    from safetensors.torch import load, save

    if rng.random() < 0.5:
        length = struct.unpack("<Q", data[:8])[0]
        header = mutate_json(data[8 : 8 + length], rng)
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    changed = mutate_value(load(data), rng)
    return save({str(name): value.contiguous() for name, value in changed.items() if isinstance(value, torch.Tensor)})


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """Other values in torch's format, or other bytes in the pickle of a whole archive."""
    out = io.BytesIO()
    if rng.random() < 0.6:
        torch.save(mutate_value(torch.load(io.BytesIO(data), weights_only=True), rng), out)
        return out.getvalue()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as copied:
        for entry in archive.infolist():
            content = archive.read(entry)
            copied.writestr(
                entry.filename, mutate_bytes(content, rng) if entry.filename.endswith("data.pkl") else content
            )
    return out.getvalue()


def mutate_yaml(data: bytes, rng: random.Random) -> bytes:
    import yaml

    return yaml.safe_dump(mutate_value(yaml.safe_load(data), rng), allow_unicode=True).encode()


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """Lines and cells of a text file left out, doubled, exchanged or replaced."""
    lines = data.splitlines(keepends=True)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        way = rng.randrange(5)
        odd = str(rng.choice(ODD)).encode(errors="replace")
        if way == 0 and len(lines) > 1:
            del lines[at]
        elif way == 1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif way == 2:
            separator = rng.choice((b",", b"\t", b" ", b'"', b":"))
            cells = lines[at].split(separator)
            cells[rng.randrange(len(cells))] = odd
            lines[at] = separator.join(cells)
        elif way == 3:
            lines.insert(at, rng.choice((b"\n", b'"\n', b"\xff\xfe\n", b"," * 50 + b"\n", b"{}\n", b"[]\n", b"\x00\n")))
        else:
            lines[at] = mutate_bytes(lines[at], rng)
    return b"".join(lines)


def mutate_json_lines(data: bytes, rng: random.Random) -> bytes:
    rows = mutate_value([json.loads(line) for line in data.splitlines()], rng)
    return b"\n".join(json.dumps(row).encode() for row in rows) if isinstance(rows, list) else mutate_lines(data, rng)


def mutate_parquet(data: bytes, rng: random.Random) -> bytes:
    import pyarrow
    import pyarrow.parquet

    rows = mutate_value(pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist(), rng)
    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    except Exception:  # rows that no table can hold
        return mutate_bytes(data, rng)
    return out.getvalue()


Mutation = Callable[[bytes, random.Random], bytes]
BY_SUFFIX: dict[str, Mutation] = {
    ".json": mutate_json,
    ".safetensors": mutate_safetensors,
    ".bin": mutate_pickle,
    ".ckpt": mutate_pickle,
    ".yaml": mutate_yaml,
    ".csv": mutate_lines,
    ".tsv": mutate_lines,
    ".txt": mutate_lines,
    ".conll": mutate_lines,
    ".jsonl": mutate_json_lines,
    ".parquet": mutate_parquet,
}


def mutate(path: Path, rng: random.Random) -> None:
    """Change one file in place."""
    data = path.read_bytes()
    way = BY_SUFFIX[path.suffix] if rng.random() < 0.7 else mutate_bytes
    try:
        changed = way(data, rng)
    except Exception:  # a value that the format cannot hold, or the second change of a file
        changed = mutate_bytes(data, rng)
    path.write_bytes(changed)


# -------------------------------------------------------------------------------------------------------- readers


class Adapters:
    """Adapter folders of both formats, read by `load_adapter` and `lit-peft info`."""

    trusted = False

    def __init__(self, work: Path) -> None:
        torch.manual_seed(0)
        self.models = {name: make(name) for name in ("llama", "bert", "t5")}
        self.originals: list[tuple[str, Path]] = []
        settings: dict[str, list[Any]] = {
            "llama": [
                lit_peft.LoRASettings(r=4, rank_pattern={"v_proj": 2}, bias="all", modules_to_save=["norm"]),
                lit_peft.LoRASettings(r=2, use_dora=True, target_modules="all-linear", layers_to_transform=[1]),
                lit_peft.PromptTuningSettings(num_virtual_tokens=4),
                lit_peft.PTuningSettings(num_virtual_tokens=4, encoder_hidden_size=8),
                lit_peft.PrefixTuningSettings(num_virtual_tokens=4, prefix_projection=False),
                lit_peft.PrefixTuningSettings(num_virtual_tokens=3, prefix_projection_size=8, leave_out=[0]),
                lit_peft.AdapterHSettings(reduction_factor=8, scaling="learned"),
                lit_peft.ParallelSettings(placement="llm_adapters", bottleneck_size=4),
            ],
            "bert": [
                lit_peft.LoRASettings(r=2, modules_to_save=["classifier"]),
                lit_peft.PTuningV2Settings(num_virtual_tokens=4, modules_to_save=["classifier"]),
                lit_peft.AdapterPSettings(reduction_factor={"default": 8, "1": 4}, modules_to_save=["classifier"]),
            ],
            "t5": [
                lit_peft.PromptTuningSettings(num_virtual_tokens=4, num_transformer_submodules=2),
                lit_peft.PrefixTuningSettings(num_virtual_tokens=2),
            ],
        }
        for name, members in settings.items():
            for number, member in enumerate(members):
                for format in (None, "adapterhub"):
                    model = lit_peft.attach(copy.deepcopy(self.models[name]), member)
                    scramble(model)
                    with contextlib.suppress(LitPeftError):
                        folder = lit_peft.save_adapter(model, work / f"{name}-{number}-{format}", format)
                        self.originals.append((name, folder))
        for name, folder in list(self.originals)[::3]:
            pickled = work / f"{folder.name}-pickled"
            shutil.copytree(folder, pickled)
            for file in pickled.glob("adapter*.safetensors"):
                from safetensors.torch import load_file

                torch.save(
                    load_file(file),
                    pickled / ("pytorch_adapter.bin" if "model" not in file.stem else "adapter_model.bin"),
                )
                file.unlink()
            self.originals.append((name, pickled))
        for case in sorted(GOLDEN.glob("*/*/case.json")):
            import transformers

            facts = json.loads(case.read_text())
            model = getattr(transformers, facts["auto_class"]).from_pretrained(case.parent / "base").eval()
            name = f"golden {case.parent.name}"
            self.models[name] = model
            shutil.copytree(case.parent / "adapter", work / name)
            self.originals.append((name, work / name))
        self.before = {
            name: {key: value.clone() for key, value in model.state_dict().items()}
            for name, model in self.models.items()
        }
        for name, folder in self.originals:
            assert self.read(name, folder) == "read", folder

    def case(self, work: Path, rng: random.Random) -> tuple[str, Path, Callable[[], str]]:
        name, original = rng.choice(self.originals)
        folder = work / original.name
        shutil.copytree(original, folder)
        files = [file for file in sorted(folder.iterdir()) if file.suffix in BY_SUFFIX]
        for _ in range(rng.choice((1, 1, 1, 2))):
            mutate(rng.choice(files), rng)
        if rng.random() < 0.02:
            rng.choice(files).unlink()
        return original.name, folder, lambda: self.read(name, folder)

    def read(self, name: str, folder: Path) -> str:
        model, result = self.models[name], "refused"
        from lit_peft.cli import main

        status = main(["info", str(folder)])
        assert status in (0, 2)
        try:
            lit_peft.load_adapter(model, folder)
            result = "read"
            lit_peft.detach(model)
        except LitPeftError as problem:
            check_message(problem)
        now = model.state_dict()
        assert list(now) == list(self.before[name]), "the model has other tensors than before"
        assert all(torch.equal(now[key], value) for key, value in self.before[name].items()), "the base has changed"
        assert all(parameter.requires_grad for parameter in model.parameters()), "the base stays frozen"
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), "hooks stay"
        return result


class Checkpoints:
    """Training checkpoints, read by `lit-peft info`, and into a module as `export` and `fit --ckpt_path` do."""

    trusted = False

    def __init__(self, work: Path) -> None:
        import lightning.pytorch as pl

        base = tiny_base(work / "base")
        self.original = work / "original.ckpt"
        self.make = lambda: lit_peft.LoRA(base=str(base), r=2, modules_to_save=["norm"])
        module = self.make()
        batches = [{"input_ids": torch.tensor([[1, 5, 6]]), "labels": torch.tensor([[1, 5, 6]])}] * 2
        trainer = pl.Trainer(
            max_steps=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with contextlib.redirect_stderr(io.StringIO()):
            loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
            trainer.fit(module, loader)
        trainer.save_checkpoint(self.original)
        self.data = self.original.read_bytes()
        self.module = self.make()
        self.module.configure_model()
        assert self.read(self.original) == "read"

    def case(self, work: Path, rng: random.Random) -> tuple[str, Path, Callable[[], str]]:
        file = work / "case.ckpt"
        file.write_bytes(self.data)
        mutate(file, rng)
        return "ckpt", file, lambda: self.read(file)

    def read(self, file: Path) -> str:
        from lit_peft.cli import main
        from lit_peft.commands.export import load_checkpoint

        assert main(["info", str(file)]) in (0, 2)
        try:
            checkpoint = load_checkpoint(file)
            lit_peft.LoRA(**checkpoint["hyper_parameters"])
            self.module.load_state_dict(checkpoint["state_dict"])
        except LitPeftError as problem:
            check_message(problem)
            return "refused"
        return "read"


class Configs:
    """YAML configurations of `fit`, up to the classes they name.

    They are the user's own, and name classes to import and files to read.
    """

    trusted = True
    cli: Any

    def __init__(self, work: Path) -> None:

        import yaml

        import lit_peft.commands.lightning_cli as lightning_cli

        class Parsing(lightning_cli.CLI):
            def parse_arguments(cli, parser: Any, args: Any) -> None:
                self.cli = cli
                raise Hang

        # The parser is built once: reading a file with it is what is tried.
        with contextlib.suppress(Hang):
            lightning_cli.run(["fit"], Parsing)
        base = str(tiny_base(work / "base"))
        self.originals = []
        for file in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")):
            values = yaml.safe_load(file.read_text())
            # A quantized base wants an engine that may not be here.
            if "init_args" in values.get("model", {}) and "quantization" not in values["model"]["init_args"]:
                values["model"]["init_args"]["base"] = base
                values["trainer"]["default_root_dir"] = str(work / "runs")
                self.originals.append((file.name, yaml.safe_dump(values).encode()))
        self.work = work
        for name, data in self.originals:
            file = work / "config.yaml"
            file.write_bytes(data)
            assert self.read(file) == "read", name

    def case(self, work: Path, rng: random.Random) -> tuple[str, Path, Callable[[], str]]:
        name, data = rng.choice(self.originals)
        file = work / "config.yaml"
        file.write_bytes(data)
        mutate(file, rng)
        return name, file, lambda: self.read(file)

    def read(self, file: Path) -> str:
        import lit_peft.commands.lightning_cli as lightning_cli

        cli = self.cli
        try:
            lightning_cli.CLI.parse_arguments(cli, cli.parser, ["fit", "--config", str(file)])
            cli.subcommand = cli.config["subcommand"]
            cli.before_instantiate_classes()
            cli.parser.instantiate(cli.config)
        except ValueError as problem:
            # As the command does: jsonargparse wraps what a class raises while it is built.
            ours = next((cause for cause in causes(problem) if isinstance(cause, LitPeftError)), None)
            if ours is None:
                raise
            check_message(ours)
            return "refused"
        return "read"


class Data:
    """Data files of every kind, to the padded batch."""

    trusted = False

    def __init__(self, work: Path) -> None:
        import datasets

        datasets.disable_progress_bars()
        tokenizer = tiny_base(work / "base")
        self.cache = work / "cache"
        os.environ["LIT_PEFT_CACHE"] = str(self.cache)
        labelled = [{"text": f"a good film {n}", "label": ("pos", "neg")[n % 2]} for n in range(12)]
        asked = [{"question": f"what is {n}", "choices": ["good", "bad", "film"], "answer": n % 3} for n in range(12)]
        spans = [
            {
                "id": str(n),
                "question": f"what is {n}",
                "context": f"the film {n} was good",
                "answers": {"text": ["film"], "answer_start": [4]},
            }
            for n in range(12)
        ]
        tagged = "".join(f"the O\nfilm B-X\nwas O\n{n} B-Y\n\n" for n in range(12))
        instructed = [{"instruction": f"say {n}", "input": "", "output": "good film"} for n in range(12)]
        pairs = [{"source": f"the film {n}", "target": "good"} for n in range(12)]
        common: dict[str, Any] = {
            "base": str(tokenizer),
            "max_length": 32,
            "validation_fraction": 0.25,
            "batch_size": 4,
        }
        files: list[tuple[str, Any, Any, dict[str, Any]]] = [
            ("labelled.csv", labelled, lit_peft.TextClassificationData, {}),
            ("labelled.tsv", labelled, lit_peft.TextClassificationData, {}),
            ("labelled.jsonl", labelled, lit_peft.TextClassificationData, {}),
            ("labelled.parquet", labelled, lit_peft.TextClassificationData, {}),
            ("text.txt", "\n".join(f"a good film {n}" for n in range(12)), lit_peft.CausalLMData, {}),
            ("asked.json", asked, lit_peft.MultipleChoiceData, {}),
            ("asked.parquet", asked, lit_peft.MultipleChoiceData, {}),
            ("spans.jsonl", spans, lit_peft.QuestionAnsweringData, {"doc_stride": 4, "max_question_length": 8}),
            ("squad.json", _squad(spans), lit_peft.QuestionAnsweringData, {"doc_stride": 4, "max_question_length": 8}),
            ("tagged.conll", tagged, lit_peft.TokenClassificationData, {}),
            ("instructed.json", instructed, lit_peft.InstructionData, {}),
            ("pairs.jsonl", pairs, lit_peft.Seq2SeqData, {}),
        ]
        self.originals = []
        for name, content, kind, settings in files:
            _write_table(work / name, content)
            self.originals.append((work / name, kind, {**common, **settings}))
        for file, kind, settings in self.originals:
            assert self.read(file, kind, settings) == "read", file

    def case(self, work: Path, rng: random.Random) -> tuple[str, Path, Callable[[], str]]:
        original, kind, settings = rng.choice(self.originals)
        file = work / original.name
        shutil.copy(original, file)
        mutate(file, rng)
        shutil.rmtree(self.cache, ignore_errors=True)
        return original.name, file, lambda: self.read(file, kind, settings)

    def read(self, file: Path, kind: Any, settings: dict[str, Any]) -> str:
        try:
            data = kind(train=str(file), **settings)
            data.setup("fit")
            for loader in (data.train_dataloader(), data.val_dataloader()):
                for _ in loader:
                    pass
        except LitPeftError as problem:
            check_message(problem)
            return "refused"
        return "read"


def check_message(problem: LitPeftError) -> None:
    text = str(problem)
    assert text.strip() and "\n" not in text.strip() and len(text) < 4000, f"not one paragraph: {text[:300]!r}"


def tiny_base(folder: Path) -> Path:
    """A small causal model with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", "a", "the", "film", "was", "good", "bad", "what", "is", "say"]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="</s>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )
    make("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _squad(spans: list[dict[str, Any]]) -> dict[str, Any]:
    asked = [
        {
            "id": span["id"],
            "question": span["question"],
            "answers": [{"text": span["answers"]["text"][0], "answer_start": span["answers"]["answer_start"][0]}],
            "is_impossible": False,
        }
        for span in spans
    ]
    paragraphs = [{"context": span["context"], "qas": [qa]} for span, qa in zip(spans, asked, strict=True)]
    return {"version": "v2.0", "data": [{"title": "x", "paragraphs": paragraphs}]}


def _write_table(file: Path, content: Any) -> None:
    if isinstance(content, str):
        file.write_text(content)
    elif file.suffix == ".json":
        file.write_text(json.dumps(content))
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in content))
    elif file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), file)
    else:
        separator = "\t" if file.suffix == ".tsv" else ","
        names = list(content[0])
        lines = [separator.join(names), *(separator.join(str(row[name]) for name in names) for row in content)]
        file.write_text("\n".join(lines) + "\n")


READERS: dict[str, Any] = {
    "adapters": Adapters,
    "checkpoints": Checkpoints,
    "configs": Configs,
    "data": Data,
    "gguf": Gguf,
}


# ------------------------------------------------------------------------------------------------------------ run


def fuzz(
    kind: str, count: int, seed: int = 0, keep: Path | None = None, most: int = 20, tell: bool = False, first: int = 0
) -> tuple[Counter[str], list[str]]:
    """Run `count` cases, from number `first` on.

    Returns:
        How many were read and refused, and the faults found, each once, `most` at the most.
    """
    faults: dict[str, str] = {}
    tally: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        root = Path(scratch)
        (root / "originals").mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            reader = READERS[kind](root / "originals")
        for number in range(first, first + count):
            if tell and number % 500 == 0:
                print(f"{number}: {dict(tally)}", file=sys.__stderr__, flush=True)
            name, result, fault = one_case(reader, kind, root, seed, number, keep)
            tally[result if result in ("read", "refused") else "fault"] += 1
            if fault:
                key = fault.split(" at ")[0] + fault.split(" at ")[-1].split(" ")[0]
                faults.setdefault(key, f"case {number} ({name}): {fault}")
                if len(faults) >= most:
                    break
    return tally, list(faults.values())


def one_case(
    reader: Any, kind: str, root: Path, seed: int, number: int, keep: Path | None = None
) -> tuple[str, str, str]:
    """Run one case.

    Returns:
        What was changed; `read`, `refused`, `hang`, `memory` or `other`; and the fault in words, or an empty string.
    """
    work = root / "case"
    work.mkdir()
    name, path, run = reader.case(work, random.Random(f"{kind} {seed} {number}"))
    result, fault = "other", ""
    with (
        WATCH.over(root, trusted=reader.trusted) as seen,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            with limits():
                result = run()
        except Hang:
            result, fault = "hang", f"takes longer than {SECONDS} s"
        except BaseException as problem:
            # Native code has other words for it.
            if isinstance(problem, MemoryError) or "allocate memory" in str(problem):
                result = "memory"
            last = traceback.extract_tb(problem.__traceback__)
            ours = next((f for f in reversed(last) if "lit_peft" in f.filename or "fuzz" in f.filename), last[-1])
            fault = f"{type(problem).__name__} at {Path(ours.filename).name}:{ours.lineno} {problem!s:.150}"
    if seen and not fault:
        result, fault = "other", "; ".join(sorted(set(seen))[:3])
    if fault and keep is not None:
        target = keep / f"{kind}-{seed}-{number}"
        shutil.rmtree(target, ignore_errors=True)
        (shutil.copytree if path.is_dir() else _keep_file)(path, target)
    shutil.rmtree(work)
    return name, result, fault


def _keep_file(path: Path, target: Path) -> None:
    target.mkdir(parents=True)
    shutil.copy(path, target / path.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=READERS)
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the files of each fault")
    options = parser.parse_args()
    faulthandler.enable()
    before = peak_memory() or 0
    tally, faults = fuzz(options.kind, options.count, options.seed, options.keep, tell=True, first=options.first)
    grown = ((peak_memory() or 0) - before) / 2**20
    print(f"{options.kind}: {dict(tally)}, {len(faults)} different faults, peak memory grew by {grown:.0f} MB")
    print("\n".join(faults))
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
