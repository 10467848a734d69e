"""A tiny BERT with a masked-LM head and a WordPiece tokenizer, for the tests of masked language modeling."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from conftest import WORDS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Words of two and of three tokens, in addition to those that are one.
PIECES = ["un", "##watch", "##able", "##ly", ".", ","]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: lower case, words and some pieces of words."""
    vocabulary = {word: at for at, word in enumerate([*SPECIALS, *dict.fromkeys([*WORDS, *PIECES])])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def save_base(folder: Path, with_head: bool = True) -> Path:
    """Write the model, with or without its head, and the tokenizer to a folder."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer()), max_position_embeddings=64, initializer_range=0.2, **shape)
    model = BertForMaskedLM(config)
    (model if with_head else model.bert).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
