"""A model with adapters of each kind of linear layer, for `convert_to_lora`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ext import BdLoraConfig, LoraConfig, get_lora_model

PREFIX = "base_model.model."
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


class Doubled(nn.Linear):
    """A base with a forward of its own, which is no product with the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Net(nn.Module):
    def __init__(self, kind: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = kind(12, 16), nn.Linear(16, 12)
        self.turned, self.head = Conv1D(8, 12), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.turned(self.second(self.first(x).tanh())))


ALL = ["first", "second", "turned"]
OPTIONS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA and patterns": {"use_rslora": True, "rank_pattern": {"first": 2}, "lora_alpha": 3},
    "DoRA": {"use_dora": True},
    "BD-LoRA": {
        "use_bdlora": BdLoraConfig(["first"], nblocks=2, match_strict=False),
        "target_modules": ["first", "second"],
    },
    "16 bits": {},
}


def filled(model: Any, std: float = 0.5) -> Any:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            nn.init.normal_(parameter, std=std)
        elif parameter.requires_grad:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    return model.eval()


def adapted(kind: str = "LoRA", **more: Any) -> Any:
    fields: dict[str, Any] = {"r": 4, "target_modules": ALL} | OPTIONS[kind] | more
    base = Net().bfloat16() if kind == "16 bits" else Net()
    return filled(get_lora_model(base, LoraConfig(**fields)))
