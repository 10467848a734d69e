"""Tiny models that read images, one of each shape of image tensors, and their processors, made on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_vision_model import CHAT_TEMPLATE, llava, text_settings, tokenizer

pytest.importorskip("PIL")

from PIL import Image

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _without_video(kind: type[Any]) -> type[Any]:
    """A processor that reads images only: reading videos needs torchvision."""

    class ImagesOnly(kind):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str, **tokens: Any) -> None:
            for name, token in tokens.items():
                setattr(self, name, token)
                setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(token) if token else None)
            transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return ImagesOnly


def _qwen(config_class: Any, processor_class: Any, patch: int, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    made = tokenizer(*QWEN_TOKENS)
    size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 8 * (2 * patch) ** 2}
    processor = _without_video(processor_class)(
        Qwen2VLImageProcessorPil(size=size, patch_size=patch),
        made,
        CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, made.convert_tokens_to_ids(list(QWEN_TOKENS)), strict=True))
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10_000.0}
    text = {**text_settings(made), "rope_parameters": rope, **text}
    vision = {**QWEN_VISION, "patch_size": patch, **vision}
    return config_class(text_config=text, vision_config=vision, **ids), processor


def _qwen2_5_vl() -> Any:
    vision = {"window_size": 56, "fullatt_block_indexes": [1]}
    return _qwen(transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLProcessor, 14, {}, vision)


def _qwen3_vl() -> Any:
    vision = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return _qwen(transformers.Qwen3VLConfig, transformers.Qwen3VLProcessor, 16, {"head_dim": 16}, vision)


def _gemma3() -> Any:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"image_token": "<image_soft>", "boi_token": "<image_start>", "eoi_token": "<image_end>"}
    made = tokenizer(*names.values(), extra_special_tokens=names)
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, do_pan_and_scan=False)
    template = CHAT_TEMPLATE.replace("IMAGE", names["boi_token"])
    processor = transformers.Gemma3Processor(images, made, chat_template=template, image_seq_length=4)
    text = {**text_settings(made), "head_dim": 16, "sliding_window": 16}
    ids = {"image_token_id": made.image_token_id, "boi_token_id": made.boi_token_id, "eoi_token_id": made.eoi_token_id}
    return transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **ids), processor


def _gemma4() -> Any:
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    names = {"image_token": "<image_soft>", "boi_token": "<image_start>", "eoi_token": "<image_end>"}
    names |= {"audio_token": "<audio_soft>", "boa_token": "<audio_start>", "eoa_token": "<audio_end>"}
    made = tokenizer(*names.values(), "<|video|>", extra_special_tokens=names)
    processor = _without_video(transformers.Gemma4Processor)(
        Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=3),
        made,
        CHAT_TEMPLATE.replace("IMAGE", names["image_token"]),
        **names,
        video_token="<|video|>",
    )
    text = {
        **text_settings(made),
        "head_dim": 16,
        "sliding_window": 16,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {**VISION, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4, "position_embedding_size": 64}
    ids = {"image_token_id": made.image_token_id, "boi_token_id": made.boi_token_id, "eoi_token_id": made.eoi_token_id}
    return transformers.Gemma4Config(text_config=text, vision_config=vision, **ids), processor


def _idefics3() -> Any:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    made = tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *places)
    # Images are split into four, and seen as a whole.
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = transformers.Idefics3Processor(
        images, made, image_seq_len=4, chat_template=CHAT_TEMPLATE.replace("IMAGE", "<image>")
    )
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**text_settings(made)),
        vision_config=VISION,
        scale_factor=2,
        image_token_id=made.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    return config, processor


FAMILIES = {
    "llava": llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "gemma4": _gemma4,
}


def processor_of(family: str) -> Any:
    return FAMILIES[family]()[1]


@cache
def _config_and_weights(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    config = FAMILIES[family]()[0]
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Away from the start, where norms are ones and biases zeros.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return config, model.state_dict()


def model_of(family: str) -> Any:
    config, weights = _config_and_weights(family)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.load_state_dict(weights)
    return model


def picture(number: int, width: int = 60, height: int = 40) -> Image.Image:
    """A picture without two equal patches."""
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
    return Image.fromarray(values.to(torch.uint8).numpy())


def chats(folder: Path) -> Path:
    """A file of chats with one, two and no images, of several sizes."""
    for number in range(6):
        picture(number, 40 + 4 * number, 60 - 3 * number).save(folder / f"{number}.png")
    answer = {"role": "assistant", "content": "a red one"}
    rows: list[dict[str, Any]] = [
        {
            "images": [f"{number}.png"],
            "messages": [
                {"role": "user", "content": f"<image>What is it? {'x' * number}"},
                answer,
                {"role": "user", "content": "And now?"},
                {"role": "assistant", "content": f"number {number}"},
            ],
        }
        for number in range(4)
    ]
    rows.append({"images": ["4.png", "5.png"], "messages": [{"role": "user", "content": "Compare them."}, answer]})
    rows.append({"images": [], "messages": [{"role": "user", "content": "Hello"}, answer]})
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def data_of(family: str, file: Path, **settings: Any) -> Any:
    """A data module whose processor is not on disk."""
    from lit_peft.data import VisionLanguageData

    settings = {"train": str(file), "validation_fraction": 0.0, "batch_size": 6, "max_length": 400, **settings}
    data = VisionLanguageData(**settings)
    data.processor = processor_of(family)
    return data


def batch_of(family: str, file: Path, split: str = "train", **settings: Any) -> dict[str, Any]:
    """All rows of the file as a batch, in their order."""
    data = data_of(family, file, **({"predict": str(file)} if split == "predict" else {}), **settings)
    examples = data.examples(split)
    return data.collator(split)([examples[at] for at in range(len(examples))])
