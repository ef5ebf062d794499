"""How often calls change packages, and how many functions of Python a forward is."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoraModel, get_lora_model

ROOT = str(Path(lora_ext.__file__).parent)


def called(run: Callable[[], object]) -> list[tuple[str, str]]:
    """(file, name) of each function of Python that is entered in the call."""
    found: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            found.append((frame.f_code.co_filename, frame.f_code.co_name))

    gc.disable()  # a collection, whenever it comes, calls what `lora_ext._patterns` notes
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return found[1:]


def test_forward_of_linear_is_at_most_ten_calls() -> None:
    layer, x = lora_ext.nn.Linear(8, 8, r=2), torch.randn(1, 8)
    layer(x)
    calls = called(lambda: layer(x))
    assert len(calls) <= 10, calls


def entered_io(run: Callable[[], object]) -> int:
    """How often control comes into `lora_ext.io` from `lora_ext.adapters`."""
    packages = [
        Path(file).relative_to(ROOT).parts[0]
        for file, _ in called(run)
        if file.startswith(f"{ROOT}/io/") or file.startswith(f"{ROOT}/adapters/")
    ]
    return sum((one, other) == ("adapters", "io") for one, other in itertools.pairwise(packages))


def test_files_are_entered_by_one_door(tmp_path: Path) -> None:
    """A save hands over everything at once, then the model card; a load asks where the folder is
    (it may be on the hub), of what kind its config is, for the config, the header and tensors."""
    net = lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))  # noqa: E731
    model = get_lora_model(net(), LoraConfig(r=2, target_modules=["0"]))
    assert entered_io(lambda: model.save_pretrained(tmp_path)) == 2
    assert entered_io(lambda: LoraModel.from_pretrained(net(), tmp_path)) == 5
