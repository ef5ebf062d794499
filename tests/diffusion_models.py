"""A small pipeline with Stable Diffusion's names, and updates of its weights by the formula."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from converted import values
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width: int, inputs: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(inputs, width, bias=False)
        self.to_v = nn.Linear(inputs, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_q(x), self.to_k(y), self.to_v(y)
        result: torch.Tensor = self.to_out[0](F.scaled_dot_product_attention(q, k, v))
        return result


class TransformerBlock(nn.Module):
    def __init__(self, width: int, inputs: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(width, width), Attention(width, inputs)
        first = nn.ModuleDict({"proj": nn.Linear(width, 2 * width)})
        self.ff = nn.ModuleDict(
            {"net": nn.ModuleList([first, nn.Identity(), nn.Linear(2 * width, width)])}
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, y)
        net = self.ff["net"]
        result: torch.Tensor = x + net[2](F.gelu(net[0]["proj"](x)))  # type: ignore[index]
        return result


class Spatial(nn.Module):
    def __init__(self, width: int, inputs: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, inputs)])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.proj_in(x)
        found = self.transformer_blocks[0](x.flatten(2).transpose(1, 2), y)
        result: torch.Tensor = found.transpose(1, 2).reshape(x.shape)
        return result


class Unet(nn.Module):
    def __init__(self, width: int = 8, inputs: int = 6) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, width, 3, padding=1)
        block = nn.ModuleDict({"attentions": nn.ModuleList([Spatial(width, inputs)])})
        self.down_blocks = nn.ModuleList([block])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_blocks[0]["attentions"][0](self.conv_in(x), y)  # type: ignore[index]
        return result


class SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        result: torch.Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v))
        return result


class TextLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 10), "fc2": nn.Linear(10, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x)
        result: torch.Tensor = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](x)))
        return result


class TextEncoder(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(11, width)})
        encoder = nn.ModuleDict({"layers": nn.ModuleList(TextLayer(width) for _ in range(2))})
        self.text_model = nn.ModuleDict({"embeddings": embeddings, "encoder": encoder})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.text_model["embeddings"]["token_embedding"](tokens)  # type: ignore[index]
        for layer in self.text_model["encoder"]["layers"]:  # type: ignore[index]
            x = layer(x)
        result: torch.Tensor = x
        return result


class Pipeline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text_encoder = Unet(), TextEncoder()

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.unet(x, self.text_encoder(tokens))
        return result


X, TOKENS = values(1, 2, 4, 5, 5), torch.tensor([[1, 4, 4, 2], [9, 0, 3, 10]])
Q, K, V = "attn1.to_q", "attn2.to_k", "attn2.to_v"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TEXT = "text_model.encoder.layers"


@dataclass(frozen=True)
class Update:
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def updated(model: nn.Module, updates: Mapping[str, Update]) -> nn.Module:
    """In float64, W + scaling B A; with DoRA's magnitudes over the norms of its rows."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, one in updates.items():
            module = exact.get_submodule(name)
            weight, A, B = module.weight, one.A.double(), one.B.double()
            assert isinstance(weight, torch.Tensor)
            delta = one.scaling * (B.flatten(1) @ A.flatten(1))
            delta = delta.t() if isinstance(module, nn.Embedding) else delta
            new = weight + delta.reshape(weight.shape)
            if one.magnitude is not None:
                norms = new.flatten(1).norm(dim=1)
                factors = one.magnitude.double().flatten() / norms
                new = new * factors.reshape(-1, *[1] * (new.dim() - 1))
            weight.copy_(new)
            if one.bias is not None:
                assert isinstance(module.bias, torch.Tensor)
                module.bias += one.scaling * one.bias.double()
    return exact


def update(
    model: nn.Module, name: str, seed: int, rank: int = 2, scaling: float = 1.0, dora: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Update:  # fmt: skip
    """Trained values for a module."""
    module = model.get_submodule(name)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    out, inputs = weight.shape[0], tuple(weight.shape[1:])
    if isinstance(module, nn.Embedding):
        out, inputs = weight.shape[1], (weight.shape[0],)
    A = values(seed, rank, *inputs, dtype=dtype)
    B = values(seed + 1, out, rank, *[1] * (len(inputs) - 1), dtype=dtype)
    magnitude = values(seed + 2, out).abs().to(dtype) + 0.5 if dora else None
    return Update(A, B, scaling, magnitude)
