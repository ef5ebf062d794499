"""What the tests of PEFT's names share: a net, and an adapter that PEFT wrote for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import peft.utils.hotswap
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

PREFIX = "base_model.model."


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.words(tokens).mT).mT
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


TARGETS = ["words", "conv", "first", "second"]
TOKENS = torch.arange(10).view(2, 5)


def config_of(lib: Any, **fields: Any) -> Any:
    return lib.LoraConfig(
        **{"r": 2, "target_modules": TARGETS, "init_lora_weights": False, **fields}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter that PEFT wrote."""
    torch.manual_seed(1)
    model = peft.get_peft_model(Net(), config_of(peft, modules_to_save=["head"]))
    model.save_pretrained(tmp_path / "adapter")
    model.add_adapter("other", config_of(peft))
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["other"])
    return tmp_path / "adapter"


def adapter(lib: Any, folder: Path) -> Any:
    return lib.PeftModel.from_pretrained(Net(), str(folder)).eval()


def read(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")
