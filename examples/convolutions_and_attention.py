"""Adapters on convolutions, on attention and on an embedding: a small image classifier of PyTorch's
own layers is adapted to images that are upside down.

    python examples/convolutions_and_attention.py

Takes about half a minute on two CPU cores and needs no network: the images are drawn here.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import lora_ext

SIZE, CLASSES = 12, 4


class Classifier(nn.Module):
    """Patches by a convolution, attention over them, a place for each."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 24, 3, stride=3)
        self.places = nn.Embedding((SIZE // 3) ** 2, 24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = x + self.places(torch.arange(x.shape[1]))
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        y: Tensor = self.head(x.mean(1))
        return y


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright quarter: which one is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    drawn = 0.5 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    half = SIZE // 2
    for image, label in zip(drawn, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, row * half : (row + 1) * half, column * half : (column + 1) * half] += 1
    return drawn, labels


def train(model: nn.Module, x: Tensor, labels: Tensor, steps: int = 120) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> str:
    model.eval()
    hits = (model(x).argmax(-1) == labels).float().mean().item()
    model.train()
    return f"{hits:.0%}"


def main() -> None:
    torch.manual_seed(0)
    base, (x, labels) = Classifier(), images(256, seed=1)
    train(base, x, labels)
    turned = x.flip(2)
    print("base:", accuracy(base, x, labels), "upright,", accuracy(base, turned, labels), "turned")

    config = lora_ext.LoraConfig(
        r=4, lora_alpha=8, target_modules=["patches", "places", "attention", "head"]
    )
    model = lora_ext.get_lora_model(copy.deepcopy(base), config)
    lora_ext.print_trainable_parameters(model)
    train(model, turned, labels)
    held_out, truth = images(256, seed=2)
    print("adapted:", accuracy(model, held_out.flip(2), truth), "of new turned images")
    print(lora_ext.explain(model, tokens=16))

    merged = copy.deepcopy(model).merge_and_unload()
    difference = (merged.eval()(held_out) - model.eval()(held_out)).abs().max().item()
    print(f"merged into plain PyTorch layers; outputs differ by {difference:.1e}")


if __name__ == "__main__":
    main()
