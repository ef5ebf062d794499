"""The classes of `lora_ext.adapters.tasks` for where PEFT is installed: instances of PEFT's
PeftModel, too, whose methods they have of their own. Nothing of PEFT's runs for them."""

from __future__ import annotations

import peft

from lora_ext.adapters import lora_model, tasks


class LoraModel(lora_model.LoraModel, peft.PeftModel):  # type: ignore[misc]
    __doc__ = lora_model.LoraModel.__doc__


class PeftModelForCausalLM(tasks.PeftModelForCausalLM, peft.PeftModelForCausalLM):  # type: ignore[misc]
    __doc__ = tasks.PeftModelForCausalLM.__doc__


class PeftModelForSeq2SeqLM(tasks.PeftModelForSeq2SeqLM, peft.PeftModelForSeq2SeqLM):  # type: ignore[misc]
    __doc__ = tasks.PeftModelForSeq2SeqLM.__doc__


class PeftModelForSequenceClassification(  # type: ignore[misc]
    tasks.PeftModelForSequenceClassification, peft.PeftModelForSequenceClassification
):
    __doc__ = tasks.PeftModelForSequenceClassification.__doc__


class PeftModelForTokenClassification(  # type: ignore[misc]
    tasks.PeftModelForTokenClassification, peft.PeftModelForTokenClassification
):
    __doc__ = tasks.PeftModelForTokenClassification.__doc__


class PeftModelForQuestionAnswering(  # type: ignore[misc]
    tasks.PeftModelForQuestionAnswering, peft.PeftModelForQuestionAnswering
):
    __doc__ = tasks.PeftModelForQuestionAnswering.__doc__


class PeftModelForFeatureExtraction(  # type: ignore[misc]
    tasks.PeftModelForFeatureExtraction, peft.PeftModelForFeatureExtraction
):
    __doc__ = tasks.PeftModelForFeatureExtraction.__doc__
