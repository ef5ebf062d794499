"""X-LoRA (Buehler and Buehler, 2024, arXiv:2402.07148): a classifier of hidden states gives each
token a mixture of frozen adapters."""

from lora_ext.adapters.xlora.classifier import XLoraClassifier
from lora_ext.adapters.xlora.config import XLoraConfig
from lora_ext.adapters.xlora.model import XLoraModel

__all__ = ["XLoraClassifier", "XLoraConfig", "XLoraModel"]
