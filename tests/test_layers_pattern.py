"""layers_to_transform with layers_pattern means what it means to PEFT, of modules of every kind."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import peft
import pytest
from torch import nn

import lora_ext


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.emb = nn.Linear(4, 4), nn.Embedding(5, 4)
        self.conv, self.conv2 = nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1)


class Net(nn.Module):
    """Two stacks, one of them once more further down, and modules outside of all."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([Block() for _ in range(3)])
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.emb, self.lin = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.deep = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleList([Block()])] * 2)})


TARGETS = [["lin"], ["conv"], ["conv2", "emb"], ["h.1.emb"], ["layers.0.0.conv"]]
LAYERS = [None, 0, 1, [1], [0, 2], (1,), [], 7]
PATTERNS: list[Any] = [None, "h", "layers", ["layers", "h"], ["nowhere", "h"], "nowhere", [], "l.*"]


def meant(make: Any, config: Any, fields: dict[str, Any]) -> list[str]:
    """The modules that get adapters; none where the config is refused, or means none."""
    try:
        model = make(Net(), config(r=2, **fields))
    except ValueError:
        return []
    names: list[str] = model.targeted_module_names
    return sorted(names)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_means_what_peft_means(targets: list[str]) -> None:
    found = 0
    for layers, pattern in itertools.product(LAYERS, PATTERNS):
        fields = {
            "target_modules": targets,
            "layers_to_transform": layers,
            "layers_pattern": pattern,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = meant(peft.get_peft_model, peft.LoraConfig, dict(fields))
            ours = meant(lora_ext.get_lora_model, lora_ext.LoraConfig, dict(fields))
        assert ours == theirs, fields
        found += bool(ours)
    assert found > 2
