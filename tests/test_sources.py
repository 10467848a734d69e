"""Base models from the hub, a folder, a package or a GGUF file, and the errors when they cannot be found."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_gguf import write_llama
from models import close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lit_peft import LitPeftError
from lit_peft.models.sources import cached_commit, convert_gguf, hub_error, resolve_base, resolve_packaged_file


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    return folder


def refused(*words: str, base: Any) -> None:
    with pytest.raises(LitPeftError) as caught:
        resolve_base(base)
    assert all(word in str(caught.value) for word in words), caught.value


# ---------------------------------------------------------------------------------------------- folders and ids


def test_local_folder(tmp_path: Path) -> None:
    source = resolve_base(str(model_folder(tmp_path)))
    assert source.is_local and Path(source.path) == tmp_path


@pytest.mark.parametrize("base", ["roberta-base", "organization/model", " organization/model.v2 "])
def test_hub_id_is_left_alone(base: str) -> None:
    source = resolve_base(base)
    assert source.path == source.name == base.strip() and not source.is_local


def test_what_is_not_a_model_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    refused("no config.json", base=str(folder))
    (folder / "weights.gguf").write_bytes(b"GGUF")
    refused("name it", "weights.gguf", base=str(folder))
    (folder / "adapter_config.json").write_text("{}")
    refused("is an adapter", base=str(folder))
    (folder / "config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"\0")
    refused("no weights", base=str(folder))
    index = folder / "model.safetensors.index.json"
    (folder / "model-1.safetensors").write_bytes(b"\0")
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    refused("lacks 1 of 2", "model-2.safetensors", base=str(folder))
    for broken in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(broken)
        refused(index.name, "cannot be read", base=str(folder))


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    model_folder(tmp_path / "modell")
    refused("does not exist", str(tmp_path / "modell"), base=str(tmp_path / "model"))
    refused("does not exist", base="./no/such/folder")
    refused("base is empty", base="  ")
    refused("base is empty", base=None)
    for neither in ("a--b", "a..b/c", "organization/model name"):
        refused("neither an existing folder nor a hub id", base=neither)
    (tmp_path / "model.bin").write_bytes(b"\0")
    refused("only .gguf files are read", base=str(tmp_path / "model.bin"))


# ------------------------------------------------------------------------------------------------------ packages


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution `tiny-models` whose package `tiny_pack` must never be imported."""
    info = tmp_path / "site" / "tiny_models-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-models\nVersion: 1.0\n")
    (info / "RECORD").write_text("tiny_pack/__init__.py,,\ntiny_models-1.0.dist-info/METADATA,,\n")
    folder = tmp_path / "site" / "tiny_pack"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "reviews.csv").write_text("text,label\n")
    monkeypatch.syspath_prepend(str(info.parent))
    return folder


def test_a_packaged_model_is_found_and_not_imported(package: Path) -> None:
    refused("holds no model", base="pkg:tiny-models")
    one = model_folder(package / "one")
    for spec in ("pkg:tiny-models", "pkg:tiny-models/one"):
        source = resolve_base(spec)
        assert Path(source.path) == one and source.name == spec and source.is_local
    refused("has no", base="pkg:tiny-models/one/config.json/..")
    model_folder(package / "sub" / "two")
    refused("holds 2 models", "'pkg:tiny-models/one'", "'pkg:tiny-models/sub/two'", base="pkg:tiny-models")
    assert Path(resolve_base("pkg:tiny-models/sub").path) == package / "sub" / "two"
    refused("has no 'three'", "'pkg:tiny-models/one'", base="pkg:tiny-models/three")


def test_a_packaged_file(package: Path) -> None:
    assert resolve_packaged_file("pkg:tiny-models/data/reviews.csv") == package / "data" / "reviews.csv"
    (package.parent / "outside.csv").write_text("secret")
    for spec, words in {
        "pkg:tiny-models/data/review.csv": "pkg:tiny-models/data/reviews.csv",
        "pkg:tiny-models": "no file is named",
        "pkg:tiny-models/../outside.csv": "has no file",
        "pkg:surely-not-installed/a.csv": "pip install surely-not-installed",
        "pkg:../x": "is not of the form",
        "tiny-models/x": "is not of the form",
    }.items():
        with pytest.raises(LitPeftError, match="train") as caught:
            resolve_packaged_file(spec, "train")
        assert words in str(caught.value)


def test_a_missing_package_names_its_install_command() -> None:
    refused("pip install surely-not-an-installed-package", base="pkg:surely-not-an-installed-package")
    refused("is not of the form", base="pkg:")


# ----------------------------------------------------------------------------------------------------- hub errors


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("You are trying to access a gated repo", "accept its licence"),
        ("403 Client Error: Forbidden", "accept its licence"),
        ("401 Client Error: Unauthorized", "accept its licence"),
        ("GatedRepoError: 401 Client Error. Cannot access gated repo for url x", "accept its licence"),
        ("RepositoryNotFoundError: 401 Client Error", "is not on the hub"),
        ("org/aggregated is no model", "could not be loaded from the hub"),
        ("RepositoryNotFound: 404 Client Error", "is not on the hub"),
        ("org/x is not a valid model identifier", "is not on the hub"),
        ("Couldn't connect to the Hub", "hf download org/x"),
        ("LocalEntryNotFoundError: 404 client", "hf download org/x"),
        ("something else\nwith a second line", "could not be loaded from the hub: something else"),
    ],
)
def test_an_error_of_the_hub_becomes_one_paragraph(answer: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    error = hub_error("org/x", OSError(answer))
    assert words in str(error) and "\n" not in str(error) and "base 'org/x'" in str(error)


def test_the_error_names_the_variable_that_turns_the_network_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert "HF_HUB_OFFLINE is set" in str(hub_error("org/x", OSError("offline mode is enabled")))
    text = str(hub_error("org/x", OSError("offline mode is enabled"), "train", dataset=True))
    assert "train 'org/x'" in text and "--repo-type dataset" in text
    ours = LitPeftError("as it was")
    assert hub_error("org/x", ours) is ours
    assert "could not be loaded" in str(hub_error(str(tmp_path), ValueError("broken")))
    # What a library wraps is read too.
    try:
        try:
            raise ConnectionError("connection refused")
        except ConnectionError as cause:
            raise OSError("cannot load") from cause
    except OSError as exc:
        assert "hf download" in str(hub_error("org/x", exc))


def test_the_commit_of_a_model_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    model_folder(folder / "snapshots" / commit)
    assert cached_commit("org/tiny") == commit
    assert cached_commit("org/other") is None and cached_commit(str(tmp_path)) is None and cached_commit("") is None
    model_folder(folder / "snapshots" / commit[::-1])
    assert cached_commit("org/tiny") is None


# ----------------------------------------------------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **shape, vocab_size=259, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gguf_file(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as llama.cpp stores it: its names, and q and k with the halves of each head interleaved."""
    pytest.importorskip("gguf")
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_llama(file, llama)
    return file


def test_a_gguf_file_is_converted_once(gguf_file: Path, llama: LlamaForCausalLM, tmp_path: Path, capsys: Any) -> None:
    source = resolve_base(str(gguf_file), cache_dir=tmp_path)
    assert source.name == "tiny.gguf" and source.is_local and "converting tiny.gguf" in capsys.readouterr().err
    model, ids = AutoModelForCausalLM.from_pretrained(source.path).eval(), torch.arange(3, 40)[None]
    with torch.no_grad():
        close(model(input_ids=ids).logits, llama(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(source.path).eos_token == "</s>"
    written = {path: path.stat().st_mtime_ns for path in Path(source.path).iterdir()}
    assert resolve_base(str(gguf_file), cache_dir=tmp_path) == source and "converting" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in Path(source.path).iterdir()} == written
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in written)


def test_a_packaged_gguf_file_is_found(gguf_file: Path, package: Path, tmp_path: Path) -> None:
    (package / "tiny.gguf").write_bytes(gguf_file.read_bytes())
    source = resolve_base("pkg:tiny-models", cache_dir=tmp_path / "cache")
    assert source.name == "pkg:tiny-models" and (Path(source.path) / "config.json").is_file()
    by_name = resolve_base("pkg:tiny-models/tiny.gguf", cache_dir=tmp_path / "cache")
    assert by_name.path == source.path


def test_code_beside_a_gguf_file_is_neither_run_nor_offered(gguf_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(gguf_file.read_bytes())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    named = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    with contextlib.suppress(LitPeftError):
        convert_gguf(folder / "tiny.gguf", tmp_path / "cache")
    assert not asked and not (tmp_path / "ran").exists()


def test_another_content_is_another_conversion(gguf_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Files over a limit are hashed at sampled places, and by their time."""
    from lit_peft.models import gguf

    file = tmp_path / "large.gguf"
    file.write_bytes(gguf_file.read_bytes())
    first = gguf._file_key(file)
    assert gguf._file_key(file) == first
    file.write_bytes(gguf_file.read_bytes()[:-1] + b"\1")
    assert gguf._file_key(file) != first
    monkeypatch.setattr(gguf, "_HASH_WHOLE", 0)
    monkeypatch.setattr(gguf, "_HASH_BLOCK", 16)
    sampled = gguf._file_key(file)
    assert sampled not in (first, "") and gguf._file_key(file) == sampled


def test_gguf_files_that_cannot_be_converted(gguf_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    bad = tmp_path / "bad.gguf"
    whole = gguf_file.read_bytes()
    for content, words in (
        (b"MZ..", "is not a GGUF file"),
        (whole[:400], "its header is incomplete"),
        (whole.replace(b"llama", b"lmama"), "could not be converted"),
        (whole.replace(b"output_norm.weight", b"output_norX.weight"), "has no weights for model.norm.weight"),
    ):
        bad.write_bytes(content)
        with pytest.raises(LitPeftError, match=words):
            convert_gguf(bad, tmp_path / "cache")
    with pytest.raises(LitPeftError, match="LIT_PEFT_CACHE"):
        convert_gguf(gguf_file, bad)
    # Nothing half-converted is left.
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(LitPeftError, match="pip install gguf"):
        convert_gguf(gguf_file, tmp_path / "cache")
