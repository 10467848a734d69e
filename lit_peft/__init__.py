"""Parameter-efficient fine-tuning of language models as PyTorch Lightning modules."""

from __future__ import annotations

from lit_peft.util.lazy import lazy_names

_NAMES = {
    "AdapterH": "lit_peft.modules",
    "AdapterHSettings": "lit_peft.methods.adapter_h",
    "AdapterP": "lit_peft.modules",
    "AdapterPSettings": "lit_peft.methods.adapter_p",
    "BaseLM": "lit_peft.training.module",
    "CausalLMData": "lit_peft.data.causal_lm",
    "FullFineTuning": "lit_peft.modules",
    "HeadOnly": "lit_peft.modules",
    "InstructionData": "lit_peft.data.instruction",
    "LitPeftError": "lit_peft.util.errors",
    "LoRA": "lit_peft.modules",
    "LoRASettings": "lit_peft.methods.lora",
    "MultipleChoiceData": "lit_peft.data.multiple_choice",
    "PTuning": "lit_peft.modules",
    "PTuningSettings": "lit_peft.methods.p_tuning",
    "PTuningV2": "lit_peft.modules",
    "PTuningV2Settings": "lit_peft.methods.p_tuning_v2",
    "Parallel": "lit_peft.modules",
    "ParallelSettings": "lit_peft.methods.parallel",
    "PrefixTuning": "lit_peft.modules",
    "PrefixTuningSettings": "lit_peft.methods.prefix_tuning",
    "PromptTuning": "lit_peft.modules",
    "PromptTuningSettings": "lit_peft.methods.prompt_tuning",
    "QuestionAnsweringData": "lit_peft.data.question_answering",
    "ReasoningData": "lit_peft.data.reasoning",
    "Seq2SeqData": "lit_peft.data.seq2seq",
    "TextClassificationData": "lit_peft.data.text_classification",
    "TokenClassificationData": "lit_peft.data.token_classification",
    "active_adapter": "lit_peft.methods.adapters",
    "adapter_names": "lit_peft.methods.adapters",
    "add_adapter": "lit_peft.methods.adapters",
    "attach": "lit_peft.methods.attachment",
    "combine_adapters": "lit_peft.methods.combine",
    "delete_adapter": "lit_peft.methods.adapters",
    "detach": "lit_peft.methods.attachment",
    "disable_adapter": "lit_peft.methods.adapters",
    "drop_adapters": "lit_peft.methods.bottleneck",
    "hotswap_adapter": "lit_peft.methods.adapters",
    "load_adapter": "lit_peft.formats.folder",
    "merge": "lit_peft.methods.lora",
    "merge_adapter": "lit_peft.methods.adapters",
    "merge_and_unload": "lit_peft.methods.adapters",
    "row_adapters": "lit_peft.methods.rows",
    "save_adapter": "lit_peft.formats.folder",
    "set_adapter": "lit_peft.methods.adapters",
    "supervised_loss": "lit_peft.tasks.supervised_loss",
    "trainable_parameters": "lit_peft.methods.attachment",
    "unmerge_adapter": "lit_peft.methods.adapters",
}
__all__ = list(_NAMES)
__version__ = "0.1.0"
__getattr__ = lazy_names(__name__, _NAMES)
