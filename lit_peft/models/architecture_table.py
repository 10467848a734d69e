"""The layers of each known `model_type`, and what to try for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_peft.models import hybrid_forms as hybrids
from lit_peft.models import layer_forms as forms
from lit_peft.models.layer_forms import Architecture

# The architectures of a model_type, or a function of the config that returns them. A layer has the first one whose
# modules it has, and the layers of one model may have different ones.
ARCHITECTURES: dict[str, tuple[Architecture, ...] | Callable[[Any], tuple[Architecture, ...]]] = {
    "afmoe": (forms.AFMOE,),
    "albert": (forms.ALBERT,),
    "apertus": (forms.APERTUS,),
    "apertus1p5_text": (forms.APERTUS,),
    "bamba": hybrids.hybrid(hybrids.BAMBA),
    "bart": (forms.BART,),
    "bert": (forms.BERT,),
    "bigbird_pegasus": (forms.MBART,),
    "bloom": forms.bloom,
    "cpmant": (forms.CPMANT,),
    "ctrl": (forms.CTRL,),
    "dbrx": (forms.DBRX,),
    "deberta": (forms.BERT,),
    "deberta-v2": (forms.BERT,),
    "distilbert": (forms.DISTILBERT,),
    "dory": (forms.OLMO2,),
    "electra": (forms.BERT,),
    "esm": (forms.ESM,),
    "falcon": forms.falcon,
    "falcon_h1": (hybrids.FALCON_H1,),
    "falcon_mamba": (hybrids.MAMBA,),
    "fnet": (forms.FNET,),
    "gemma": (forms.LLAMA,),
    "gpt2": (forms.GPT2,),
    "gpt_neox": forms.gpt_neox,
    "gpt_neox_japanese": (forms.GPT_NEOX_JAPANESE,),
    "gptj": (forms.GPTJ,),
    "granitemoe": hybrids.GRANITE,
    "granitemoe_swa": hybrids.GRANITE,
    "granitemoehybrid": hybrids.hybrid(*hybrids.GRANITE),
    "granitemoeshared": hybrids.GRANITE,
    "gte": (forms.GTE,),
    "jamba": hybrids.hybrid(hybrids.BAMBA),
    "jina_embeddings_v3": (forms.GTE,),
    "lara_mini": hybrids.hybrid(forms.LLAMA),
    "lfm2": hybrids.hybrid(hybrids.LFM2),
    "lfm2_moe": hybrids.hybrid(hybrids.LFM2),
    "lfm3": hybrids.hybrid(hybrids.LFM2),
    "llama": (forms.LLAMA,),
    "llama4_text": (hybrids.LLAMA4,),
    "mamba": (hybrids.MAMBA,),
    "mamba2": (hybrids.MAMBA,),
    "marian": (forms.BART,),
    "mbart": (forms.MBART,),
    "megatron-bert": (forms.MEGATRON_BERT,),
    "minimax": (forms.OLMO2,),
    "mistral": (forms.LLAMA,),
    "modernbert": (forms.MODERNBERT,),
    "mpnet": (forms.MPNET,),
    "mpt": (forms.MPT,),
    "mt5": forms.T5,
    "nemotron_h": hybrids.NEMOTRON_H,
    "nllb-moe": (forms.seamless("ff_layer_norm"),),
    "nomic_bert": (forms.GTE,),
    "olmo_hybrid": (*hybrids.hybrid(forms.LLAMA), forms.OLMO2),
    "openai-gpt": (forms.OPENAI_GPT,),
    "opt": forms.opt,
    "pegasus_x": (forms.MBART,),
    "phi": (forms.PHI,),
    "phi3": (forms.PHI3,),
    "prophetnet": (forms.PROPHETNET,),
    "qwen2": (forms.LLAMA,),
    "qwen3": (forms.LLAMA,),
    "qwen3_5_moe_text": hybrids.hybrid(forms.LLAMA),
    "qwen3_5_text": hybrids.hybrid(forms.LLAMA),
    "qwen3_next": hybrids.hybrid(forms.LLAMA),
    "qwen4_exp_text": hybrids.QWEN4,
    "rembert": (forms.REMBERT,),
    "recurrent_gemma": hybrids.RECURRENT_GEMMA,
    "roberta": (forms.BERT,),
    "roberta-prelayernorm": (forms.ROBERTA_PRE_NORM,),
    "rwkv": (hybrids.RWKV,),
    "seamless_m4t": (forms.seamless("ffn_layer_norm"),),
    "seamless_m4t_v2": (forms.seamless("ffn_layer_norm"),),
    "t5": forms.T5,
    "xglm": (forms.XGLM,),
    "xlm-roberta-xl": (forms.XLM_ROBERTA_XL,),
    "xlstm": (hybrids.XLSTM,),
    "xmod": forms.xmod,
    "zamba": hybrids.ZAMBA,
    "zamba2": hybrids.ZAMBA2,
}


def candidates(config: Any, ends_in_norm: bool) -> tuple[tuple[Architecture, ...], ...]:
    """Return the architectures that a model's layers may have: those of its `model_type`, or all if that is unknown.

    Args:
        config: the config of the model around the layers.
        ends_in_norm: whether a norm follows the last layer of the stack.

    Returns:
        The families to try in turn; each layer must have an architecture of the same family.
    """
    known = ARCHITECTURES.get(getattr(config, "model_type", None) or "")
    if known is not None:
        return (known(config) if callable(known) else known,)
    # The most specific come first. A norm after the last layer means pre-LN layers, which tells mBART from BART.
    return (
        (forms.BERT,),
        (forms.DISTILBERT,),
        *((each,) for each in forms.T5),
        (forms.PHI3,),
        (forms.GEMMA2,),
        (forms.T5GEMMA,),
        (forms.AFMOE,),
        (forms.APERTUS,),
        (forms.LLAMA,),
        (forms.PHI,),
        (forms.GTE,),
        (forms.OLMO2,),
        (forms.MBART if ends_in_norm else forms.BART,),
        (forms.GPT2,),
        (forms.GPTJ,),
        *((each,) for find in (forms.gpt_neox, forms.bloom, forms.falcon) for each in find(config)),
        (forms.MODERNBERT,),
        hybrids.hybrid(forms.LLAMA),
        (*hybrids.hybrid(forms.LLAMA), forms.OLMO2),
        (hybrids.FALCON_H1,),
        hybrids.hybrid(hybrids.BAMBA),
        hybrids.hybrid(hybrids.LFM2),
        hybrids.hybrid(hybrids.LLAMA4),
        hybrids.hybrid(*hybrids.GRANITE),
        (hybrids.MAMBA,),
        hybrids.NEMOTRON_H,
    )
