"""Fused LoRA layers for PyTorch. Start with `lora_ext.nn.Linear` or `lora_ext.replace_linear`."""

from typing import TYPE_CHECKING

from lora_ext import _startup

if TYPE_CHECKING:
    from lora_ext.calibration import (
        get_eva_state_dict,
        initialize_lora_eva_weights,
        preprocess_corda,
        preprocess_loraga,
    )
    from lora_ext.conversion import convert_to_lora, save_as_lora

# Not `nn`: after `from lora_ext import *` that name would not be torch's any more.
__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "XLoraConfig",
    "XLoraModel",
    "__version__",
    "autotune",
    "batch",
    "build_info",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "convert_to_lora",
    "draw_rng_state",
    "dropout_mask",
    "explain",
    "fuse_blocks",
    "fused_blocks",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_lora_model",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "lora_embedding",
    "lora_linear",
    "lora_linear_grouped",
    "lora_linear_multi",
    "lora_mlp",
    "lora_qkv",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_gradient_checkpointing",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "print_trainable_parameters",
    "reference",
    "replace_linear",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "unfuse_blocks",
]

if _startup.is_program():
    _startup.load_when_asked(__name__, {*__all__, "nn"})
else:
    from lora_ext import _flops as _flops
    from lora_ext import blocks as _blocks
    from lora_ext import calibration as _calibration
    from lora_ext import conversion as _conversion
    from lora_ext import nn as nn
    from lora_ext import reference
    from lora_ext._extension import __version__, build_info
    from lora_ext._moved import resolve_former_names as _resolve_former_names
    from lora_ext._not_built import answer_for as _answer_for
    from lora_ext.adapters import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
        BdLoraConfig,
        CordaConfig,
        EvaConfig,
        LoftQConfig,
        LoraConfig,
        LoraGAConfig,
        LoraModel,
        LoraRuntimeConfig,
        PeftConfig,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PeftType,
        TaskType,
        XLoraConfig,
        XLoraModel,
        cast_mixed_precision_params,
        check_if_peft_model,
        explain,
        get_base_model_state_dict,
        get_layer_status,
        get_lora_model,
        get_model_status,
        get_peft_config,
        get_peft_model,
        get_peft_model_state_dict,
        hotswap_adapter,
        inject_adapter_in_model,
        load_peft_weights,
        lora_state_dict,
        mark_only_lora_as_trainable,
        prepare_model_for_compiled_hotswap,
        prepare_model_for_gradient_checkpointing,
        prepare_model_for_kbit_training,
        print_trainable_parameters,
        replace_linear,
        replace_lora_weights_loftq,
        rescale_adapter_scale,
        set_base_model_state_dict,
        set_peft_model_state_dict,
    )
    from lora_ext.batching import batch
    from lora_ext.functional import (
        draw_rng_state,
        dropout_mask,
        lora_embedding,
        lora_linear,
        lora_linear_grouped,
        lora_linear_multi,
    )
    from lora_ext.tuning import autotune

    _resolve_former_names()
    _answer_for(__name__, _blocks, _calibration, _conversion)
