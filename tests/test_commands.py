"""`lit-peft export`, `merge`, `info` and `generate`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from hub_server import hub
from models import batch, close, make, scramble

import lit_peft
from lit_peft import LitPeftError, LoRA, LoRASettings
from lit_peft.cli import main
from lit_peft.commands import export, generate

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def adapter(decoder: Path, folder: Path) -> Any:
    model = lit_peft.attach(transformers.AutoModelForCausalLM.from_pretrained(decoder), LoRASettings(r=4))
    scramble(model)
    lit_peft.save_adapter(model.eval(), folder)
    return model


def test_merge_gives_the_same_logits_with_transformers_alone(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapter(decoder, tmp_path / "adapter")
    folders = ["--base", str(decoder), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert main(["merge", *folders, "--max_shard_size", "20KB"]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        close(merged(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    capsys.readouterr()
    assert main(["merge", *folders]) == 2
    assert main(["merge", *folders[:-1], str(tmp_path / "x"), "--dtype", "float33"]) == 2
    assert "not an empty folder" in (said := capsys.readouterr().err) and "float33" in said
    for option, value in (
        ("dtype", "int64"),
        ("max_shard_size", "5XB"),
        ("max_shard_size", "0GB"),
        ("num_labels", "0"),
    ):
        assert main(["merge", *folders[:-1], str(tmp_path / "x"), f"--{option}", value]) == 2
        assert f"--{option} {value}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["t5", "mt5", "bart", "mbart"])
def test_merged_embeddings_that_were_tied_are_saved(name: str, tmp_path: Path) -> None:
    base = make(name)
    base.save_pretrained(tmp_path / "base")
    model = lit_peft.attach(base, LoRASettings(r=4, target_modules=["decoder.embed_tokens", "lm_head"]))
    scramble(model)
    lit_peft.save_adapter(model, tmp_path / "adapter")
    folders = ["--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter")]
    assert main(["merge", *folders, "--output", str(tmp_path / "merged")]) == 0
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        close(merged(**batch(name)).logits, model.eval()(**batch(name)).logits)


def test_export_from_a_checkpoint(decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = LoRA(base=str(decoder), r=4)
    module.configure_model()
    scramble(module)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    to = ["--ckpt_path", str(tmp_path / "last.ckpt"), "--output", str(tmp_path / "out")]
    # The checkpoint names its method, unless it is of an earlier version.
    former = {key: value for key, value in torch.load(tmp_path / "last.ckpt").items() if key != "module_class"}
    torch.save(former, tmp_path / "former.ckpt")
    assert main(["export", "--ckpt_path", str(tmp_path / "former.ckpt"), *to[2:]]) == 2
    assert "--method" in capsys.readouterr().err
    assert main(["export", *to]) == 0
    again = lit_peft.load_adapter(transformers.AutoModelForCausalLM.from_pretrained(decoder), tmp_path / "out").eval()
    with torch.no_grad():
        close(again(input_ids=IDS).logits, module.model.eval()(input_ids=IDS).logits, 0)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "last.ckpt")]) == 0
    assert f"{lit_peft.trainable_parameters(module):,}" in capsys.readouterr().out


def test_info_is_a_table(decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapter(decoder, tmp_path / "adapter")
    assert main(["info", str(tmp_path / "adapter")]) == 0
    out = capsys.readouterr().out
    for text in ("lora", str(decoder), f"{lit_peft.trainable_parameters(model):,}", "layers.*.self_attn.q_proj.lora_A"):
        assert text in out
    assert main(["info", str(tmp_path)]) == 2


def test_generate_with_adapters_by_name(decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapter(decoder, tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    ids = tokenizer("the film was good", return_tensors="pt").input_ids
    expected = {}
    for name in ("base", "a"):
        chosen = model if name == "a" else transformers.AutoModelForCausalLM.from_pretrained(decoder)
        out = chosen.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        expected[name] = tokenizer.decode(out, skip_special_tokens=True)
    given = ["--base", str(decoder), "--prompt", "the film was good", "--max_new_tokens", "6"]
    for name, more in (("base", []), ("a", ["--adapter", f"a={tmp_path / 'adapter'}", "--use", "a"])):
        capsys.readouterr()
        assert main(["generate", *given, *more]) == 0
        assert capsys.readouterr().out.split() == expected[name].split()
    assert main(["generate", *given, "--use", "b"]) == 2
    # Drawn from the likeliest token alone: the likeliest token.
    for more in (["--top_k", "1"], ["--top_p", "1e-6"]):
        capsys.readouterr()
        assert main(["generate", *given, "--temperature", "9", *more]) == 0
        assert capsys.readouterr().out.split() == expected["base"].split()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", " \n"], "prompt is empty"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "1", "--top_p", "2"], "top_p=2.0"),
        (["--temperature", "1", "--top_k", "-1"], "top_k=-1"),
        (["--top_p", "0.9"], "--top_p has no effect"),
        (["--top_k", "5"], "--top_k has no effect"),
        (["--chat"], "no chat template"),
        (["--use", "a"], "--use a"),
        (["--adapter", "a=nowhere"], "adapter_config.json"),
    ],
    ids=str,
)
def test_generate_says_what_is_wrong_before_it_loads_the_model(
    given: list[str], words: str, decoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lit_peft.commands.generate.load_base_from_options", lambda options: pytest.fail("the model is loaded")
    )
    assert main(["generate", "--base", str(decoder), "--prompt", "the film", *given]) == 2
    assert words in capsys.readouterr().err


def test_generate_needs_a_model_that_generates_and_a_prompt_with_tokens(
    encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--base", str(encoder), "--prompt", "the film"]) == 2
    assert "cannot generate text" in capsys.readouterr().err
    with pytest.raises(LitPeftError, match=r"'\?\?' has no tokens"):
        generate._encoded(lambda *_, **__: {"input_ids": torch.zeros(1, 0)}, "??", chat=False)


def test_a_revision_is_the_tokenizers_and_the_configurations_too(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []
    for kind in (transformers.AutoTokenizer, transformers.AutoConfig):

        def recorded(*given: Any, real: Any = kind.from_pretrained, name: str = kind.__name__, **more: Any) -> Any:
            asked.append((name, more.get("revision")))
            return real(*given, **more)

        monkeypatch.setattr(kind, "from_pretrained", recorded)
    adapter(decoder, tmp_path / "adapter")
    base = ["--base", str(decoder), "--revision", "v1"]
    commands = {
        "generate": [*base, "--prompt", "the", "--max_new_tokens", "1"],
        "merge": [*base, "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")],
    }
    for name, given in commands.items():
        asked.clear()
        assert main([name, *given]) == 0
        assert {kind for kind, _ in asked} == {"AutoTokenizer", "AutoConfig"}
        assert {revision for kind, revision in asked if kind == "AutoTokenizer"} == {"v1"}, name
        assert ("AutoConfig", "v1") in asked
    asked.clear()
    assert LoRA(base=str(decoder), revision="v1").tokenizer is not None
    (tmp_path / "a.txt").write_text("the film was good\n" * 3)
    model = ["--model", "LoRA", "--model.base", str(decoder), "--model.revision", "v1"]
    data = ["--data", "CausalLMData", "--data.train", str(tmp_path / "a.txt"), "--data.validation_fraction", "0"]
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    assert main(["fit", *model, *data, "--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]) == 0
    tokenizers = [revision for kind, revision in asked if kind == "AutoTokenizer"]
    assert len(tokenizers) > 1 and set(tokenizers) == {"v1"}
    with pytest.raises(LitPeftError, match=r"data\.revision .* data\.tokenizer"):
        lit_peft.CausalLMData(base="a", tokenizer="b", revision="v1")


def test_generate_switches_adapters_between_prompts(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter(decoder, tmp_path / "adapter")
    lines = iter(("the film was", "/base", "the film was", "/use yours", "/use mine", "the film was", ""))
    said: list[str] = []

    def next_line(_: str) -> str:
        said.append(capsys.readouterr().out.strip())
        return next(lines)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", next_line)
    given = ["--base", str(decoder), "--adapter", f"mine={tmp_path / 'adapter'}", "--max_new_tokens", "4"]
    assert main(["generate", *given]) == 0
    start, with_adapter, switched, of_base, unknown, back, again = said
    assert "mine" in start and with_adapter == again != of_base and of_base
    assert switched == back == "" and "'yours'" in unknown


@pytest.mark.heavy
def test_generate_is_interactive_on_a_terminal(decoder: Path, tmp_path: Path) -> None:
    import os
    import pty
    import select
    import time

    adapter(decoder, tmp_path / "adapter")
    terminal, side = pty.openpty()
    command = [sys.executable, "-c", "from lit_peft.cli import main; raise SystemExit(main())", "generate"]
    given = ["--base", str(decoder), "--adapter", f"mine={tmp_path / 'adapter'}", "--max_new_tokens", "4"]
    process = subprocess.Popen([*command, *given], stdin=side, stdout=side, stderr=side)
    os.close(side)
    said = ""

    def read(until: str) -> str:
        nonlocal said
        end = time.monotonic() + 120
        while until not in said and time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                said += os.read(terminal, 4096).decode()
        before, _, said = said.partition(until)
        return before

    assert "mine" in read("\n> ")
    answers = []
    for line in ("the film was", "/base", "the film was", "/use yours", "/use mine", "the film was"):
        os.write(terminal, f"{line}\n".encode())
        # Below the line as the terminal shows it, and what transformers may have to warn of.
        answers.append(read("\n> ").replace("\r", "").strip().partition("\n")[2].rpartition("\n")[2])
    os.write(terminal, b"\x04")  # the end of the input, as an empty line
    assert process.wait(60) == 0
    with_adapter, switched, of_base, unknown, back, again = answers
    assert with_adapter == again != of_base and of_base and switched == back == "" and "'yours'" in unknown
    os.close(terminal)


def test_code_that_a_base_brings_does_not_run(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json
    import shutil

    base = tmp_path / "base"
    shutil.copytree(decoder, base)
    config = json.loads((base / "config.json").read_text())
    places = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": places}))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    more = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps({**tokenizer, **more}))
    with pytest.raises(lit_peft.LitPeftError, match=r"evil|custom code"):
        LoRA(base=str(base)).configure_model()
    assert main(["generate", "--base", str(base), "--prompt", "the"]) == 2
    # Its tokenizer's neither.
    shutil.copy(decoder / "config.json", base / "config.json")
    assert main(["generate", "--base", str(base), "--prompt", "the", "--max_new_tokens", "1"]) in (0, 2)
    capsys.readouterr()
    assert not (tmp_path / "ran").exists()


def test_push_and_pull(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    folder = tmp_path / "adapter"
    adapter(decoder, folder)
    (folder / "notes.txt").write_text("not the adapter's")
    with hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        file = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", file)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        assert main(["push", str(folder), "me/mine", "--private"]) == 0
        assert main(["push", str(folder), "me/mine"]) == 0
        assert server.private == {"me/mine"}
        assert main(["pull", "me/mine", str(tmp_path / "again")]) == 0
        # Files of ours alone, to the bit, without what the client keeps for itself.
        pulled = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
        assert pulled == server.files["me/mine"]
        assert pulled == {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "notes.txt"}
        lit_peft.load_adapter(transformers.AutoModelForCausalLM.from_pretrained(decoder), tmp_path / "again")
        assert main(["push", str(tmp_path), "me/mine"]) == 2
        assert main(["pull", "me/other", str(tmp_path / "other")]) == 2
        assert "404" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_the_module_has_adapters_by_name(decoder: Path, tmp_path: Path) -> None:
    module = LoRA(base=str(decoder), r=4)
    module.configure_model()
    scramble(module)
    module.eval()
    with torch.no_grad():
        trained = module(input_ids=IDS).logits
        module.save_adapter(tmp_path / "adapter")
        module.add_adapter("new", LoRASettings(r=2))
        with module.disable_adapter():
            close(module(input_ids=IDS).logits, module(input_ids=IDS).logits, 0)
            base = module(input_ids=IDS).logits
        close(module(input_ids=IDS).logits, base)
        module.load_adapter(tmp_path / "adapter", "again")
        close(module(input_ids=IDS).logits, trained, 0)
        module.set_adapter("default")
        module.merge()
        close(module(input_ids=IDS).logits, trained)
        module.unmerge()
        close(module.merge_and_unload()(input_ids=IDS).logits, trained)


def test_a_checkpoint_does_not_say_whom_to_trust(decoder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(decoder, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "code.Config"}}))
    (base / "code.py").write_text(
        f"import pathlib, transformers\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class Config(transformers.LlamaConfig):\n    pass\n"
    )
    file = tmp_path / "x.ckpt"
    settings = {"base": str(base), "trust_remote_code": True}
    torch.save({"state_dict": {}, "hyper_parameters": settings}, file)
    with pytest.raises(LitPeftError, match="the file lacks it"):
        export.run(["--ckpt_path", str(file), "--output", str(tmp_path / "out"), "--method", "LoRA"])
    assert not (tmp_path / "ran").exists()


def test_train_save_load_continue_merge(decoder: Path, tmp_path: Path) -> None:
    """What was trained goes on where it was, in a plain loop, and merged it is a transformers model with its logits."""

    def steps(model: Any, count: int) -> list[float]:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.SGD(trained, lr=1.0), []
        for _ in range(count):
            loss = model(input_ids=IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(decoder).eval()

    torch.manual_seed(3)
    whole = lit_peft.attach(base(), LoRASettings(r=4))
    state = {name: p.clone() for name, p in whole.named_parameters() if p.requires_grad}
    expected = steps(whole, 6)
    half = lit_peft.attach(base(), LoRASettings(r=4))
    with torch.no_grad():
        for name, value in state.items():
            half.get_parameter(name).copy_(value)
    losses = steps(half, 3)
    lit_peft.save_adapter(half, tmp_path / "half")
    again = lit_peft.load_adapter(base(), tmp_path / "half")
    assert lit_peft.trainable_parameters(again) == lit_peft.trainable_parameters(whole)
    assert losses + steps(again, 3) == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < expected[0] - 0.1
    lit_peft.save_adapter(again, tmp_path / "adapter")
    folders = ["--base", str(decoder), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert main(["merge", *folders]) == 0
    script = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r}).eval()\n"
        f"out = model(input_ids=torch.tensor({IDS.tolist()})).logits.detach()\n"
        f"torch.save(out, {str(tmp_path / 'logits.pt')!r})\n"
        "assert not [name for name in sys.modules if name.startswith(('lit_peft', 'peft'))]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    with torch.no_grad():
        close(torch.load(tmp_path / "logits.pt"), again(input_ids=IDS).logits)
