"""Parameter-efficient fine-tuning of language models as PyTorch Lightning modules."""

from __future__ import annotations

from lit_peft.methods.registry import METHODS as _METHODS
from lit_peft.util.lazy import lazy_names

_NAMES = {
    **dict.fromkeys(_METHODS, "lit_peft.modules"),
    **{
        f"{name}Settings": f"lit_peft.methods.{method.module}"
        for name, method in _METHODS.items()
        if not method.baseline
    },
    "BaseLM": "lit_peft.training.module",
    "CausalLMData": "lit_peft.data.causal_lm",
    "EmbeddingData": "lit_peft.data.embedding",
    "InstructionData": "lit_peft.data.instruction",
    "LitPeftError": "lit_peft.util.errors",
    "MaskedLMData": "lit_peft.data.masked_lm",
    "MultipleChoiceData": "lit_peft.data.multiple_choice",
    "PreferenceData": "lit_peft.data.preference",
    "QuestionAnsweringData": "lit_peft.data.question_answering",
    "ReasoningData": "lit_peft.data.reasoning",
    "Seq2SeqData": "lit_peft.data.seq2seq",
    "SpeechData": "lit_peft.data.speech",
    "Stack": "lit_peft.methods.stack",
    "TextClassificationData": "lit_peft.data.text_classification",
    "TokenClassificationData": "lit_peft.data.token_classification",
    "active_adapter": "lit_peft.methods.adapters",
    "adapter_names": "lit_peft.methods.adapters",
    "add_adapter": "lit_peft.methods.adapters",
    "attach": "lit_peft.methods.attach",
    "combine_adapters": "lit_peft.methods.combine",
    "compile_layers": "lit_peft.models.compiled_layers",
    "delete_adapter": "lit_peft.methods.adapters",
    "detach": "lit_peft.methods.attach",
    "disable_adapter": "lit_peft.methods.adapters",
    "drop_adapters": "lit_peft.methods.bottleneck",
    "hotswap_adapter": "lit_peft.methods.merging",
    "load_adapter": "lit_peft.formats.folder",
    "merge": "lit_peft.methods.lora",
    "merge_adapter": "lit_peft.methods.merging",
    "merge_and_unload": "lit_peft.methods.merging",
    "merged_adapter": "lit_peft.methods.merged",
    "register_layer": "lit_peft.methods.layer_kinds",
    "rescaled": "lit_peft.methods.scale",
    "restore_layers": "lit_peft.models.compiled_layers",
    "row_adapters": "lit_peft.methods.rows",
    "save_adapter": "lit_peft.formats.folder",
    "set_adapter": "lit_peft.methods.adapters",
    "set_scale": "lit_peft.methods.scale",
    "supervised_loss": "lit_peft.tasks.supervised_loss",
    "trainable_parameters": "lit_peft.methods.attachment",
    "unmerge_adapter": "lit_peft.methods.merging",
    "use_adapter": "lit_peft.methods.adapters",
}
__all__ = sorted(_NAMES)
__version__ = "0.1.0"
__getattr__ = lazy_names(__name__, _NAMES)
