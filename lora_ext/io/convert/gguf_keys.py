"""Names in llama.cpp's adapters."""

GENERAL = {"general.type": "adapter", "adapter.type": "lora"}
ALPHA, TOKENS = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
# Texts that PEFT's config has no field for; kept under these names.
TEXTS = {"task_name": "adapter.lora.task_name", "prompt_prefix": "adapter.lora.prompt_prefix"}
# Ends of tensors' names, after that of the base's tensor.
A_END, B_END, WEIGHT = ".lora_a", ".lora_b", ".weight"
