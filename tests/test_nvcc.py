"""The CUDA kernels compile for every architecture they are for, without spilled registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulated import ROOT

KERNELS = ROOT / "csrc" / "kernels"
SOURCES = sorted(path.name for path in KERNELS.glob("*.cu"))
# Before sm_80 too, as setup.py tells CMake
FOR_ANY_GPU = ("column_scale.cu", "dropout.cu", "lora_embedding.cu", "merge.cu", "sum_parts.cu")
FOR_ANY_GPU += ("weight_norm.cu", "write_table.cu")
# As CMakeLists.txt compiles them: those for tensor cores once for each type of the base.
COMPILED = [
    (name, base) for name in SOURCES for base in ([""] if name in FOR_ANY_GPU else ["Bf16", "Fp16"])
]


def compile_command(nvcc: str, name: str, base: str) -> list[str]:
    command = [nvcc, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-DLORA_EXT_SM90"]
    return [*command, *([f"-DLORA_EXT_BASE={base}"] if base else []), str(KERNELS / name)]


def test_there_are_sources() -> None:
    assert len(SOURCES) >= 5


@pytest.mark.skipif(
    "LORA_EXT_CUDA_CHECK" in os.environ, reason="make cuda-check reads the same off its own build"
)
@pytest.mark.parametrize(("name", "base"), COMPILED)
def test_no_spills_and_no_local_memory(name: str, base: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc; pip install nvidia-cuda-nvcc and its headers to compile the kernels")
    # One of the family for sm_90a has no code elsewhere; the others run there as well.
    targets = ["90a"] if "sm90" in name else ["80", "90a"]
    if name in FOR_ANY_GPU:
        targets.insert(0, "75")
    command = [*compile_command(nvcc, name, base), "-Xptxas", "-v", "--threads", "2"]
    for target in targets:
        command += ["-gencode", f"arch=compute_{target},code=sm_{target}"]
    command += ["-c", "-o", str(tmp_path / "kernels.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    used = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", result.stderr)
    assert used and all(f"for 'sm_{target}'" in result.stderr for target in targets)
    assert all(size == "0" for size, _ in used), result.stderr
    assert "setmaxnreg' ignored" not in result.stderr
    # Of wgmma: products one after the other, and waits that the source does not have.
    assert "serialized" not in result.stderr and "injected" not in result.stderr


@pytest.mark.skipif(
    "LORA_EXT_CUDA_CHECK" in os.environ, reason="make cuda-check compiles and links them"
)
@pytest.mark.parametrize("name", ["tests/gpu/kernels.cu", "benchmarks/kernels/bench_kernels.cu"])
def test_the_programs_for_a_gpu_compile(name: str, tmp_path: Path) -> None:
    """`make gpu-prebuilt` links them."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc; pip install nvidia-cuda-nvcc and its headers to compile the programs")
    command = [nvcc, "-std=c++20", "-arch=sm_80", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/gpu'}"]
    command += ["-c", str(ROOT / name), "-o", str(tmp_path / "program.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


# Whose kernels arch::launch_dependent starts, all but fill_rng_state's.
OVERLAPPING = (*FOR_ANY_GPU, "lora_linear_run.cu", "lora_linear_multi_run.cu")
OVERLAPPING += ("lora_linear_grouped_run.cu", "low_rank_sm90.cu", "product_sm90.cu")


@pytest.mark.parametrize("name", OVERLAPPING)
def test_kernels_that_overlap_wait_before_they_touch_global_memory(
    name: str, tmp_path: Path
) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to compile the kernels to PTX with")
    ptx = tmp_path / "kernels.ptx"
    command = compile_command(nvcc, name, "" if name in FOR_ANY_GPU else "Bf16")
    command += ["-ptx", "-arch=compute_90a", "-o", str(ptx)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    kernels = ptx.read_text().split(".entry ")[1:]
    assert kernels
    for kernel in kernels:
        if "fill_rng_state" in kernel.partition("(")[0]:
            continue
        before, wait, _ = kernel.partition("griddepcontrol.wait")
        assert wait, kernel.partition("(")[0]
        assert not re.search(r"\b(ld|st|red|atom)\.(?!param|shared)|cp\.async", before)
