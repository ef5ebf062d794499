"""What the tests of PEFT's names share: a net, an adapter that PEFT wrote for it, and programs that
are run with both libraries."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.utils.hotswap
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_ext

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


def gives_the_same(program: Callable[[Any, Path, Path], Any], folder: Path, tmp_path: Path) -> None:
    """`program(library, a copy of the adapter's folder, a folder to write into)` returns the same
    with PEFT and with lora_ext, there without a DeprecationWarning."""
    results = []
    for lib in (peft, lora_ext):
        with warnings.catch_warnings():
            if lib is lora_ext:
                warnings.simplefilter("error", DeprecationWarning)
            where = tmp_path / lib.__name__
            shutil.copytree(folder, where / "source")
            results.append(program(lib, where / "source", where / "out"))
    assert_same(*results)


def assert_same(theirs: Any, ours: Any) -> None:
    """Equal, but for rounding in tensors: sums of at most 30 products of float32, in another order
    of additions."""
    assert type(theirs) is type(ours) or isinstance(theirs, torch.Tensor)
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    elif isinstance(theirs, dict):
        assert theirs.keys() == ours.keys()
        for key in theirs:
            assert_same(theirs[key], ours[key])
    elif isinstance(theirs, list | tuple):
        assert len(theirs) == len(ours)
        for one, other in zip(theirs, ours, strict=True):
            assert_same(one, other)
    else:
        assert theirs == ours
