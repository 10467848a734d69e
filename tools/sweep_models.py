"""Small random models of as many of transformers' model types as can be built, for `tools/sweep.py`."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

VOCABULARY = 61
# What a default config is made smaller by: the first pattern that matches a setting's whole name decides.
SIZES: list[tuple[str, Any]] = [
    (r"vocab_size|.*_vocab_size|n_vocab|vocab_size_per_layer_input", VOCABULARY),
    (r"pad_token_id", 0),
    (r"decoder_start_token_id", 0),
    (r"(bos|mask|sep|cls)_token_id", 1),  # some configs refuse None
    (r"(eos|forced_bos|forced_eos)_token_id", None),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|max_length", 128),
    (r"num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_decoder_layers|num_encoder_layers", 2),
    (r"n_heads?|num_heads|num_attention_heads|(encoder|decoder)_attention_heads", 4),
    (r"num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num", 2),
    (r"head_dim|d_kv|kv_channels|attention_head_dim", 8),
    (
        r"hidden_size|d_model|n_embd|n_embed|dim|embedding_size|model_dim|embed_dim|word_embed_proj_dim|mlp_dim|emb_dim",
        32,
    ),
    (r"hidden_size_per_layer_input|laurel_rank", 8),
    (r"intermediate_size|ffn_dim|d_ff|n_inner|hidden_dim|ffn_hidden_size|(en|de)coder_ffn_dim|block_ff_dim", 48),
    (r".*intermediate_size.*|.*ffn_hidden_size", 48),
    (r"(n_|num_)?(local_|routed_)?experts|n_routed_experts|num_local_experts|moe_num_experts|num_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|num_experts_per_token|top_k|moe_top_k", 2),
    (r"n_shared_experts|moe_num_shared_experts|num_shared_experts", 1),
    (r"n_group|topk_group|first_k_dense_replace", 1),
    (r"q_lora_rank|kv_lora_rank", 16),
    (r"qk_rope_head_dim", 4),
    (r"qk_nope_head_dim", 4),
    (r"v_head_dim", 6),
    (r"qk_head_dim", 8),
    (r"sliding_window|attention_window|local_attention|attention_window_size", 16),
    (r"rotary_dim", 4),
    (r"state_size|mamba_d_state|d_state|ssm_state_size", 8),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 8),
    (r"mamba_n_groups|n_groups", 1),
    (r"mamba_chunk_size|chunk_size", 8),
    (r"linear_num_value_heads", 4),
    (r"linear_num_key_heads", 2),
    (r"linear_(key|value)_head_dim", 8),
]
# What the patterns cannot know.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_expand": 2},
    "bloom": {"n_layer": 2, "n_head": 4},
    "deepseek_v2": {"head_dim": 4},
    "deepseek_v3": {"head_dim": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "llama4_text": {"attention_chunk_size": 16, "num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8, "expand": 2, "n_groups": 2},
    "minimax": {"block_size": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "modernbert": {"global_attn_every_n_layers": 2},
    "mpt": {"expansion_ratio": 2},
    "phi3": {"rope_scaling": None},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "xlnet": {"d_inner": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "axk1": {"head_dim": 4},
    "bailing_hybrid": {"linear_head_dim": 8, "linear_num_heads": 4, "num_expert_group": 1, "head_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "dots3_note_text": {"per_layer_config": {}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "esmc": {"num_key_value_heads": 4},
    # The gradient of a row of zeros, which padding has, is not finite there.
    "gemma3n_text": {
        "pad_token_id": None,
        "intermediate_size": [48, 48],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_expand": 2},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "visual_embed": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2},
    "rwkv": {"use_cache": False},
    "qwen4_exp_text": {
        "num_hidden_layers": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
        "ple_embed_dim": 32,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": 2, "use_cache": False},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"head_dim": 4},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "adapter_rank": 4,
        "use_mem_rope": True,
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1},
}
LISTS = {
    "decoder": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "encoder": ("AutoModelForSequenceClassification", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "encoder-decoder": ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}
# Model types without a row, and why.
LEFT_OUT = {
    "blt": "cannot be built small: its tables of hashed bytes have fixed sizes",
    "dory": "does not run with few layers",
    "fsmt": "computes a loss only for labels of the input's length",
    "git": "reads images",
    "layoutlmv2": "needs the package detectron2",
    "mra": "its attention does not run on a CPU",
    "musicgen": "writes sound",
    "musicgen_melody": "writes sound",
    "perceiver": "cannot be built small: it reads bytes, images or sound through fixed tables",
    "reformer": "is no decoder unless its attention layers are chosen by hand",
    "t5gemma2": "reads images beside the text",
    "trocr": "reads images",
    "whisper": "reads sound",
}
SEVERAL = "combines several models, e.g. for images or sound: a language model among them has a row of its own"
LARGEST = 7_000_000


def settings_of(model_type: str) -> dict[str, Any]:
    """The settings of a small model: the default config's, made smaller."""
    default = transformers.AutoConfig.for_model(model_type).to_dict()
    found = smaller(model_type, default)
    if model_type in LISTS["encoder-decoder"][1]:
        found["decoder_start_token_id"] = 0
    return found


def smaller(model_type: str, default: dict[str, Any]) -> dict[str, Any]:
    """The settings to change of a config, and of the configs in it."""
    found: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, dict) and value.get("model_type"):
            # What differs between a large model's layers would name layers that a small one does not have.
            kept = {key: item for key, item in value.items() if key != "per_layer_config"}
            found[name] = {**kept, **smaller(value["model_type"], value)}
            continue
        size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), name)
        if size is not name and (isinstance(value, int) or value is None or name.endswith("_id")):
            found[name] = size
    if "kv_lora_rank" in default:  # latent attention has as many heads of keys as of queries
        found["num_key_value_heads"] = found["num_attention_heads"]
    layers = OWN.get(model_type, {}).get("num_hidden_layers", 2)
    kinds = default.get("layer_types")
    if isinstance(kinds, list) and kinds:
        # One of each kind, and the last one again where there are more layers.
        distinct = list(dict.fromkeys(kinds))
        found["layer_types"] = (distinct * layers)[:layers]
    return {**found, **OWN.get(model_type, {})}


def build(model_type: str, kind: str) -> Any:
    """Build a small random model in evaluation mode.

    Raises:
        ValueError: it stays large, whatever is set.
    """
    auto = getattr(transformers, LISTS[kind][0])
    config = transformers.AutoConfig.for_model(model_type, **settings_of(model_type))
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(0)
    return auto.from_config(config).eval()


def model_types(kind: str) -> list[str]:
    """The model types of a kind, in alphabetical order."""
    names = sorted(LISTS[kind][1])
    if kind == "encoder":
        decoders, both = LISTS["decoder"][1], LISTS["encoder-decoder"][1]
        names = [name for name in names if name not in both and (name not in decoders or "bert" in name)]
    if kind == "decoder":
        others = {*LISTS["encoder-decoder"][1], *(name for name in LISTS["encoder"][1] if "bert" in name)}
        names = [name for name in names if name not in others]
    return [name for name in names if left_out(name) is None]


def left_out(model_type: str) -> str | None:
    """Why a model type has no row; None if it has one."""
    if model_type in LEFT_OUT:
        return LEFT_OUT[model_type]
    config_class: Any = transformers.CONFIG_MAPPING[model_type]
    combines = {"text_config", "vision_config", "audio_config"} & set(config_class.sub_configs)
    return SEVERAL if combines and not getattr(config_class, "is_encoder_decoder", False) else None
