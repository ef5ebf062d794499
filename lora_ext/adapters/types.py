"""PEFT's names for tasks and for kinds of adapters; each is also its text."""

from __future__ import annotations

import enum


class TaskType(str, enum.Enum):  # noqa: UP042 - as PEFT's, also what str() makes of them
    """What a model is for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, enum.Enum):  # noqa: UP042
    """The kinds of adapters that there are here: LoRA, and mixtures of it (X-LoRA)."""

    LORA = "LORA"
    XLORA = "XLORA"
