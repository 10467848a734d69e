"""`lit-peft serve` with the real `openai` client over loopback."""

from __future__ import annotations

import json
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

pytest.importorskip("litserve", reason="serving is tested where the extra `serve` is installed")
from test_serve import PROMPTS, post, serving

pytestmark = pytest.mark.heavy
openai = pytest.importorskip("openai", reason="the server is tested with the client that people use")

SETTINGS: dict[str, Any] = {
    "poems": LoRASettings(r=4),
    "dora": LoRASettings(r=2, use_dora=True, target_modules="all-linear"),
    "prompt": PromptTuningSettings(num_virtual_tokens=3, prompt_tuning_init="RANDOM"),
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
POSITIONS, MOST = 64, 12


class Served:
    """A running server, its client, and the models that it should answer like."""

    def __init__(self, url: str, base: Path, models: dict[str, Any]) -> None:
        self.url, self.base, self.models = url, str(base), models
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def ids(self, prompt: str) -> torch.Tensor:
        return self.tokenizer(prompt, return_tensors="pt").input_ids

    def expected(self, name: str, prompt: str, new_tokens: int = 6) -> list[int]:
        """The tokens that transformers generates with the one adapter alone."""
        ids = self.ids(prompt)
        with torch.no_grad():
            out = self.models[name].generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        return out[0, ids.shape[1] :].tolist()

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def logprobs(self, name: str, ids: list[int]) -> torch.Tensor:
        """Log-softmax of the logits of one forward, for the token after each one."""
        with torch.no_grad():
            logits = self.models[name](input_ids=torch.tensor([ids])).logits[0, -len(ids) :]
        return logits.log_softmax(-1)

    def complete(self, model: str, prompt: Any, **fields: Any) -> Any:
        given = {"max_tokens": 6, "temperature": 0, **fields}
        return self.client.completions.create(model=model, prompt=prompt, **given)


@pytest.fixture(scope="module")
def served(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("openai")
    base = folder / "base"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **shape, num_attention_heads=4, max_position_embeddings=POSITIONS, eos_token_id=4, pad_token_id=0
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    models = {str(base): transformers.AutoModelForCausalLM.from_pretrained(base).eval()}
    arguments = []
    for name, settings in SETTINGS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        scramble(lit_peft.attach(model, settings))
        lit_peft.save_adapter(model, folder / name)
        models[name] = model.eval()
        arguments += ["--adapter", f"{name}={folder / name}"]
    arguments += ["--max_new_tokens", str(MOST), "--max_batch_size", "8", "--batch_timeout", "0.1"]
    with serving("--base", str(base), *arguments) as url:
        yield Served(url.removesuffix("/generate"), base, models)


def test_the_base_and_its_adapters_are_the_models(served: Served) -> None:
    listed = served.client.models.list().data
    assert [model.id for model in listed] == [served.base, *SETTINGS]
    assert served.client.models.retrieve("poems").id == "poems"
    with pytest.raises(openai.NotFoundError, match=r"pems.*poems"):
        served.client.models.retrieve("pems")


def test_concurrent_requests_get_what_their_adapters_alone_say(served: Served) -> None:
    wanted = [(name, prompt) for name in served.models for prompt in PROMPTS]
    expected = [served.text(served.expected(*each)) for each in wanted]
    assert len(set(expected)) > 10
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda each: served.complete(*each), wanted))
        streams = list(pool.map(lambda each: list(served.complete(*each, stream=True)), wanted))
    assert [answer.choices[0].text for answer in answers] == expected
    assert ["".join(chunk.choices[0].text for chunk in chunks) for chunks in streams] == expected
    assert [answer.model for answer in answers] == [name for name, _ in wanted]
    # The server's own requests are answered beside them.
    assert post(f"{served.url}/generate", prompt=PROMPTS[0], adapter="poems", max_new_tokens=6)[1]["text"] == (
        served.text(served.expected("poems", PROMPTS[0]))
    )


def test_a_chat_is_rendered_by_the_template_and_counted(served: Served) -> None:
    messages = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was good"}]
    prompt = served.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = served.expected("poems", prompt, MOST)
    answer = served.client.chat.completions.create(model="poems", messages=messages, temperature=0)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", served.text(expected))
    assert choice.finish_reason == ("stop" if expected[-1] == 4 else "length")
    length = served.ids(prompt).shape[1]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, len(expected))
    assert answer.usage.total_tokens == length + len(expected)
    parts = [{"role": "user", "content": [{"type": "text", "text": "the film"}]}, choice.message]
    again = served.client.chat.completions.create(model="poems", messages=parts, temperature=0)
    assert again.usage.prompt_tokens == len(
        served.tokenizer.apply_chat_template(
            [messages[0], {"role": "assistant", "content": choice.message.content}], return_dict=True
        )["input_ids"]
    )


def test_a_streamed_chat_is_the_whole_one_in_parts(served: Served) -> None:
    fields: dict[str, Any] = {
        "model": "dora",
        "messages": [{"role": "user", "content": "this film"}],
        "max_tokens": 8,
        "seed": 5,
        "n": 2,
        "logprobs": True,
    }
    whole = served.client.chat.completions.create(**fields)
    chunks = list(served.client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant"] * 2
    for choice in whole.choices:
        parts = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        found = [each for part in parts if part.logprobs for each in part.logprobs.content]
        assert [each.token for each in found] == [each.token for each in choice.logprobs.content]
        assert len(parts) > len(found) >= 2


@pytest.mark.parametrize("name", ["poems", "prompt"])
def test_log_probabilities_are_those_of_the_logits(name: str, served: Served) -> None:
    prompt = served.ids(PROMPTS[0])[0].tolist()
    tokens = served.expected(name, PROMPTS[0])
    shown = tokens[:-1] if tokens[-1] == 4 else tokens
    truth = served.logprobs(name, prompt + tokens)[len(prompt) - 1 :]
    found = served.complete(name, PROMPTS[0], logprobs=3).choices[0].logprobs
    assert found.tokens == [served.tokenizer.decode([token]) for token in shown]
    own = [truth[place, token].item() for place, token in enumerate(shown)]
    assert found.token_logprobs == pytest.approx(own, abs=1e-4)
    text = served.text(tokens)
    for place, (token, start) in enumerate(zip(found.tokens, found.text_offset, strict=True)):
        assert text[start:].lstrip().startswith(token)
        best = truth[place].topk(3).indices.tolist()
        expected = {served.tokenizer.decode([at]): truth[place, at].item() for at in best}
        expected[token] = own[place]
        assert found.top_logprobs[place] == pytest.approx(expected, abs=1e-4)
    chat = served.client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": "film"}],
        max_tokens=4,
        temperature=1.5,
        seed=1,
        n=6,
        logprobs=True,
        top_logprobs=2,
    )
    prompt = served.ids("user film")[0].tolist()
    assert sum(len(choice.logprobs.content) for choice in chat.choices) >= 10
    for choice in chat.choices:
        tokens = served.tokenizer.convert_tokens_to_ids([each.token for each in choice.logprobs.content])
        truth = served.logprobs(name, prompt + tokens)[len(prompt) - 1 :]
        for place, each in enumerate(choice.logprobs.content):
            # Sampling and temperature do not change them.
            assert each.logprob == pytest.approx(truth[place, tokens[place]].item(), abs=1e-4)
            assert bytes(each.bytes).decode() == each.token
            top = truth[place].topk(2).values.tolist()
            assert [other.logprob for other in each.top_logprobs] == pytest.approx(top, abs=1e-4)


@pytest.mark.parametrize("name", ["poems", "prompt"])
def test_an_echoed_prompt_has_the_log_probabilities_of_its_own_tokens(name: str, served: Served) -> None:
    """What lm-evaluation-harness asks a server for."""
    prompts = [served.ids(prompt)[0].tolist() for prompt in PROMPTS[:3]]
    answer = served.complete(name, prompts, echo=True, logprobs=1, max_tokens=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for ids, choice in zip(prompts, answer.choices, strict=True):
        truth = served.logprobs(name, ids)
        expected = [truth[place, token].item() for place, token in enumerate(ids[1:])]
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        assert choice.logprobs.tokens[: len(ids)] == [served.tokenizer.decode([token]) for token in ids]
        assert choice.text.startswith(served.text(ids))
        for place in range(1, len(ids)):
            assert max(choice.logprobs.top_logprobs[place].values()) == pytest.approx(
                truth[place - 1].max().item(), abs=1e-4
            )
    none = served.complete(name, PROMPTS[0], echo=True, max_tokens=0)
    assert none.choices[0].text == PROMPTS[0] and none.usage.completion_tokens == 0


def test_an_answer_ends_before_a_stop_text(served: Served) -> None:
    whole = served.text(served.expected("poems", PROMPTS[1], MOST))
    words = whole.split()
    stop = f"{words[3][-1]} {words[4][:2]}"  # across two tokens
    expected = whole[: whole.index(stop)]
    for fields in ({"stop": stop}, {"stop": ["never", stop]}):
        answer = served.complete("poems", PROMPTS[1], max_tokens=MOST, logprobs=0, **fields).choices[0]
        assert (answer.text, answer.finish_reason) == (expected, "stop")
        assert all(start < len(expected) for start in answer.logprobs.text_offset)
    chunks = list(served.complete("poems", PROMPTS[1], max_tokens=MOST, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert len(chunks) >= 2 and chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer_in_any_company(served: Served) -> None:
    def ask(seed: int | None, **fields: Any) -> list[str]:
        answer = served.complete("poems", PROMPTS[0], temperature=2.0, seed=seed, max_tokens=MOST, **fields)
        return [choice.text for choice in answer.choices]

    alone = ask(7)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, [7, 8, 9, 10, 7, 11]))
    assert together[0] == together[4] == alone
    assert len({each[0] for each in together}) >= 4
    # Answer i has the seed + i.
    assert ask(7, n=3) == [*alone, together[1][0], together[2][0]]
    assert ask(None) != ask(None)
    # Of a very small top_p only the most likely token is left.
    assert ask(3, top_p=1e-6) == [served.text(served.expected("poems", PROMPTS[0], MOST))]


@pytest.mark.parametrize(
    ("fields", "kind", "words", "param"),
    [
        ({"model": "pems"}, "NotFoundError", "no model 'pems': .*'poems'", "model"),
        ({"prompt": ["film " * 60]}, "BadRequestError", "has 60 tokens; with max_new_tokens=6.*at most 58", "prompt"),
        ({"prompt": ""}, "BadRequestError", "has no tokens", "prompt"),
        ({"prompt": [[5, 99]]}, "BadRequestError", "token id 99: give ids from 0 to ", "prompt"),
        ({"prompt": []}, "BadRequestError", "0 prompts", "prompt"),
        ({"prompt": 3}, "BadRequestError", "prompt=3: give a text, token ids", "prompt"),
        ({"max_tokens": 13}, "BadRequestError", "max_tokens=13: the server's maximum is 12", "max_tokens"),
        ({"n": 9}, "BadRequestError", "n=9: the server's maximum is 8", "n"),
        ({"temperature": -1}, "BadRequestError", "temperature=-1", "temperature"),
        ({"top_p": 0}, "BadRequestError", "top_p=0", "top_p"),
        ({"stop": ["a", ""]}, "BadRequestError", "must not be empty", "stop"),
        ({"logprobs": 21}, "BadRequestError", "logprobs=21", "logprobs"),
        ({"presence_penalty": 0.5}, "BadRequestError", "presence_penalty=0.5 is not supported", None),
        ({"extra_body": {"top_k": 4}}, "BadRequestError", "no field 'top_k': a request has model", "top_k"),
        ({"max_tokens": 0}, "BadRequestError", "needs echo=true", None),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_an_error_of_the_client(
    served: Served, stream: bool, fields: dict[str, Any], kind: str, words: str, param: str | None
) -> None:
    given = {"model": "poems", "prompt": "film", **fields}
    with pytest.raises(getattr(openai, kind), match=words) as caught:
        served.complete(given.pop("model"), given.pop("prompt"), stream=stream, **given)
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", param)


def test_errors_of_chats_and_of_paths_are_openais_too(served: Served) -> None:
    def chat(*messages: Any, **fields: Any) -> None:
        served.client.chat.completions.create(model="poems", messages=messages, **fields)

    user = {"role": "user", "content": "film"}
    image = {"type": "image_url", "image_url": {"url": "x"}}
    for wrong, words in (
        ([{"role": "user", "content": [image]}], "messages.0.content"),
        ([], "messages"),
        ([{**user, "tool_call_id": "1"}], "no field 'messages.0.tool_call_id'"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            chat(*wrong)
    with pytest.raises(openai.BadRequestError, match=r"tools=.*not supported"):
        chat(user, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    with pytest.raises(openai.BadRequestError, match="needs logprobs=true"):
        chat(user, top_logprobs=2)
    with pytest.raises(openai.BadRequestError, match="differ"):
        chat(user, max_tokens=2, max_completion_tokens=3)
    with pytest.raises(openai.BadRequestError) as caught:
        chat({"role": "user", "content": "film " * 70})
    assert caught.value.code == "context_length_exceeded"
    chat(user, tools=[], presence_penalty=0, user="me", response_format={"type": "text"}, max_tokens=1)
    for path, body, status in (
        ("completions", b"{", 400),
        ("completions", b'{"model": "poems", "prompt": "\\ud800"}', 400),
        ("completions", b'{"prompt": "' + b"film " * 2_000_000 + b'"}', 413),
        ("embeddings", b"{}", 404),
    ):
        request = urllib.request.Request(f"{served.url}/v1/{path}", body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        error = json.load(refused.value)["error"]
        assert refused.value.code == status and error["type"] == "invalid_request_error" and error["message"]


def test_a_client_that_leaves_does_not_disturb_the_others(served: Served) -> None:
    stream = served.complete("poems", PROMPTS[0], stream=True, max_tokens=MOST)
    next(iter(stream))
    stream.close()
    assert served.complete("poems", PROMPTS[0]).choices[0].text == served.text(served.expected("poems", PROMPTS[0]))


def test_a_stream_begins_before_the_answer_is_complete(served: Served) -> None:
    """Events come one by one, not all at the end."""
    chunks = list(served.complete("poems", PROMPTS[0], stream=True, max_tokens=MOST))
    assert len(chunks) >= min(len(served.expected("poems", PROMPTS[0], MOST)), MOST) - 1
