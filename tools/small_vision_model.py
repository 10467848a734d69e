"""Write a small random LLaVA with its processor, images of coloured shapes, and questions about them.

    pip install -e ".[vision]"
    python tools/small_vision_model.py small_vision 400

The folder gets `base/` (a model to fine-tune, without any skill), `images/`, `train.jsonl` and `test.jsonl`, which
`configs/vision_language.yaml` reads.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (230, 210, 40)}
SHAPES = ("square", "circle")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(*special: str, **named: Any) -> Any:
    """Return a tokenizer whose tokens are bytes, with special tokens of a chat and those given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *pre_tokenizers.ByteLevel.alphabet()]
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(sorted(tokens))}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        model_max_length=4096,
        **named,
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    return made


def text_settings(made: Any) -> dict[str, Any]:
    """Return the settings of a small language model for a tokenizer."""
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,  # the head is frozen, and must be able to tell tokens apart
        "vocab_size": len(made),
        "max_position_embeddings": 512,
        "bos_token_id": made.bos_token_id,
        "eos_token_id": made.eos_token_id,
        "pad_token_id": made.pad_token_id,
    }


def llava() -> tuple[Any, Any]:
    """Return the configuration and the processor of a small LLaVA."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    made = tokenizer("<image>")
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        made,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "<image>"),
    )
    vision: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    settings: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**vision, image_size=28, patch_size=14, projection_dim=64),
        "text_config": LlamaConfig(**text_settings(made)),
        "image_token_id": made.convert_tokens_to_ids("<image>"),
    }
    return LlavaConfig(**settings), processor


def draw(colour: str, shape: str, randomness: random.Random) -> Any:
    """Return an image of a shape on grey."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (randomness.randint(40, 72), randomness.randint(40, 72)), (128, 128, 128))
    left, top = randomness.randint(2, 8), randomness.randint(2, 8)
    box = (left, top, left + randomness.randint(24, 30), top + randomness.randint(24, 30))
    pen = ImageDraw.Draw(image)
    (pen.rectangle if shape == "square" else pen.ellipse)(box, fill=COLOURS[colour])
    return image


def write(folder: Path, count: int) -> None:
    """Write the model, `count` images, and a chat about each; every fifth one is for tests."""
    import torch
    from transformers import AutoModelForImageTextToText

    config, processor = llava()
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    randomness = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number in range(count):
        colour, shape = randomness.choice(list(COLOURS)), randomness.choice(SHAPES)
        draw(colour, shape, randomness).save(folder / "images" / f"{number}.png")
        question = {"role": "user", "content": "<image>Which colour does it have?"}
        answer = {"role": "assistant", "content": colour}
        rows["train" if number % 5 else "test"].append(
            {"images": [f"images/{number}.png"], "messages": [question, answer]}
        )
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
