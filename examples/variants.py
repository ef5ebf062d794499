"""LoRA, rsLoRA, DoRA, PiSSA and OLoRA on the same task: losses and trained parameters.

    python examples/variants.py

Takes some seconds on a CPU and needs no network.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import lora_ext

VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "with a bias of lora_B": {"lora_bias": True},
}


def main() -> None:
    torch.manual_seed(0)
    first, middle, last = nn.Linear(32, 96), nn.Linear(96, 96), nn.Linear(96, 8)
    base = nn.Sequential(first, nn.GELU(), middle, nn.GELU(), last)
    x = torch.randn(512, 32)
    with torch.no_grad():  # the base with other directions in its middle layer
        other = copy.deepcopy(base)
        other[2].weight += 0.1 * torch.randn(96, 3) @ torch.randn(3, 96)
        y = other(x)
    print(f"{'':24}{'first':>8}{'last':>10}{'trained':>9}")
    for name, fields in VARIANTS.items():
        config = lora_ext.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"], **fields)
        model = lora_ext.get_lora_model(copy.deepcopy(base), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        losses = []
        for _ in range(200):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        count = sum(p.numel() for p in trained)
        print(f"{name:24}{losses[0]:8.4f}{losses[-1]:10.6f}{count:9}")
        with torch.no_grad():
            model.eval()
            adapted = model(x)
            model.merge_adapter()
            torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main()
