"""The CPU's vector kernels, in a program without torch, under AddressSanitizer and
UndefinedBehaviorSanitizer, on numbers whose results are exact. Those on bf16 dot products, of
vectors and of AMX's tiles, run on every CPU with AVX-512 here, with the instructions emulated."""

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


VECTORS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    # with those on bf16 dot products, which the program emulates
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_kernels_are_exact_and_clean_and_mistakes_are_noticed(
    capability: str, tmp_path: Path
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels with")
    runtime = ["g++", "-print-file-name=libasan.so"]
    library = subprocess.run(runtime, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("g++ is here without its sanitizers' runtimes")
    here = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and here != "AVX512":
        pytest.skip(f"this CPU has {here}, no AVX-512")
    chosen = capability if here in ("AVX2", "AVX512") else "DEFAULT"
    program = tmp_path / "cpu_kernels"
    compile_source(SOURCE, program, *OPTIONS, *VECTORS[chosen])
    clean = subprocess.run([program], capture_output=True, text=True)
    assert clean.stdout.strip() == "clean" and clean.returncode == 0, (clean.stdout, clean.stderr)
    wrong = subprocess.run([program, "wrong"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stdout.startswith("dx: element")
    canary = subprocess.run([program, "canary"], capture_output=True, text=True)
    # of a write, or, of a masked one, which it does not see, of what was overwritten
    assert canary.returncode != 0 and "AddressSanitizer: " in canary.stderr
