"""GGUF files for `tools/fuzz.py`: a tiny Llama with a tokenizer, its header and its fields mutated."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_peft import LitPeftError

HUGE = [0, 1, 255, 2**16, 2**31 - 1, 2**32, 2**40, 2**62, 2**64 - 1]


def write_tiny(file: Path) -> None:
    """Write the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.max_position_embeddings = 64
    write_llama(file, LlamaForCausalLM(config))


def write_llama(file: Path, model: Any) -> None:
    """Write a Llama of 259 tokens as llama.cpp stores it: its names, and the halves of each head interleaved."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    config = model.config
    writer: Any = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(259)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(ByteLevel.alphabet()), "ab", "<s>", "</s>"])
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Gguf:
    """GGUF files, to the model's folder in the cache."""

    trusted = True  # the conversion imports the tokenizer's code and writes to the cache

    def __init__(self, work: Path) -> None:
        self.original, self.cache = work / "tiny.gguf", work / "cache"
        os.environ["LIT_PEFT_CACHE"] = str(self.cache)
        write_tiny(self.original)
        self.data = self.original.read_bytes()
        self.header = self.data.index(b"token_embd")
        assert self.read(self.original) == "read"

    def case(self, work: Path, rng: random.Random) -> tuple[str, Path, Callable[[], str]]:
        import fuzz

        file = work / "tiny.gguf"
        data = bytearray(self.data)
        # Mostly the header: other values in a tensor are a model, too.
        for _ in range(rng.randint(1, 3)):
            at = rng.choice((4, 8, 16, rng.randrange(self.header + 600)))
            if rng.random() < 0.5:
                data[at : at + 8] = struct.pack("<Q", rng.choice(HUGE))
            else:
                data[at : at + 4] = rng.choice((rng.randbytes(4), struct.pack("<I", rng.randrange(14))))
        file.write_bytes(bytes(data) if rng.random() < 0.8 else fuzz.mutate_bytes(bytes(data), rng))
        return "gguf", file, lambda: self.read(file)

    def read(self, file: Path) -> str:
        import fuzz

        from lit_peft.models.gguf import convert_gguf

        try:
            with contextlib.redirect_stderr(io.StringIO()):
                convert_gguf(file, self.cache)
        except LitPeftError as problem:
            fuzz.check_message(problem)
            return "refused"
        return "read"
