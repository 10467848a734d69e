"""Files of strangers cost little time and memory, whatever they declare, and do nothing else than SECURITY.md says."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import run
from fuzz_gguf import write_tiny
from limits import MEMORY, SECONDS, cost_of
from models import make
from safetensors.torch import load_file, save_file
from torch import nn

import lit_peft
from lit_peft import LitPeftError, LoRASettings
from lit_peft.cli import main
from lit_peft.commands.export import load_checkpoint
from lit_peft.formats.untrusted import ElementLimit
from lit_peft.models.gguf_header import check_gguf_header
from lit_peft.util.type_checks import brief

SLOW = r"(\w|\w\w|.)+!"
WEIGHTS = "adapter_model.safetensors"


def settings(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def inner(folder: Path, **values: Any) -> None:
    settings(folder, config={**json.loads((folder / "adapter_config.json").read_text())["config"], **values})


def tensors(folder: Path, name: str = WEIGHTS, **more: torch.Tensor) -> None:
    save_file({**load_file(folder / name), **more}, folder / name)


def header(folder: Path, content: Any, body: bytes = b"", name: str = WEIGHTS) -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + body)


def table(folder: Path, rows: int, width: int, **values: Any) -> None:
    """A prompt of one byte for each virtual token, or of none."""
    described = {"dtype": "I8", "shape": [rows, width], "data_offsets": [0, rows * width]}
    header(folder, {"prompt_embeddings": described}, b"\0" * (rows * width))
    settings(folder, num_virtual_tokens=rows)


def pickled(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(change(found), folder / "adapter_model.bin")


def archive(folder: Path, entries: dict[str, bytes], kind: int) -> None:
    (folder / WEIGHTS).unlink()
    with zipfile.ZipFile(folder / "adapter_model.bin", "w", kind) as file:
        for name, content in entries.items():
            file.writestr(name, content)


def many(count: int) -> bytes:
    empty = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(b'"%x":%s' % (number, empty) for number in range(count)) + b"}"


METHODS: dict[str, tuple[str, Any, Any]] = {
    "lora": ("llama", LoRASettings(r=2), "peft"),
    "prompt": ("llama", lit_peft.PromptTuningSettings(num_virtual_tokens=4), "peft"),
    "p_tuning": ("llama", lit_peft.PTuningSettings(num_virtual_tokens=4), "peft"),
    "prefix": ("llama", lit_peft.PrefixTuningSettings(num_virtual_tokens=4, prefix_projection=False), "peft"),
    "bottleneck": ("bert", lit_peft.AdapterHSettings(reduction_factor=8), "adapterhub"),
    "mlp": ("bert", lit_peft.PrefixTuningSettings(num_virtual_tokens=4, positions="adapterhub"), "adapterhub"),
}
# What is done to a folder of the method, and the size or count that is declared.
HOSTILE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a large rank": ("lora", lambda f: settings(f, r=2**28)),
    "a large rank, a thin tensor": (
        "lora",
        lambda f: (
            settings(f, r=2**22),
            tensors(f, **{"base_model.model.z.lora_A.weight": torch.zeros(2**22, 1).char()}),
        ),
    ),
    "a tensor of one number repeated": (
        "lora",
        lambda f: (
            settings(f, r=2**24),
            pickled(f, lambda found: {**found, "z.lora_A": torch.zeros(1).expand(2**24, 1)}),
        ),
    ),
    "sparse tensors": ("lora", lambda f: pickled(f, lambda found: {k: v.to_sparse() for k, v in found.items()})),
    "tensors without memory": ("lora", lambda f: pickled(f, lambda found: {k: v.to("meta") for k, v in found.items()})),
    "names by the thousand": ("lora", lambda f: settings(f, modules_to_save=[f"x{n}" for n in range(200_000)])),
    "names of a prefix": (
        "prefix",
        lambda f: (settings(f, modules_to_save=[f"x{n}" for n in range(200_000)]), header(f, many(40_000))),
    ),
    "lists in a header": ("lora", lambda f: header(f, b'{"a":[' + b",".join([b"[]"] * 2_700_000) + b"]}")),
    "many tensors": ("lora", lambda f: header(f, many(29_000))),
    "too many tensors": ("lora", lambda f: header(f, many(60_000))),
    "nested lists": ("lora", lambda f: (f / "adapter_config.json").write_text('{"a":' + "[" * 3_000_000)),
    "lists in settings": (
        "lora",
        lambda f: (f / "adapter_config.json").write_text('{"a":[' + ",".join(["[]"] * 1_300_000) + "]}"),
    ),
    "a long number": ("lora", lambda f: (f / "adapter_config.json").write_text('{"r":' + "9" * 4_000_000 + "}")),
    "patterns by the thousand": ("lora", lambda f: settings(f, rank_pattern={f"x{n}.*": 2 for n in range(9999)})),
    "a slow target": ("lora", lambda f: settings(f, target_modules=SLOW)),
    "a compressed pickle": (
        "lora",
        lambda f: archive(f, {"a/data.pkl": b"\0" * 2**27}, zipfile.ZIP_DEFLATED),
    ),
    "a long pickle": ("lora", lambda f: archive(f, {"a/data.pkl": b"\x80\x02" + b"]" * 2**22}, zipfile.ZIP_STORED)),
    "parts by the thousand": (
        "lora",
        lambda f: archive(f, {f"archive/data/{n}": b"" for n in range(40_000)}, zipfile.ZIP_STORED),
    ),
    "a thin prompt": ("prompt", lambda f: table(f, 2**23, 1)),
    "a prompt without width": ("prompt", lambda f: table(f, 2**26, 0)),
    "a thin prompt of P-Tuning": ("p_tuning", lambda f: table(f, 2**23, 1)),
    "a thin prefix": ("prefix", lambda f: table(f, 2**23, 1)),
    "a wide bottleneck": (
        "bottleneck",
        lambda f: (inner(f, reduction_factor=2**-17), tensors(f, "adapter.safetensors", z=torch.zeros(2**22).char())),
    ),
    "a long prefix of AdapterHub": (
        "mlp",
        lambda f: (inner(f, prefix_length=2**23), tensors(f, "adapter.safetensors", z=torch.zeros(2**23).char())),
    ),
    "a wide network": (
        "mlp",
        lambda f: (inner(f, bottleneck_size=2**22), tensors(f, "adapter.safetensors", z=torch.zeros(2**22).char())),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no other threads
    root = tmp_path_factory.mktemp("adapters")
    found = {}
    for name, (model, method, format) in METHODS.items():
        found[name] = lit_peft.save_adapter(lit_peft.attach(make(model), method), root / name, format)
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("case", HOSTILE)
def test_a_folder_costs_little_whatever_it_declares(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    method, change = HOSTILE[case]
    folder, model = tmp_path / "adapter", make(METHODS[method][0])
    shutil.copytree(folders[method], folder)
    change(folder)
    loaded = cost_of(lambda: lit_peft.load_adapter(model, folder))
    assert loaded.result == "refused" and loaded.seconds < SECONDS and loaded.memory < MEMORY, loaded
    shown = cost_of(lambda: main(["info", str(folder)]))
    assert shown.message in ("0", "2") and shown.seconds < SECONDS and shown.memory < MEMORY, shown


def test_a_layer_is_not_built_beyond_what_is_stored() -> None:
    stored = {"a": torch.zeros(10)}
    with ElementLimit(stored, "x.json", spare=20):
        nn.Linear(4, 5)
        torch.zeros((2, 2))
    with pytest.raises(LitPeftError, match=r"x\.json: on this model"), ElementLimit(stored, "x.json", spare=20):
        nn.Linear(2**20, 2**20)


def checkpoint(file: Path, place: Path, state: dict[str, Any] | None = None, **given: Any) -> Path:
    torch.save({"state_dict": state or {}, "hyper_parameters": {"base": str(place), **given}}, file)
    return file


def export(file: Path, *more: str) -> int:
    return main(["export", "--ckpt_path", str(file), "--output", str(file.with_name("out")), "--method", "LoRA", *more])


@pytest.fixture(scope="module", autouse=True)
def imported(decoder: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the commands import is not part of what a file costs."""
    file = tmp_path_factory.mktemp("imported") / "x.ckpt"
    export(checkpoint(file, decoder, r=2))
    export(checkpoint(file, encoder, r=2, task="sequence_classification", num_labels=2))
    main(["info", str(file)])


def nested(times: int = 40) -> list[Any]:
    found: list[Any] = ["q_proj"]
    for _ in range(times):
        found = [found, found, found]
    return found


@pytest.mark.parametrize(
    "given",
    [
        {"r": 2**28},
        {"num_labels": 2**40, "task": "sequence_classification"},
        {"labels": [str(number) for number in range(40_000)], "task": "sequence_classification"},
        {"target_modules": nested()},
        {"base": nested()},
        {"target_modules": SLOW},
        {"rank_pattern": {"(?:.?){30}!": 2}},
        {"layers_pattern": ".{1,16}" * 14, "layers_to_transform": [0]},
        {"adapter_dtype": "int8"},
    ],
    ids=["r", "num_labels", "labels", "nested", "base", "slow", "rank_pattern", "layers_pattern", "dtype"],
)
def test_a_checkpoint_costs_little_whatever_it_declares(given: dict[str, Any], decoder: Path, tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "x.ckpt", decoder, **{"r": 2, **given})
    for call in (lambda: export(file), lambda: main(["info", str(file)])):
        cost = cost_of(call)
        assert cost.message in ("0", "2") and cost.seconds < SECONDS and cost.memory < MEMORY, cost
    assert cost_of(lambda: export(file)).message == "2" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_does_not_unpack_to_more_than_it_has(legacy: bool, decoder: Path, tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "x.ckpt", decoder, {"a": torch.zeros(7)})
    if legacy:
        torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
        # The storage's size, as the pickle has it.
        file.write_bytes(file.read_bytes().replace(b"K\7", b"\x8a\5" + (2**33).to_bytes(5, "little")))
    else:
        with zipfile.ZipFile(file) as plain, zipfile.ZipFile(tmp_path / "y.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in plain.infolist():
                packed.writestr(entry.filename, plain.read(entry) + b"\0" * 2**27)
        file = tmp_path / "y.ckpt"
    cost = cost_of(lambda: load_checkpoint(file))
    assert cost.result == "refused" and cost.seconds < 0.5 and cost.memory < 2**26
    assert "would unpack" in cost.message or "before PyTorch 1.6" in cost.message


def test_a_checkpoint_chooses_no_code(decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module: Any = lit_peft.LoRA(base=str(decoder), r=2)
    module.configure_model()
    given = {"attn_implementation": "someone/kernel", "optimizer": "os.system", "trust_remote_code": True, "r": 2}
    file = checkpoint(tmp_path / "x.ckpt", decoder, module.state_dict(), **given)
    assert export(file) == 0
    told = capsys.readouterr().out
    assert f"base: {decoder} (named by the checkpoint" in told
    line = next(line for line in told.splitlines() if line.startswith("not taken from the checkpoint: "))
    assert "attn_implementation='someone/kernel'" in line
    assert "optimizer='os.system'" in line and "trust_remote_code=True" in line and "r=2" not in line.split(", ")
    for quantization in (
        {"quant_method": "gptq", "bits": 4, "dataset": "c4"},
        {"quant_method": "bitsandbytes", "x": []},
    ):
        file = checkpoint(tmp_path / "y.ckpt", decoder, module.state_dict(), quantization=quantization)
        assert export(file) == 2 and "only names and bitsandbytes' settings" in capsys.readouterr().err
    file = checkpoint(tmp_path / "z.ckpt", decoder, module.state_dict(), hook="os.system")
    assert export(file) == 2 and "'hook', which LoRA does not have" in capsys.readouterr().err


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (f"{LAUGHS}model: {{class_path: *j}}\n", "2"),
        (f"{LAUGHS}model:\n  init_args: {{class_path: X, y: *j}}\n  class_path: lit_peft.LoRA\n", "0"),
        ("model: {class_path: LoRA}\nx:\n" + "- a\n" * 1_000_000, "0"),
        ("x: " + "59:" * 300_000 + "59\nmodel: {class_path: LoRA}\n", "2"),
        ("model: " + "[" * 100_000, "2"),
        ("- " * 50_000, "2"),
        ("model: [\0", "2"),
        ("model: [1]", "2"),
    ],
    ids=["aliases", "aliases beside", "long", "number", "flow", "lists", "broken", "list"],
)
def test_a_configuration_beside_a_checkpoint_is_not_expanded(
    text: str, status: str, decoder: Path, tmp_path: Path
) -> None:
    module: Any = lit_peft.LoRA(base=str(decoder), r=2)
    module.configure_model()
    file = checkpoint(tmp_path / "x.ckpt", decoder, module.state_dict(), r=2)
    (tmp_path / "config.yaml").write_text(text)
    out = tmp_path / "out"
    cost = cost_of(lambda: main(["export", "--ckpt_path", str(file), "--output", str(out)]))
    assert cost.message == status and cost.seconds < SECONDS and cost.memory < MEMORY, cost


def test_control_characters_are_never_printed(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "\x1b[2J\x1b]0;x\x07\u202e\nlit-peft: all is well\x9b"
    folder = tmp_path / "adapter"
    shutil.copytree(folders["lora"], folder)
    settings(folder, base_model_name_or_path=odd, target_modules=[odd], **{odd: odd})
    tensors(folder, **{odd: torch.zeros(1)})
    (folder / "lit_peft.json").write_text(json.dumps({"base": {"name": odd, "revision": odd, "shapes": odd}}))
    assert main(["info", str(folder)]) == 0
    with pytest.raises(LitPeftError) as caught:
        lit_peft.load_adapter(make("llama"), folder)
    assert "\\x1b" in str(caught.value)
    file = checkpoint(tmp_path / "x.ckpt", Path(odd), {odd: torch.zeros(1)}, **{odd: odd})
    assert main(["info", str(file)]) == 0 and export(file) == 2
    told = capsys.readouterr()
    for text in (told.out, told.err, str(caught.value)):
        assert all(letter.isprintable() or letter == "\n" for letter in text)
        assert not any(line.startswith("lit-peft: all is well") for line in text.splitlines())
    assert len(told.out) > 500


def test_values_are_shown_as_python_shows_them_but_only_their_start() -> None:
    values = [1, "a'b", [1, 2], (1,), {"a": [1, {}]}, {1}, frozenset(), frozenset([1]), [], None, 1.5, b"x", True]
    values += [10**40, list(range(1000)), {"a": (1, "b")}, "x" * 200]
    for value in values:
        whole = repr(value)
        assert brief(value) == (whole if len(whole) <= 80 else f"{whole[:80]}…")
    cost = cost_of(lambda: brief(nested(), 300) + brief(10**100_000) + brief(torch.zeros(3)))
    assert cost.result == "done" and cost.seconds < 0.1 and "an integer of 332,193 bits" in cost.message
    assert "Tensor of shape (3,)" in cost.message


@pytest.mark.parametrize(
    ("at", "content", "words"),
    [
        (8, struct.pack("<Q", 2**62), "declares"),
        (16, struct.pack("<Q", 2**62), "declares"),
        (24, struct.pack("<Q", 2**62), "a text of"),
        (4, struct.pack("<I", 9), "of version 9"),
        (b"llama.embedding_length", struct.pack("<II", 4, 2**31), "embedding_length=2147483648, and no tensor"),
        (b"llama.block_count", struct.pack("<II", 4, 2**31), "tensors for 2147483648 layers"),
        (b"tokenizer.ggml.token_type", struct.pack("<IIQ", 9, 5, 2**40), "a list of 1,099,511,627,776 values"),
        (b"token_embd.weight", struct.pack("<IQQ", 2, 2**40, 2**20), "is more than the file"),
        (b"token_embd.weight", struct.pack("<I", 2**31), "2,147,483,648 dimensions"),
        (8, struct.pack("<QQ", 0, 17), "no tensors"),
        (16, struct.pack("<Q", 1), "no block_count"),
    ],
)
def test_the_header_of_a_gguf_file_is_believed_only_if_it_can_be_true(
    at: int | bytes, content: bytes, words: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    write_tiny(file)
    check_gguf_header(file)
    data = bytearray(file.read_bytes())
    start = at if isinstance(at, int) else data.index(at) + len(at)
    data[start : start + len(content)] = content
    file.write_bytes(data)
    cost = cost_of(lambda: check_gguf_header(file))
    assert cost.result == "refused" and words in cost.message and cost.seconds < 0.5, cost


def test_an_index_of_weights_has_a_limit(decoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(decoder, folder)
    index = folder / "model.safetensors.index.json"
    for content, words in (("[" * 100_000, "cannot be read"), ('{"weight_map":{"a":[]}}', "cannot be read")):
        index.write_text(content)
        cost = cost_of(lambda: lit_peft.LoRA(base=str(folder)).configure_model())
        assert cost.result == "refused" and words in cost.message
    with index.open("wb") as file:
        file.truncate(2**27)  # takes no space
    cost = cost_of(lambda: lit_peft.LoRA(base=str(folder)).configure_model())
    assert cost.result == "refused" and "at most" in cost.message


def test_a_slice_of_the_campaign_finds_nothing() -> None:
    for kind, count in (("checkpoints", 60), ("gguf", 20)):
        if kind == "gguf":
            pytest.importorskip("gguf")
        report = run(kind, count, seed=5)
        assert not report.faults, report.faults
        assert report.tally["read"] + report.tally["refused"] == count and report.tally["refused"]
