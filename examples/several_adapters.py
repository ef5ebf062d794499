"""One base, three tasks: an adapter for each, switched, scaled, combined, switched off.

    python examples/several_adapters.py

Takes some seconds on a CPU and needs no network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lora_ext

CONFIG = lora_ext.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int = 150) -> float:
    """The loss after so many steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    tasks = {"sine": torch.sin(x[:, :4]), "square": x[:, 4:8] ** 2, "sum": x[:, :4] + x[:, 4:8]}
    base = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
    model = lora_ext.get_lora_model(base, CONFIG, "sine")
    for name in ("square", "sum"):
        model.add_adapter(name, CONFIG)

    for name, y in tasks.items():
        model.set_adapter(name)
        before = nn.functional.mse_loss(model(x), y).item()
        print(f"{name:8} loss {before:.3f} -> {train(model, x, y):.3f}")
    model.requires_grad_(False)

    print("\nloss of each task (columns) with each adapter (rows)")
    print(" " * 12, *(f"{name:>8}" for name in tasks))
    for name in tasks:
        model.set_adapter(name, inference_mode=True)
        losses = (nn.functional.mse_loss(model(x), y).item() for y in tasks.values())
        print(f"{name:12}", *(f"{loss:8.3f}" for loss in losses))

    model.add_weighted_adapter(["sine", "square"], [0.5, 0.5], "blend", combination_type="cat")
    model.set_adapter("blend", inference_mode=True)
    blended = model(x)
    model.set_adapter(["sine", "square"], inference_mode=True)
    for name in ("sine", "square"):
        model.set_scale(name, 0.5)
    print("\nhalf of two adapters, combined or together:", (blended - model(x)).abs().max().item())

    model.set_adapter("sum", inference_mode=True)
    adapted = model(x)
    model.merge_adapter()
    print("merged, the difference of outputs:", (model(x) - adapted).abs().max().item())
    model.unmerge_adapter()
    assert torch.equal(model(x), adapted)
    with model.disable_adapter():
        print("without adapters:", nn.functional.mse_loss(model(x), tasks["sum"]).item())


if __name__ == "__main__":
    main()
