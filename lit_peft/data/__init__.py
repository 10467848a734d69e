"""Data modules by task; names are imported lazily."""

from __future__ import annotations

from lit_peft.util.lazy import lazy_names

_NAMES = {
    "CausalLMData": "lit_peft.data.causal_lm",
    "EmbeddingData": "lit_peft.data.embedding",
    "InstructionData": "lit_peft.data.instruction",
    "LitDataModule": "lit_peft.data.base",
    "MaskedLMData": "lit_peft.data.masked_lm",
    "MultipleChoiceData": "lit_peft.data.multiple_choice",
    "PreferenceData": "lit_peft.data.preference",
    "QuestionAnsweringData": "lit_peft.data.question_answering",
    "ReasoningData": "lit_peft.data.reasoning",
    "RewardData": "lit_peft.data.reward",
    "Seq2SeqData": "lit_peft.data.seq2seq",
    "SpeechData": "lit_peft.data.speech",
    "TextClassificationData": "lit_peft.data.text_classification",
    "TokenClassificationData": "lit_peft.data.token_classification",
    "VisionLanguageData": "lit_peft.data.vision_language",
}
__all__ = list(_NAMES)
__getattr__ = lazy_names(__name__, _NAMES)
