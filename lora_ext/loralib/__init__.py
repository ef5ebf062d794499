"""loralib under another import: `import lora_ext.loralib as lora` stands for
`import loralib as lora`.

Names, arguments, defaults, state dicts and modes are loralib 0.1.2's: layers freeze their weight in
the constructor, `eval()` merges and its `state_dict()` holds the merged weight, `train()` takes the
update out again, here bit for bit. Where loralib fails or loses something this differs;
docs/loralib.md lists where. `lora_ext.nn` has other layers, with several adapters and PEFT's files.
"""

from lora_ext.loralib import layers, utils
from lora_ext.loralib.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvLoRA,
    Embedding,
    Linear,
    LoRALayer,
    MergedLinear,
)
from lora_ext.loralib.utils import lora_state_dict, mark_only_lora_as_trainable

name = "lora"

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "layers",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "utils",
]
