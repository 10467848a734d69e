"""Chats with images to batches: forms, what is learned, padding, limits, and what is refused."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vision_models import FAMILIES, batch_of, chats, data_of, picture, processor_of

from lit_peft.data import VisionLanguageData
from lit_peft.data.image_messages import IMAGE_PART
from lit_peft.data.images import ImageSource, read_image
from lit_peft.data.preview import facts_of, pieces
from lit_peft.util.errors import LitPeftError

ANSWER = {"role": "assistant", "content": "red"}
QUESTION = {"type": "text", "text": "What?"}


def chat(content: Any, **columns: Any) -> dict[str, Any]:
    return {**columns, "messages": [{"role": "user", "content": content}, ANSWER]}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats(tmp_path_factory.mktemp("chats"))


def png(number: int = 0) -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, format="PNG")
    return stream.getvalue()


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def learned(processor: Any, batch: dict[str, Any]) -> list[str]:
    return [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


# ----------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_the_processors_own_with_labels_on_the_answers(family: str, file: Path) -> None:
    data = data_of(family, file)
    examples = data.examples("train")
    batch = data.collator("train")([examples[at] for at in range(len(examples))])
    paths = [[f"{number}.png"] for number in range(4)] + [["4.png", "5.png"], []]
    own = data.processor(
        text=[example["text"] for example in examples],
        images=[[read_image(ImageSource(str(file.parent / name), b"")) for name in row] for row in paths],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    assert set(batch) == {*own, "labels"}
    assert all(torch.equal(batch[name], own[name]) for name in own)
    end = "<|im_end|>"
    answers = [f"a red one{end}number {number}{end}" for number in range(4)] + [f"a red one{end}"] * 2
    assert learned(data.processor, batch) == answers


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_padded_on_the_left_and_end_where_the_answer_begins(family: str, file: Path) -> None:
    batch = batch_of(family, file, "predict")
    decode = processor_of(family).tokenizer.decode
    assert torch.equal(batch["attention_mask"], batch["attention_mask"].sort(1).values)
    assert all(decode(row).endswith("<|im_start|>assistant\n") for row in batch["input_ids"])
    assert "labels" not in batch
    for name in {"token_type_ids", "mm_token_type_ids"} & set(batch):
        assert not batch[name][batch["attention_mask"] == 0].any() and batch[name].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_images_are_never_learned(family: str, file: Path) -> None:
    processor = processor_of(family)
    batch = batch_of(family, file, train_on_inputs=True)
    text = learned(processor, batch)[4]
    assert "Compare them." in text and "a red one" in text
    special = {"<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<image_soft>", "<image_start>"}
    assert not any(token in text for token in {*special, "<image_end>", "<global-img>", "<row_1_col_1>"})


def test_only_the_last_answer_or_other_roles_can_be_learned(file: Path) -> None:
    processor = processor_of("llava")
    assert learned(processor, batch_of("llava", file, learn="last_answer"))[0] == "number 0<|im_end|>"
    found = learned(processor, batch_of("llava", file, learn=["user"]))[0]
    assert "What is it?" in found and "And now?" in found and "<image>" not in found and "number" not in found


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_labels_are_those_of_trl_after_the_prompt(family: str, tmp_path: Path) -> None:
    """TRL's collator masks the prompt of a prompt and its completion, and padding."""
    trainer = pytest.importorskip("trl.trainer.sft_trainer")
    processor = processor_of(family)
    rows = []
    for number in range(2):
        picture(number, 50 + 9 * number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "prompt": f"What is{' it' * number}?", "completion": f"the {number}"})
    batch = batch_of(family, written(tmp_path, *rows))
    examples = [
        {
            "images": [picture(number, 50 + 9 * number)],
            "prompt": [{"role": "user", "content": [IMAGE_PART, {"type": "text", "text": row["prompt"]}]}],
            "completion": [
                {"role": "assistant", "content": [{"type": "text", "text": row["completion"]}]},
            ],
        }
        for number, row in enumerate(rows)
    ]
    processor.tokenizer.padding_side = "right"
    theirs = trainer.DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(examples)
    assert torch.equal(batch["pixel_values"], theirs["pixel_values"])
    for row in range(2):
        ours = batch["labels"][row][batch["labels"][row] != -100].tolist()
        found = theirs["labels"][row][theirs["labels"][row] != -100].tolist()
        # Theirs also has the line break that the template puts after each turn.
        assert found[: len(ours)] == ours and len(found) - len(ours) <= 1


# ------------------------------------------------------------------------------------------ forms of rows


@pytest.mark.parametrize(
    "row",
    [
        chat([{"type": "image", "path": "0.png"}, QUESTION]),
        chat([{"type": "image_url", "image_url": {"url": "0.png"}}, QUESTION]),
        chat([{"type": "image"}, QUESTION], images=["0.png"]),
        {
            "image": "0.png",
            "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}],
        },
        chat("What?", image="0.png"),
        {"image": "0.png", "prompt": "What?", "completion": "red"},
        {"image": "0.png", "question": "What?", "answer": "red"},
        {"image": "0.png", "instruction": "What?", "output": "red"},
        {"image": {"base64": base64.b64encode(png()).decode()}, "prompt": "What?", "completion": "red"},
        {"image": f"data:image/png;base64,{base64.b64encode(png()).decode()}", "prompt": "What?", "completion": "red"},
    ],
    ids=["part", "openai", "places", "llava", "front", "pair", "question", "alpaca", "base64", "data URI"],
)  # fmt: skip
def test_the_forms_of_rows_give_the_same_example(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png())
    batch = batch_of("llava", written(tmp_path, row))
    processor = processor_of("llava")
    shown = "<|im_start|>user\n<image><image><image><image>What?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>"
    assert processor.tokenizer.decode(batch["input_ids"][0]) == shown
    own = processor.image_processor([read_image(ImageSource("", png()))], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], own["pixel_values"])


def test_images_of_a_dataset_stay_undecoded_until_they_are_needed(tmp_path: Path) -> None:
    import datasets

    columns = {"images": [[picture(0)], [picture(1), picture(2)]], "prompt": ["a", "b"], "completion": ["c", "d"]}
    text = datasets.Value("string")
    features = datasets.Features({"images": datasets.List(datasets.Image()), "prompt": text, "completion": text})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    data = data_of("llava", tmp_path / "saved")
    examples = data.examples("train")
    assert [len(row) for row in examples["image_files"]] == [1, 2]
    batch = data.collator("train")([examples[0], examples[1]])
    own = data.processor.image_processor([picture(0), picture(1), picture(2)], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], own["pixel_values"])


def test_relative_paths_start_in_the_folder_of_the_file_or_where_the_setting_says(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    picture(0).save(tmp_path / "elsewhere" / "0.png")
    file = written(tmp_path, {"image": "0.png", "prompt": "What?", "completion": "red"})
    with pytest.raises(LitPeftError, match=r"row 1: the image '.*0\.png' does not exist; correct the path"):
        data_of("llava", file).examples("train")
    assert len(data_of("llava", file, image_folder=str(tmp_path / "elsewhere")).examples("train")) == 1
    with pytest.raises(LitPeftError, match=r"data\.image_folder 'nowhere' is no folder"):
        VisionLanguageData(train=str(file), image_folder="nowhere")


def test_all_rows_about_an_image_are_in_one_split(tmp_path: Path) -> None:
    rows = []
    for number in range(6):
        picture(number).save(tmp_path / f"{number}.png")
        rows += [{"image": f"{number}.png", "prompt": f"What {at}?", "completion": "red"} for at in range(4)]
    data = data_of("llava", written(tmp_path, *rows), validation_fraction=0.3)
    found = {
        split: {row[0]["path"] for row in data.examples(split)["image_files"]} for split in ("train", "validation")
    }
    assert found["train"] and found["validation"] and not found["train"] & found["validation"]


def test_texts_that_differ_only_in_their_image_are_no_duplicates(tmp_path: Path) -> None:
    rows = [
        {"image": {"base64": base64.b64encode(png(number)).decode()}, "prompt": "What?", "completion": "red"}
        for number in (0, 1, 0)
    ]
    data = data_of("llava", written(tmp_path, *rows))
    key = data.duplicate_key(data.rows["train"].table)
    assert key(0) != key(1) and key(0) == key(2)


# ------------------------------------------------------------------------------------------------ limits


def test_an_image_is_never_cut(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "0.png")
    late = {"role": "user", "content": [{"type": "text", "text": "x" * 60}, {"type": "image", "path": "0.png"}]}
    long = {"role": "user", "content": [{"type": "image", "path": "0.png"}, {"type": "text", "text": "x"}]}
    first = {"role": "assistant", "content": "y" * 60}
    file = written(
        tmp_path,
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}, late, ANSWER]},
        {"messages": [long, first]},
        {"messages": [{"role": "user", "content": "Hi"}, ANSWER]},
    )
    with pytest.warns(UserWarning, match="examples"):
        data = data_of("llava", file, max_length=60)
        assert len(data.examples("train")) == 2
    report = " ".join(data.report())
    assert "1 of 3 examples (33.3 %) dropped, because data.max_length 60 would cut an image" in report
    assert max(len(ids) for ids in data.examples("train")["input_ids"]) == 60
    only_late = written(tmp_path, {"messages": [{"role": "user", "content": "Hi"}, ANSWER, late, ANSWER]})
    with pytest.raises(LitPeftError, match=r"would cut an image in every row of data\.train"):
        data_of("llava", only_late, max_length=40).examples("train")
    prompt = written(tmp_path, {"messages": [long, {"role": "user", "content": "z" * 60}]})
    data = data_of("llava", file, predict=str(prompt), max_length=30)
    with pytest.raises(LitPeftError, match=r"row 1: the prompt has \d+ tokens with its images, and data\.max_length"):
        data.examples("predict")


def test_long_rows_can_be_dropped_and_left_cuts_are_refused(file: Path) -> None:
    data = data_of("llava", file, max_length=60, truncation_side="drop")
    assert {len(ids) <= 60 for ids in data.examples("train")["input_ids"]} == {True}
    with pytest.raises(LitPeftError, match="truncation_side is 'left'; VisionLanguageData allows 'right' or 'drop'"):
        data_of("llava", file, truncation_side="left")


def test_the_default_length_is_what_the_images_need(file: Path) -> None:
    data = data_of("idefics3", file, max_length=None)
    longest = max(len(ids) for ids in data.examples("train")["input_ids"])
    assert data.max_length == longest + -longest % 8


# ---------------------------------------------------------------------------------------------- refusals


def test_packing_is_refused(file: Path) -> None:
    with pytest.raises(LitPeftError, match=r"data\.packing is set, but rows with images are not packed"):
        data_of("llava", file, packing=True)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (chat("<image>?", images=["0.png", "0.png"]), "has 2 images, and its messages have places for 1"),
        (chat("<image><image>?", images=["0.png"]), "more places for images than its column has images, 1"),
        (chat("?", images=["broken.png"]), r"the image '.*broken\.png' cannot be read"),
        (chat("?", images=["http://localhost/0.png"]), r"is an address, and data\.image_urls is not set"),
        (chat("?", images=["ftp://localhost/0.png"]), "neither http nor https"),
        (chat("?", images=[{"base64": "%"}]), "not valid base64"),
        (chat("?", images=[7]), "7 is no image; give a path"),
        (chat("?", images=["iVBORw0KGgo" * 1000]), "the image '[^']{200,300}… does not exist; correct the path"),
        (chat("a <image> in text"), "the processor refuses the row .*no images were passed"),
        (chat([{"type": "video", "path": "a.mp4"}]), "has the content part .*, which is not read; give text, "),
    ],
)
def test_a_wrong_row_is_named(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "broken.png").write_bytes(png()[:60])
    with pytest.raises(LitPeftError, match=rf"data\.train '.*rows\.jsonl', row 1.*{problem}"):
        data_of("llava", written(tmp_path, row)).examples("train")


def test_two_columns_of_images_are_refused_until_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png())
    file = written(tmp_path, {"image": "0.png", "images": ["0.png", "0.png"], "question": "?", "answer": "A"})
    with pytest.raises(LitPeftError, match=r"columns 'images' and 'image': name the one to read in data\.image_column"):
        data_of("llava", file).examples("train")
    data = data_of("llava", file, image_column="image")
    assert len(data.examples("train")[0]["image_files"]) == 1
    assert any("column 'images' not used" in line for line in data.report())


def test_data_without_any_image_get_a_warning(tmp_path: Path) -> None:
    file = written(tmp_path, {"photo": "0.png", "question": "?", "answer": "A"})
    data = data_of("llava", file)
    with pytest.warns(UserWarning, match=r"data\.train: no example has an image; name the column .*image_column"):
        data.examples("train")
    assert not any("data.template" in line for line in data.report())  # it cannot be set


def test_only_the_columns_of_the_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(LitPeftError, match="it has 'image', 'question', 'answers'; nearest") as error:
        data_of("llava", written(tmp_path, {"image": "0.png", "question": "?", "answers": ["A"]})).examples("train")
    assert "folder_of_images" not in str(error.value)


def test_settings_without_effect_are_refused(file: Path) -> None:
    with pytest.raises(LitPeftError, match=r"data\.template is set but has no effect with images"):
        data_of("llava", file, template="alpaca")
    with pytest.raises(LitPeftError, match=r"data\.image_column is 'photo', and there is no such column"):
        data_of("llava", file, image_column="photo").examples("train")
    with pytest.raises(LitPeftError, match="set `processor` instead"):
        data_of("llava", file).tokenizer = None
    data = data_of("llava", file)
    data.tokenizer.chat_template = None
    with pytest.raises(LitPeftError, match="has no chat template, so the places of images"):
        data.examples("train")


def test_a_processor_is_loaded_with_settings_and_unknown_ones_are_refused(file: Path, tmp_path: Path) -> None:
    from vision_models import model_of

    model_of("idefics3").save_pretrained(tmp_path)
    processor_of("idefics3").save_pretrained(tmp_path)
    settings: dict[str, Any] = {"train": str(file), "base": str(tmp_path), "validation_fraction": 0.0}
    split = VisionLanguageData(**settings).examples("train")[0]["input_ids"]
    whole = VisionLanguageData(**settings, processor_args={"do_image_splitting": False}).examples("train")[0]
    assert len(whole["input_ids"]) < len(split)
    with pytest.raises(
        LitPeftError, match=r"data\.processor_args has 'do_image_spliting': False, which changes nothing"
    ):
        _ = VisionLanguageData(**settings, processor_args={"do_image_spliting": False}).processor


def test_a_base_without_a_processor_is_named(file: Path, decoder: Path) -> None:
    with pytest.raises(LitPeftError, match=r"data\.base .* has no processor"):
        _ = VisionLanguageData(train=str(file), base=str(decoder)).processor


# ----------------------------------------------------------------------------------------------- preview


@pytest.mark.parametrize("family", FAMILIES)
def test_the_preview_shows_an_image_as_one_token(family: str, file: Path) -> None:
    data = data_of(family, file)
    shown = "".join(piece.text for piece in pieces(data, data.examples("train")[0]))
    token = "<image_soft>" if family.startswith("gemma") else data.processor.image_token
    assert f"{token}{token}" not in shown and token in shown and "What is it?" in shown
    facts = facts_of(data, "train", data.examples("train"))
    assert facts.packed is None and facts.learned is not None and facts.duplicates == 0
    assert any("6 images in 6 examples" in line for line in data.report())


def test_a_missing_package_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vision_models import model_of

    model_of("qwen2_5_vl").save_pretrained(tmp_path)
    processor_of("qwen2_5_vl").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings |= {"processor_class": "Qwen2_5_VLProcessor"}
    settings |= {"video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"}}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    with pytest.raises(LitPeftError, match="its processor needs the package torchvision: `pip install"):
        _ = VisionLanguageData(train=str(file), base=str(tmp_path)).processor
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(LitPeftError, match="Images are read by Pillow, which is not installed"):
        VisionLanguageData(train=str(file), base=str(tmp_path))
