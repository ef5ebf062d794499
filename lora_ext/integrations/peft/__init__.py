"""PEFT's own models on the fused operators.

    import lora_ext.integrations.peft as fused

    fused.patch()                    # all of this process, from now on
    fused.accelerate(model)          # or one model
    print(fused.report(model))       # which layers run fused, and why others do not

or, for one config, `config._register_custom_module({torch.nn.Linear: fused.Linear})`.
"""

try:
    import peft as _peft  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lora_ext.integrations.peft needs peft, which is not installed: pip install peft"
    ) from error

from lora_ext.integrations.peft import blocks as _blocks  # noqa: F401
from lora_ext.integrations.peft.config import peft_config
from lora_ext.integrations.peft.layers import BASE_ALONE, FUSED, Embedding, Linear, calls
from lora_ext.integrations.peft.patching import accelerate, is_patched, patch, unpatch
from lora_ext.integrations.peft.report import LayerReport, Report, report

__all__ = [
    "BASE_ALONE",
    "FUSED",
    "Embedding",
    "LayerReport",
    "Linear",
    "Report",
    "accelerate",
    "calls",
    "is_patched",
    "patch",
    "peft_config",
    "report",
    "unpatch",
]
