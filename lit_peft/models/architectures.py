"""Where things are in a transformer layer: one table by `model_type`, and a search by structure for unknown models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from lit_peft.models.call_arguments import arguments
from lit_peft.nn.linear import linear_features
from lit_peft.util.errors import LitPeftError


@dataclass(frozen=True)
class Sublayer:
    """One sublayer (attention or FFN) of a layer that computes `LN(y + x)` or, pre-LN, `y + x`.

    Args:
        output: the module whose output is y.
        residual: the module whose first input is x.
        norm: LN, in a post-LN layer.
        more_residual: a module whose output is part of x as well, run after `residual`: the attention of a layer that
            runs attention and FFN in parallel.
        normed_before: whether AdapterHub's `original_ln_before` adds x there; not in layers without x in its eyes.
        adapterhub: the module AdapterHub keeps this sublayer's adapter in.
    """

    output: str
    residual: str
    norm: str | None = None
    more_residual: str | None = None
    normed_before: bool = True
    adapterhub: str = ""


@dataclass(frozen=True)
class Architecture:
    """The modules of one kind of layer, named from the layer.

    Args:
        attention: the self-attention sublayer.
        ffn: the feed-forward sublayer.
        cross: the cross-attention sublayer, where a layer has one.
        qkv_linears: the projections to query, key and value; those that a layer lacks do not count.
        ffn_linears: the FFN's linear layers, the last one last; those that a layer lacks do not count.
        cross_attention: the module that computes cross-attention, where a layer has one.
    """

    attention: Sublayer
    ffn: Sublayer
    cross: Sublayer | None = None
    qkv_linears: tuple[str, ...] = ()
    ffn_linears: tuple[str, ...] = ()
    cross_attention: str | None = None

    @property
    def self_attention(self) -> str:
        """The module that computes self-attention: the one the projections belong to."""
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
# Norms stand around each sublayer; y is what enters the second one.
_GEMMA2 = replace(_LLAMA, ffn=Sublayer("mlp", "pre_feedforward_layernorm"))
_PHI = replace(_LLAMA, ffn=Sublayer("mlp", "input_layernorm", more_residual="self_attn", normed_before=False))
# Norms only after the sublayers, so that their input is x.
_OLMO2 = replace(_LLAMA, attention=Sublayer("self_attn", "self_attn"), ffn=Sublayer("mlp", "mlp"))
_GPT2 = Architecture(
    attention=Sublayer("attn", "ln_1"),
    ffn=Sublayer("mlp", "ln_2"),
    cross=Sublayer("crossattention", "ln_cross_attn"),
    qkv_linears=_names("attn", "c_attn"),
    ffn_linears=_names("mlp", "c_fc", "c_proj"),
    cross_attention="crossattention",
)
_GPTJ = Architecture(
    attention=Sublayer("attn", "ln_1"),
    ffn=Sublayer("mlp", "ln_1", more_residual="attn"),
    qkv_linears=_names("attn", "q_proj", "k_proj", "v_proj", "qkv_proj"),
    ffn_linears=_names("mlp", "fc_in", "fc_out"),
)


def _bert(place: str, residual: str) -> Sublayer:
    return Sublayer(f"{place}.dropout", residual, f"{place}.LayerNorm", adapterhub=place)


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
# AdapterHub takes the normed input for x here.
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
        place = f"layer.{number}"
        return Sublayer(f"{place}.dropout", f"{place}.layer_norm", adapterhub=place)

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
        # Both norms take the layer's input; the first runs before the attention, whose output is added to it.
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
            f"slow_but_exact=True with pretraining_tp={config.pretraining_tp} computes layers without calling them, so "
            "that adapters there would do nothing: load the model with slow_but_exact=False."
        )
    # x is added inside the sublayers, and is the normed input where the config says so.
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

# A model_type's architectures, or what gives them from the config; the first whose modules a layer has is its own.
ARCHITECTURES: dict[str, tuple[Architecture, ...] | Callable[[Any], tuple[Architecture, ...]]] = {
    "bart": (_BART,),
    "bert": (_BERT,),
    "bloom": _bloom,
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
    "opt": _opt,
    "phi": (_PHI,),
    "phi3": (_PHI3,),
    "qwen2": (_LLAMA,),
    "qwen3": (_LLAMA,),
    "roberta": (_BERT,),
    "t5": _T5,
}


class Layer(NamedTuple):
    """A transformer layer in a model: its name, its architecture, and the config of the part it belongs to."""

    path: str
    module: nn.Module
    architecture: Architecture
    config: Any


def layer_stacks(model: nn.Module) -> list[list[Layer]]:
    """Find a model's layers: one list per stack (encoder, decoder), in the model's order.

    Args:
        model: a transformers model, or one that contains such models.

    Raises:
        LitPeftError: no list of layers of a known shape is there.
    """
    stacks: list[list[Layer]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        config = _config_of(model, path)
        owner = model.get_submodule(path.rpartition(".")[0])
        for architecture in _candidates(config, owner):
            if all(_fits(architecture, layer) for layer in module):
                layers = enumerate(module)
                stacks.append([Layer(f"{path}.{number}", layer, architecture, config) for number, layer in layers])
                break
    if not stacks:
        raise LitPeftError(
            f"{type(model).__name__} has no transformer layers of a known shape, so an adapter's places are not known: "
            "name the linear layers to adapt yourself, with placement='llm_adapters' and target_modules=[...]."
        )
    return stacks


def token_model(model: nn.Module, layer: Layer) -> str | None:
    """The path of the innermost model around a layer: the one that is called with token ids. None if none is."""
    path = layer.path
    while path:
        path = path.rpartition(".")[0]
        if "input_ids" in arguments(model.get_submodule(path)):
            return path
    return None


def kv_shape(attention: nn.Module, config: Any) -> tuple[int, int]:
    """The number of heads and the width of a head of the keys and values that an attention module attends to.

    Args:
        attention: the module that computes attention.
        config: the config of the model it belongs to.
    """

    def first(owner: Any, *names: str) -> Any:
        return next((getattr(owner, name) for name in names if getattr(owner, name, None) is not None), None)

    heads = first(attention, "num_heads", "num_attention_heads", "n_heads") or config.num_attention_heads
    size = first(attention, "head_dim", "attention_head_size", "key_value_proj_dim") or first(config, "head_dim")
    size = int(size or config.hidden_size // heads)
    for name in ("k_proj", "key", "k_lin", "k", "key_proj"):
        projection = attention.get_submodule(name) if has_module(attention, name) else None
        if projection is not None and isinstance(getattr(projection, "weight", None), Tensor):
            return linear_features(projection)[1] // size, size
    groups = first(attention, "num_key_value_groups")
    if groups is not None:
        return int(heads) // int(groups), size
    # Falcon's newer form gives each query its own copy of its group's key.
    if not getattr(attention, "new_decoder_architecture", False):
        heads = first(attention, "num_kv_heads") or first(config, "num_key_value_heads") or heads
    return int(heads), size


def has_module(module: nn.Module, path: str) -> bool:
    """Whether `module` has a submodule of that name."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _config_of(model: nn.Module, path: str) -> Any:
    """The config of the innermost model around `path`."""
    parts = path.split(".")
    for length in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:length])), "config", None)
        if hasattr(config, "hidden_size"):
            return config
    return None


def _candidates(config: Any, owner: nn.Module) -> tuple[Architecture, ...]:
    known = ARCHITECTURES.get(getattr(config, "model_type", None) or "")
    if known is not None:
        return known(config) if callable(known) else known
    # The most particular first. Stacks of pre-LN layers end in a norm of their own, which tells BART from mBART.
    ends_in_norm = has_module(owner, "layer_norm") or has_module(owner, "final_layer_norm")
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


def _fits(architecture: Architecture, layer: nn.Module) -> bool:
    return all(
        place is None or has_module(layer, place)
        for sublayer in (architecture.attention, architecture.ffn)
        for place in (sublayer.output, sublayer.residual, sublayer.norm, sublayer.more_residual)
    )


def position_table(host: nn.Module) -> nn.Embedding | None:
    """A model's table of position embeddings; None without one."""
    for name, module in host.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and last in ("position_embeddings", "embed_positions", "wpe"):
            return module
    return None


def learned_positions(host: nn.Module) -> int | None:
    """How many positions a model's table of position embeddings has; None without one."""
    table = position_table(host)
    if table is None:
        return None
    before = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(getattr(table, "offset", before))


def room_for(num_virtual_tokens: int, host: nn.Module, model: nn.Module) -> int | None:
    """How many positions `host`, the part of `model` that virtual tokens enter, has a table of; None without one.

    Raises:
        LitPeftError: the virtual tokens alone fill it.
    """
    positions = learned_positions(host)
    if positions is not None and num_virtual_tokens >= positions:
        raise LitPeftError(
            f"num_virtual_tokens={num_virtual_tokens} leaves no room in the {positions} positions that "
            f"{type(model).__name__} has: give fewer."
        )
    return positions


def is_causal(config: Any) -> bool:
    """Whether each token of a model sees only those before it, whatever its head."""
    import transformers

    kind = type(config)
    # Of those that are encoders as well, BERT's kind, the config says which.
    encodes = kind in transformers.AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    return kind in transformers.AutoModelForCausalLM._model_mapping and not encodes


def counts_over_mask(host: nn.Module, config: Any) -> bool:
    """Whether a causal model can be given positions that are counted over its attention mask, from 0."""
    # RoBERTa's begin behind its padding's id, and it counts past padding itself.
    own = getattr(position_table(host), "padding_idx", None) is not None
    return is_causal(config) and "position_ids" in arguments(host) and not own
