"""Small language models, and what is asked of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

FILE, PREFIX = "adapter_model.safetensors", "base_model.model."


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 4, "intermediate_size": 37}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **options)).eval()


def phi() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.PhiConfig(**SIZES, intermediate_size=37)
    return transformers.PhiForCausalLM(config).eval()  # its head has a bias


INPUTS = {"input_ids": torch.tensor([[1, 2, 3, 4]])}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def keys(folder: Path) -> set[str]:
    return {key.removeprefix(PREFIX) for key in load_file(folder / FILE)}
