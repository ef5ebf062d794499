"""`import lora_ext.integrations.experts` makes "lora_ext" one of transformers' expert
implementations: `from_pretrained(..., experts_implementation="lora_ext")`, or
`model.set_experts_implementation("lora_ext")`.

Each expert is multiplied by its own rows, also in dtypes and on devices that have no grouped
product. Adapters of experts (`LoraConfig.target_parameters`) run so whatever the implementation is.
"""

from __future__ import annotations

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lora_ext.nn.experts import experts_forward

ALL_EXPERTS_FUNCTIONS.register("lora_ext", experts_forward)
