"""`lit-peft serve` over loopback: concurrent requests, each answered as its adapter alone would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import scramble

import lit_peft
from lit_peft import LoRASettings, PromptTuningSettings
from lit_peft.cli import main

pytest.importorskip("litserve", reason="serving is tested where the extra `serve` is installed")
PROMPTS = ["the film was good", "a bad story", "the awful acting of this", "it is great", "this"]
SETTINGS: dict[str, Any] = {
    "poems": LoRASettings(r=4),
    "dora": LoRASettings(r=2, use_dora=True, target_modules="all-linear"),
    "prompt": PromptTuningSettings(num_virtual_tokens=3, prompt_tuning_init="RANDOM"),
}


def post(url: str, **content: Any) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as problem:
        return problem.code, json.load(problem)


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from lit_peft.cli import main; main()", "serve", "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--accelerator", "cpu", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as a,
            ):
                if a.status == 200:
                    break
            assert server.poll() is None, server.communicate()[0].decode()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/generate"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.heavy
def test_concurrent_requests_get_what_their_adapters_alone_say(decoder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    expected = {}
    for name in (None, *SETTINGS):
        model = transformers.AutoModelForCausalLM.from_pretrained(decoder)
        if name is not None:
            torch.manual_seed(0)
            scramble(lit_peft.attach(model, SETTINGS[name]))
            lit_peft.save_adapter(model, tmp_path / name)
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                out = model.eval().generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
            expected[name, prompt] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(expected.values())) > 10
    adapters = [part for name in SETTINGS for part in ("--adapter", f"{name}={tmp_path / name}")]
    with serving("--base", str(decoder), *adapters, "--max_new_tokens", "6", "--batch_timeout", "0.1") as url:
        with ThreadPoolExecutor(20) as pool:
            asked = {key: pool.submit(post, url, adapter=key[0], prompt=key[1]) for key in expected}
            wrong = pool.submit(post, url, adapter="pems", prompt="it")
            none = pool.submit(post, url, adapter="poems")
            misspelt = pool.submit(post, url, adaptor="poems", prompt="it")
            short = pool.submit(post, url, adapter="poems", prompt=PROMPTS[0], max_new_tokens=1)
        for (name, prompt), answer in asked.items():
            assert answer.result() == (200, {"text": expected[name, prompt], "adapter": name})
        assert wrong.result()[0] == 422 and "poems" in wrong.result()[1]["error"]
        assert none.result()[0] == 422
        assert misspelt.result()[0] == 422 and "adaptor" in str(misspelt.result()[1])
        assert len(short.result()[1]["text"].split()) <= 1
        assert post(url, prompt=" ".join(["film"] * 5000))[0] == 422


def test_what_cannot_be_served_is_said_at_once(decoder: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["serve", "--base", str(decoder), "--adapter", f"a={tmp_path}"]) == 2
    assert main(["serve", "--base", str(decoder), "--max_batch_size", "0"]) == 2
    assert main(["serve", "--base", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "adapter_config.json" in said and "max_batch_size" in said and "config.json" in said
    for option, value in {"port": "65536", "timeout": "0", "batch_timeout": "nan", "max_new_tokens": "-1"}.items():
        assert main(["serve", "--base", str(decoder), f"--{option}", value]) == 2
        said = capsys.readouterr().err
        assert option in said and value in said


def test_a_server_of_ones_own_needs_no_more_than_a_base(decoder: Path) -> None:
    from lit_peft.serving import AdapterAPI, Request

    api = AdapterAPI(str(decoder), {}, max_new_tokens=2)
    api.setup("cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder)
    ids = api.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    expected = api.tokenizer.decode(out, skip_special_tokens=True)
    assert api.predict(Request(prompt=PROMPTS[0])) == {"text": expected, "adapter": None}
    # A text without tokens fails itself alone.
    none, some = api.predict([Request(prompt=" "), Request(prompt=PROMPTS[0])])
    assert "no tokens" in none["error"] and some["text"] == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantisation": "int8"}, "'quantisation'.*'quantization'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_timeout": -1.0}, "batch_timeout=-1.0"),
    ],
    ids=str,
)
def test_a_server_of_ones_own_is_told_what_it_cannot_take(options: dict[str, Any], words: str) -> None:
    from lit_peft.serving import AdapterAPI

    with pytest.raises(lit_peft.LitPeftError, match=words):
        AdapterAPI("x", {}, **options)
