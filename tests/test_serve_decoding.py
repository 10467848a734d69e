"""What the server's answers are made of: sampling, text from tokens, and batches that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import make

pytest.importorskip("litserve", reason="serving is tested where the extra `serve` is installed")
from test_serve_limits import Fails, gpt2, made_api, send

import lit_peft
from lit_peft.serving.api import AdapterAPI
from lit_peft.serving.completions import Part, Usage
from lit_peft.serving.decoding import Decoder, Row
from lit_peft.serving.errors import Refusal
from lit_peft.serving.generate_request import Request
from lit_peft.serving.http import make_server
from lit_peft.serving.openai_requests import ChatRequest, CompletionRequest
from lit_peft.serving.sampling import choose_tokens
from lit_peft.serving.text_stream import TextStream

__all__ = ["gpt2"]  # a fixture


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.05)])
def test_tokens_are_drawn_from_the_distribution_of_transformers(temperature: float, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 12) * 2
    warpers = transformers.LogitsProcessorList(
        [transformers.TemperatureLogitsWarper(temperature), transformers.TopPLogitsWarper(top_p)]
    )
    expected = warpers(torch.tensor([[0]]), logits.clone()).softmax(-1)[0]
    draws = 20_000
    numbers = [(draw + 0.5) / draws for draw in range(draws)]
    tokens = choose_tokens(logits.expand(draws, -1), [temperature] * draws, [top_p] * draws, numbers)
    torch.testing.assert_close(tokens.bincount(minlength=12) / draws, expected, atol=2e-4, rtol=0)


def test_each_row_is_drawn_by_its_own_settings() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4, -1)
    tokens = choose_tokens(logits, [0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.5], [0.99, 0.9999, 0.0, 0.9999])
    assert tokens.tolist() == [2, 0, 2, 2]
    impossible = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert choose_tokens(impossible, [1.0], [1.0], [1 - 1e-9]).tolist() == [0]


class Bytes:
    """A tokenizer with one token for each byte."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界 🙂!", "🙂"])
def test_only_whole_characters_are_sent(text: str) -> None:
    stream = TextStream(Bytes())
    parts = [stream.add(byte) for byte in text.encode()]
    assert "".join(parts) + stream.finish() == text
    assert all("\ufffd" not in part for part in parts)
    # Half a character at the end is shown as such.
    stream = TextStream(Bytes())
    parts = [stream.add(byte) for byte in "a🙂".encode()[:-1]]
    assert parts == ["a", "", "", ""] and stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["llo w"], "he"),
        (["x", "r"], "hello wo"),
        (["world", "o w"], "hell"),
        (["worlds"], "hello world"),
        (["h"], ""),
    ],
)
def test_nothing_of_a_stop_text_is_sent(stops: list[str], expected: str) -> None:
    stream = TextStream(Bytes(), stops)
    sent = ""
    for byte in b"hello world":
        sent += stream.add(byte)
        assert expected.startswith(sent)
        if stream.is_stopped:
            break
    assert sent + stream.finish() == expected
    assert stream.is_stopped == (expected != "hello world")


def answers(api: Any, *requests: Any) -> list[list[Any]]:
    """The messages for requests that arrive together."""
    found: list[list[Any]] = [[] for _ in requests]
    api.complete([(request, messages.append) for request, messages in zip(requests, found, strict=True)])
    return found


def completion(prompt: Any, model: str = "lora", **fields: Any) -> CompletionRequest:
    return CompletionRequest(**{"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 5, **fields})


def text(messages: list[Any]) -> str:
    assert isinstance(messages[-1], Usage)
    return "".join(part.text for part in messages[:-1])


def test_of_a_batch_that_fails_the_others_go_on_where_they_are(gpt2: Path, caplog: pytest.LogCaptureFixture) -> None:
    api = made_api(gpt2)
    prompts = ["it", "a good film", "the awful story", "this was"]
    requests = [completion(prompt, "prefix", stream=True, logprobs=0, max_tokens=6) for prompt in prompts]
    alone = [answers(api, request)[0] for request in requests]
    bad = api.tokenizer("awful").input_ids[0]

    class FailsLater(Fails):
        """Fails after the third token of the first batch, and after the first one of the next."""

        def __call__(self, **inputs: Any) -> Any:
            self.sizes.append(len(inputs["input_ids"]))
            is_bad = bool((inputs["input_ids"] == bad).any())
            most = inputs["input_ids"].shape[1] + (3 if len(inputs["input_ids"]) == 4 else 1)

            def fail(input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
                if is_bad and input_ids.shape[1] == most:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
                return torch.zeros(len(input_ids), dtype=torch.bool)

            criteria = [*inputs.pop("stopping_criteria"), fail]
            return type(self.model).generate(self.model, **inputs, stopping_criteria=criteria)

    api.model.generate = fails = FailsLater(api.model, bad, 8)
    found = answers(api, *requests)
    assert fails.sizes[:2] == [4, 2] and "A batch of 4 rows failed" in caplog.text
    for place in (0, 1, 3):
        assert text(found[place]) == text(alone[place])
        assert [part.finish for part in found[place][:-1]].count("length") == 1
        own = [each.logprob for part in alone[place][:-1] for each in part.logprobs]
        assert [each.logprob for part in found[place][:-1] for each in part.logprobs] == pytest.approx(own, abs=1e-4)
    refusal = found[2][-1]
    assert isinstance(refusal, Refusal) and refusal.status == 500 and "CUDA out of memory" in refusal.message


def test_an_encoder_decoder_goes_on_where_it_was() -> None:
    model = make("bart")
    tokenizer = type("Words", (Bytes,), {"pad_token_id": 1})()
    tokenizer.decode = lambda tokens, skip_special_tokens=True: "".join(f" {token}" for token in tokens)
    sent: dict[int, list[float]] = {0: [], 1: []}

    def rows() -> list[Row]:
        def sender(index: int) -> Any:
            return lambda text, logprobs, finish: sent[index].extend(each.logprob for each in logprobs)

        prompts = [[5, 6, 7, 8], [9, 10]]
        return [
            Row(None, ids, 6, TextStream(tokenizer), sender(at), seed=at, top_count=0) for at, ids in enumerate(prompts)
        ]

    expected = rows()
    Decoder(model, tokenizer).run(expected)
    for index, row in enumerate(expected):
        assert len(row.tokens) == 6 and len(set(row.tokens)) > 3
        start = torch.tensor([[model.config.decoder_start_token_id, *row.tokens[:-1]]])
        with torch.no_grad():
            truth = model(input_ids=torch.tensor([row.prompt]), decoder_input_ids=start).logits[0].log_softmax(-1)
        own = [truth[place, token].item() for place, token in enumerate(row.tokens)]
        assert sent[index] == pytest.approx(own, abs=1e-4)
    again = rows()
    for row, whole in zip(again, expected, strict=True):
        for token in whole.tokens[:2]:
            row.random.random()
            row.add(token, None, False)
    Decoder(model, tokenizer).run(again)
    assert [row.tokens for row in again] == [row.tokens for row in expected]


def test_logits_that_are_no_numbers_are_an_error(gpt2: Path) -> None:
    api = made_api(gpt2)
    with torch.no_grad():
        api.model.lm_head.weight[3] = float("nan")
    ((refusal,),) = answers(api, completion("a film"))
    assert refusal.status == 500 and "logits are not finite" in refusal.message


def test_a_request_without_a_number_of_tokens_gets_what_the_positions_leave(gpt2: Path) -> None:
    api = made_api(gpt2)
    messages = [{"role": "user", "content": " ".join(["film"] * 61)}]
    api.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    ((part, usage),) = answers(api, ChatRequest(model="lora", messages=messages))
    assert isinstance(part, Part) and part.finish == "length" and usage == Usage(61, 3)
    ((refusal,),) = answers(api, ChatRequest(model="lora", messages=messages, max_tokens=4))
    assert (refusal.status, refusal.code) == (400, "context_length_exceeded")
    # Virtual tokens take positions.
    ((refusal,),) = answers(api, ChatRequest(model="prompt", messages=messages))
    assert "at most 56" in refusal.message
    api.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    ((refusal,),) = answers(api, ChatRequest(model="lora", messages=messages))
    assert "roles must alternate" in refusal.message and refusal.param == "messages"
    api.tokenizer.chat_template = None
    ((refusal,),) = answers(api, ChatRequest(model="lora", messages=messages))
    assert "no chat template: use /v1/completions" in refusal.message


def test_many_answers_are_computed_in_batches_of_the_servers_size(gpt2: Path) -> None:
    api = made_api(gpt2, max_batch_size=3)
    api.model.generate = fails = Fails(api.model, -1, rows=8)
    (messages,) = answers(api, completion(["film", "it", "this"], "prefix", n=3, temperature=1.0, seed=1))
    assert fails.sizes == [3, 3, 3]
    assert [part.index for part in messages[:-1]] == list(range(9))
    ((refusal,),) = answers(api, completion(["film"] * 17, n=3))
    assert "51 answers: the server gives 1 to 48" in refusal.message


def test_an_encoder_decoder_answers_a_batch_as_it_answers_each_prompt(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Padding on the left would move the positions of the shorter prompts."""
    torch.manual_seed(0)
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(
        **shape,
        d_model=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=40,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=39,
        bos_token_id=4,
        decoder_start_token_id=4,
        forced_eos_token_id=None,
        init_std=1.0,
    )
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    api = AdapterAPI(str(tmp_path), {}, max_new_tokens=8)
    api.setup("cpu")
    prompts = ["film", "the awful story of this film", "good acting", "it was a great film and a poor story"]
    requests: list[Any] = [Request(prompt=prompt) for prompt in prompts]
    alone = [api.predict([request])[0] for request in requests]
    assert len({answer["text"] for answer in alone}) > 1
    assert api.predict(requests) == alone
    asked = [completion(prompt, str(tmp_path), max_tokens=8) for prompt in prompts]
    assert [text(messages) for messages in answers(api, *asked)] == [answer["text"] for answer in alone]
    ((refusal,),) = answers(api, completion("film", str(tmp_path), echo=True))
    assert "needs a decoder" in refusal.message


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (b'{"model": "pems", "prompt": "film"}', 404, "model", "no model 'pems'"),
        (b'{"prompt": "film"}', 400, "model", "model is missing"),
        (b'{"model": "a", "prompt": "film", "top_k": 1}', 400, "top_k", "no field 'top_k': a request has model, "),
        (b'{"model": "a", "prompt": {}}', 400, "prompt", "prompt={}: give a text, token ids"),
        (
            b'{"model": "a", "prompt": "film", "logit_bias": {"5": 1}}',
            400,
            None,
            "logit_bias={'5': 1} is not supported",
        ),
        (b'{"model": "a", "prompt": "film", "stream_options": {"x": 1}}', 400, "stream_options", "stream_options.x"),
        (b"[1]", 400, None, "body=[1]"),
        (b"{", 400, None, "not valid JSON"),
        (b'{"prompt": "' + b"film " * 2_000_000 + b'"}', 413, None, "larger than 1638400 bytes"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, bytes) else "",
)
def test_what_cannot_be_read_is_an_error_in_openais_form(
    gpt2: Path, body: bytes, status: int, param: str | None, words: str
) -> None:
    app = make_server(AdapterAPI(str(gpt2 / "base"), {"a": "x"}), accelerator="cpu", devices=1).app
    found, said, _ = send(app, body, path="/v1/completions")
    error = json.loads(said)["error"]
    assert (found, error["type"], error["param"]) == (status, "invalid_request_error", param)
    assert words in error["message"] and "\n" not in error["message"]


def test_an_adapter_with_the_name_of_the_base_is_refused() -> None:
    with pytest.raises(lit_peft.LitPeftError, match="has the name of the base, 'poems'"):
        AdapterAPI("poems", {"poems": "x"})
