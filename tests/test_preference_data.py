"""PreferenceData: the forms of files, what is cut and left out, and TRL's tokens for the same rows."""

from __future__ import annotations

import copy
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_peft import LitPeftError
from lit_peft.data import PreferenceData
from lit_peft.data.preview import pieces

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that knows the names of the speakers."""
    from conftest import WORDS
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "</s>", "user", "assistant", "system", "Human", "Assistant", ":", ".", *WORDS]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    )
    folder = tmp_path_factory.mktemp("talker")
    tokenizer.save_pretrained(folder)
    return folder


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def data_of(folder: Path, talker: Path, rows: list[dict[str, Any]], **settings: Any) -> PreferenceData:
    settings = {"max_length": 64, "validation_fraction": 0.0, **settings}
    return PreferenceData(train=written(folder, rows), tokenizer=str(talker), **settings)


def texts(data: PreferenceData, split: Any = "train") -> list[Any]:
    """The prompts with each answer as text, with what is learned in brackets."""

    def text(ids: list[int], labels: list[int]) -> str:
        start = next(place for place, label in enumerate(labels) if label != -100)
        assert labels[start:] == ids[start:]
        return f"{data.tokenizer.decode(ids[:start])} [{data.tokenizer.decode(ids[start:])}]"

    found = []
    for example in data.examples(split):
        if "desirable" in example:
            found.append((text(example["input_ids"], example["labels"]), example["desirable"]))
        else:
            found.append(tuple(map(text, example["input_ids"], example["labels"])))
    return found


ONE_TURN = ("user : the film </s> assistant : [good </s>]", "user : the film </s> assistant : [bad </s>]")
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "texts": ({"prompt": "the film", "chosen": "good", "rejected": "bad"}, "pairs of answers as text"),
    "question": ({"question": "the film", "chosen": "good", "rejected": "bad"}, "columns 'question', 'chosen'"),
    "messages": (
        {"prompt": [user("the film")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        "pairs of answers as messages",
    ),
    "text prompt, answers as messages": (
        {"prompt": "the film", "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        "as messages",
    ),
    "implicit prompt": (
        {"chosen": [user("the film"), assistant("good")], "rejected": [user("the film"), assistant("bad")]},
        "whose common start is the prompt",
    ),
    "implicit prompt beside a prompt": (
        {
            "prompt": "the film",
            "chosen": [user("the film"), assistant("good")],
            "rejected": [user("the film"), assistant("bad")],
        },
        "column 'prompt' not used",
    ),
    "alpaca": ({"instruction": "the", "input": "film", "chosen": "good", "rejected": "bad"}, "columns 'instruction'"),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "the film"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        "columns 'conversations', 'chosen', 'rejected'",
    ),
    "hh-rlhf": (
        {"chosen": f"{HUMAN}the film{ASSISTANT}good", "rejected": f"{HUMAN}the film{ASSISTANT}bad"},
        "pairs of answers in Anthropic's form",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_pairs_are_found_and_rendered(tmp_path: Path, talker: Path, name: str) -> None:
    row, said = FORMS[name]
    data = data_of(tmp_path, talker, [row], chat_template=TEMPLATE)
    expected = tuple(text.replace("the film", "the film") for text in ONE_TURN)
    assert texts(data) == [expected]
    assert said in "\n".join(data.report())
    assert data.is_unpaired is False


def test_turns_before_the_answer_are_the_prompt(tmp_path: Path, talker: Path) -> None:
    start = [{"role": "system", "content": "well"}, user("the film"), assistant("it is great"), user("the acting")]
    rows = [
        {"prompt": start, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": start, "chosen": [assistant("great")], "rejected": [assistant("poor")]},
    ]
    before = "system : well </s> user : the film </s> assistant : it is great </s> user : the acting </s> assistant : "
    expected = [(f"{before}[good </s>]", f"{before}[bad </s>]"), (f"{before}[great </s>]", f"{before}[poor </s>]")]
    assert texts(data_of(tmp_path, talker, rows, chat_template=TEMPLATE)) == expected
    dialogue = f"{HUMAN}the film{ASSISTANT}it is great{HUMAN}the acting{ASSISTANT}"
    rows = [{"chosen": f"{dialogue}good", "rejected": f"{dialogue}bad"}]
    assert texts(data_of(tmp_path, talker, rows, chat_template=TEMPLATE)) == [
        tuple(text.removeprefix("system : well </s> ") for text in expected[0])
    ]
    history = {"instruction": "the acting", "system": "well", "history": [["the film", "it is great"]]}
    rows = [{**history, "chosen": "good", "rejected": "bad"}]
    assert texts(data_of(tmp_path, talker, rows, chat_template=TEMPLATE)) == expected[:1]


def test_without_a_chat_template_prompts_are_plain_text(tmp_path: Path, talker: Path) -> None:
    row = {"prompt": "the film", "chosen": "is good", "rejected": "is bad"}
    data = data_of(tmp_path, talker, [row])
    assert texts(data) == [("the film [is good </s>]", "the film [is bad </s>]")]
    assert "in the form 'plain'" in data.report()[0]
    row = {"chosen": f"{HUMAN}the film{ASSISTANT}good", "rejected": f"{HUMAN}the film{ASSISTANT}bad"}
    start = "Human: the film Assistant:".replace("Human:", "[UNK]").replace("Assistant:", "[UNK]")
    assert texts(data_of(tmp_path, talker, [row])) == [(f"{start} [good </s>]", f"{start} [bad </s>]")]
    row = {"instruction": "the", "input": "film", "chosen": "good", "rejected": "bad"}
    found = texts(data_of(tmp_path, talker, [row]))[0]
    assert found[0].endswith("[good </s>]") and found[0].count("[UNK]") > 10  # Alpaca's sentences
    with pytest.raises(LitPeftError, match=r"has no chat template; set data.chat_template"):
        texts(
            data_of(
                tmp_path, talker, [{"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}]
            )
        )


LABELLED: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "the film", "completion": "good", "label": True},
    "numbers": {"prompt": "the film", "completion": "good", "label": 1},
    "words": {"prompt": "the film", "completion": "good", "label": "True"},
    "messages": {"messages": [user("the film"), assistant("good")], "label": True},
    "kto_tag": {"messages": [user("the film"), assistant("good")], "kto_tag": True},
    "prompts of messages": {"prompt": [user("the film")], "completion": [assistant("good")], "label": True},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "the film"}, {"from": "gpt", "value": "good"}],
        "label": True,
    },
    "alpaca": {"instruction": "the film", "output": "good", "label": True},
}


@pytest.mark.parametrize("name", LABELLED)
def test_forms_of_labelled_answers(tmp_path: Path, talker: Path, name: str) -> None:
    other = json.loads(json.dumps(LABELLED[name]).replace("the film", "this story").replace("good", "bad"))
    label = "kto_tag" if "kto_tag" in other else "label"
    other[label] = {"numbers": 0, "words": "false"}.get(name, False)
    data = data_of(tmp_path, talker, [LABELLED[name], other], chat_template=TEMPLATE)
    assert texts(data) == [
        ("user : the film </s> assistant : [good </s>]", True),
        ("user : this story </s> assistant : [bad </s>]", False),
    ]
    assert data.is_unpaired is True and "labelled answers" in data.report()[0]
    batch = data.collator("train")([data.examples("train")[0], data.examples("train")[1]])
    assert batch["desirable"].tolist() == [True, False]
    # KTO's mismatched answers: each prompt with the answer to the other one.
    swapped = [data.tokenizer.decode(row[row != 0]) for row in batch["kl_input_ids"]]
    assert swapped == ["user : the film </s> assistant : bad </s>", "user : this story </s> assistant : good </s>"]
    learned = [data.tokenizer.decode(row[row != -100]) for row in batch["kl_labels"]]
    assert learned == ["bad </s>", "good </s>"]


def test_pairs_taken_apart(tmp_path: Path, talker: Path) -> None:
    rows = [{"prompt": f"the {word}", "chosen": "good", "rejected": "bad"} for word in ("film", "story", "acting")]
    data = data_of(tmp_path, talker, rows, unpair=True)
    found = texts(data)
    assert found[:2] == [("the film [good </s>]", True), ("the film [bad </s>]", False)]
    assert len(found) == 6 and data.is_unpaired is True and "each answer by itself" in data.report()[0]
    others = [data.tokenizer.decode(example["kl_input_ids"]) for example in data.examples("train")]
    assert others[0] == "the film bad </s>" and len(others) == 6


def test_batches_have_the_chosen_answers_first(tmp_path: Path, talker: Path) -> None:
    rows = [
        {"prompt": "the film", "chosen": "is good", "rejected": "bad"},
        {"prompt": "this", "chosen": "great", "rejected": "is it of poor"},
    ]
    for side in ("right", "left"):
        data = data_of(tmp_path, talker, rows, padding_side=side)
        batch = data.collator("train")([data.examples("train")[0], data.examples("train")[1]])
        whole = [
            data.tokenizer.decode(row[mask.bool()])
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert whole == ["the film is good </s>", "this great </s>", "the film bad </s>", "this is it of poor </s>"]
        learned = [data.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
        assert learned == ["is good </s>", "great </s>", "bad </s>", "is it of poor </s>"]
        assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])
        assert int(batch["attention_mask"][1, 0]) == (side == "right") and len(set(batch["key"].tolist())) == 4


def test_what_is_cut_and_left_out_is_counted(tmp_path: Path, talker: Path) -> None:
    rows = [
        {"prompt": "the film", "chosen": "is good", "rejected": "is bad great good"},
        {"prompt": "the film is it of the acting", "chosen": "good", "rejected": "bad"},
        {"prompt": "a story", "chosen": "good", "rejected": "good"},
    ]
    data = data_of(tmp_path, talker, rows, max_length=6)
    assert texts(data) == [("the film [is good </s>]", "the film [is bad great good]")]
    report = "\n".join(data.report())
    assert "1 of 3 rows (33.3 %) left out whose answers are the same." in report
    assert "1 of 3 rows (33.3 %) left out, because data.max_length 6 leaves nothing of an answer." in report
    assert "answers with their prompts (50.0 %) cut to 6 tokens at the end" in report and "tokens to learn" in report
    # At the start, both prompts lose the same words.
    data = data_of(tmp_path, talker, rows[1:2], max_length=6, truncation_side="left")
    assert texts(data) == [("it of the acting [good </s>]", "it of the acting [bad </s>]")]
    assert "cut to 6 tokens at the start" in "\n".join(data.report())
    data = data_of(tmp_path, talker, rows[:2], max_length=8, truncation_side="drop")
    assert len(texts(data)) == 1 and "1 of 2 examples (50.0 %) dropped" in "\n".join(data.report())
    with pytest.raises(LitPeftError, match=r"no row whose answers can be compared within data.max_length 6"):
        texts(data_of(tmp_path, talker, rows[1:], max_length=6))


def test_dialogues_that_cannot_be_compared_are_left_out(tmp_path: Path, talker: Path) -> None:
    start = f"{HUMAN}the film{ASSISTANT}"
    rows = [
        {"chosen": f"{start}good", "rejected": f"{start}bad"},
        {"chosen": f"{start}great", "rejected": f"{start}great"},
        {"chosen": f"{start}good{HUMAN}well", "rejected": f"{start}good{HUMAN}it"},
    ]
    data = data_of(tmp_path, talker, rows, chat_template=TEMPLATE)
    assert len(texts(data)) == 1
    report = "\n".join(data.report())
    assert "1 of 3 rows (33.3 %) left out whose answers are the same." in report
    assert "1 of 3 rows (33.3 %) left out whose answers do not differ in a turn of the assistant." in report
    data = PreferenceData(predict=written(tmp_path, rows), tokenizer=str(talker), max_length=64, chat_template=TEMPLATE)
    with pytest.raises(LitPeftError, match="row 2: a row whose answers are the same cannot be compared"):
        data.setup("predict")


def test_wrong_rows_are_named(tmp_path: Path, talker: Path) -> None:
    good = {"prompt": "the film", "chosen": "good", "rejected": "bad"}
    for rows, message in [
        ([good, {**good, "rejected": ""}], "row 2 has no text in column 'rejected'"),
        ([{"prompt": "a", "chosen": "b"}], "rejected"),
        ([{"text": "a"}], "chosen"),
        ([{"prompt": "a", "completion": "b"}], "label"),
        ([{"prompt": "a", "completion": "b", "label": "perhaps"}], "column 'label' has 'perhaps', which is no label"),
        (
            [
                {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
                {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": None},
            ],
            "row 2 has nothing in column 'rejected'",
        ),
        ([{"messages": [user("a")], "label": True}], "the last message is not the assistant's"),
        (
            [{"prompt": "a", "chosen": [assistant("b")], "rejected": [user("c")]}],
            "does not start with the assistant's turn",
        ),
    ]:
        with pytest.raises(LitPeftError, match=message):
            texts(data_of(tmp_path, talker, rows, chat_template=TEMPLATE))
    with pytest.raises(LitPeftError, match=r"data.unpair is set, but .* has single answers already"):
        texts(data_of(tmp_path, talker, [LABELLED["texts"]], unpair=True))
    with pytest.raises(LitPeftError, match=r"data.template 'chatty' is not known"):
        data_of(tmp_path, talker, [good], template="chatty")
    with pytest.raises(LitPeftError, match=r"chat_template is set but has no effect with data.template 'plain'"):
        data_of(tmp_path, talker, [good], template="plain", chat_template=TEMPLATE)


def test_pairs_of_a_prompt_are_in_one_split(tmp_path: Path, talker: Path) -> None:
    words = ("good", "great", "bad", "poor", "awful", "weak")
    rows = [
        {"prompt": f"the {a} {b}", "chosen": c, "rejected": "it"}
        for a in words
        for b in words
        for c in ("good", "great")
    ]
    data = data_of(tmp_path, talker, rows, validation_fraction=0.3)
    prompts = [{text[0].partition(" [")[0] for text in texts(data, split)} for split in ("train", "validation")]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 36
    assert len(data.examples("train")) + len(data.examples("validation")) == 72


def test_a_stream_gives_the_same_examples(tmp_path: Path, talker: Path) -> None:
    rows = [
        {"prompt": f"the {word}", "chosen": "good", "rejected": "bad"} for word in ("film", "story", "acting", "it")
    ]
    for settings in ({}, {"unpair": True}):
        whole = data_of(tmp_path, talker, rows, **settings)
        stream = data_of(tmp_path, talker, rows, streaming=True, shuffle_buffer=1, batch_size=1, **settings)
        batches = list(islice(stream.train_dataloader(), 4 * (1 + len(settings))))
        found = {
            tuple(row[mask.bool()].tolist())
            for b in batches
            for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        }
        examples = whole.examples("train")
        expected = {tuple(ids) for e in examples for ids in ([e["input_ids"]] if settings else e["input_ids"])}
        assert found == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["texts", "messages", "labelled"])
def test_tokens_are_those_of_trl(tmp_path: Path, talker: Path, kind: str) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    rows: list[dict[str, Any]] = [
        {"prompt": f"the {word} ", "chosen": "is good", "rejected": "is bad poor"}
        for word in ("film", "story", "acting")
    ]
    tokenizer = AutoTokenizer.from_pretrained(talker)
    settings: dict[str, Any] = {}
    if kind == "messages":
        settings["chat_template"] = tokenizer.chat_template = TEMPLATE
        for row in rows:
            row.update({name: [(user if name == "prompt" else assistant)(text)] for name, text in row.items()})
    if kind == "labelled":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    common = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False}
    table = Dataset.from_list(rows)
    trainer: Any
    if kind == "labelled":
        trainer = KTOTrainer(
            model, copy.deepcopy(model), KTOConfig(**common), train_dataset=table, processing_class=tokenizer
        )
        expected = [[row["prompt_ids"] + row["completion_ids"]] for row in trainer.train_dataset]
    else:
        trainer = DPOTrainer(
            model, copy.deepcopy(model), DPOConfig(**common), train_dataset=table, processing_class=tokenizer
        )
        names = ("chosen_ids", "rejected_ids")
        expected = [[row["prompt_ids"] + row[name] for name in names] for row in trainer.train_dataset]
    found = [example["input_ids"] for example in data_of(tmp_path, talker, rows, **settings).examples("train")]
    assert ([[ids] for ids in found] if kind == "labelled" else found) == expected


def test_the_preview_shows_both_answers(tmp_path: Path, talker: Path) -> None:
    data = data_of(tmp_path, talker, [{"prompt": "the film", "chosen": "good", "rejected": "bad"}])
    found = pieces(data, data.examples("train")[0])
    assert "".join(piece.text for piece in found).split("\n") == ["(0) the film good </s>", "(1) the film bad </s>"]
    assert [piece.text.strip() for piece in found if piece.learned] == ["good </s>", "bad </s>"]
