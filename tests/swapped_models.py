"""A small model, and folders of adapters of other ranks and scalings, to swap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoraModel, get_lora_model

CAPACITY = 16


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def config(r: int, alpha: float, **more: Any) -> LoraConfig:
    return LoraConfig(
        r=r, lora_alpha=alpha, target_modules=["0", "2", "4"], init_lora_weights=False, **more
    )


def saved(folder: Path, r: int, alpha: float, seed: int, **more: Any) -> Path:
    model = get_lora_model(net(), config(r, alpha, **more))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def save_folders(place: Path) -> list[Path]:
    kinds: list[dict[str, Any]] = [
        {"r": 4, "alpha": 8},
        {"r": 16, "alpha": 4},
        {"r": 1, "alpha": 3, "use_rslora": True},
        {"r": 8, "alpha": 8, "rank_pattern": {"2": 3}, "alpha_pattern": {"4": 5}},
    ]
    return [saved(place / str(i), seed=i, **kind) for i, kind in enumerate(kinds)]


def loaded(folder: Path) -> LoraModel:
    return LoraModel.from_pretrained(net(), folder).eval()


def prepared(folder: Path) -> LoraModel:
    model = loaded(folder)
    lora_ext.prepare_model_for_compiled_hotswap(model, target_rank=CAPACITY)
    return model


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
