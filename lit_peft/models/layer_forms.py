"""The modules of transformer layers: what `lit_peft.models.architecture_table` gives to each `model_type`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from lit_peft.util.errors import LitPeftError


@dataclass(frozen=True)
class Sublayer:
    """One sublayer (attention or FFN) of a layer that computes `LN(y + x)` or, pre-LN, `y + x`.

    Args:
        output: the module whose output is y.
        residual: the module whose first input is x; empty for the layer itself.
        norm: LN, in a post-LN layer.
        more_residual: a module that runs after `residual` and whose output is added to x: the attention, in a layer
            that runs attention and FFN in parallel.
        normed_before: whether AdapterHub's `original_ln_before` adds x here.
        adapterhub: the module that holds this sublayer's adapter in AdapterHub.
        more_output: a module that runs before `output` and whose output is added to that of `output`: y is the sum.
        factors: the layer's attributes that multiply the outputs of `output` and `more_output` in this sum.
    """

    output: str
    residual: str
    norm: str | None = None
    more_residual: str | None = None
    normed_before: bool = True
    adapterhub: str = ""
    more_output: str | None = None
    factors: tuple[str, str] | None = None


@dataclass(frozen=True)
class Architecture:
    """The modules of one architecture's layers, by their paths inside the layer.

    Args:
        attention: the self-attention sublayer, or that of another module that mixes tokens in its place (Mamba, a
            convolution); None in a layer that is only a feed-forward network.
        ffn: the feed-forward sublayer; None in a layer that only mixes tokens.
        cross: the cross-attention sublayer, if layers have one.
        qkv_linears: the projections to query, key and value; a layer need not have all of them.
        ffn_linears: the FFN's linear layers in the order they run; a layer need not have all of them.
        cross_attention: the module that computes cross-attention, if layers have one.
        marks: further modules that tell these layers from others.
        own_attention: how attention that is computed in the model's own code takes a prefix. `cache`: from its cache,
            with a mask that is added to the scores; `distance`: from its cache, with a mask that is true for hidden
            keys and a bias that depends on the distance to the last key. None: it does not.
    """

    attention: Sublayer | None
    ffn: Sublayer | None
    cross: Sublayer | None = None
    qkv_linears: tuple[str, ...] = ()
    ffn_linears: tuple[str, ...] = ()
    cross_attention: str | None = None
    marks: tuple[str, ...] = ()
    own_attention: Literal["cache", "distance"] | None = None

    @property
    def self_attention(self) -> str | None:
        """The path of the module that computes self-attention, which has the projections; None without attention."""
        return self.qkv_linears[0].rpartition(".")[0] if self.qkv_linears else None


def names(parent: str, *children: str) -> tuple[str, ...]:
    """Return the paths of a module's children."""
    return tuple(f"{parent}.{child}" for child in children)


LLAMA = Architecture(
    attention=Sublayer("self_attn", "input_layernorm"),
    ffn=Sublayer("mlp", "post_attention_layernorm"),
    # The last two are those of latent attention.
    qkv_linears=names("self_attn", "q_proj", "k_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj"),
    ffn_linears=names("mlp", "gate_proj", "up_proj", "gate_up_proj", "fc1", "down_proj", "fc2"),
)
PHI3 = replace(
    LLAMA,
    attention=Sublayer("resid_attn_dropout", "input_layernorm"),
    ffn=Sublayer("resid_mlp_dropout", "post_attention_layernorm"),
)
# A norm before and one after each sublayer; y is the input of the second.
GEMMA2 = replace(LLAMA, ffn=Sublayer("mlp", "pre_feedforward_layernorm"))
T5GEMMA = replace(
    GEMMA2,
    attention=Sublayer("self_attn", "pre_self_attn_layernorm"),
    cross=Sublayer("cross_attn", "pre_cross_attn_layernorm"),
    cross_attention="cross_attn",
)
AFMOE = replace(LLAMA, ffn=Sublayer("mlp", "pre_mlp_layernorm"))
APERTUS = replace(
    LLAMA, attention=Sublayer("self_attn", "attention_layernorm"), ffn=Sublayer("mlp", "feedforward_layernorm")
)
PHI = replace(LLAMA, ffn=Sublayer("mlp", "input_layernorm", more_residual="self_attn", normed_before=False))
# Norms only after the sublayers, so x is the sublayer's input.
OLMO2 = replace(LLAMA, attention=Sublayer("self_attn", "self_attn"), ffn=Sublayer("mlp", "mlp"))
GTE = replace(
    OLMO2,
    attention=Sublayer("self_attn", "self_attn", "post_attention_layernorm"),
    ffn=Sublayer("mlp", "mlp", "post_mlp_layernorm"),
    marks=("post_attention_dropout",),
)
GPT2 = Architecture(
    attention=Sublayer("attn", "ln_1"),
    ffn=Sublayer("mlp", "ln_2"),
    cross=Sublayer("crossattention", "ln_cross_attn"),
    qkv_linears=names("attn", "c_attn"),
    ffn_linears=names("mlp", "c_fc", "c_proj"),
    cross_attention="crossattention",
)
OPENAI_GPT = Architecture(
    attention=Sublayer("attn", "attn", "ln_1"),
    ffn=Sublayer("mlp", "mlp", "ln_2"),
    qkv_linears=names("attn", "c_attn"),
    ffn_linears=names("mlp", "c_fc", "c_proj"),
)
GPTJ = Architecture(
    attention=Sublayer("attn", "ln_1"),
    ffn=Sublayer("mlp", "ln_1", more_residual="attn"),
    qkv_linears=names("attn", "q_proj", "k_proj", "v_proj", "qkv_proj"),
    ffn_linears=names("mlp", "fc_in", "fc_out"),
)


def bert(path: str, residual: str) -> Sublayer:
    return Sublayer(f"{path}.dropout", residual, f"{path}.LayerNorm", adapterhub=path)


BERT = Architecture(
    attention=bert("attention.output", "attention"),
    ffn=bert("output", "intermediate"),
    cross=bert("crossattention.output", "crossattention"),
    qkv_linears=names("attention.self", "query", "key", "value", "query_proj", "key_proj", "value_proj"),
    ffn_linears=("intermediate.dense", "output.dense"),
    cross_attention="crossattention.self",
)
DISTILBERT = Architecture(
    attention=Sublayer("attention", "attention", "sa_layer_norm"),
    ffn=Sublayer("ffn", "ffn", "output_layer_norm"),
    qkv_linears=names("attention", "q_lin", "k_lin", "v_lin"),
    ffn_linears=names("ffn", "lin1", "lin2"),
)
# AdapterHub uses the normed input as x here.
MODERNBERT = Architecture(
    attention=Sublayer("attn", "attn"),
    ffn=Sublayer("mlp", "mlp"),
    qkv_linears=names("attn", "Wqkv"),
    ffn_linears=names("mlp", "Wi", "Wo"),
)
BART = Architecture(
    attention=Sublayer("self_attn", "self_attn", "self_attn_layer_norm"),
    ffn=Sublayer("fc2", "fc1", "final_layer_norm"),
    cross=Sublayer("encoder_attn", "encoder_attn", "encoder_attn_layer_norm"),
    qkv_linears=names("self_attn", "q_proj", "k_proj", "v_proj"),
    ffn_linears=("fc1", "fc2"),
    cross_attention="encoder_attn",
)
MBART = replace(
    BART,
    attention=Sublayer("self_attn", "self_attn_layer_norm"),
    ffn=Sublayer("fc2", "final_layer_norm"),
    cross=Sublayer("encoder_attn", "encoder_attn_layer_norm"),
)


def t5(ffn: int) -> Architecture:
    def sublayer(number: int) -> Sublayer:
        path = f"layer.{number}"
        return Sublayer(f"{path}.dropout", f"{path}.layer_norm", adapterhub=path)

    return Architecture(
        attention=sublayer(0),
        ffn=sublayer(ffn),
        cross=sublayer(1) if ffn == 2 else None,
        qkv_linears=names("layer.0.SelfAttention", "q", "k", "v"),
        ffn_linears=names(f"layer.{ffn}.DenseReluDense", "wi", "wi_0", "wi_1", "wo"),
        cross_attention="layer.1.EncDecAttention" if ffn == 2 else None,
    )


def gpt_neox(config: Any) -> tuple[Architecture, ...]:
    attention = Sublayer("post_attention_dropout", "input_layernorm")
    ffn = Sublayer("post_mlp_dropout", "post_attention_layernorm")
    if getattr(config, "use_parallel_residual", True):
        # The input of both norms is the layer's; the first norm runs before the attention, whose output is added.
        ffn = replace(ffn, residual=attention.residual, more_residual=attention.output)
    return (
        Architecture(
            attention=attention,
            ffn=ffn,
            qkv_linears=names("attention", "query_key_value"),
            ffn_linears=names("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        ),
    )


def bloom(config: Any) -> tuple[Architecture, ...]:
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        raise LitPeftError(
            f"slow_but_exact=True with pretraining_tp={config.pretraining_tp} computes linear layers without calling "
            "them, so adapters on them would have no effect: load the model with slow_but_exact=False."
        )
    # x is added inside the sublayers; the config says whether it is the normed input.
    normed = getattr(config, "apply_residual_connection_post_layernorm", False)
    return (
        Architecture(
            attention=Sublayer("self_attention.dense", "self_attention" if normed else "input_layernorm"),
            ffn=Sublayer("mlp.dense_4h_to_h", "mlp" if normed else "post_attention_layernorm"),
            qkv_linears=names("self_attention", "query_key_value"),
            ffn_linears=names("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        ),
    )


def falcon(config: Any) -> tuple[Architecture, ...]:
    def architecture(norm: str, ffn_norm: str, parallel: bool) -> Architecture:
        return Architecture(
            attention=Sublayer("self_attention", norm),
            ffn=Sublayer("mlp", ffn_norm, more_residual="self_attention" if parallel else None),
            qkv_linears=names("self_attention", "query_key_value"),
            ffn_linears=names("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        )

    if getattr(config, "parallel_attn", True) or getattr(config, "new_decoder_architecture", False):
        return architecture("ln_attn", "ln_attn", True), architecture("input_layernorm", "input_layernorm", True)
    return (architecture("input_layernorm", "post_attention_layernorm", False),)


def opt(config: Any) -> tuple[Architecture, ...]:
    return (MBART if getattr(config, "do_layer_norm_before", True) else BART,)


T5 = (t5(2), t5(1))

MPT = Architecture(
    attention=Sublayer("attn", "norm_1"),
    # x is added inside of `ffn`.
    ffn=Sublayer("ffn.down_proj", "norm_2"),
    qkv_linears=names("attn", "Wqkv"),
    ffn_linears=names("ffn", "up_proj", "down_proj"),
    own_attention="distance",
)
DBRX = Architecture(
    attention=Sublayer("norm_attn_norm.attn", "norm_attn_norm.norm_1"),
    ffn=Sublayer("ffn", "norm_attn_norm.norm_2"),
    qkv_linears=names("norm_attn_norm.attn", "Wqkv"),
)
GPT_NEOX_JAPANESE = Architecture(
    attention=Sublayer("attention", "input_layernorm"),
    ffn=Sublayer("mlp", "post_attention_layernorm"),
    qkv_linears=names("attention", "query_key_value"),
    ffn_linears=names("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    own_attention="cache",
)
CTRL = Architecture(
    attention=Sublayer("dropout1", "layernorm1"),
    ffn=Sublayer("dropout2", "layernorm2"),
    qkv_linears=names("multi_head_attention", "Wq", "Wk", "Wv"),
    ffn_linears=names("ffn", "0", "2"),
)
CPMANT = Architecture(
    attention=Sublayer("self_att.self_attention", "self_att.layernorm_before_attention"),
    ffn=Sublayer("ffn.ffn", "ffn.layernorm_before_ffn"),
    qkv_linears=names("self_att.self_attention", "project_q", "project_k", "project_v"),
    ffn_linears=("ffn.ffn.w_in.w_0", "ffn.ffn.w_in.w_1", "ffn.ffn.w_out"),
)
ALBERT = Architecture(
    attention=Sublayer("attention.output_dropout", "attention", "attention.LayerNorm"),
    ffn=Sublayer("ffn_output", "ffn", "full_layer_layer_norm"),
    qkv_linears=names("attention", "query", "key", "value"),
    ffn_linears=("ffn", "ffn_output"),
)
MPNET = replace(
    BERT,
    attention=Sublayer("attention.dropout", "attention", "attention.LayerNorm"),
    qkv_linears=names("attention.attn", "q", "k", "v"),
)
FNET = replace(
    BERT, attention=Sublayer("fourier.self", "fourier", "fourier.output.LayerNorm"), cross=None, qkv_linears=()
)


def pre_norm_bert(ffn: Sublayer) -> Architecture:
    """A BERT whose norms stand before the sublayers; x is added inside of `attention.output` and `output`."""
    cross = Sublayer("crossattention.output.dropout", "crossattention")
    return replace(BERT, attention=Sublayer("attention.output.dropout", "attention"), ffn=ffn, cross=cross)


def xmod(config: Any) -> tuple[Architecture, ...]:
    """A BERT with adapters for languages of its own between its FFN and the norm."""
    pre_norm = bool(getattr(config, "pre_norm", False))
    attention_norm, norm = (None, None) if pre_norm else ("attention.output.LayerNorm", "output.LayerNorm")
    return (
        replace(
            BERT,
            attention=Sublayer("attention.output.dropout", "attention", attention_norm, adapterhub="attention.output"),
            # The dropout after it runs again in the adapters for languages.
            ffn=Sublayer("output.dense", "output.LayerNorm" if pre_norm else "intermediate", norm, adapterhub="output"),
        ),
    )


MEGATRON_BERT = replace(pre_norm_bert(Sublayer("output.dropout", "ln")), own_attention="cache")
REMBERT = replace(BERT, own_attention="cache")
XGLM = replace(MBART, own_attention="cache")
ESM = pre_norm_bert(Sublayer("output.dropout", "LayerNorm"))
XLM_ROBERTA_XL = pre_norm_bert(Sublayer("output.dense", "LayerNorm"))
ROBERTA_PRE_NORM = pre_norm_bert(Sublayer("output.dropout", "intermediate"))


def seamless(norm: str) -> Architecture:
    return replace(
        MBART,
        ffn=Sublayer("ffn", norm),
        cross=Sublayer("cross_attention", "cross_attention_layer_norm"),
        ffn_linears=names("ffn", "fc1", "fc2"),
        cross_attention="cross_attention",
    )


PROPHETNET = replace(
    BART,
    ffn=Sublayer("feed_forward", "feed_forward", "feed_forward_layer_norm"),
    cross=Sublayer("cross_attn", "cross_attn", "cross_attn_layer_norm"),
    qkv_linears=names("self_attn", "query_proj", "key_proj", "value_proj"),
    ffn_linears=names("feed_forward", "intermediate", "output"),
    cross_attention="cross_attn",
)
