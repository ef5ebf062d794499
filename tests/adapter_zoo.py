"""A model with every kind of layer that can be adapted, and configs for it drawn by seed."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WIDTH = 8


class Experts(nn.Module):
    """Weights that no layer of its own computes with, a bias, and a layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.gate = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("eoi,...i->...eo", self.up, x) * self.gate(x).unsqueeze(-1)
        return torch.tanh(h.sum(-2)) @ self.down.T + self.bias


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.lin, self.mix = nn.Linear(WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.free = nn.Linear(WIDTH, WIDTH, bias=False)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return torch.tanh(self.free(self.mix(torch.tanh(self.lin(x))))) + self.experts(x)


class Zoo(nn.Module):
    """Tokens [.., 6] to [.., 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.conv1 = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, (1, 3), padding=(0, 1))
        self.conv3 = nn.Conv3d(WIDTH, WIDTH, 1)
        self.batch = nn.BatchNorm1d(WIDTH)
        self.lin = nn.Linear(WIDTH, WIDTH)  # also the end of a longer name
        self.head = nn.Linear(WIDTH, 5)
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.batch(self.conv1(x.mT))[..., None, :]
        x = self.conv3(self.conv2(x)[..., None])[..., 0, :]  # [.., WIDTH, 1, tokens]
        x = self.lin(x.flatten(2).mT)
        return self.head(x) + self.bias


def zoo(dtype: torch.dtype = torch.float32) -> Zoo:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Zoo().to(dtype).eval()


def tokens() -> Tensor:
    return torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(1))


TARGETS = "words attn lin mix free conv1 conv2 conv3 gate head layers.1.lin 0.lin".split()
EXPRESSIONS = [r"layers\.\d\.(lin|mix)", "all-linear", r"(words|head|.*\.attn|conv\d)", ".*lin"]
SAVED = ["head", "batch", "norm", "words", "conv1", "layers.0.experts", "layers.1"]
PARAMETERS = [["experts.up"], ["experts.up", "experts.down"], ["layers.0.experts.down"]]
PATTERNS = ["lin", r"layers\.1\.lin", r".*\.lin", "mix", "free", "layers.0.lin", "head", "conv2"]


def drawn(seed: int) -> dict[str, Any]:
    """Fields of a config; not all of them go together."""
    rng = random.Random(seed)

    def maybe(p: float) -> bool:
        return rng.random() < p

    fields: dict[str, Any] = {"r": rng.choice([2, 4]), "lora_alpha": rng.choice([1, 3.5, 16])}
    fields["init_lora_weights"] = rng.choice([False, False, True, "gaussian", "pissa", "olora"])
    if maybe(0.3):
        fields["target_modules"] = rng.choice(EXPRESSIONS)
    else:
        fields["target_modules"] = rng.sample(TARGETS, rng.randint(1, 5))
        if maybe(0.3):
            fields["layers_to_transform"] = rng.choice([0, [1], [0, 1]])
    for pattern, values in (("rank_pattern", [2, 4, 6]), ("alpha_pattern", [1, 5, 40])):
        if maybe(0.4):
            keys = rng.sample(PATTERNS, rng.randint(1, 4))
            fields[pattern] = {key: rng.choice(values) for key in keys}
    if maybe(0.3):
        fields["exclude_modules"] = rng.choice([["lin"], ["layers.0.mix"], "head|conv1", ["attn"]])
    if maybe(0.4):
        fields["modules_to_save"] = rng.sample(SAVED, rng.randint(1, 2))
    if maybe(0.25):
        fields["target_parameters"] = rng.choice(PARAMETERS)
        fields["init_lora_weights"] = rng.choice([True, False])
    fields["bias"] = rng.choice(["none", "none", "all", "lora_only"])
    fields["use_rslora"], fields["use_dora"], fields["lora_bias"] = (
        maybe(0.3),
        maybe(0.2),
        maybe(0.2),
    )
    return fields
