"""Prompt Tuning and P-Tuning: peft's reference cases and the installed peft, every architecture, generation."""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from models import (
    ALL,
    DECODERS,
    ENCODERS,
    GOLDEN,
    PEFT_TASK,
    SHAPE,
    batch,
    checkpointing_changes_nothing,
    close,
    learns,
    make,
    scramble,
    trained_of,
)
from safetensors.torch import load_file

import lit_peft
from lit_peft import LitPeftError, PromptTuningSettings, PTuningSettings
from lit_peft.models.architectures import learned_positions
from lit_peft.models.call_arguments import cache_of
from lit_peft.nn.prompt import PromptEncoder

METHODS = ("prompt_tuning", "p_tuning")
CASES = sorted(
    path.parent for path in (GOLDEN / "peft").glob("*/case.json") if json.loads(path.read_text())["method"] in METHODS
)


def fresh(config: dict[str, Any]) -> Any:
    """Our settings with which to train what a folder of peft's describes."""
    common = {name: config[name] for name in ("num_virtual_tokens", "num_transformer_submodules")}
    if config["peft_type"] == "PROMPT_TUNING":
        return PromptTuningSettings(**common)
    return PTuningSettings(**common, **{name: value for name, value in config.items() if name.startswith("encoder_")})


@pytest.mark.skipif(not CASES, reason="no reference cases: set LIT_PEFT_GOLDEN to their folder")
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_reference_case(case: Path, tmp_path: Path) -> None:
    facts = json.loads((case / "case.json").read_text())
    io = load_file(case / "io.safetensors")
    inputs = {name: io[name] for name in io if not name.startswith(("output", "prompt"))}
    model = getattr(transformers, facts["auto_class"]).from_pretrained(case / "base").eval()
    lit_peft.load_adapter(model, case / "adapter").eval()
    with torch.no_grad():
        output = model(**inputs)[facts["output"]]
        close(output, io["output"][:, -output.shape[1] :])
        lit_peft.save_adapter(model, tmp_path / "again")
        assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == {"prompt_embeddings"}
        close(lit_peft.detach(model)(**inputs)[facts["output"]], io["output_base"])
    lit_peft.attach(model, fresh(json.loads((case / "adapter" / "adapter_config.json").read_text())))
    assert lit_peft.trainable_parameters(model) == facts["trainable"]


def padded(inputs: dict[str, torch.Tensor], side: str, pad: int = 0) -> dict[str, torch.Tensor]:
    """The batch with three columns of padding."""
    fills = {"input_ids": pad, "attention_mask": 0}
    if inputs.get("labels", torch.zeros(0)).shape == inputs["input_ids"].shape:
        fills["labels"] = -100
    amount = (3, 0) if side == "left" else (0, 3)
    return {k: F.pad(v, amount, value=fills[k]) if k in fills else v for k, v in inputs.items()}


def their_config(model: Any, kind: str, task: str) -> Any:
    import peft

    common = {
        "task_type": task,
        "num_virtual_tokens": 5,
        "token_dim": model.get_input_embeddings().weight.shape[1],
        "num_layers": 2,
        "num_attention_heads": 4,
    }
    if kind == "prompt_tuning":
        return peft.PromptTuningConfig(**common)
    return peft.PromptEncoderConfig(**common, encoder_hidden_size=6, encoder_reparameterization_type=kind)


def compare_reading(make_model: Any, kind: str, task: str, inputs: dict[str, torch.Tensor], folder: Path) -> None:
    import peft

    theirs = peft.get_peft_model(make_model(), their_config(make_model(), kind, task)).eval()
    scramble(theirs)
    theirs.save_pretrained(folder)
    ours = lit_peft.load_adapter(make_model(), folder).eval()
    with torch.no_grad():
        expected, output = theirs(**inputs), ours(**inputs)
    names = [name for name in output if name == "loss" or "logits" in name or "last_hidden_state" in name]
    assert names
    for name in names:
        wanted = expected[name]
        if wanted.dim() > 1 and name != "encoder_last_hidden_state":
            wanted = wanted[:, -output[name].shape[1] :]
        close(output[name], wanted)


@pytest.mark.parametrize("name", ALL)
def test_reads_what_peft_writes(name: str, tmp_path: Path) -> None:
    pad = make(name).config.pad_token_id or 0
    inputs = padded(batch(name), "left" if name in DECODERS else "right", pad)
    kind = ("prompt_tuning", "LSTM", "MLP")[list(ALL).index(name) % 3]
    compare_reading(lambda: make(name), kind, PEFT_TASK[name], inputs, tmp_path)


@pytest.mark.parametrize(
    ("name", "auto", "task"),
    [
        ("llama", "AutoModelForSequenceClassification", "SEQ_CLS"),
        ("gpt2", "AutoModelForSequenceClassification", "SEQ_CLS"),
        ("roberta", "AutoModelForTokenClassification", "TOKEN_CLS"),
        ("deberta-v2", "AutoModelForTokenClassification", "TOKEN_CLS"),
        ("bert", "AutoModelForQuestionAnswering", "QUESTION_ANS"),
        ("bert", "AutoModel", "FEATURE_EXTRACTION"),
        ("llama", "AutoModel", "FEATURE_EXTRACTION"),
    ],
)
def test_reads_what_peft_writes_for_other_heads(name: str, auto: str, task: str, tmp_path: Path) -> None:
    inputs = {key: value for key, value in batch(name).items() if key != "labels"}
    for side in ("left", "right"):
        padding = padded(inputs, side)
        compare_reading(lambda: headed(name, auto), "prompt_tuning", task, padding, tmp_path / side)


def headed(name: str, auto: str) -> Any:
    config = make(name).config
    config.pad_token_id = 0
    # After `make`, which draws when it is called for the first time.
    torch.manual_seed(0)
    return getattr(transformers, auto).from_config(config).eval()


@pytest.mark.parametrize("name", ALL)
def test_peft_reads_what_we_write_and_learns_the_same(name: str, tmp_path: Path) -> None:
    import peft

    kind = PromptTuningSettings if list(ALL).index(name) % 2 else PTuningSettings
    head = ["classifier"] if name in ENCODERS else None
    ours = lit_peft.attach(make(name), kind(num_virtual_tokens=5, modules_to_save=head)).eval()
    scramble(ours)
    lit_peft.save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(make(name), str(tmp_path / "a")).eval()
    inputs = batch(name)
    inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
    if name not in ("bert", "deberta-v2", "electra"):
        del inputs["token_type_ids"]
    with torch.no_grad():
        expected, output = theirs(**inputs), ours(**inputs)
        close(output.logits, expected.logits[:, -output.logits.shape[1] :])
        close(output.loss, expected.loss)
        again = lit_peft.load_adapter(make(name), tmp_path / "a").eval()
        close(again(**inputs).logits, output.logits)
    prompt = theirs.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    theirs(**inputs).loss.backward()
    again(**inputs).loss.backward()
    close(again.prompt_encoder.embedding.weight.grad, prompt.grad)


@pytest.mark.parametrize("name", ALL)
def test_every_architecture(name: str) -> None:
    """Trains, undoes itself, and neither checkpointing nor padding nor the cache changes anything."""
    kind = PTuningSettings if list(ALL).index(name) % 2 else PromptTuningSettings
    model, inputs = make(name), batch(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    lit_peft.attach(model, kind(num_virtual_tokens=4))
    trained = trained_of(model)
    assert all(key.startswith("prompt_encoder.") for key in trained)
    learns(model, inputs, rate=0.02, steps=3)
    scramble(model)
    checkpointing_changes_nothing(model, inputs, tolerance=1e-5)

    model.eval()
    with torch.no_grad():
        plain, length = model(**inputs).logits, inputs["input_ids"].shape[1]
        pad = model.config.pad_token_id or 0
        del inputs["attention_mask"]
        close(model(**inputs).logits, plain)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        # Encoders with absolute positions do not bear padding on the left, with or without a prompt.
        sides = ["right", "left"] if name in DECODERS or name in ("t5", "mt5", "roberta") else ["right"]
        for side in sides:
            logits = model(**padded(inputs, side, pad)).logits
            if name in DECODERS:
                logits = logits[:, 3:] if side == "left" else logits[:, :length]
            close(logits, plain)
    if name not in ENCODERS:
        generates_alike(model, padded({k: v for k, v in inputs.items() if k != "labels"}, "left", pad), pad)

    for key, tensor in lit_peft.detach(model).state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert list(model.state_dict()) == list(before)


def generates_alike(model: Any, inputs: dict[str, torch.Tensor], pad: int) -> None:
    """The same with the cache and without, greedy and with beams; the prompt is computed once with it."""
    calls: list[int] = []
    handle = model.prompt_encoder.register_forward_hook(lambda module, args, out: calls.append(1))
    for beams in (1, 3):
        settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": pad}
        settings |= {"num_beams": beams, "return_dict_in_generate": True, "output_scores": True}
        calls.clear()
        cached = model.generate(**inputs, **settings, use_cache=True)
        assert len(calls) == 1
        plain = model.generate(**inputs, **settings, use_cache=False)
        assert torch.equal(cached.sequences, plain.sequences)
        for ours, wanted in zip(cached.scores, plain.scores, strict=True):
            finite = wanted.isfinite()
            close(ours[finite], wanted[finite])
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "opt"])
def test_decoders_classify_the_last_token(name: str) -> None:
    model = lit_peft.attach(headed(name, "AutoModelForSequenceClassification"), PromptTuningSettings())
    inputs = {key: value for key, value in batch(name).items() if key != "labels"}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        for side in ("left", "right"):
            close(model(**padded(inputs, side)).logits, logits)


def test_a_roberta_decoder_counts_positions_by_itself() -> None:
    """They start behind the padding's id, not at 0."""
    config = transformers.RobertaConfig(vocab_size=61, is_decoder=True, max_position_embeddings=64, **SHAPE)
    torch.manual_seed(0)
    model = transformers.RobertaForCausalLM(config).eval()
    ids = batch("roberta")["input_ids"]
    with torch.no_grad():
        prompt = lit_peft.attach(model, PromptTuningSettings(num_virtual_tokens=4)).prompt_encoder()
        logits = [model(input_ids=ids, attention_mask=mask).logits for mask in (None, torch.ones_like(ids))]
        embeds = torch.cat([prompt.expand(2, -1, -1), model.get_input_embeddings()(ids)], 1)
        wanted = lit_peft.detach(model)(inputs_embeds=embeds).logits[:, 4:]
    for found in logits:
        close(found, wanted)


@pytest.mark.parametrize("pad", [0, 1])
def test_a_roberta_has_fewer_positions_than_rows(pad: int) -> None:
    config = transformers.RobertaConfig(vocab_size=61, max_position_embeddings=12, pad_token_id=pad, **SHAPE)
    model = transformers.RobertaModel(config)
    known = learned_positions(model)
    model(torch.full((1, known), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, known + 1), 5))


@pytest.mark.parametrize("auto", ["MaskedLM", "TokenClassification", "QuestionAnswering", "MultipleChoice"])
def test_heads_see_the_users_tokens(auto: str) -> None:
    model = lit_peft.attach(headed("bert", f"AutoModelFor{auto}"), PTuningSettings(num_virtual_tokens=5))
    ids = torch.randint(3, 61, (2, 3, 7) if auto == "MultipleChoice" else (2, 7))
    labels: dict[str, dict[str, torch.Tensor]] = {
        "MaskedLM": {"labels": ids},
        "TokenClassification": {"labels": torch.ones_like(ids)},
        "QuestionAnswering": {"start_positions": torch.tensor([0, 2]), "end_positions": torch.tensor([6, 3])},
        "MultipleChoice": {"labels": torch.tensor([0, 2])},
    }
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, **labels[auto])
    logits = output.start_logits if auto == "QuestionAnswering" else output.logits
    assert logits.shape[:2] == ids.shape[:2]
    assert auto == "MultipleChoice" or all(state.shape[1] == 7 for state in output.hidden_states)
    output.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "auto"), [("llama", "CausalLM"), ("bert", "MaskedLM"), ("roberta", "MaskedLM")])
@pytest.mark.parametrize("kind", [PromptTuningSettings, PTuningSettings])
def test_template_places(name: str, auto: str, kind: Any, tmp_path: Path) -> None:
    mark = 99  # outside of the vocabulary
    ids = torch.tensor([[mark, 5, 6, mark, mark, 7], [8, mark, mark, 9, 10, mark]])
    model = lit_peft.attach(headed(name, f"AutoModelFor{auto}"), kind(num_virtual_tokens=3, prompt_token_id=mark))
    base = headed(name, f"AutoModelFor{auto}")
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        embeds = base.get_input_embeddings()(ids.masked_fill(ids == mark, 5))
        for row in range(2):
            embeds[row, ids[row] == mark] = model.prompt_encoder()
        close(logits, base(inputs_embeds=embeds).logits)
        lit_peft.save_adapter(model, tmp_path / "a")
        again = lit_peft.load_adapter(headed(name, f"AutoModelFor{auto}"), tmp_path / "a").eval()
        close(again(input_ids=ids).logits, logits)
        if name == "llama":
            generates_alike(model, padded({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "left"), 0)
    with pytest.raises(LitPeftError, match="3 times"):
        model(input_ids=ids[:, 1:])


def test_starts(tokenizer_folder: Path, tmp_path: Path) -> None:
    model = make("llama")
    rows = model.get_input_embeddings().weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)

    def start(**values: Any) -> torch.Tensor:
        settings = PromptTuningSettings(**{"tokenizer_name_or_path": str(tokenizer_folder), **values})
        result = lit_peft.attach(model, settings).prompt_encoder.embedding.weight.detach()
        lit_peft.detach(model)
        return result

    vocabulary = start()
    assert vocabulary.shape == (20, 32) and all((rows == row).all(1).any() for row in vocabulary)
    text = tokenizer("a good film is great")["input_ids"]
    init = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a good film is great"}
    assert torch.equal(start(**init, num_virtual_tokens=7), rows[[*text, *text[:2]]])
    assert torch.equal(start(**init, num_virtual_tokens=3), rows[text[:3]])
    labels = start(prompt_tuning_init="LABELS", prompt_tuning_init_labels=["good film", "bad"], num_virtual_tokens=4)
    good, film, bad = tokenizer.convert_tokens_to_ids(["good", "film", "bad"])
    close(labels[:2], torch.stack([(rows[good] + rows[film]) / 2, rows[bad]]))
    model.config.id2label = {0: "good", 1: "bad"}
    assert torch.equal(start(prompt_tuning_init="LABELS", num_virtual_tokens=2), rows[[good, bad]])
    # The model's own folder has the tokenizer, and what stands around every text is no label's.
    whole = tmp_path / "tokenizer"
    tokenizer._tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save_pretrained(whole)
    model.name_or_path = str(whole)
    own = {"tokenizer_name_or_path": None}
    assert torch.equal(start(prompt_tuning_init="LABELS", num_virtual_tokens=2, **own), rows[[good, bad]])
    assert torch.equal(start(**init, num_virtual_tokens=7, **own), rows[[2, *text, 3]])
    random = start(prompt_tuning_init="RANDOM", num_virtual_tokens=60)
    assert random.abs().max() <= 0.5 and random.std() > 0.25


def test_the_result_is_kept_until_something_changes() -> None:
    encoder = PromptEncoder(4, 8, 3, dropout=0.5).eval()
    with torch.no_grad():
        first = encoder()
        assert encoder() is first
        encoder.embedding.weight.add_(1)
        second = encoder()
        assert second is not first and not torch.equal(second, first)
        assert torch.equal(encoder.train().folded(), second) and encoder.training
        encoder.eval().fold()
        assert torch.equal(encoder(), second)
    assert [name for name, _ in encoder.named_parameters()] == ["embedding.weight"]
    encoder().sum().backward()


def test_positions_and_logits_that_are_asked_for() -> None:
    base, model = make("llama"), lit_peft.attach(make("llama"), PromptTuningSettings(num_virtual_tokens=2)).eval()
    ids, places = batch("llama")["input_ids"], torch.tensor([[0, 1, 2, 9, 10, 11, 12]]).expand(2, -1)
    embeds = base.get_input_embeddings()(ids)
    embeds = torch.cat([model.prompt_encoder().expand(2, -1, -1), embeds], 1)
    whole = torch.cat([torch.tensor([[0, 1]]).expand(2, -1), places + 2], 1)
    with torch.no_grad():
        expected = base(inputs_embeds=embeds, position_ids=whole).logits[:, 2:]
        close(model(input_ids=ids, position_ids=places).logits, expected)
        output = model(input_ids=ids, position_ids=places, labels=ids[:, -3:], logits_to_keep=3)
    close(output.logits, expected[:, -3:])
    close(output.loss, F.cross_entropy(expected[:, -3:-1].flatten(0, 1), ids[:, -2:].flatten()))


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_tuples_hold_what_outputs_do(name: str) -> None:
    model = lit_peft.attach(make(name), PromptTuningSettings(num_virtual_tokens=2)).eval()
    inputs = batch(name)
    with torch.no_grad():
        output, values = model(**inputs), model(**inputs, return_dict=False)
    assert torch.equal(values[0], output.loss) and torch.equal(values[1], output.logits)


def test_virtual_tokens_stand_under_an_id_that_means_nothing() -> None:
    for ids in itertools.permutations(range(4), 3):
        model = make("llama")
        model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id = ids
        lit_peft.attach(model, PromptTuningSettings(num_virtual_tokens=2))
        seen: list[Any] = []
        model.model.register_forward_pre_hook(lambda _, args, kwargs, seen=seen: seen.append(kwargs), with_kwargs=True)
        model(input_ids=torch.full((1, 3), 9))
        front = seen[0]["input_ids"]
        assert front.shape == (1, 5) and not {*front[0, :2].tolist()} & {*ids}


def test_half_precision_bases_keep_full_precision_prompts() -> None:
    for settings in (PromptTuningSettings(), PTuningSettings()):
        model = lit_peft.attach(make("llama").to(torch.bfloat16), settings)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        output = model(**batch("llama"))
        assert output.logits.dtype == torch.bfloat16
        output.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_bad_input_names_the_fix() -> None:
    for values, words in (
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ({"positions": "x"}, "positions='x'"),
        ({"prompt_tuning_init": "WORDS"}, "prompt_tuning_init='WORDS'"),
        ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text"),
        ({"prompt_tuning_init_labels": ["a"]}, "LABELS"),
        (
            {"prompt_tuning_init": "LABELS", "prompt_tuning_init_labels": ["a", "b"], "num_virtual_tokens": 1},
            "num_virtual_tokens=1",
        ),
        ({"prompt_token_id": 3, "positions": "sequence"}, "prompt_token_id=3"),
    ):
        with pytest.raises(LitPeftError, match=words):
            PromptTuningSettings(**values)
    mlp = {"encoder_reparameterization_type": "MLP"}
    for values in (
        {"encoder_reparameterization_type": "GRU"},
        {"encoder_hidden_size": 0},
        {"encoder_dropout": 1.0},
        {"encoder_num_layers": 3, **mlp},
        {"encoder_dropout": 0.1, **mlp},
        {"encoder_dropout": 0.1, "encoder_num_layers": 1},
    ):
        with pytest.raises(LitPeftError, match=next(iter(values))):
            PTuningSettings(**values)
    model = make("bert")
    names = list(model.state_dict())
    for settings, words in (
        (PromptTuningSettings(num_virtual_tokens=64), "leaves no room in the 64 positions"),
        (PromptTuningSettings(prompt_tuning_init="LABELS"), "prompt_tuning_init_labels"),
        (PromptTuningSettings(prompt_tuning_init="TEXT", prompt_tuning_init_text="a"), "tokenizer_name_or_path"),
    ):
        with pytest.raises(LitPeftError, match=words):
            lit_peft.attach(model, settings)
    assert list(model.state_dict()) == names
    with pytest.raises(LitPeftError, match="not a transformers model"):
        lit_peft.attach(torch.nn.Linear(2, 2), PromptTuningSettings())
    lit_peft.attach(model, PromptTuningSettings(num_virtual_tokens=60))
    with pytest.raises(LitPeftError, match="shorten the texts to 4"):
        model(**batch("bert"))
    with pytest.raises(LitPeftError, match="static cache"):
        causal = lit_peft.attach(make("llama"), PromptTuningSettings())
        causal.generate(batch("llama")["input_ids"], cache_implementation="static", max_new_tokens=2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma"])
def test_the_loss_of_supervised_tokens_alone_is_the_same(name: str) -> None:
    model = lit_peft.attach(make(name), PromptTuningSettings(num_virtual_tokens=5))
    losses, gradients = [], []
    for enabled in (False, True):
        model.zero_grad()
        with lit_peft.supervised_loss(model, enabled):
            loss = model(**batch(name)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.prompt_encoder.embedding.weight.grad.clone())
    close(losses[1], losses[0])
    close(gradients[1], gradients[0])


def test_every_setting_is_explained_on_the_command_line() -> None:
    text = lit_peft.PTuning.__init__.__doc__ or ""
    for name in inspect.signature(lit_peft.PTuning.__init__).parameters:
        assert name == "self" or f"\n    {name}: " in text, name


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta", "t5", "bart"])
@pytest.mark.parametrize("positions", ["mask", "sequence"])
def test_embeddings_stand_for_their_tokens(name: str, positions: Any) -> None:
    settings = PromptTuningSettings(num_virtual_tokens=3, positions=positions)
    model, inputs = lit_peft.attach(make(name), settings).eval(), batch(name)
    ids = inputs.pop("input_ids")
    if name != "roberta":
        # RoBERTa tells padding by its id, which embeddings do not have.
        inputs["attention_mask"][0, 5:] = 0
    embeds = make(name).get_input_embeddings()(ids)
    close(model(inputs_embeds=embeds, **inputs).logits, model(input_ids=ids, **inputs).logits)


def test_masks_that_virtual_tokens_cannot_join() -> None:
    model, ids = lit_peft.attach(make("llama"), PromptTuningSettings()), batch("llama")["input_ids"]
    for mask in (torch.ones(2, 1, 7, 7, dtype=torch.bool), {"full_attention": torch.ones(2, 7)}):
        with pytest.raises(LitPeftError, match=r"attention_mask does not have the shape \[batch, length\]"):
            model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_last_position_may_be_used(name: str) -> None:
    model = lit_peft.attach(make(name), PromptTuningSettings(num_virtual_tokens=57)).eval()
    model(**batch(name))
    lit_peft.attach(lit_peft.detach(model), PromptTuningSettings(num_virtual_tokens=58))
    with pytest.raises(LitPeftError, match=r"7 tokens and 58 virtual tokens, which is more than the 64 positions"):
        model(**batch(name))


def test_positions_as_peft_has_them_are_its_own() -> None:
    model = lit_peft.attach(make("gpt2"), PromptTuningSettings(num_virtual_tokens=3, positions="sequence")).eval()
    inputs = batch("gpt2")
    given = torch.arange(7).flip(0).expand(2, -1)
    assert torch.equal(model(**inputs, position_ids=given).logits, model(**inputs).logits)


def test_the_loss_behind_a_cache_is_of_the_tokens_given() -> None:
    model, inputs = lit_peft.attach(make("gpt2"), PromptTuningSettings(num_virtual_tokens=3)).eval(), batch("gpt2")
    ids = inputs["input_ids"]
    cache = cache_of(model(input_ids=ids[:, :3], use_cache=True))
    output = model(input_ids=ids[:, 3:], cache=cache, labels=ids[:, 3:])
    assert output.logits.shape[1] == 4
    close(output.loss, F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 4:].flatten()))
    close(output.logits, model(input_ids=ids).logits[:, 3:])


def test_labels_that_are_shifted_already() -> None:
    model, ids = (
        lit_peft.attach(make("llama"), PromptTuningSettings(num_virtual_tokens=3)).eval(),
        batch("llama")["input_ids"],
    )
    output = model(input_ids=ids, labels=ids, shift_labels=ids)
    assert output.logits.shape[1] == 7
    close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), ids.flatten()))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoders_virtual_tokens_stand_before_padding_as_in_peft(name: str) -> None:
    settings = PromptTuningSettings(num_virtual_tokens=3, positions="sequence")
    model, inputs = lit_peft.attach(make(name), settings).eval(), padded(batch(name), "left")
    base, count = make(name), len(inputs["input_ids"])
    embeds = base.get_input_embeddings()(inputs.pop("input_ids"))
    with torch.no_grad():
        output = model(inputs_embeds=embeds, **inputs)
        embeds = torch.cat([model.prompt_encoder().expand(count, -1, -1), embeds], 1)
        inputs["attention_mask"] = F.pad(inputs["attention_mask"], (3, 0), value=1)
        close(output.logits, base(inputs_embeds=embeds, **inputs).logits)


def test_a_tokenizers_own_code_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def load(where: str, **kwargs: Any) -> None:
        given.update(kwargs)
        raise OSError("enough")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    with pytest.raises(LitPeftError, match="enough"):
        settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "x"}
        lit_peft.attach(make("llama"), PromptTuningSettings(**settings))
    assert given["trust_remote_code"] is False


def test_a_headless_models_tuple_is_cut() -> None:
    model, ids = (
        lit_peft.attach(make("llama").model, PromptTuningSettings(num_virtual_tokens=3)),
        batch("llama")["input_ids"],
    )
    with torch.no_grad():
        output = model(ids, use_cache=True, output_hidden_states=True)
        values = model(ids, use_cache=True, output_hidden_states=True, return_dict=False)
    assert torch.equal(values[0], output.last_hidden_state) and values[0].shape[1] == 7
    assert len(values) == len(output.to_tuple()) == 3 and values[1].get_seq_length() == 10


def test_a_causal_models_tuple_keeps_its_cache() -> None:
    model, inputs = lit_peft.attach(make("llama"), PromptTuningSettings(num_virtual_tokens=3)), batch("llama")
    values = model(**inputs, use_cache=True, return_dict=False)
    assert values[1].shape[1] == 7 and values[2].get_seq_length() == 10 and len(values) == 3


def test_a_loss_that_fails_leaves_nothing_behind() -> None:
    model, inputs = lit_peft.attach(make("llama"), PromptTuningSettings(num_virtual_tokens=3)).eval(), batch("llama")
    ids = inputs["input_ids"]
    expected = model.model(ids).last_hidden_state
    with pytest.raises((IndexError, RuntimeError)):
        model(ids, labels=torch.full_like(ids, 1000))
    assert torch.equal(model.model(ids).last_hidden_state, expected) and expected.shape[1] == 7


def test_an_empty_cache_changes_no_loss() -> None:
    model, inputs = lit_peft.attach(make("llama"), PromptTuningSettings(num_virtual_tokens=3)).eval(), batch("llama")
    output = model(**inputs, cache=transformers.DynamicCache(config=model.config))
    close(output.loss, model(**inputs).loss)


def test_no_virtual_token_starts_as_the_padding_token() -> None:
    """Its embedding is zero, where the gradient of a norm is huge."""
    embeddings = torch.nn.Embedding(3, 4, padding_idx=2)
    prompt = PromptTuningSettings(num_virtual_tokens=100).make_prompt(torch.nn.Module(), embeddings)
    assert prompt().abs().sum(-1).min() > 0 and len(prompt().unique(dim=0)) == 2
