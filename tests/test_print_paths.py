"""LORA_EXT_PRINT_PATHS, which a process reads once: so in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch, lora_ext
layer = lora_ext.nn.Linear(72, 40, r=4, lora_dropout=0.1)
for _ in range(3):
    layer(torch.randn(2, 9, 72)).sum().backward()
layer.eval()(torch.randn(18, 72))
for row in lora_ext.explain(layer.train(), tokens=18):
    print(row.path)
"""


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_each_kind_of_call_is_printed_once(value: str) -> None:
    environment = os.environ | {"LORA_EXT_PRINT_PATHS": value}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    path = ran.stdout.strip()
    lines = [line for line in ran.stderr.splitlines() if line.startswith("lora_ext: ")]
    if value != "1":
        assert not lines
        return
    calls = ("forward", "dropout"), ("backward", "dropout"), ("forward", "")
    assert len(lines) == len(calls), ran.stderr
    for line, (of, dropout) in zip(lines, calls, strict=True):
        drops = ", dropout" if dropout else ""
        what = f"lora_ext: {of} of 18 rows, 72 -> 40, r 4, float32{drops}: "
        assert line.startswith(f"{what}{path}: "), line
