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
        compile: bool | Literal["auto"] = "auto",
        add_tokens: list[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        neftune_noise_alpha: float | None = None,
        adapter: str | None = None,
        task_args: dict[str, Any] | None = None,
        stack: str | list[str] | None = None,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
    ) -> None:
        """Build the module.

        Args:
            modules_to_save: names of modules to train in full and to save with the adapter, e.g. a classification head.
                A full parameter name selects a single parameter.
            trainable_token_indices: token ids whose embeddings are trained, as in peft; rows that the base lacks are added.
                A list for the input embeddings (and a head that shares their weight), or lists by the names of modules.
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
        compile: bool | Literal["auto"] = "auto",
        add_tokens: list[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        neftune_noise_alpha: float | None = None,
        adapter: str | None = None,
        task_args: dict[str, Any] | None = None,
        stack: str | list[str] | None = None,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
    ) -> None:
        """Build the module.

        Args:
            modules_to_save: names of modules to train in full and to save with the adapter, e.g. a classification head.
                A full parameter name selects a single parameter.
            trainable_token_indices: token ids whose embeddings are trained, as in peft; rows that the base lacks are added.
                A list for the input embeddings (and a head that shares their weight), or lists by the names of modules.
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
        compile: bool | Literal["auto"] = "auto",
        add_tokens: list[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        neftune_noise_alpha: float | None = None,
        adapter: str | None = None,
        task_args: dict[str, Any] | None = None,
        stack: str | list[str] | None = None,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        target_parameters: list[str] | tuple[str, ...] | None = None,
        target_experts: bool = False,
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
        ensure_weight_tying: bool = False,
        alora_invocation_tokens: list[int] | tuple[int, ...] | None = None,
        lora_bias: bool = False,
    ) -> None:
        """Build the module.

        Args:
            r: rank of each update.
            lora_alpha: scales the updates by `lora_alpha / r`.
            lora_dropout: dropout probability on the input of the update.
            target_modules: the modules to adapt: a list of names, a regular expression, or `"all-linear"`. None selects
                the query and value projections, and an empty list none (for `target_parameters` alone). In a model that
                reads images, `"language"`, `"vision"`, `"projector"` and `"all"` select all linear layers of these parts,
                also in a list; None selects from its language model.
            target_parameters: parameters to adapt that are no linear layers, by their names or the last parts of them, as
                in peft: the stacked weights of a mixture's experts, e.g. `["experts.gate_up_proj", "experts.down_proj"]`.
                Each expert has an A and a B of its own.
            target_experts: adapt every parameter that holds the weights of several experts, besides `target_modules`. This
                trains r · (d_in + d_out) parameters for each of the experts, so many more than for the other layers.
            exclude_modules: names or a regular expression of modules to leave out.
            rank_pattern: ranks that differ from `r`, by regular expression on the module's name.
            alpha_pattern: values that differ from `lora_alpha`, by regular expression on the module's name.
            layers_to_transform: indices of the layers to adapt, counted from 0. None adapts all layers.
            layers_pattern: name of the model's list of layers.
            bias: which biases to train: `none`, `all`, or `lora_only` (those of the adapted layers).
            use_rslora: scale by `lora_alpha / sqrt(r)` instead (arXiv:2312.03732).
            use_dora: weight-decomposed updates (arXiv:2402.09353).
            init_lora_weights: `kaiming`, `gaussian`, `pissa` (arXiv:2404.02948) or `olora` (arXiv:2406.01775).
            loraplus_lr_ratio: ratio of B's learning rate to A's (LoRA+, arXiv:2402.12354).
            ensure_weight_tying: whether an embedding and the head that shares its weight get one update together (or one
                trained copy, with modules_to_save), so that they stay tied, also when they are merged.
            alora_invocation_tokens: ids of tokens; the update acts only from their last occurrence in a row on, so that
                keys and values that the base has cached for the text before stay valid (aLoRA, arXiv:2504.12397).
            lora_bias: whether each update has a bias of its own, `s · (B A x + bias)`. Merging needs layers with a bias.
            modules_to_save: names of modules to train in full and to save with the adapter, e.g. a classification head.
                A full parameter name selects a single parameter.
            trainable_token_indices: token ids whose embeddings are trained, as in peft; rows that the base lacks are added.
                A list for the input embeddings (and a head that shares their weight), or lists by the names of modules.
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
        compile: bool | Literal["auto"] = "auto",
        add_tokens: list[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        neftune_noise_alpha: float | None = None,
        adapter: str | None = None,
        task_args: dict[str, Any] | None = None,
        stack: str | list[str] | None = None,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
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
            mh_adapter: adapt each self-attention.
            train_layer_norms: also train the model's LayerNorms, as in the paper.
            reduction_factor: hidden size divided by bottleneck size. Either a number, or numbers by layer index, e.g.
                `{"0": 8, "default": 16}`. Indices count from 0, and a decoder's layers follow those of the encoder.
            bottleneck_size: width of the bottleneck, as an alternative to `reduction_factor`.
            non_linearity: name of the activation, e.g. `relu`, `swish`, `gelu`, `tanh`.
            bias: whether the two projections have biases.
            scaling: factor on the adapter's output: a number, `learned` (one number) or `channel` (one per feature).
            dropout: dropout probability on the adapter's output.
            init_weights: `mam_adapter` (the adapter's output starts at zero, so the model's output is unchanged), `bert`
                or `houlsby` (small random weights, so the adapter's output starts near zero).
            use_gating: multiply the adapter's output by a trained gate, averaged over the sequence. Padding and the KV
                cache affect that average.
            ln_before: add a LayerNorm before the bottleneck.
            ln_after: add a LayerNorm after the bottleneck.
            adapter_residual_before_ln: add the residual before the LayerNorm of `ln_after`.
            original_ln_before: apply the layer's residual and LayerNorm to the sublayer's output before the adapter.
            original_ln_after: apply the layer's residual and LayerNorm after the adapter.
            residual_before_ln: take the adapter's own residual from before the layer's residual and LayerNorm; `post_add`
                takes it from between the two.
            mh_adapter: adapt each self-attention.
            output_adapter: adapt each feed-forward block.
            cross_adapter: adapt each cross-attention.
            leave_out: indices of the layers to leave without adapters (AdapterDrop, arXiv:2010.11918). Indices count from
                0, and a decoder's layers follow those of the encoder.
            placement: `paper` adapts the sublayers as in the method's paper; `llm_adapters` adapts linear layers.
            target_modules: names of the linear layers for `placement="llm_adapters"`. None selects those that LLM-Adapters
                uses for the method. In a model that reads images, `"language"`, `"vision"`, `"projector"` and `"all"`
                select those of these parts; without them, its language model is adapted.
            modules_to_save: names of modules to train in full and to save with the adapter, e.g. a classification head.
                A full parameter name selects a single parameter.
            trainable_token_indices: token ids whose embeddings are trained, as in peft; rows that the base lacks are added.
                A list for the input embeddings (and a head that shares their weight), or lists by the names of modules.
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
        compile: bool | Literal["auto"] = "auto",
        add_tokens: list[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        neftune_noise_alpha: float | None = None,
        adapter: str | None = None,
        task_args: dict[str, Any] | None = None,
        stack: str | list[str] | None = None,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
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
            original_ln_before: apply the layer's residual and LayerNorm to the FFN's output before the adapter.
            reduction_factor: hidden size divided by bottleneck size. Either a number, or numbers by layer index, e.g.
                `{"0": 8, "default": 16}`. Indices count from 0, and a decoder's layers follow those of the encoder.
            bottleneck_size: width of the bottleneck, as an alternative to `reduction_factor`.
            non_linearity: name of the activation, e.g. `relu`, `swish`, `gelu`, `tanh`.
            bias: whether the two projections have biases.
            scaling: factor on the adapter's output: a number, `learned` (one number) or `channel` (one per feature).
            dropout: dropout probability on the adapter's output.
            init_weights: `mam_adapter` (the adapter's output starts at zero, so the model's output is unchanged), `bert`
                or `houlsby` (small random weights, so the adapter's output starts near zero).
            use_gating: multiply the adapter's output by a trained gate, averaged over the sequence. Padding and the KV
                cache affect that average.
            ln_before: add a LayerNorm before the bottleneck.
            ln_after: add a LayerNorm after the bottleneck.
            adapter_residual_before_ln: add the residual before the LayerNorm of `ln_after`.
            original_ln_before: apply the layer's residual and LayerNorm to the sublayer's output before the adapter.
            original_ln_after: apply the layer's residual and LayerNorm after the adapter.
            residual_before_ln: take the adapter's own residual from before the layer's residual and LayerNorm; `post_add`
                takes it from between the two.
            mh_adapter: adapt each self-attention.
            output_adapter: adapt each feed-forward block.
            cross_adapter: adapt each cross-attention.
            leave_out: indices of the layers to leave without adapters (AdapterDrop, arXiv:2010.11918). Indices count from
                0, and a decoder's layers follow those of the encoder.
            placement: `paper` adapts the sublayers as in the method's paper; `llm_adapters` adapts linear layers.
            target_modules: names of the linear layers for `placement="llm_adapters"`. None selects those that LLM-Adapters
                uses for the method. In a model that reads images, `"language"`, `"vision"`, `"projector"` and `"all"`
                select those of these parts; without them, its language model is adapted.
            modules_to_save: names of modules to train in full and to save with the adapter, e.g. a classification head.
                A full parameter name selects a single parameter.
            trainable_token_indices: token ids whose embeddings are trained, as in peft; rows that the base lacks are added.
                A list for the input embeddings (and a head that shares their weight), or lists by the names of modules.
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
        compile: bool | Literal["auto"] = "auto",
        add_tokens: list[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        neftune_noise_alpha: float | None = None,
        adapter: str | None = None,
        task_args: dict[str, Any] | None = None,
        stack: str | list[str] | None = None,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
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
            reduction_factor: hidden size divided by bottleneck size. Either a number, or numbers by layer index, e.g.
                `{"0": 8, "default": 16}`. Indices count from 0, and a decoder's layers follow those of the encoder.
            bottleneck_size: width of the bottleneck, as an alternative to `reduction_factor`.
            non_linearity: name of the activation, e.g. `relu`, `swish`, `gelu`, `tanh`.
            bias: whether the two projections have biases.
            scaling: factor on the adapter's output: a number, `learned` (one number) or `channel` (one per feature).
            dropout: dropout probability on the adapter's output.
            init_weights: `mam_adapter` (the adapter's output starts at zero, so the model's output is unchanged), `bert`
                or `houlsby` (small random weights, so the adapter's output starts near zero).
            use_gating: multiply the adapter's output by a trained gate, averaged over the sequence. Padding and the KV
                cache affect that average.
            ln_before: add a LayerNorm before the bottleneck.
            ln_after: add a LayerNorm after the bottleneck.
            adapter_residual_before_ln: add the residual before the LayerNorm of `ln_after`.
            original_ln_before: apply the layer's residual and LayerNorm to the sublayer's output before the adapter.
            original_ln_after: apply the layer's residual and LayerNorm after the adapter.
            residual_before_ln: take the adapter's own residual from before the layer's residual and LayerNorm; `post_add`
                takes it from between the two.
            mh_adapter: adapt each self-attention.
            output_adapter: adapt each feed-forward block.
            cross_adapter: adapt each cross-attention.
            leave_out: indices of the layers to leave without adapters (AdapterDrop, arXiv:2010.11918). Indices count from
                0, and a decoder's layers follow those of the encoder.
            placement: `paper` adapts the sublayers as in the method's paper; `llm_adapters` adapts linear layers.
            target_modules: names of the linear layers for `placement="llm_adapters"`. None selects those that LLM-Adapters
                uses for the method. In a model that reads images, `"language"`, `"vision"`, `"projector"` and `"all"`
                select those of these parts; without them, its language model is adapted.
            modules_to_save: names of modules to train in full and to save with the adapter, e.g. a classification head.
                A full parameter name selects a single parameter.
            trainable_token_indices: token ids whose embeddings are trained, as in peft; rows that the base lacks are added.
                A list for the input embeddings (and a head that shares their weight), or lists by the names of modules.
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
        compile: bool | Literal["auto"] = "auto",
        add_tokens: list[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        neftune_noise_alpha: float | None = None,
        adapter: str | None = None,
        task_args: dict[str, Any] | None = None,
        stack: str | list[str] | None = None,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
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
            prefix_projection: compute keys and values from a smaller table with an MLP instead of training them directly.
            prefix_projection_size: width of the MLP's hidden layer. None selects the model's hidden size.
            non_linearity: name of the MLP's activation.
            dropout: dropout probability on the prefix's keys and values.
            init_std: standard deviation of the initial table.
            encoder_prefix: in an encoder-decoder, add a prefix to the encoder's self-attention.
            cross_prefix: in an encoder-decoder, add a prefix to the decoder's cross-attention.
            leave_out: indices of the layers to leave without a prefix. Indices count from 0, and a decoder's layers follow
                those of the encoder.
            positions: absolute and rotary positions of the input's tokens. `mask`: they start after the prefix and skip
                padding, so that padding has no effect. `peft`: they start after the prefix and count padding, unless the
                model skips it. `adapterhub`: they are the same as without a prefix (in T5, those of the keys start after
                the prefix).
            per_query_head: give each query head a separate prefix where several share keys, as early versions of
                AdapterHub did.
            modules_to_save: names of modules to train in full and to save with the adapter, e.g. a classification head.
                A full parameter name selects a single parameter.
            trainable_token_indices: token ids whose embeddings are trained, as in peft; rows that the base lacks are added.
                A list for the input embeddings (and a head that shares their weight), or lists by the names of modules.
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
        compile: bool | Literal["auto"] = "auto",
        add_tokens: list[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        neftune_noise_alpha: float | None = None,
        adapter: str | None = None,
        task_args: dict[str, Any] | None = None,
        stack: str | list[str] | None = None,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
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
            prefix_projection: compute keys and values from a smaller table with an MLP instead of training them directly.
            prefix_projection_size: width of the MLP's hidden layer. None selects the model's hidden size.
            non_linearity: name of the MLP's activation.
            dropout: dropout probability on the prefix's keys and values.
            init_std: standard deviation of the initial table.
            encoder_prefix: in an encoder-decoder, add a prefix to the encoder's self-attention.
            cross_prefix: in an encoder-decoder, add a prefix to the decoder's cross-attention.
            leave_out: indices of the layers to leave without a prefix. Indices count from 0, and a decoder's layers follow
                those of the encoder.
            positions: absolute and rotary positions of the input's tokens. `mask`: they start after the prefix and skip
                padding, so that padding has no effect. `peft`: they start after the prefix and count padding, unless the
                model skips it. `adapterhub`: they are the same as without a prefix (in T5, those of the keys start after
                the prefix).
            per_query_head: give each query head a separate prefix where several share keys, as early versions of
                AdapterHub did.
            modules_to_save: names of modules to train in full and to save with the adapter, e.g. a classification head.
                A full parameter name selects a single parameter.
            trainable_token_indices: token ids whose embeddings are trained, as in peft; rows that the base lacks are added.
                A list for the input embeddings (and a head that shares their weight), or lists by the names of modules.
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
        compile: bool | Literal["auto"] = "auto",
        add_tokens: list[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        neftune_noise_alpha: float | None = None,
        adapter: str | None = None,
        task_args: dict[str, Any] | None = None,
        stack: str | list[str] | None = None,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
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
            encoder_reparameterization_type: `LSTM` for an LSTM followed by an MLP, or `MLP` for an MLP only.
            encoder_hidden_size: hidden size of the network. None selects half the size of the embeddings.
            encoder_num_layers: number of LSTM layers.
            encoder_dropout: dropout probability between LSTM layers.
            num_virtual_tokens: number v of virtual tokens.
            prompt_token_id: id of a placeholder token. Each row of `input_ids` must contain it v times, anywhere in the
                template, and the virtual tokens replace it in order. None puts all virtual tokens in front.
            positions: how positions are counted. `mask` counts only the tokens that the attention mask shows, so that
                padding has no effect on either side. `sequence` counts padding too and passes embeddings instead of ids to
                the model, as peft does. Adapters saved by peft are loaded with `sequence`.
            num_transformer_submodules: 2 stores twice as many embeddings, as peft does for encoder-decoders. The encoder
                uses the first half.
            modules_to_save: names of modules to train in full and to save with the adapter, e.g. a classification head.
                A full parameter name selects a single parameter.
            trainable_token_indices: token ids whose embeddings are trained, as in peft; rows that the base lacks are added.
                A list for the input embeddings (and a head that shares their weight), or lists by the names of modules.
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
        compile: bool | Literal["auto"] = "auto",
        add_tokens: list[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        neftune_noise_alpha: float | None = None,
        adapter: str | None = None,
        task_args: dict[str, Any] | None = None,
        stack: str | list[str] | None = None,
        *,
        modules_to_save: tuple[str, ...] | list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
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
            prompt_tuning_init: initial virtual tokens (section 3.2). `SAMPLE_VOCAB`: embeddings of tokens drawn from the
                vocabulary, except for padding. `TEXT`: embeddings of the tokens of a text, repeated or cut to v tokens.
                `LABELS`: for each class label the mean embedding of its tokens, then tokens drawn from the vocabulary.
                `RANDOM`: uniform in [-0.5, 0.5].
            prompt_tuning_init_text: the text for `TEXT`.
            prompt_tuning_init_labels: the labels for `LABELS`. None uses the model's labels (`config.id2label`), at most v.
            tokenizer_name_or_path: the tokenizer of the text or labels. None uses the base model's.
            num_virtual_tokens: number v of virtual tokens.
            prompt_token_id: id of a placeholder token. Each row of `input_ids` must contain it v times, anywhere in the
                template, and the virtual tokens replace it in order. None puts all virtual tokens in front.
            positions: how positions are counted. `mask` counts only the tokens that the attention mask shows, so that
                padding has no effect on either side. `sequence` counts padding too and passes embeddings instead of ids to
                the model, as peft does. Adapters saved by peft are loaded with `sequence`.
            num_transformer_submodules: 2 stores twice as many embeddings, as peft does for encoder-decoders. The encoder
                uses the first half.
            modules_to_save: names of modules to train in full and to save with the adapter, e.g. a classification head.
                A full parameter name selects a single parameter.
            trainable_token_indices: token ids whose embeddings are trained, as in peft; rows that the base lacks are added.
                A list for the input embeddings (and a head that shares their weight), or lists by the names of modules.
            base, ...: see `BaseLM`.
        """
