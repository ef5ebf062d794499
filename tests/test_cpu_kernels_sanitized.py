"""The CPU's vector kernels, in a program without torch, under AddressSanitizer and
UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulated import compile_source

SOURCE = Path(__file__).parent / "cpu_kernels.cpp"
# Unoptimised: that compiles in a third of the time, and no access is optimised away.
OPTIONS = ["-O0", "-g1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def test_kernels_are_clean_and_a_mistake_is_noticed(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels with")
    runtime = ["g++", "-print-file-name=libasan.so"]
    library = subprocess.run(runtime, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("g++ is here without its sanitizers' runtimes")
    vectors = ["-mavx2", "-mfma", "-mf16c"]
    has_avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    program = tmp_path / "cpu_kernels"
    compile_source(SOURCE, program, *OPTIONS, *(vectors if has_avx2 else []))
    clean = subprocess.run([program], capture_output=True, text=True)
    assert clean.stdout.strip() == "clean" and clean.returncode == 0, clean.stderr[-4000:]
    canary = subprocess.run([program, "canary"], capture_output=True, text=True)
    assert canary.returncode != 0 and "heap-buffer-overflow" in canary.stderr
