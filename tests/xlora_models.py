"""Small models with X-LoRA, PEFT's beside them, and the mixture composed in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import peft
import peft.tuners.xlora.model as peft_xlora
import tiny_models
import torch
from torch import Tensor, nn

import lora_ext

TOKENS = torch.randint(
    3, tiny_models.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5)
)
TARGETS: dict[str, list[list[str]]] = {  # of the two adapters: not the same modules
    "llama": [["q_proj", "v_proj", "down_proj"], ["q_proj", "up_proj"]],
    "gpt2": [["c_attn", "c_proj", "wte"], ["c_attn", "c_fc"]],
}
HIDDEN = 32  # of tiny_models


def base_of(family: str) -> Any:
    base: Any = getattr(tiny_models, family)()[0]
    base.config.use_cache = False  # PEFT wants it
    return base


def saved_experts(family: str, folder: Path, names: tuple[str, ...] = ("0", "1")) -> dict[str, str]:
    """Folders of adapters with random values; PEFT runs those alone whose names are numbers."""
    adapters = {}
    for i, name in enumerate(names):
        torch.manual_seed(100 + i)
        config = lora_ext.LoraConfig(
            r=2 + 2 * i,
            lora_alpha=16,
            target_modules=TARGETS[family][i % 2],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        lora_ext.get_peft_model(base_of(family), config).save_pretrained(folder / name)
        adapters[name] = str(folder / name)
    return adapters


def settings(**options: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "task_type": "CAUSAL_LM",
        "xlora_depth": 2,
        "xlora_size": 16,
        "xlora_dropout_p": 0.0,
        **options,
    }


def ours(family: str, adapters: dict[str, str], seed: int = 3, **options: Any) -> Any:
    config = lora_ext.XLoraConfig(adapters=adapters, **settings(**options))
    model: Any = lora_ext.get_peft_model(base_of(family), config)
    torch.manual_seed(seed)
    for parameter in model.internal_xlora_classifier.parameters():
        nn.init.normal_(parameter.data, std=0.5)
    return model


def _load(lora_model: Any, adapter_name: str, model_id: str, **_: Any) -> None:
    """PEFT's own reads adapters alone whose models have their layers in `model.`: Llama's, not
    GPT-2's. What is computed with them is PEFT's."""
    config = peft.LoraConfig.from_pretrained(model_id)
    config.inference_mode = False
    lora_model.peft_config[adapter_name] = config
    lora_model.inject_adapter(lora_model.model, adapter_name)
    weights = peft.utils.load_peft_weights(model_id, device="cpu")
    weights = {key.removeprefix("base_model."): value for key, value in weights.items()}
    result = peft.utils.set_peft_model_state_dict(lora_model, weights, adapter_name=adapter_name)
    assert not result.unexpected_keys


def theirs_of(model: Any, family: str, adapters: dict[str, str], **options: Any) -> Any:
    """PEFT's model with the same classifier."""
    config = peft.XLoraConfig(adapters=dict(adapters), **settings(**options))
    with mock.patch.object(peft_xlora, "_load_adapter_into_lora_model", _load):
        theirs: Any = peft.get_peft_model(base_of(family), config)
    own = model.internal_xlora_classifier.state_dict()
    theirs.internal_xlora_classifier.load_state_dict(own)
    return theirs.eval()


class Composed(nn.Module):
    """A layer's gated composition in plain PyTorch, in the place of the layer."""

    gates: Tensor  # [requests, tokens, adapters], set before each call

    def __init__(self, layer: Any, names: list[str]) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight.detach(), layer.bias
        self.deltas = [
            layer.get_delta_weight(n).detach() if n in layer.adapters else None for n in names
        ]

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        for place, delta in enumerate(self.deltas):
            if delta is not None:
                y = y + self.gates[..., place, None] * nn.functional.linear(x, delta)
        return y
