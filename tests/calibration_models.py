"""Small models and data for the initialisations from data, and PEFT's modules of them."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 48
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def pefts(name: str) -> Any:
    """A module of PEFT's. Its corda.py takes `dataclass` from attrs, which is no requirement of
    PEFT; Python's does the same there."""
    if name.endswith("corda"):
        try:
            importlib.import_module("attr")
        except ImportError:
            sys.modules["attr"] = dataclasses
    return importlib.import_module(f"peft.{name}")


def llama(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval()


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=1, n_head=2, n_positions=64
    )
    return transformers.GPT2LMHeadModel(config).eval()


def texts(seed: int = 0, batches: int = 6, rows: int = 3, length: int = 16) -> list[dict[str, Any]]:
    """Batches with padding, and labels of a part of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        tokens = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(tokens)
        labels = tokens.clone()
        labels[:, :2] = -100
        if rows > 1:
            mask[0, -3:] = 0
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


class Net(nn.Module):
    """Two linear layers; `unused` is never called, `conv` and `embedding` only stand there."""

    def __init__(self, seed: int = 0, inside: int = 20) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(16, inside)
        self.second = nn.Linear(inside, 12)
        self.unused = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


def points(seed: int = 0, batches: int = 6, rows: int = 40) -> list[Tensor]:
    """Rows whose variance is spread unevenly, so that components are far apart."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.7 ** torch.arange(16.0)
    return [torch.randn(rows, 16, generator=generator) * spread + 0.3 for _ in range(batches)]


def running(model: nn.Module, data: list[Any]) -> Callable[[], None]:
    def run() -> None:
        for batch in data:
            if isinstance(batch, dict):
                model(**batch)
            else:
                model(batch)

    return run


def training(model: nn.Module, data: list[Any]) -> Callable[[], None]:
    def run() -> None:
        for batch in data:
            output = model(**batch).loss if isinstance(batch, dict) else loss(model, batch)
            output.backward()

    return run


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()  # type: ignore[no-any-return]


def twice(model: Any) -> tuple[Any, Any]:
    return copy.deepcopy(model), copy.deepcopy(model)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a calibration might change."""
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "trains": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_hooks) for n, m in model.named_modules()},
        "names": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    same = all(one[key] == other[key] for key in ("trains", "modes", "hooks", "names"))
    for key in ("parameters", "gradients"):
        for name, tensor in one[key].items():
            now = other[key][name]
            same &= (tensor is None) == (now is None)
            same &= tensor is None or torch.equal(tensor, now)
    return same
