"""Every Python block of README and docs runs, as a reader would paste it."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama
from torch import nn

import lora_ext
import lora_ext.integrations.peft as fused

ROOT = Path(lora_ext.__file__).parents[1]
BLOCKS = {
    f"{page.name}:{i}": block
    for page in sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/*.md")])
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
}


def given() -> dict[str, Any]:
    """What the pages take for given: libraries, a reader's model, operands."""
    model = llama()[0]
    return {
        "copy": copy, "torch": torch, "nn": nn, "lora_ext": lora_ext,
        "model": model, "base_model": copy.deepcopy(model),
        "x": torch.randn(3, 8), "lora_A": torch.randn(2, 8), "lora_B": torch.randn(4, 2),
        "lora_bias": torch.randn(4), "weight": torch.randn(4, 8), "bias": torch.randn(4),
        "s": 2.0, "p": 0.1,
    }  # fmt: skip


@pytest.mark.skipif(not BLOCKS, reason="docs/ is not here: an installed copy is tested")
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_block(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            exec(compile(block, "a block of the documentation", "exec"), given())
    finally:
        fused.unpatch()
