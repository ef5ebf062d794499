"""Training with adapters on several processes, by torch.distributed: see docs/scale.md."""

from lora_ext.distributed.styles import ColwiseLora, RowwiseLora, lora_plan
from lora_ext.distributed.traffic import Traffic

__all__ = ["ColwiseLora", "RowwiseLora", "Traffic", "lora_plan"]
