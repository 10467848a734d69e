"""Data modules by task; names are imported lazily."""

# Made by tools/make_stubs.py from the code. Do not edit.

from lit_peft.data.causal_lm import CausalLMData as CausalLMData
from lit_peft.data.embedding import EmbeddingData as EmbeddingData
from lit_peft.data.instruction import InstructionData as InstructionData
from lit_peft.data.base import LitDataModule as LitDataModule
from lit_peft.data.masked_lm import MaskedLMData as MaskedLMData
from lit_peft.data.multiple_choice import MultipleChoiceData as MultipleChoiceData
from lit_peft.data.preference import PreferenceData as PreferenceData
from lit_peft.data.question_answering import QuestionAnsweringData as QuestionAnsweringData
from lit_peft.data.reasoning import ReasoningData as ReasoningData
from lit_peft.data.reward import RewardData as RewardData
from lit_peft.data.seq2seq import Seq2SeqData as Seq2SeqData
from lit_peft.data.speech import SpeechData as SpeechData
from lit_peft.data.text_classification import TextClassificationData as TextClassificationData
from lit_peft.data.token_classification import TokenClassificationData as TokenClassificationData
from lit_peft.data.vision_language import VisionLanguageData as VisionLanguageData

__all__ = [
    "CausalLMData",
    "EmbeddingData",
    "InstructionData",
    "LitDataModule",
    "MaskedLMData",
    "MultipleChoiceData",
    "PreferenceData",
    "QuestionAnsweringData",
    "ReasoningData",
    "RewardData",
    "Seq2SeqData",
    "SpeechData",
    "TextClassificationData",
    "TokenClassificationData",
    "VisionLanguageData",
]
