"""Working on whole models: putting adapters in, training, saving and inspecting them."""

from lora_ext.adapters.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from lora_ext.adapters.bdlora import BdLoraConfig
from lora_ext.adapters.calibrated_configs import CordaConfig, EvaConfig, LoraGAConfig
from lora_ext.adapters.checkpoint.base_state_dict import (
    get_base_model_state_dict,
    set_base_model_state_dict,
)
from lora_ext.adapters.checkpoint.state_dict import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from lora_ext.adapters.config import LoraConfig, PeftConfig
from lora_ext.adapters.explain import explain
from lora_ext.adapters.helpers import (
    cast_mixed_precision_params,
    check_if_peft_model,
    get_peft_config,
    rescale_adapter_scale,
)
from lora_ext.adapters.hotswap import (
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)
from lora_ext.adapters.inject import inject_adapter_in_model
from lora_ext.adapters.loftq import replace_lora_weights_loftq
from lora_ext.adapters.loftq_config import LoftQConfig
from lora_ext.adapters.lora_model import LoraModel, PeftModel
from lora_ext.adapters.replace_linear import replace_linear
from lora_ext.adapters.runtime_config import LoraRuntimeConfig
from lora_ext.adapters.status import get_layer_status, get_model_status
from lora_ext.adapters.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_lora_model,
    get_peft_model,
)
from lora_ext.adapters.training import (
    prepare_model_for_gradient_checkpointing,
    prepare_model_for_kbit_training,
)
from lora_ext.adapters.types import PeftType, TaskType
from lora_ext.adapters.xlora import XLoraConfig, XLoraModel
from lora_ext.nn.trainable import (
    lora_state_dict,
    mark_only_lora_as_trainable,
    print_trainable_parameters,
)

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
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "explain",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_lora_model",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "inject_adapter_in_model",
    "load_peft_weights",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_gradient_checkpointing",
    "prepare_model_for_kbit_training",
    "print_trainable_parameters",
    "replace_linear",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
