"""Fused LoRA layers for PyTorch. Start with `lora_ext.nn.Linear` or `lora_ext.replace_linear`."""

from lora_ext import _startup

# Not `nn`: after `from lora_ext import *` that name would not be torch's any more.
__all__ = [
    "LoraConfig",
    "LoraModel",
    "__version__",
    "autotune",
    "build_info",
    "draw_rng_state",
    "dropout_mask",
    "explain",
    "get_lora_model",
    "get_peft_model",
    "lora_embedding",
    "lora_linear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "print_trainable_parameters",
    "reference",
    "replace_linear",
]

if _startup.is_program():
    _startup.load_when_asked(__name__, {*__all__, "nn"})
else:
    from lora_ext import _flops as _flops
    from lora_ext import nn as nn
    from lora_ext import reference
    from lora_ext._extension import __version__, build_info
    from lora_ext._moved import resolve_former_names as _resolve_former_names
    from lora_ext.adapters import (
        LoraConfig,
        LoraModel,
        explain,
        get_lora_model,
        get_peft_model,
        lora_state_dict,
        mark_only_lora_as_trainable,
        print_trainable_parameters,
        replace_linear,
    )
    from lora_ext.functional import draw_rng_state, dropout_mask, lora_embedding, lora_linear
    from lora_ext.tuning import autotune

    _resolve_former_names()
