"""Parameter-efficient fine-tuning of language models as PyTorch Lightning modules."""

# Made by tools/make_stubs.py from the code. Do not edit.

from lit_peft.modules import AdapterH as AdapterH
from lit_peft.methods.adapter_h import AdapterHSettings as AdapterHSettings
from lit_peft.modules import AdapterP as AdapterP
from lit_peft.methods.adapter_p import AdapterPSettings as AdapterPSettings
from lit_peft.training.module import BaseLM as BaseLM
from lit_peft.data.causal_lm import CausalLMData as CausalLMData
from lit_peft.data.embedding import EmbeddingData as EmbeddingData
from lit_peft.modules import FullFineTuning as FullFineTuning
from lit_peft.modules import HeadOnly as HeadOnly
from lit_peft.modules import IA3 as IA3
from lit_peft.methods.ia3 import IA3Settings as IA3Settings
from lit_peft.data.instruction import InstructionData as InstructionData
from lit_peft.util.errors import LitPeftError as LitPeftError
from lit_peft.modules import LoRA as LoRA
from lit_peft.methods.lora import LoRASettings as LoRASettings
from lit_peft.data.masked_lm import MaskedLMData as MaskedLMData
from lit_peft.data.multiple_choice import MultipleChoiceData as MultipleChoiceData
from lit_peft.modules import PTuning as PTuning
from lit_peft.methods.p_tuning import PTuningSettings as PTuningSettings
from lit_peft.modules import PTuningV2 as PTuningV2
from lit_peft.methods.p_tuning_v2 import PTuningV2Settings as PTuningV2Settings
from lit_peft.modules import Parallel as Parallel
from lit_peft.methods.parallel import ParallelSettings as ParallelSettings
from lit_peft.data.preference import PreferenceData as PreferenceData
from lit_peft.modules import PrefixTuning as PrefixTuning
from lit_peft.methods.prefix_tuning import PrefixTuningSettings as PrefixTuningSettings
from lit_peft.modules import PromptTuning as PromptTuning
from lit_peft.methods.prompt_tuning import PromptTuningSettings as PromptTuningSettings
from lit_peft.data.question_answering import QuestionAnsweringData as QuestionAnsweringData
from lit_peft.data.reasoning import ReasoningData as ReasoningData
from lit_peft.data.seq2seq import Seq2SeqData as Seq2SeqData
from lit_peft.data.speech import SpeechData as SpeechData
from lit_peft.methods.stack import Stack as Stack
from lit_peft.data.text_classification import TextClassificationData as TextClassificationData
from lit_peft.data.token_classification import TokenClassificationData as TokenClassificationData
from lit_peft.methods.adapters import active_adapter as active_adapter
from lit_peft.methods.adapters import adapter_names as adapter_names
from lit_peft.methods.adapters import add_adapter as add_adapter
from lit_peft.methods.attach import attach as attach
from lit_peft.methods.combine import combine_adapters as combine_adapters
from lit_peft.models.compiled_layers import compile_layers as compile_layers
from lit_peft.methods.adapters import delete_adapter as delete_adapter
from lit_peft.methods.attach import detach as detach
from lit_peft.methods.adapters import disable_adapter as disable_adapter
from lit_peft.methods.bottleneck import drop_adapters as drop_adapters
from lit_peft.methods.merging import hotswap_adapter as hotswap_adapter
from lit_peft.formats.folder import load_adapter as load_adapter
from lit_peft.methods.lora import merge as merge
from lit_peft.methods.merging import merge_adapter as merge_adapter
from lit_peft.methods.merging import merge_and_unload as merge_and_unload
from lit_peft.methods.merged import merged_adapter as merged_adapter
from lit_peft.methods.layer_kinds import register_layer as register_layer
from lit_peft.methods.scale import rescaled as rescaled
from lit_peft.models.compiled_layers import restore_layers as restore_layers
from lit_peft.methods.rows import row_adapters as row_adapters
from lit_peft.formats.folder import save_adapter as save_adapter
from lit_peft.methods.adapters import set_adapter as set_adapter
from lit_peft.methods.scale import set_scale as set_scale
from lit_peft.tasks.supervised_loss import supervised_loss as supervised_loss
from lit_peft.methods.attachment import trainable_parameters as trainable_parameters
from lit_peft.methods.merging import unmerge_adapter as unmerge_adapter
from lit_peft.methods.adapters import use_adapter as use_adapter

__version__: str

__all__ = [
    "AdapterH",
    "AdapterHSettings",
    "AdapterP",
    "AdapterPSettings",
    "BaseLM",
    "CausalLMData",
    "EmbeddingData",
    "FullFineTuning",
    "HeadOnly",
    "IA3",
    "IA3Settings",
    "InstructionData",
    "LitPeftError",
    "LoRA",
    "LoRASettings",
    "MaskedLMData",
    "MultipleChoiceData",
    "PTuning",
    "PTuningSettings",
    "PTuningV2",
    "PTuningV2Settings",
    "Parallel",
    "ParallelSettings",
    "PreferenceData",
    "PrefixTuning",
    "PrefixTuningSettings",
    "PromptTuning",
    "PromptTuningSettings",
    "QuestionAnsweringData",
    "ReasoningData",
    "Seq2SeqData",
    "SpeechData",
    "Stack",
    "TextClassificationData",
    "TokenClassificationData",
    "active_adapter",
    "adapter_names",
    "add_adapter",
    "attach",
    "combine_adapters",
    "compile_layers",
    "delete_adapter",
    "detach",
    "disable_adapter",
    "drop_adapters",
    "hotswap_adapter",
    "load_adapter",
    "merge",
    "merge_adapter",
    "merge_and_unload",
    "merged_adapter",
    "register_layer",
    "rescaled",
    "restore_layers",
    "row_adapters",
    "save_adapter",
    "set_adapter",
    "set_scale",
    "supervised_loss",
    "trainable_parameters",
    "unmerge_adapter",
    "use_adapter",
]
