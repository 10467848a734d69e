"""The modules of each known transformer layer, in one table by `model_type`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lit_peft.util.errors import LitPeftError


@dataclass(frozen=True)
class Sublayer:
    """One sublayer (attention or FFN) of a layer that computes `LN(y + x)` or, pre-LN, `y + x`.

    Args:
        output: the module whose output is y.
        residual: the module whose first input is x.
        norm: LN, in a post-LN layer.
        more_residual: a module that runs after `residual` and whose output is added to x: the attention, in a layer
            that runs attention and FFN in parallel.
        normed_before: whether AdapterHub's `original_ln_before` adds x here.
        adapterhub: the module that holds this sublayer's adapter in AdapterHub.
    """

    output: str
    residual: str
    norm: str | None = None
    more_residual: str | None = None
    normed_before: bool = True
    adapterhub: str = ""


@dataclass(frozen=True)
class Architecture:
    """The modules of one architecture's layers, by their paths inside the layer.

    Args:
        attention: the self-attention sublayer.
        ffn: the feed-forward sublayer.
        cross: the cross-attention sublayer, if layers have one.
        qkv_linears: the projections to query, key and value; a layer need not have all of them.
        ffn_linears: the FFN's linear layers in the order they run; a layer need not have all of them.
        cross_attention: the module that computes cross-attention, if layers have one.
    """

    attention: Sublayer
    ffn: Sublayer
    cross: Sublayer | None = None
    qkv_linears: tuple[str, ...] = ()
    ffn_linears: tuple[str, ...] = ()
    cross_attention: str | None = None

    @property
    def self_attention(self) -> str:
        """The path of the module that computes self-attention, which has the projections."""
        return self.qkv_linears[0].rpartition(".")[0]


def _names(parent: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names)


_LLAMA = Architecture(
    attention=Sublayer("self_attn", "input_layernorm"),
    ffn=Sublayer("mlp", "post_attention_layernorm"),
    qkv_linears=_names("self_attn", "q_proj", "k_proj", "v_proj", "qkv_proj"),
    ffn_linears=_names("mlp", "gate_proj", "up_proj", "gate_up_proj", "fc1", "down_proj", "fc2"),
)
_PHI3 = replace(
    _LLAMA,
    attention=Sublayer("resid_attn_dropout", "input_layernorm"),
    ffn=Sublayer("resid_mlp_dropout", "post_attention_layernorm"),
)
# A norm before and one after each sublayer; y is the input of the second.
_GEMMA2 = replace(_LLAMA, ffn=Sublayer("mlp", "pre_feedforward_layernorm"))
_PHI = replace(_LLAMA, ffn=Sublayer("mlp", "input_layernorm", more_residual="self_attn", normed_before=False))
# Norms only after the sublayers, so x is the sublayer's input.
_OLMO2 = replace(_LLAMA, attention=Sublayer("self_attn", "self_attn"), ffn=Sublayer("mlp", "mlp"))
_GPT2 = Architecture(
    attention=Sublayer("attn", "ln_1"),
    ffn=Sublayer("mlp", "ln_2"),
    cross=Sublayer("crossattention", "ln_cross_attn"),
    qkv_linears=_names("attn", "c_attn"),
    ffn_linears=_names("mlp", "c_fc", "c_proj"),
    cross_attention="crossattention",
)
_OPENAI_GPT = Architecture(
    attention=Sublayer("attn", "attn", "ln_1"),
    ffn=Sublayer("mlp", "mlp", "ln_2"),
    qkv_linears=_names("attn", "c_attn"),
    ffn_linears=_names("mlp", "c_fc", "c_proj"),
)
_GPTJ = Architecture(
    attention=Sublayer("attn", "ln_1"),
    ffn=Sublayer("mlp", "ln_1", more_residual="attn"),
    qkv_linears=_names("attn", "q_proj", "k_proj", "v_proj", "qkv_proj"),
    ffn_linears=_names("mlp", "fc_in", "fc_out"),
)


def _bert(path: str, residual: str) -> Sublayer:
    return Sublayer(f"{path}.dropout", residual, f"{path}.LayerNorm", adapterhub=path)


_BERT = Architecture(
    attention=_bert("attention.output", "attention"),
    ffn=_bert("output", "intermediate"),
    cross=_bert("crossattention.output", "crossattention"),
    qkv_linears=_names("attention.self", "query", "key", "value", "query_proj", "key_proj", "value_proj"),
    ffn_linears=("intermediate.dense", "output.dense"),
    cross_attention="crossattention.self",
)
_DISTILBERT = Architecture(
    attention=Sublayer("attention", "attention", "sa_layer_norm"),
    ffn=Sublayer("ffn", "ffn", "output_layer_norm"),
    qkv_linears=_names("attention", "q_lin", "k_lin", "v_lin"),
    ffn_linears=_names("ffn", "lin1", "lin2"),
)
# AdapterHub uses the normed input as x here.
_MODERNBERT = Architecture(
    attention=Sublayer("attn", "attn"),
    ffn=Sublayer("mlp", "mlp"),
    qkv_linears=_names("attn", "Wqkv"),
    ffn_linears=_names("mlp", "Wi", "Wo"),
)
_BART = Architecture(
    attention=Sublayer("self_attn", "self_attn", "self_attn_layer_norm"),
    ffn=Sublayer("fc2", "fc1", "final_layer_norm"),
    cross=Sublayer("encoder_attn", "encoder_attn", "encoder_attn_layer_norm"),
    qkv_linears=_names("self_attn", "q_proj", "k_proj", "v_proj"),
    ffn_linears=("fc1", "fc2"),
    cross_attention="encoder_attn",
)
_MBART = replace(
    _BART,
    attention=Sublayer("self_attn", "self_attn_layer_norm"),
    ffn=Sublayer("fc2", "final_layer_norm"),
    cross=Sublayer("encoder_attn", "encoder_attn_layer_norm"),
)


def _t5(ffn: int) -> Architecture:
    def sublayer(number: int) -> Sublayer:
        path = f"layer.{number}"
        return Sublayer(f"{path}.dropout", f"{path}.layer_norm", adapterhub=path)

    return Architecture(
        attention=sublayer(0),
        ffn=sublayer(ffn),
        cross=sublayer(1) if ffn == 2 else None,
        qkv_linears=_names("layer.0.SelfAttention", "q", "k", "v"),
        ffn_linears=_names(f"layer.{ffn}.DenseReluDense", "wi", "wi_0", "wi_1", "wo"),
        cross_attention="layer.1.EncDecAttention" if ffn == 2 else None,
    )


def _gpt_neox(config: Any) -> tuple[Architecture, ...]:
    attention = Sublayer("post_attention_dropout", "input_layernorm")
    ffn = Sublayer("post_mlp_dropout", "post_attention_layernorm")
    if getattr(config, "use_parallel_residual", True):
        # The input of both norms is the layer's; the first norm runs before the attention, whose output is added.
        ffn = replace(ffn, residual=attention.residual, more_residual=attention.output)
    return (
        Architecture(
            attention=attention,
            ffn=ffn,
            qkv_linears=_names("attention", "query_key_value"),
            ffn_linears=_names("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        ),
    )


def _bloom(config: Any) -> tuple[Architecture, ...]:
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
            qkv_linears=_names("self_attention", "query_key_value"),
            ffn_linears=_names("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        ),
    )


def _falcon(config: Any) -> tuple[Architecture, ...]:
    def architecture(norm: str, ffn_norm: str, parallel: bool) -> Architecture:
        return Architecture(
            attention=Sublayer("self_attention", norm),
            ffn=Sublayer("mlp", ffn_norm, more_residual="self_attention" if parallel else None),
            qkv_linears=_names("self_attention", "query_key_value"),
            ffn_linears=_names("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        )

    if getattr(config, "parallel_attn", True) or getattr(config, "new_decoder_architecture", False):
        return architecture("ln_attn", "ln_attn", True), architecture("input_layernorm", "input_layernorm", True)
    return (architecture("input_layernorm", "post_attention_layernorm", False),)


def _opt(config: Any) -> tuple[Architecture, ...]:
    return (_MBART if getattr(config, "do_layer_norm_before", True) else _BART,)


_T5 = (_t5(2), _t5(1))

# The architectures of a model_type, or a function of the config that returns them. A layer has the first one whose
# modules it has.
ARCHITECTURES: dict[str, tuple[Architecture, ...] | Callable[[Any], tuple[Architecture, ...]]] = {
    "bart": (_BART,),
    "bert": (_BERT,),
    "bloom": _bloom,
    "deberta": (_BERT,),
    "deberta-v2": (_BERT,),
    "distilbert": (_DISTILBERT,),
    "electra": (_BERT,),
    "falcon": _falcon,
    "gemma": (_LLAMA,),
    "gpt2": (_GPT2,),
    "gpt_neox": _gpt_neox,
    "gptj": (_GPTJ,),
    "llama": (_LLAMA,),
    "marian": (_BART,),
    "mbart": (_MBART,),
    "mistral": (_LLAMA,),
    "modernbert": (_MODERNBERT,),
    "mt5": _T5,
    "openai-gpt": (_OPENAI_GPT,),
    "opt": _opt,
    "phi": (_PHI,),
    "phi3": (_PHI3,),
    "qwen2": (_LLAMA,),
    "qwen3": (_LLAMA,),
    "roberta": (_BERT,),
    "t5": _T5,
}


def candidates(config: Any, ends_in_norm: bool) -> tuple[Architecture, ...]:
    """Return the architectures that a layer may have: those of its `model_type`, or all if that is unknown.

    Args:
        config: the config of the model around the layer.
        ends_in_norm: whether a norm follows the last layer of the stack.
    """
    known = ARCHITECTURES.get(getattr(config, "model_type", None) or "")
    if known is not None:
        return known(config) if callable(known) else known
    # The most specific come first. A norm after the last layer means pre-LN layers, which tells mBART from BART.
    return (
        _BERT,
        _DISTILBERT,
        *_T5,
        _PHI3,
        _GEMMA2,
        _LLAMA,
        _PHI,
        _OLMO2,
        _MBART if ends_in_norm else _BART,
        _GPT2,
        _GPTJ,
        *_gpt_neox(config),
        *_bloom(config),
        *_falcon(config),
        _MODERNBERT,
    )
