"""The modules of layers that mix tokens by attention or by something else (Mamba, a convolution), and of mixtures."""

from __future__ import annotations

from dataclasses import replace

from lit_peft.models.layer_forms import LLAMA, OLMO2, Architecture, Sublayer, names


def hybrid(*architectures: Architecture) -> tuple[Architecture, ...]:
    """Return layers with attention and those that have another module in its place."""
    return tuple(
        layer
        for each in architectures
        if each.attention is not None
        for layer in (
            each,
            *(
                replace(each, attention=replace(each.attention, output=mixer), qkv_linears=())
                for mixer in ("linear_attn", "mamba", "conv")
            ),
        )
    )


BAMBA = replace(
    LLAMA,
    ffn=Sublayer("feed_forward", "pre_ff_layernorm"),
    ffn_linears=names("feed_forward", "gate_proj", "up_proj", "down_proj"),
)
FALCON_H1 = replace(
    BAMBA,
    attention=Sublayer(
        "self_attn", "input_layernorm", more_output="mamba", factors=("attn_out_multiplier", "ssm_out_multiplier")
    ),
)
LFM2 = replace(
    LLAMA,
    attention=Sublayer("self_attn", "operator_norm"),
    ffn=Sublayer("feed_forward", "ffn_norm"),
    ffn_linears=names("feed_forward", "w1", "w3", "w2"),
)
LLAMA4 = replace(
    LLAMA,
    ffn=Sublayer("feed_forward", "post_attention_layernorm"),
    ffn_linears=names("feed_forward", "gate_proj", "up_proj", "down_proj")
    + names("feed_forward.shared_expert", "gate_proj", "up_proj", "down_proj"),
)
GRANITE_MOE = replace(LLAMA, ffn=Sublayer("block_sparse_moe", "post_attention_layernorm"), ffn_linears=())
GRANITE_DENSE = replace(
    LLAMA,
    ffn=Sublayer("shared_mlp", "post_attention_layernorm"),
    ffn_linears=names("shared_mlp", "input_linear", "output_linear"),
)
GRANITE_SHARED = replace(
    GRANITE_DENSE, ffn=Sublayer("shared_mlp", "post_attention_layernorm", more_output="block_sparse_moe")
)
GRANITE = (GRANITE_SHARED, GRANITE_DENSE, GRANITE_MOE)
_GRIFFIN = Architecture(
    attention=Sublayer("temporal_block", "temporal_pre_norm"),
    ffn=Sublayer("mlp_block", "channel_pre_norm"),
    qkv_linears=names("temporal_block", "q_proj", "k_proj", "v_proj"),
    ffn_linears=names("mlp_block", "gate_proj", "up_proj", "down_proj"),
    marks=("temporal_block.q_proj",),
)
RECURRENT_GEMMA = (_GRIFFIN, replace(_GRIFFIN, qkv_linears=(), marks=()))
# A layer is one block. In a model of Mamba blocks alone each widens the hidden states as a feed-forward network does.
MAMBA = Architecture(
    attention=None, ffn=Sublayer("mixer", "norm"), ffn_linears=("mixer.in_proj",), marks=("mixer.in_proj",)
)
NEMOTRON_H = (
    Architecture(
        attention=Sublayer("mixer", "norm"),
        ffn=None,
        qkv_linears=names("mixer", "q_proj", "k_proj", "v_proj"),
        marks=("mixer.q_proj",),
    ),
    Architecture(attention=Sublayer("mixer", "norm"), ffn=None, marks=("mixer.in_proj",)),
    Architecture(attention=None, ffn=Sublayer("mixer", "norm"), ffn_linears=names("mixer", "up_proj", "down_proj")),
)
# Attention whose output passes through `linear` and joins the input of a Mamba block. Its weights are shared by layers;
# `linear` is each layer's own.
ZAMBA2 = (
    Architecture(
        attention=Sublayer("mamba_decoder.mamba", "mamba_decoder"),
        ffn=Sublayer("linear", ""),
        qkv_linears=names("shared_transformer.self_attn", "q_proj", "k_proj", "v_proj"),
    ),
    Architecture(attention=Sublayer("mamba", ""), ffn=None),
)
ZAMBA = (replace(ZAMBA2[0], qkv_linears=names("shared_transf.self_attn", "q_proj", "k_proj", "v_proj")), ZAMBA2[1])
RWKV = Architecture(
    attention=Sublayer("attention", "ln1"),
    ffn=Sublayer("feed_forward", "ln2"),
    ffn_linears=names("feed_forward", "key", "value"),
)
XLSTM = Architecture(
    attention=Sublayer("mlstm_layer", "norm_mlstm"),
    ffn=Sublayer("ffn", "norm_ffn"),
    ffn_linears=names("ffn", "proj_up_gate", "proj_up", "proj_down"),
)
# Hyper-connections mix several residuals into the input of each sublayer, which is taken for x.
QWEN4 = (OLMO2, replace(OLMO2, attention=Sublayer("linear_attn", "linear_attn"), qkv_linears=()))
