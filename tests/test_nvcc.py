"""The CUDA kernels compile for every architecture they are for, without spilled registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulated import ROOT

KERNELS = ROOT / "csrc" / "kernels"
TARGETS = {"sm90": ("compute_90a", "sm_90a")}  # others: sm_80
SOURCES = sorted(path.name for path in KERNELS.glob("*.cu"))


def test_there_are_sources() -> None:
    assert len(SOURCES) >= 2


@pytest.mark.parametrize("name", SOURCES)
def test_no_spills_and_no_local_memory(name: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc; pip install nvidia-cuda-nvcc and its headers to compile the kernels")
    compute, code = TARGETS.get(name.removesuffix(".cu").split("_")[-1], ("compute_80", "sm_80"))
    command = [nvcc, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v"]
    command += ["-gencode", f"arch={compute},code={code}", "-c", str(KERNELS / name)]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    used = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", result.stderr)
    assert used, "ptxas reported nothing"
    assert all(size == "0" for size, _ in used), result.stderr
