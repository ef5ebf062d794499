"""Mistakes planted in the CUDA kernels, one at a time: the emulated tests must notice each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import ROOT

# What is planted → (file, what stands there, what is put in its place)
MISTAKES = {
    "no wait for the copies": (
        "gemm_sm80.h", "arch::cp_async_wait<Shape::kRing - 2>();", "",
    ),
    "a wait for one group too few": (
        "gemm_sm80.h", "cp_async_wait<Shape::kRing - 2>", "cp_async_wait<Shape::kRing - 1>",
    ),
    "no barrier after the wait": (
        "gemm_sm80.h", "__syncthreads();", "",
    ),
    "a slot filled while it is read": (
        "gemm_sm80.h",
        "G::load(stage(step + Shape::kRing - 1), params, loading, m, n, thread);",
        "G::load(stage(step), params, loading, m, n, thread);",
    ),
    "stores below the last row": (
        "gemm_sm80.h", "if (m >= params.M) continue;", "",
    ),
    "stores right of the last column": (
        "gemm_sm80.h", "if (n >= params.N) continue;", "",
    ),
    "a segment one step too long": (
        "gemm_sm80.h", "if (k >= params.segments[segment].a.columns)",
        "if (k > params.segments[segment].a.columns)",
    ),
    "a mask of the wrong rows": (
        "gemm_sm80.h", "params.threshold, m + warp_row,", "params.threshold, m,",
    ),
    "rows read beyond the matrix": (
        "tile_sm80.h", "row + r < matrix.rows ? matrix.columns",
        "row + r <= matrix.rows ? matrix.columns",
    ),
    "chunks not permuted for one operand": (
        "tile_sm80.h", "Tile::offset(row + lane % 16, column / 8 + lane / 16)",
        "(row + lane % 16) * Tile::kChunks * 16 + (column / 8 + lane / 16) * 16",
    ),
    "down: no wait for the copies": (
        "lora_down_sm80.h", "arch::cp_async_wait<Shape::kRing - 2>();", "",
    ),
    "down: splits that overlap": (
        "lora_down_sm80.h", "const int64_t first = steps * blockIdx.x / params.splits;",
        "const int64_t first = 0;",
    ),
    "up_grad: no barrier before h is read": (
        "lora_up_grad_sm80.h",
        "params.rank, params.stride, 1.0f, Shape::kM, thread);\n        __syncthreads();",
        "params.rank, params.stride, 1.0f, Shape::kM, thread);",
    ),
    "up_grad: no barrier before the sums are stored": (
        "lora_up_grad_sm80.h", "  if (params.dB) {\n    __syncthreads();", "  if (params.dB) {",
    ),
    "down_grad: no wait for the copies": (
        "lora_down_grad_sm80.h", "arch::cp_async_wait<0>();", "",
    ),
    "down_grad: a mask of the wrong columns": (
        "lora_down_grad_sm80.h", "params.threshold, m + k, blockIdx.x, warp * kSlots, lane",
        "params.threshold, m + k, blockIdx.x, 0, lane",
    ),
}  # fmt: skip

# Small sizes that reach every part: several tiles and steps, several splits, tails.
SCRIPT = """
import itertools, sys
from pathlib import Path
import test_kernels
from emulated import COMPLETIONS, EmulatedKernels
kernels = EmulatedKernels.build(Path(sys.argv[1]), "-DBF16_ONLY", csrc=Path(sys.argv[2]))
print("compiled", flush=True)
for size, schedule in itertools.product([(37, 192, 200, 16), (130, 200, 72, 8)],
                                        itertools.product(COMPLETIONS, range(4))):
    test_kernels.check(kernels, size, ("bf16", "bf16"), 0.1, schedule)
print("no mistake noticed")
"""


def run_checks(folder: Path, csrc: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(csrc)]
    return subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_noticed(mistake: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host with")
    name, right, wrong = MISTAKES[mistake]
    csrc = tmp_path / "csrc"
    for part in ("common", "kernels"):
        shutil.copytree(ROOT / "csrc" / part, csrc / part)
    file = csrc / "kernels" / name
    text = file.read_text()
    assert text.count(right) >= 1, f"{name} no longer holds what this test replaces"
    file.write_text(text.replace(right, wrong))
    result = run_checks(tmp_path, csrc)
    # Noticed by a check or by the emulator, both exceptions; not by the compiler, and no crash.
    assert result.stdout.strip() == "compiled", result.stderr[-3000:]
    assert result.returncode == 1 and "Error" in result.stderr, result.stderr[-3000:]


def test_nothing_is_noticed_in_the_right_kernels(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host with")
    result = run_checks(tmp_path, ROOT / "csrc")
    assert "no mistake noticed" in result.stdout, result.stderr[-3000:]
