"""The emulated CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import ROOT

SCRIPT = """
import itertools, os, sys
del os.environ["LD_PRELOAD"]  # for this process, not for the compiler
from pathlib import Path
import torch
import test_kernels
from kernel_checks import check
from emulated import COMPLETIONS, EmulatedKernels
from emulated_gates import check_gated, make_gated
from emulated_grouped import GroupedKernels
from emulated_grouped import check as check_grouped, make_problem as make_grouped
from emulated_dequantize import check_dequantize
from emulated_rows import Problem, RowKernels, check_column_scale, check_embedding, check_norms
options = ["-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# fp16: the same templates as bf16, and scales by powers of two
kernels = EmulatedKernels.build(Path(sys.argv[1]), *options, "-DFP16_ONLY")
sizes = [(1, 64, 72, 1), (37, 72, 136, 16), (65, 131, 70, 17), (130, 136, 64, 64)]
for size, types, (seed, family) in itertools.product(
    sizes, ("fp16", "fp16-fp32"), enumerate(test_kernels.SIZES)
):
    completion = COMPLETIONS[(size[0] + seed) % 3]
    check(kernels, size, types, 0.1, (completion, seed), family)
grouped = GroupedKernels.build(Path(sys.argv[1]), *options)
for seed in range(24):
    grouped.gpu((80, 86)[seed % 2], 3)
    grouped.schedule(COMPLETIONS[seed % 3], seed)
    check_grouped(grouped, make_grouped(seed))
    if seed % 4 == 0:
        check_gated(grouped, make_gated(seed))
rows = RowKernels.load(RowKernels.compile(Path(sys.argv[1]), *options))
for base, adapter in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]:
    for size in [(1, 1, 1, 0), (37, 264, 40, 0), (70, 257, 8, 0), (33, 528, 5, 8)]:
        p = Problem(*size, base, adapter)
        for capability, by_column in itertools.product((75, 90), (False, True)):
            rows.gpu(capability)
            check_norms(rows, p, by_column)
        check_column_scale(rows, p)
        check_embedding(rows, p)
rows.guarded = False  # memory of their size: what reads beyond it is seen too
check_dequantize(rows)
print("clean")
"""


def runtime(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_kernels_are_clean(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host with")
    libraries = [runtime("libasan.so"), runtime("libubsan.so")]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("g++ is here without its sanitizers' runtimes")
    # They must be loaded before Python; its own allocations at exit are not of interest.
    environment = os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT / "tests", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == "clean"
