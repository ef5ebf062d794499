"""Every CUDA kernel under compute-sanitizer, each of whose tools must find a planted mistake.

`make gpu-sanitize` builds the program (kernels.cu) and runs this. A report of racecheck about an
sm_90a kernel has to be read before it is believed: it follows barriers of threads, and what it
knows of mbarriers, TMA and wgmma depends on its version.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

PROGRAM = os.environ.get("KERNELS_ON_GPU")
if PROGRAM is None:
    pytest.skip("KERNELS_ON_GPU names no program; see make gpu-sanitize", allow_module_level=True)

TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
FAMILIES = ["sm80", "sm90"] if torch.cuda.get_device_capability() == (9, 0) else ["sm80"]
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def find_sanitizer() -> str:
    """On PATH, in CUDA_HOME, or beside nvcc."""
    folders = [os.environ.get("PATH", "")]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(f"{home}/bin")
    if nvcc := shutil.which("nvcc"):
        folders.append(str(Path(nvcc).resolve().parent))
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    assert found, "compute-sanitizer is neither on PATH nor with the CUDA toolkit; install it"
    return found


def run(tool: str, what: str) -> tuple[int, str]:
    """How many errors the tool reports of the program, and all that both say."""
    command = [find_sanitizer(), "--tool", tool, "--print-limit", "20", str(PROGRAM), what]
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    summary = SUMMARY.search(output)
    assert summary, f"{tool} did not get to its summary:\n{output[-5000:]}"
    return int(summary[1]), output


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_right_without_a_tool(family: str) -> None:
    result = subprocess.run([str(PROGRAM), family], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"all kernels of {family}: right\n"


@pytest.mark.timeout(540)
@pytest.mark.parametrize("tool", TOOLS)
def test_planted_mistake_is_reported(tool: str) -> None:
    errors, output = run(tool, tool)
    assert errors > 0, output
    assert f"planted_{tool}(" in output, output


@pytest.mark.timeout(540)
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_clean(family: str, tool: str) -> None:
    errors, output = run(tool, family)
    assert errors == 0, output[-10000:]
    assert f"all kernels of {family}: right" in output, output[-5000:]
