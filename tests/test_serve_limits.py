"""What a server refuses: too long, too large, not text; and a failed batch, of which only the bad requests fail."""

from __future__ import annotations

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import DECODERS, SEQ2SEQS, make, scramble

import lit_peft
from lit_peft import LoRASettings, PrefixTuningSettings, PromptTuningSettings, PTuningV2Settings
from lit_peft.methods.prompt_room import prompt_room
from lit_peft.models.architectures import max_positions

pytest.importorskip("litserve", reason="serving is tested where the extra `serve` is installed")
from test_serve import post, serving

from lit_peft.serving import AdapterAPI, BodyLimit, Request, make_server

POSITIONS = 64
ADAPTERS: dict[str, Any] = {
    "lora": LoRASettings(r=4),
    "prefix": PrefixTuningSettings(num_virtual_tokens=5, prefix_projection=False),
    "prompt": PromptTuningSettings(num_virtual_tokens=7, prompt_tuning_init="RANDOM"),
}


@pytest.fixture(scope="module")
def gpt2(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a table of 64 positions, and three adapters beside it."""
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copytree(tokenizer_folder, folder / "base")
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 40, "n_positions": POSITIONS}
    config = transformers.AutoConfig.for_model("gpt2", **shape, bos_token_id=4, eos_token_id=None, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    for name, settings in ADAPTERS.items():
        scramble(lit_peft.attach(model, settings))
        lit_peft.save_adapter(model, folder / name)
        lit_peft.detach(model)
    return folder


def made_api(gpt2: Path, **options: Any) -> AdapterAPI:
    adapters = {name: str(gpt2 / name) for name in ADAPTERS}
    api = AdapterAPI(str(gpt2 / "base"), adapters, **{"max_new_tokens": 6, **options})
    api.setup("cpu")
    return api


@pytest.fixture(scope="module")
def api(gpt2: Path) -> AdapterAPI:
    return made_api(gpt2)


def request(tokens: int, adapter: str | None = "lora", **fields: Any) -> Request:
    return Request(prompt=" ".join(["film"] * tokens), adapter=adapter, **fields)


@pytest.mark.parametrize(("adapter", "virtual"), [(None, 0), ("lora", 0), ("prefix", 5), ("prompt", 7)])
def test_a_prompt_may_fill_the_positions_that_new_and_virtual_tokens_leave(
    adapter: str | None, virtual: int, api: AdapterAPI
) -> None:
    longest = POSITIONS - 6 - virtual
    fits, too_long, shorter = api.predict(
        [request(longest, adapter), request(longest + 1, adapter), request(longest + 4, adapter, max_new_tokens=2)]
    )
    assert fits.keys() == shorter.keys() == {"text", "adapter"}
    assert too_long == {
        "error": f"The prompt has {longest + 1} tokens; with max_new_tokens=6, the model's positions allow at most "
        f"{longest}.",
        "status": 422,
    }
    assert api.encode_response(too_long).status_code == 422


def test_requests_that_do_not_fit_into_one_batch_get_what_they_get_alone(api: AdapterAPI) -> None:
    """A long prompt with few new tokens, and a short one with many: together they would need more positions."""
    requests = [request(60, max_new_tokens=4), request(3), request(5, None), request(59, None, max_new_tokens=1)]
    alone = [api.predict([each])[0] for each in requests]
    assert all("text" in answer for answer in alone)
    assert api.predict(requests) == alone


class Fails:
    """A `generate` that fails where a prompt has a forbidden token, or a batch has too many rows."""

    def __init__(self, model: Any, forbidden: int, rows: int) -> None:
        self.model, self.forbidden, self.rows, self.sizes = model, forbidden, rows, []

    def __call__(self, **inputs: Any) -> Any:
        self.sizes.append(len(inputs["input_ids"]))
        if (inputs["input_ids"] == self.forbidden).any():
            raise IndexError("index out of range in self")
        if len(inputs["input_ids"]) > self.rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return type(self.model).generate(self.model, **inputs)


def test_of_a_batch_that_fails_only_the_bad_requests_do(gpt2: Path, caplog: pytest.LogCaptureFixture) -> None:
    api = made_api(gpt2)
    bad = api.tokenizer("awful").input_ids[0]
    requests = [Request(prompt=text, adapter="prefix") for text in ("it", "a good film", "the awful story", "this was")]
    expected = [api.predict([each])[0] for each in requests]
    api.model.generate = fails = Fails(api.model, bad, rows=8)
    answers = api.predict(requests)
    assert [answers[place] for place in (0, 1, 3)] == [expected[place] for place in (0, 1, 3)]
    assert answers[2] == {"error": "The model failed on this request (index out of range in self).", "status": 500}
    assert api.encode_response(answers[2]).status_code == 500
    assert fails.sizes == [4, 2, 2, 1, 1]
    assert "A batch of 4 requests failed" in caplog.text
    # Too large a batch is divided until it fits.
    api.model.generate = fails = Fails(api.model, -1, rows=1)
    assert api.predict(requests) == expected and fails.sizes == [4, 2, 1, 1, 2, 1, 1]
    assert lit_peft.active_adapter(api.model) is None


def test_what_a_request_cannot_be_answered_for_is_said(gpt2: Path, api: AdapterAPI, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a prompt of this size must not be tokenized")

    small = made_api(gpt2, max_prompt_tokens=10)
    said = small.predict([request(11), request(3, "sonnets"), Request(prompt=" \n ")])
    assert [answer["status"] for answer in said] == [422] * 3
    assert said[0]["error"] == "The prompt has 11 tokens; the maximum is 10."
    assert "'sonnets'" in said[1]["error"] and "'lora'" in said[1]["error"]
    assert "no tokens" in said[2]["error"]
    monkeypatch.setattr(small, "tokenizer", refuse)
    (answer,) = small.predict([request(2_000_000)])
    assert answer["status"] == 422 and "9999999 characters; the maximum is 320 (10 tokens)" in answer["error"]
    (answer,) = small.predict([request(3)])
    assert "The tokenizer cannot read the prompt (a prompt of this size" in answer["error"]


def test_a_server_whose_answers_leave_no_position_does_not_start(gpt2: Path) -> None:
    with pytest.raises(lit_peft.LitPeftError, match=r"--max_new_tokens 57 .* \(adapter: prompt\): the model has 57 "):
        made_api(gpt2, max_new_tokens=57)


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQS])
def test_a_model_computes_as_many_positions_as_it_is_said_to_have(name: str) -> None:
    """Those with a table cannot compute more; those with rotary positions were not trained for more."""
    model = make(name)
    room = prompt_room(model, None)
    expected = None if name.startswith(("t5", "mt5", "bloom")) or name == "falcon serial" else 64
    assert room.prompt == room.answer == expected and room.is_shared == (name in DECODERS)
    if expected is None:
        assert room.longest_prompt(10**6) is None and room.fits(10**6, 10**6)
        return
    assert room.longest_prompt(4) == (60 if room.is_shared else 64)
    ids = torch.ones(1, expected, dtype=torch.long)
    model(input_ids=ids, **({} if room.is_shared else {"decoder_input_ids": ids}))
    if name.startswith(("gpt2", "gptj", "opt", "bart", "mbart", "marian")):
        with pytest.raises(IndexError):
            model(
                input_ids=torch.ones(1, expected + 1, dtype=torch.long),
                **({} if room.is_shared else {"decoder_input_ids": ids}),
            )


def test_virtual_tokens_take_positions_where_they_stand() -> None:
    model = make("bart")
    lit_peft.add_adapter(model, "prefix", PTuningV2Settings(num_virtual_tokens=5))
    lit_peft.add_adapter(model, "prompt", PromptTuningSettings(num_virtual_tokens=7, prompt_tuning_init="RANDOM"))
    prefix, prompt = prompt_room(model, "prefix"), prompt_room(model, "prompt")
    assert (prefix.prompt, prefix.answer) == (64, 59) and (prompt.prompt, prompt.answer) == (57, 64)
    assert prefix.fits(64, 59) and not prefix.fits(64, 60) and not prompt.fits(58, 1)
    settings = PromptTuningSettings(num_virtual_tokens=7, prompt_tuning_init="RANDOM", prompt_token_id=60)
    model = lit_peft.add_adapter(make("gpt2"), "placeholders", settings)
    assert prompt_room(model, "placeholders").prompt == 64
    model = lit_peft.add_adapter(model, "unshifted", PTuningV2Settings(num_virtual_tokens=5, positions="adapterhub"))
    assert prompt_room(model, "unshifted").prompt == 64


def test_scaled_rotary_positions_have_no_limit() -> None:
    config = make("llama").config
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert max_positions(transformers.AutoModelForCausalLM.from_config(config)) is None


# ----------------------------------------------------------------------------------------------------------- HTTP


def send(app: Any, body: bytes, chunk: int = 1 << 16, path: str = "/generate") -> tuple[int, bytes, int]:
    """POST a body to an ASGI application; return status, answer, and how many bytes of the body were read."""
    parts = [body[at : at + chunk] for at in range(0, len(body), chunk)] or [b""]
    sent: list[Any] = []
    read = 0

    async def receive() -> Any:
        nonlocal read
        part = parts.pop(0)
        read += len(part)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def answer(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers}
    rest = {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("x", 80)}
    asyncio.run(app({**scope, **rest, "client": ("x", 1)}, receive, answer))
    return sent[0]["status"], b"".join(part.get("body", b"") for part in sent[1:]), read


def test_a_body_is_passed_on_whole_or_refused() -> None:
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    app = BodyLimit(echo, 100)
    assert send(app, b"x" * 100, 7)[:2] == (200, b"x" * 100)
    assert send(app, b"")[:2] == (200, b"")
    status, said, read = send(app, b"x" * 101, 7)
    # The client is heard to the end, so that it reads the answer; but not forever.
    assert (status, read) == (413, 101) and b"larger than 100 bytes" in said
    status, _, read = send(app, b"x" * 100_000, 50)
    assert status == 413 and read < 7_000


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"prompt": "film \\ud800"}', 422, "prompt is not valid Unicode"),
        (b'{"prompt": "film", "\\udc00": 1}', 422, "A name is not valid Unicode"),
        (b'{"prompt": "film", "adaptor": "a"}', 422, "no field 'adaptor': a request has prompt, adapter, max_new_"),
        (b'{"prompt": "film", "max_new_tokens": NaN}', 422, "max_new_tokens=nan"),
        (b'{"prompt": "film", "max_new_tokens": 0}', 422, "max_new_tokens=0"),
        (b'{"prompt": ""}', 422, "prompt=''"),
        (b'{"adapter": "a"}', 422, "prompt is missing"),
        (b"[1]", 422, "body=[1]"),
        (b"{", 422, "not valid JSON"),
        (b"", 422, "body is missing"),
        (b'{"prompt": "\xff"}', 400, "parsing the body"),
        (b"[" * 100_000, 400, "parsing the body"),
        (b'{"prompt": "' + b"film " * 2_000_000 + b'"}', 413, "larger than 1638400 bytes"),
    ],
    ids=[
        "surrogate",
        "field",
        "unknown",
        "nan",
        "zero",
        "empty",
        "none",
        "list",
        "json",
        "void",
        "utf8",
        "deep",
        "10MB",
    ],
)
def test_what_is_not_a_request_gets_one_sentence(gpt2: Path, body: bytes, status: int, words: str) -> None:
    app = make_server(AdapterAPI(str(gpt2 / "base"), {}), accelerator="cpu", devices=1).app
    found, said, _ = send(app, body)
    assert found == status, said
    answer = json.loads(said)
    assert list(answer) == ["error"] and words in answer["error"] and "\n" not in answer["error"]


@pytest.mark.heavy
def test_of_42_requests_only_the_three_too_long_ones_fail(gpt2: Path) -> None:
    """Before, each of the three failed its whole batch: up to 39 of the others got status 500."""
    prompts = [" ".join(["film"] * (3 + number % 5)) for number in range(39)]
    prompts += [" ".join(["film"] * length) for length in (62, 70, 500)]
    arguments = ["--adapter", f"lora={gpt2 / 'lora'}", "--max_new_tokens", "6", "--batch_timeout", "0.3"]
    with serving("--base", str(gpt2 / "base"), *arguments) as url:
        with ThreadPoolExecutor(42) as pool:
            answers = list(pool.map(lambda prompt: post(url, prompt=prompt, adapter="lora"), prompts))
        assert [status for status, _ in answers] == [200] * 39 + [422] * 3
        assert post(url, prompt="film " * 2_000_000)[0] == 413
        assert post(url, prompt="film \ud800")[0] == 422
        assert post(url, prompt="film \0", max_new_tokens=10**30)[0] == 200
