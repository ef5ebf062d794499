"""Layers and models over bases of bitsandbytes and torchao, alone and beside PEFT: the tests of the
folder `quantized`, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from quantized_libraries import are_installed, environment

FOLDER = Path(__file__).with_name("quantized")


def test_what_needs_the_libraries() -> None:
    if are_installed():
        pytest.skip("bitsandbytes is in the environment: tests/quantized runs as other folders do")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(FOLDER)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True)
    print(run.stdout[-20000:], run.stderr[-2000:])
    assert run.returncode == 0 and " passed" in run.stdout
