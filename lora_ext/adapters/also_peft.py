"""The classes of `lora_ext.adapters.tasks` for where PEFT is installed: instances of PEFT's
PeftModel, too, whose methods they have of their own. Nothing of PEFT's runs for them."""

# mypy: disable-error-code="misc,override"

from __future__ import annotations

import peft
from peft.tuners.tuners_utils import BaseTunerLayer

from lora_ext.adapters import lora_model, tasks
from lora_ext.adapters.xlora import model as xlora
from lora_ext.nn import LoraLayer

# So that who asks whether a layer has adapters is told: TRL computes with the weight of a head
# itself, and refuses one that has.
BaseTunerLayer.register(LoraLayer)


class LoraModel(lora_model.LoraModel, peft.PeftModel):
    __doc__ = lora_model.LoraModel.__doc__


class XLoraModel(xlora.XLoraModel, peft.PeftModel):
    __doc__ = xlora.XLoraModel.__doc__


class PeftModelForCausalLM(tasks.PeftModelForCausalLM, peft.PeftModelForCausalLM):
    __doc__ = tasks.PeftModelForCausalLM.__doc__


class PeftModelForSeq2SeqLM(tasks.PeftModelForSeq2SeqLM, peft.PeftModelForSeq2SeqLM):
    __doc__ = tasks.PeftModelForSeq2SeqLM.__doc__


class PeftModelForSequenceClassification(
    tasks.PeftModelForSequenceClassification, peft.PeftModelForSequenceClassification
):
    __doc__ = tasks.PeftModelForSequenceClassification.__doc__


class PeftModelForTokenClassification(
    tasks.PeftModelForTokenClassification, peft.PeftModelForTokenClassification
):
    __doc__ = tasks.PeftModelForTokenClassification.__doc__


class PeftModelForQuestionAnswering(
    tasks.PeftModelForQuestionAnswering, peft.PeftModelForQuestionAnswering
):
    __doc__ = tasks.PeftModelForQuestionAnswering.__doc__


class PeftModelForFeatureExtraction(
    tasks.PeftModelForFeatureExtraction, peft.PeftModelForFeatureExtraction
):
    __doc__ = tasks.PeftModelForFeatureExtraction.__doc__
