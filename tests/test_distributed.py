"""Two processes train what one trains; their checkpoints go from one world size to another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import WORDS
from distributed_run import accumulate, train
from models import METHODS
from safetensors.torch import load_file

from lit_peft import AdapterP
from lit_peft.cli import main
from lit_peft.training.tensor_parallel import split_matrices
from lit_peft.util.errors import LitPeftError
from lit_peft.util.memory import process_memory


def two(strategy: str, out: Path, base: Path, data: Path, single: Path, task: str, *methods: str) -> None:
    script = Path(__file__).with_name("distributed_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [strategy, str(out), str(base), str(data), str(single), task, *methods]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-6000:]


def results(out: Path, method: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(out / f"{method}.pt", weights_only=True)
    return found


def alike(one: dict[str, Any], other: dict[str, Any], last: int) -> None:
    assert one["losses"][-last:] == pytest.approx(other["losses"][-last:], abs=1e-5)
    assert set(one["trained"]) == set(other["trained"])
    for name, value in one["trained"].items():
        torch.testing.assert_close(value, other["trained"][name], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def base(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder without dropout, which each process would draw for itself."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def single(base: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single")
    for method in METHODS:
        train("auto", method, str(base), str(reviews), out, 4, None)
    train("auto", "LoRA", str(base), str(reviews), out / "half", 2, None)
    accumulate("auto", str(base), out)
    return out


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.heavy)])
def test_two_processes_train_what_one_trains(
    strategy: str, single: Path, base: Path, reviews: Path, tmp_path: Path
) -> None:
    two(strategy, tmp_path, base, reviews, single, "sequence_classification", *METHODS)
    for method in METHODS:
        one, both = results(single, method), results(tmp_path, method)
        assert len(set(one["losses"])) == 4
        alike(both, one, last=4)
        assert both["held"] == 1 if strategy == "ddp" else both["held"] < 0.6
        names = sorted(path.name for path in (single / method / "last").iterdir())
        assert names == sorted(path.name for path in (tmp_path / method / "last").iterdir())
        for weights in (single / method / "last").glob("*.safetensors"):
            stored, ours = load_file(weights), load_file(tmp_path / method / "last" / weights.name)
            assert stored and set(stored) == set(ours)
            for name, value in stored.items():
                torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5)
        files = [torch.load(run / f"{method}.ckpt", weights_only=True) for run in (single, tmp_path)]
        assert set(files[0]["state_dict"]) == set(files[1]["state_dict"]) and set(files[0]) == set(files[1])
    # Gradients of two batches in each of two processes are those of a single large batch.
    one, both = (torch.load(run / "gradients.pt", weights_only=True) for run in (single, tmp_path))
    assert one.keys() == both.keys() and len(one) > 4
    for name, value in one.items():
        assert (both[name] - value).norm() <= 1e-5 * value.norm(), name
    # A checkpoint of one process goes on in two, and one of two in one.
    alike(results(tmp_path / "resumed", "LoRA"), results(single, "LoRA"), last=2)
    train("auto", "LoRA", str(base), str(reviews), tmp_path / "one", 4, tmp_path / "half" / "LoRA.ckpt")
    alike(results(tmp_path / "one", "LoRA"), results(single, "LoRA"), last=2)


@pytest.mark.heavy
def test_matrices_split_over_two_processes_train_what_one_trains(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    single, both = tmp_path / "single", tmp_path / "both"
    for method in METHODS:
        train("auto", method, str(decoder), str(reviews), single, 4, None, "causal_lm")
    train("auto", "LoRA", str(decoder), str(reviews), single / "half", 2, None, "causal_lm")
    two("tensor_parallel", both, decoder, reviews, single, "causal_lm", *METHODS)
    for method in METHODS:
        one, other = results(single, method), results(both, method)
        assert len(set(one["losses"])) == 4
        alike(other, one, last=4)
    one = results(single, "LoRA")
    # Half of every matrix of the layers; embeddings and head are whole.
    assert len(one["trained"]) == 28 and results(both, "LoRA")["held"] < 0.7
    alike(results(both / "resumed", "LoRA"), one, last=2)
    train("auto", "LoRA", str(decoder), str(reviews), both / "one", 4, both / "half" / "LoRA.ckpt", "causal_lm")
    alike(results(both / "one", "LoRA"), one, last=2)


def test_an_adapter_on_a_part_of_a_matrix_is_refused(decoder: Path) -> None:
    class Mesh:
        def size(self) -> int:
            return 2

    module = AdapterP(str(decoder), placement="llm_adapters", target_modules=["up_proj"])
    module.configure_model()
    with pytest.raises(LitPeftError, match="up_proj would see only a part of its features"):
        split_matrices(module.model, Mesh())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of very different lengths, so that each process has another number of supervised tokens."""
    file = tmp_path_factory.mktemp("uneven") / "texts.jsonl"
    words = [*WORDS, *reversed(WORDS)]
    rows = [json.dumps({"text": " ".join(words[at % 7 : at % 7 + 2 + at * 5 % 29])}) for at in range(32)]
    file.write_text("\n".join(dict.fromkeys(rows)))
    return file


@pytest.mark.heavy
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_is_the_mean_over_all_tokens_of_all_processes(
    accumulate: int, decoder: Path, uneven: Path, tmp_path: Path
) -> None:
    single, both, strategy = tmp_path / "single", tmp_path / "both", f"ddp/{accumulate}"
    for out, steps in ((single, 4), (single / "half", 2)):
        train(f"auto/{accumulate}", "LoRA", str(decoder), str(uneven), out, steps, None, "causal_lm")
    two(strategy, both, decoder, uneven, single, "causal_lm", "LoRA")
    alike(results(both, "LoRA"), results(single, "LoRA"), last=4)
    alike(results(both / "resumed", "LoRA"), results(single, "LoRA"), last=2)


STRATEGIES = Path(__file__).parents[1] / "configs" / "strategies"
ON_CPU = ["ddp", "fsdp2", "tensor_parallel"]


@pytest.mark.parametrize("file", sorted(STRATEGIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_strategy_is_read(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-peft"])
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(STRATEGIES.parent / "causal_lora.yaml"), "--config", str(file), "--print_config"])
    assert done.value.code in (0, None)
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["strategy"] == yaml.safe_load(file.read_text())["trainer"]["strategy"] | {
        "init_args": shown["trainer"]["strategy"]["init_args"]
    }
    assert shown["model"]["class_path"].endswith("LoRA") and shown["trainer"]["max_steps"] == 60


@pytest.mark.heavy
def test_the_command_runs_every_strategy_in_two_processes(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    config = {
        "model": {"class_path": "LoRA", "init_args": {"base": str(decoder), "learning_rate": 1e-2}},
        "data": {"class_path": "CausalLMData", "init_args": {"train": str(reviews), "limit_train": 32}},
        "trainer": {"max_epochs": 2, "enable_progress_bar": False, "logger": None},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    code = (
        "import sys\n"
        "from lit_peft.cli import main\n"
        "config, strategies, out, *names = sys.argv[1:]\n"
        "for name in names:\n"
        "    size = '16' if name == 'tensor_parallel' else '8'\n"
        "    configs = ['--config', config, '--config', f'{strategies}/{name}.yaml', '--data.batch_size', size]\n"
        "    cpus = ['--trainer.accelerator', 'cpu', '--trainer.devices', '2']\n"
        "    folder = ['--trainer.default_root_dir', f'{out}/{name}']\n"
        "    assert main(['fit', *configs, *cpus, *folder]) == 0\n"
    )
    (tmp_path / "run.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "run.py"), str(tmp_path / "config.yaml"), str(STRATEGIES), str(tmp_path), *ON_CPU]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("next:  lit-peft test") == 3
    adapters = [load_file(tmp_path / name / "version_0/adapter/adapter_model.safetensors") for name in ON_CPU]
    for adapter in adapters[1:]:
        assert set(adapter) == set(adapters[0])
        for name, value in adapter.items():
            torch.testing.assert_close(value, adapters[0][name], atol=1e-5, rtol=1e-5)


@pytest.mark.heavy
@pytest.mark.skipif(not process_memory("RssAnon"), reason="memory is read from /proc")
def test_no_process_holds_the_whole_base(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 8}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=500, **shape)).save_pretrained(tmp_path)
    script = Path(__file__).with_name("sharded_build.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    own, base = map(int, done.stdout.split())
    # A quarter, and a layer at a time.
    assert own < 0.6 * base


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["fsdp", "deepspeed_zero2", "deepspeed_zero3"])
def test_strategies_of_gpus_train_and_resume(name: str, decoder: Path, reviews: Path, tmp_path: Path) -> None:
    if name.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    settings = ["--model", "LoRA", "--model.base", str(decoder), "--data", "CausalLMData", "--data.train", str(reviews)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        str(Path(sys.executable).with_name("lit-peft")),
        "fit",
        *settings,
        "--config",
        str(STRATEGIES / f"{name}.yaml"),
    ]
    command += ["--trainer.devices", "2", "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", "last"]
    for epochs in ("1", "2"):
        done = subprocess.run([*command, "--trainer.max_epochs", epochs], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-6000:]
        assert "train_loss" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["version_0"]
