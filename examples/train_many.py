"""Eight adapters trained at once on eight data sets: one base product for all of them, an optimizer
and a clipping for each; and each ends bit for bit where it ends trained by itself.

    python examples/train_many.py

Takes some seconds on a CPU and needs no network.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import lora_ext

RANKS = {"a": 2, "b": 4, "c": 4, "d": 8, "e": 8, "f": 16, "g": 16, "h": 32}
ROWS = [24, 40, 8, 64, 16, 48, 32, 24]  # of each data set in a batch, packed one behind the other
FEATURES, STEPS = 64, 40


def make_model() -> lora_ext.LoraModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(FEATURES, 128), nn.GELU(), nn.Linear(128, FEATURES))
    model: lora_ext.LoraModel | None = None
    for name, r in RANKS.items():
        config = lora_ext.LoraConfig(
            r=r, lora_alpha=2 * r, lora_dropout=0.05, target_modules=["0", "2"]
        )
        if model is None:
            model = lora_ext.get_lora_model(base, config, name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    model.set_adapter(list(RANKS))  # all train
    return model


def parameters_of(model: lora_ext.LoraModel, name: str) -> list[nn.Parameter]:
    return [p for _, layer in model.layers_with(name) for p in layer.parts(name).values()]


def batch(step: int) -> tuple[Tensor, list[Tensor]]:
    """Inputs of all data sets, packed, and the targets of each: another rotation for each."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(ROWS), FEATURES, generator=generator)
    return x, [part.roll(i + 1, -1).sin() for i, part in enumerate(x.split(ROWS))]


def train(trained: list[str]) -> tuple[dict[str, list[Tensor]], dict[str, float], float]:
    """(values, last losses, seconds) of these adapters; rows of the others are the base's."""
    model = make_model()
    names = [name if name in trained else None for name in RANKS]
    optimizers = {
        name: torch.optim.AdamW(parameters_of(model, name), lr=1e-2 / RANKS[name] ** 0.5)
        for name in trained
    }
    losses: dict[str, float] = {}
    torch.manual_seed(1)  # of dropout
    start = time.perf_counter()
    for step in range(STEPS):
        x, targets = batch(step)
        with lora_ext.batch(names, lengths=ROWS):
            outputs = model(x).split(ROWS)
            own = {
                name: nn.functional.mse_loss(y, target)
                for name, y, target in zip(RANKS, outputs, targets, strict=True)
                if name in trained
            }
            torch.stack(list(own.values())).sum().backward()
        for name, optimizer in optimizers.items():
            nn.utils.clip_grad_norm_(parameters_of(model, name), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses = {name: loss.item() for name, loss in own.items()}
    values = {name: [p.detach() for p in parameters_of(model, name)] for name in trained}
    return values, losses, time.perf_counter() - start


def main() -> None:
    train(["a"])  # warm
    together, losses, seconds = train(list(RANKS))
    one_by_one = 0.0
    print("adapter  rank  rows  loss   as by itself, bit for bit")
    for (name, r), rows in zip(RANKS.items(), ROWS, strict=True):
        alone, _, own_seconds = train([name])
        one_by_one += own_seconds
        pairs = zip(together[name], alone[name], strict=True)
        same = all(torch.equal(one, other) for one, other in pairs)
        print(f"{name:8} {r:4}  {rows:4}  {losses[name]:.3f}  {same}")
    print(f"\nall at once {seconds:.2f} s, one after another {one_by_one:.2f} s")


if __name__ == "__main__":
    main()
