"""The LightningModules: `lit_peft.modules.LoRA` and one for every other method in `lit_peft.methods.registry`."""

# Made by tools/make_stubs.py from the code. Do not edit.

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lit_peft.methods.adapter_h import AdapterHMixin
from lit_peft.methods.adapter_h import AdapterHSettings
from lit_peft.methods.adapter_p import AdapterPMixin
from lit_peft.methods.adapter_p import AdapterPSettings
from lit_peft.methods.baselines import FullFineTuningMixin
from lit_peft.methods.baselines import FullFineTuningSettings
from lit_peft.methods.baselines import HeadOnlyMixin
from lit_peft.methods.baselines import HeadOnlySettings
from lit_peft.methods.lora import LoRAMixin
from lit_peft.methods.lora import LoRASettings
from lit_peft.methods.p_tuning import PTuningMixin
from lit_peft.methods.p_tuning import PTuningSettings
from lit_peft.methods.p_tuning_v2 import PTuningV2Mixin
from lit_peft.methods.p_tuning_v2 import PTuningV2Settings
from lit_peft.methods.parallel import ParallelMixin
from lit_peft.methods.parallel import ParallelSettings
from lit_peft.methods.prefix_tuning import PrefixTuningMixin
from lit_peft.methods.prefix_tuning import PrefixTuningSettings
from lit_peft.methods.prompt_tuning import PromptTuningMixin
from lit_peft.methods.prompt_tuning import PromptTuningSettings
from lit_peft.training.module import BaseLM

class FullFineTuning(FullFineTuningMixin, BaseLM):
    """Every parameter is trained: the upper baseline."""

    settings: FullFineTuningSettings

    def __init__(
        self,
        base: str,
        task: str = "causal_lm",
        labels: list[str] | None = None,
        num_labels: int | None = None,
        learning_rate: float | None = None,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_scheduler: str = "linear",
        warmup_steps: float = 0.06,
        generation: dict[str, Any] | None = None,
        dtype: str | None = None,
        adapter_dtype: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        supervised_loss: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
    ) -> None:
        """Build the module.

        Args:
            modules_to_save: names of modules trained in full and stored with the adapter, e.g. a classification head; a
                single parameter by its full name.
            base, ...: see `BaseLM`.
        """

class HeadOnly(HeadOnlyMixin, BaseLM):
    """Only the task head is trained: the lower baseline."""

    settings: HeadOnlySettings

    def __init__(
        self,
        base: str,
        task: str = "causal_lm",
        labels: list[str] | None = None,
        num_labels: int | None = None,
        learning_rate: float | None = None,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_scheduler: str = "linear",
        warmup_steps: float = 0.06,
        generation: dict[str, Any] | None = None,
        dtype: str | None = None,
        adapter_dtype: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        supervised_loss: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
    ) -> None:
        """Build the module.

        Args:
            modules_to_save: names of modules trained in full and stored with the adapter, e.g. a classification head; a
                single parameter by its full name.
            base, ...: see `BaseLM`.
        """

class LoRA(LoRAMixin, BaseLM):
    """A low-rank update beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

    settings: LoRASettings

    def __init__(
        self,
        base: str,
        task: str = "causal_lm",
        labels: list[str] | None = None,
        num_labels: int | None = None,
        learning_rate: float | None = None,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_scheduler: str = "linear",
        warmup_steps: float = 0.06,
        generation: dict[str, Any] | None = None,
        dtype: str | None = None,
        adapter_dtype: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        supervised_loss: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        rank_pattern: dict[str, int] = ...,
        alpha_pattern: dict[str, float] = ...,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        bias: Literal["none", "all", "lora_only"] = "none",
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: Literal["kaiming", "gaussian", "pissa", "olora"] = "kaiming",
        loraplus_lr_ratio: float = 1.0,
    ) -> None:
        """Build the module.

        Args:
            r: rank of each update.
            lora_alpha: updates are scaled by `lora_alpha / r`.
            lora_dropout: dropout probability on the update's input.
            target_modules: names, a regular expression, or `"all-linear"`; the query and value projections when None.
            exclude_modules: names or a regular expression of modules to leave out.
            rank_pattern: rank by module name (regular expressions), where it differs from `r`.
            alpha_pattern: the same for `lora_alpha`.
            layers_to_transform: numbers of the layers to adapt, counted from 0; all when None.
            layers_pattern: the name of the list of layers.
            bias: which biases are trained as well: `none`, `all`, or `lora_only` (of the adapted layers).
            use_rslora: scale by `lora_alpha / sqrt(r)` (arXiv:2312.03732).
            use_dora: weight-decomposed updates (arXiv:2402.09353).
            init_lora_weights: `kaiming`, `gaussian`, `pissa` (arXiv:2404.02948) or `olora` (arXiv:2406.01775).
            loraplus_lr_ratio: B learns this many times faster than A (LoRA+, arXiv:2402.12354).
            modules_to_save: names of modules trained in full and stored with the adapter, e.g. a classification head; a
                single parameter by its full name.
            base, ...: see `BaseLM`.
        """

class AdapterH(AdapterHMixin, BaseLM):
    """Bottlenecks after attention and FFN (Houlsby et al. 2019, arXiv:1902.00751)."""

    settings: AdapterHSettings

    def __init__(
        self,
        base: str,
        task: str = "causal_lm",
        labels: list[str] | None = None,
        num_labels: int | None = None,
        learning_rate: float | None = None,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_scheduler: str = "linear",
        warmup_steps: float = 0.06,
        generation: dict[str, Any] | None = None,
        dtype: str | None = None,
        adapter_dtype: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        supervised_loss: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        reduction_factor: float | dict[str, float] | None = None,
        bottleneck_size: int | None = None,
        non_linearity: str | None = None,
        bias: bool | None = None,
        scaling: float | Literal["learned", "channel"] | None = None,
        dropout: float = 0.0,
        init_weights: Literal["mam_adapter", "bert", "houlsby"] = "mam_adapter",
        use_gating: bool = False,
        ln_before: bool = False,
        ln_after: bool = False,
        adapter_residual_before_ln: bool = False,
        original_ln_before: bool = False,
        original_ln_after: bool = True,
        residual_before_ln: bool | Literal["post_add"] = True,
        mh_adapter: bool = True,
        output_adapter: bool = True,
        cross_adapter: bool = False,
        leave_out: Sequence[int] = ...,
        placement: Literal["paper", "llm_adapters"] = "paper",
        target_modules: str | Sequence[str] | None = None,
        train_layer_norms: bool = False,
    ) -> None:
        """Build the module.

        Args:
            mh_adapter: an adapter at each self-attention.
            train_layer_norms: train the model's LayerNorms as well, as the paper does.
            reduction_factor: the hidden size divided by the bottleneck's; a number, or numbers by layer, counted from 0
                through all stacks, e.g. `{"0": 8, "default": 16}`.
            bottleneck_size: width of the bottleneck itself, in place of `reduction_factor`.
            non_linearity: the activation by name, e.g. `relu`, `swish`, `gelu`, `tanh`.
            bias: whether the two projections have biases.
            scaling: factor on the adapter's output: a number, `learned` (one number) or `channel` (one per feature).
            dropout: dropout probability on the adapter's output.
            init_weights: `mam_adapter` (starts as zero: the model's output is unchanged), `bert` or `houlsby` (both
                random and small, near zero).
            use_gating: a trained gate on the adapter's output, averaged over the sequence; padding and the KV cache
                change that average.
            ln_before: a new LayerNorm before the bottleneck.
            ln_after: a new LayerNorm after it.
            adapter_residual_before_ln: add the residual before that LayerNorm.
            original_ln_before: give the adapter the sublayer's output after the layer's residual and LayerNorm.
            original_ln_after: let the layer's residual and LayerNorm follow the adapter.
            residual_before_ln: take the residual around the adapter before the layer's LayerNorm; `post_add`: between
                the layer's residual and its LayerNorm.
            mh_adapter: an adapter at each self-attention.
            output_adapter: an adapter at each feed-forward block.
            cross_adapter: an adapter at each cross-attention.
            leave_out: numbers of the layers without adapters (AdapterDrop, arXiv:2010.11918), counted from 0 through all
                stacks: a decoder's go on from the encoder's.
            placement: `paper`: at the sublayers, as the method's paper; `llm_adapters`: at named linear layers.
            target_modules: the linear layers' names with `placement="llm_adapters"`; the method's own when None.
            modules_to_save: names of modules trained in full and stored with the adapter, e.g. a classification head; a
                single parameter by its full name.
            base, ...: see `BaseLM`.
        """

class AdapterP(AdapterPMixin, BaseLM):
    """A bottleneck after the FFN (Pfeiffer et al. 2020, arXiv:2005.00052)."""

    settings: AdapterPSettings

    def __init__(
        self,
        base: str,
        task: str = "causal_lm",
        labels: list[str] | None = None,
        num_labels: int | None = None,
        learning_rate: float | None = None,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_scheduler: str = "linear",
        warmup_steps: float = 0.06,
        generation: dict[str, Any] | None = None,
        dtype: str | None = None,
        adapter_dtype: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        supervised_loss: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        reduction_factor: float | dict[str, float] | None = None,
        bottleneck_size: int | None = None,
        non_linearity: str | None = None,
        bias: bool | None = None,
        scaling: float | Literal["learned", "channel"] | None = None,
        dropout: float = 0.0,
        init_weights: Literal["mam_adapter", "bert", "houlsby"] = "mam_adapter",
        use_gating: bool = False,
        ln_before: bool = False,
        ln_after: bool = False,
        adapter_residual_before_ln: bool = False,
        original_ln_before: bool = True,
        original_ln_after: bool = True,
        residual_before_ln: bool | Literal["post_add"] = True,
        mh_adapter: bool = False,
        output_adapter: bool = True,
        cross_adapter: bool = False,
        leave_out: Sequence[int] = ...,
        placement: Literal["paper", "llm_adapters"] = "paper",
        target_modules: str | Sequence[str] | None = None,
    ) -> None:
        """Build the module.

        Args:
            original_ln_before: give the adapter the FFN's output after the layer's residual and LayerNorm.
            reduction_factor: the hidden size divided by the bottleneck's; a number, or numbers by layer, counted from 0
                through all stacks, e.g. `{"0": 8, "default": 16}`.
            bottleneck_size: width of the bottleneck itself, in place of `reduction_factor`.
            non_linearity: the activation by name, e.g. `relu`, `swish`, `gelu`, `tanh`.
            bias: whether the two projections have biases.
            scaling: factor on the adapter's output: a number, `learned` (one number) or `channel` (one per feature).
            dropout: dropout probability on the adapter's output.
            init_weights: `mam_adapter` (starts as zero: the model's output is unchanged), `bert` or `houlsby` (both
                random and small, near zero).
            use_gating: a trained gate on the adapter's output, averaged over the sequence; padding and the KV cache
                change that average.
            ln_before: a new LayerNorm before the bottleneck.
            ln_after: a new LayerNorm after it.
            adapter_residual_before_ln: add the residual before that LayerNorm.
            original_ln_before: give the adapter the sublayer's output after the layer's residual and LayerNorm.
            original_ln_after: let the layer's residual and LayerNorm follow the adapter.
            residual_before_ln: take the residual around the adapter before the layer's LayerNorm; `post_add`: between
                the layer's residual and its LayerNorm.
            mh_adapter: an adapter at each self-attention.
            output_adapter: an adapter at each feed-forward block.
            cross_adapter: an adapter at each cross-attention.
            leave_out: numbers of the layers without adapters (AdapterDrop, arXiv:2010.11918), counted from 0 through all
                stacks: a decoder's go on from the encoder's.
            placement: `paper`: at the sublayers, as the method's paper; `llm_adapters`: at named linear layers.
            target_modules: the linear layers' names with `placement="llm_adapters"`; the method's own when None.
            modules_to_save: names of modules trained in full and stored with the adapter, e.g. a classification head; a
                single parameter by its full name.
            base, ...: see `BaseLM`.
        """

class Parallel(ParallelMixin, BaseLM):
    """A bottleneck in parallel to the FFN (He et al. 2021, arXiv:2110.04366)."""

    settings: ParallelSettings

    def __init__(
        self,
        base: str,
        task: str = "causal_lm",
        labels: list[str] | None = None,
        num_labels: int | None = None,
        learning_rate: float | None = None,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_scheduler: str = "linear",
        warmup_steps: float = 0.06,
        generation: dict[str, Any] | None = None,
        dtype: str | None = None,
        adapter_dtype: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        supervised_loss: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        reduction_factor: float | dict[str, float] | None = None,
        bottleneck_size: int | None = None,
        non_linearity: str | None = None,
        bias: bool | None = None,
        scaling: float | Literal["learned", "channel"] | None = None,
        dropout: float = 0.0,
        init_weights: Literal["mam_adapter", "bert", "houlsby"] = "mam_adapter",
        use_gating: bool = False,
        ln_before: bool = False,
        ln_after: bool = False,
        adapter_residual_before_ln: bool = False,
        original_ln_before: bool = False,
        original_ln_after: bool = True,
        residual_before_ln: bool | Literal["post_add"] = True,
        mh_adapter: bool = False,
        output_adapter: bool = True,
        cross_adapter: bool = False,
        leave_out: Sequence[int] = ...,
        placement: Literal["paper", "llm_adapters"] = "paper",
        target_modules: str | Sequence[str] | None = None,
    ) -> None:
        """Build the module.

        Args:
            reduction_factor: the hidden size divided by the bottleneck's; a number, or numbers by layer, counted from 0
                through all stacks, e.g. `{"0": 8, "default": 16}`.
            bottleneck_size: width of the bottleneck itself, in place of `reduction_factor`.
            non_linearity: the activation by name, e.g. `relu`, `swish`, `gelu`, `tanh`.
            bias: whether the two projections have biases.
            scaling: factor on the adapter's output: a number, `learned` (one number) or `channel` (one per feature).
            dropout: dropout probability on the adapter's output.
            init_weights: `mam_adapter` (starts as zero: the model's output is unchanged), `bert` or `houlsby` (both
                random and small, near zero).
            use_gating: a trained gate on the adapter's output, averaged over the sequence; padding and the KV cache
                change that average.
            ln_before: a new LayerNorm before the bottleneck.
            ln_after: a new LayerNorm after it.
            adapter_residual_before_ln: add the residual before that LayerNorm.
            original_ln_before: give the adapter the sublayer's output after the layer's residual and LayerNorm.
            original_ln_after: let the layer's residual and LayerNorm follow the adapter.
            residual_before_ln: take the residual around the adapter before the layer's LayerNorm; `post_add`: between
                the layer's residual and its LayerNorm.
            mh_adapter: an adapter at each self-attention.
            output_adapter: an adapter at each feed-forward block.
            cross_adapter: an adapter at each cross-attention.
            leave_out: numbers of the layers without adapters (AdapterDrop, arXiv:2010.11918), counted from 0 through all
                stacks: a decoder's go on from the encoder's.
            placement: `paper`: at the sublayers, as the method's paper; `llm_adapters`: at named linear layers.
            target_modules: the linear layers' names with `placement="llm_adapters"`; the method's own when None.
            modules_to_save: names of modules trained in full and stored with the adapter, e.g. a classification head; a
                single parameter by its full name.
            base, ...: see `BaseLM`.
        """

class PrefixTuning(PrefixTuningMixin, BaseLM):
    """Keys and values computed by an MLP (Li, Liang 2021, arXiv:2101.00190)."""

    settings: PrefixTuningSettings

    def __init__(
        self,
        base: str,
        task: str = "causal_lm",
        labels: list[str] | None = None,
        num_labels: int | None = None,
        learning_rate: float | None = None,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_scheduler: str = "linear",
        warmup_steps: float = 0.06,
        generation: dict[str, Any] | None = None,
        dtype: str | None = None,
        adapter_dtype: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        supervised_loss: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        num_virtual_tokens: int = 30,
        prefix_projection: bool = True,
        prefix_projection_size: int | None = None,
        non_linearity: str = "tanh",
        dropout: float = 0.0,
        init_std: float = 0.02,
        encoder_prefix: bool = True,
        cross_prefix: bool = True,
        leave_out: Sequence[int] = ...,
        positions: Literal["mask", "peft", "adapterhub"] = "mask",
        per_query_head: bool = False,
    ) -> None:
        """Build the module.

        Args:
            num_virtual_tokens: length v of the prefix.
            prefix_projection: compute keys and values from a smaller table by an MLP, rather than train them themselves.
            prefix_projection_size: width of the MLP's hidden layer; the model's hidden size when None.
            non_linearity: the MLP's activation by name.
            dropout: dropout probability on the prefix's keys and values.
            init_std: standard deviation of the trained table at the start.
            encoder_prefix: in an encoder-decoder, a prefix at the encoder's self-attention.
            cross_prefix: in an encoder-decoder, a prefix at the decoder's cross-attention.
            leave_out: numbers of the layers without a prefix, counted from 0 through all stacks: a decoder's go on from
                the encoder's.
            positions: where absolute and rotary positions of the real tokens start. `mask`: behind the prefix, padding
                not counted, so that padding changes nothing; `peft`: behind the prefix, padding counted unless the model
                itself does not; `adapterhub`: as without a prefix (T5: its keys alone move behind the prefix).
            per_query_head: where several query heads share keys, a prefix of its own for each of them, as early
                versions of AdapterHub did.
            modules_to_save: names of modules trained in full and stored with the adapter, e.g. a classification head; a
                single parameter by its full name.
            base, ...: see `BaseLM`.
        """

class PTuningV2(PTuningV2Mixin, BaseLM):
    """Keys and values in every attention layer (Liu et al. 2021, arXiv:2110.07602)."""

    settings: PTuningV2Settings

    def __init__(
        self,
        base: str,
        task: str = "causal_lm",
        labels: list[str] | None = None,
        num_labels: int | None = None,
        learning_rate: float | None = None,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_scheduler: str = "linear",
        warmup_steps: float = 0.06,
        generation: dict[str, Any] | None = None,
        dtype: str | None = None,
        adapter_dtype: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        supervised_loss: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        num_virtual_tokens: int = 20,
        prefix_projection: bool = False,
        prefix_projection_size: int | None = None,
        non_linearity: str = "tanh",
        dropout: float = 0.0,
        init_std: float = 0.02,
        encoder_prefix: bool = True,
        cross_prefix: bool = True,
        leave_out: Sequence[int] = ...,
        positions: Literal["mask", "peft", "adapterhub"] = "mask",
        per_query_head: bool = False,
    ) -> None:
        """Build the module.

        Args:
            num_virtual_tokens: length v of the prefix.
            prefix_projection: compute keys and values from a smaller table by an MLP, rather than train them themselves.
            prefix_projection_size: width of the MLP's hidden layer; the model's hidden size when None.
            non_linearity: the MLP's activation by name.
            dropout: dropout probability on the prefix's keys and values.
            init_std: standard deviation of the trained table at the start.
            encoder_prefix: in an encoder-decoder, a prefix at the encoder's self-attention.
            cross_prefix: in an encoder-decoder, a prefix at the decoder's cross-attention.
            leave_out: numbers of the layers without a prefix, counted from 0 through all stacks: a decoder's go on from
                the encoder's.
            positions: where absolute and rotary positions of the real tokens start. `mask`: behind the prefix, padding
                not counted, so that padding changes nothing; `peft`: behind the prefix, padding counted unless the model
                itself does not; `adapterhub`: as without a prefix (T5: its keys alone move behind the prefix).
            per_query_head: where several query heads share keys, a prefix of its own for each of them, as early
                versions of AdapterHub did.
            modules_to_save: names of modules trained in full and stored with the adapter, e.g. a classification head; a
                single parameter by its full name.
            base, ...: see `BaseLM`.
        """

class PTuning(PTuningMixin, BaseLM):
    """Virtual tokens computed by a bi-LSTM (Liu et al. 2021, arXiv:2103.10385)."""

    settings: PTuningSettings

    def __init__(
        self,
        base: str,
        task: str = "causal_lm",
        labels: list[str] | None = None,
        num_labels: int | None = None,
        learning_rate: float | None = None,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_scheduler: str = "linear",
        warmup_steps: float = 0.06,
        generation: dict[str, Any] | None = None,
        dtype: str | None = None,
        adapter_dtype: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        supervised_loss: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        num_virtual_tokens: int = 20,
        prompt_token_id: int | None = None,
        positions: Literal["mask", "sequence"] = "mask",
        num_transformer_submodules: int = 1,
        encoder_reparameterization_type: Literal["LSTM", "MLP"] = "LSTM",
        encoder_hidden_size: int | None = None,
        encoder_num_layers: int = 2,
        encoder_dropout: float = 0.0,
    ) -> None:
        """Build the module.

        Args:
            encoder_reparameterization_type: `LSTM`, followed by an MLP, or `MLP` alone.
            encoder_hidden_size: hidden size of the network; half of the embeddings' size when None.
            encoder_num_layers: layers of the LSTM.
            encoder_dropout: dropout between the LSTM's layers.
            num_virtual_tokens: v, how many virtual tokens.
            prompt_token_id: the id of a token that stands for a virtual token. Each row of `input_ids` then holds it v
                times, wherever the template has a virtual token, and the virtual tokens take these places in their order.
                None puts all of them in front.
            positions: `mask` counts positions over the tokens that the attention mask shows, so that padding on either
                side changes nothing; `sequence` does as peft, which counts the padding too and hides the ids from the
                model. Folders that peft wrote are read with `sequence`.
            num_transformer_submodules: 2 keeps twice the rows, as peft does for encoder-decoders. The encoder uses the
                first half.
            modules_to_save: names of modules trained in full and stored with the adapter, e.g. a classification head; a
                single parameter by its full name.
            base, ...: see `BaseLM`.
        """

class PromptTuning(PromptTuningMixin, BaseLM):
    """Embeddings before the input (Lester et al. 2021, arXiv:2104.08691)."""

    settings: PromptTuningSettings

    def __init__(
        self,
        base: str,
        task: str = "causal_lm",
        labels: list[str] | None = None,
        num_labels: int | None = None,
        learning_rate: float | None = None,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_scheduler: str = "linear",
        warmup_steps: float = 0.06,
        generation: dict[str, Any] | None = None,
        dtype: str | None = None,
        adapter_dtype: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        supervised_loss: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        num_virtual_tokens: int = 20,
        prompt_token_id: int | None = None,
        positions: Literal["mask", "sequence"] = "mask",
        num_transformer_submodules: int = 1,
        prompt_tuning_init: Literal["SAMPLE_VOCAB", "TEXT", "LABELS", "RANDOM"] = "SAMPLE_VOCAB",
        prompt_tuning_init_text: str | None = None,
        prompt_tuning_init_labels: tuple[str, ...] | list[str] | None = None,
        tokenizer_name_or_path: str | None = None,
    ) -> None:
        """Build the module.

        Args:
            prompt_tuning_init: where the virtual tokens start (section 3.2): `SAMPLE_VOCAB`, embeddings of tokens drawn
                from the vocabulary; `TEXT`, those of a text's tokens, repeated or cut to v; `LABELS`, one for each class
                label (of the model's own the first v), the mean over its tokens, the rest drawn from the vocabulary;
                `RANDOM`, uniform in [-0.5, 0.5].
            prompt_tuning_init_text: the text, for `TEXT`.
            prompt_tuning_init_labels: the labels, for `LABELS`; the model's own names (`config.id2label`) when None.
            tokenizer_name_or_path: whose tokenizer splits text and labels; the base model's when None.
            num_virtual_tokens: v, how many virtual tokens.
            prompt_token_id: the id of a token that stands for a virtual token. Each row of `input_ids` then holds it v
                times, wherever the template has a virtual token, and the virtual tokens take these places in their order.
                None puts all of them in front.
            positions: `mask` counts positions over the tokens that the attention mask shows, so that padding on either
                side changes nothing; `sequence` does as peft, which counts the padding too and hides the ids from the
                model. Folders that peft wrote are read with `sequence`.
            num_transformer_submodules: 2 keeps twice the rows, as peft does for encoder-decoders. The encoder uses the
                first half.
            modules_to_save: names of modules trained in full and stored with the adapter, e.g. a classification head; a
                single parameter by its full name.
            base, ...: see `BaseLM`.
        """
