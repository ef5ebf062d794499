"""What a machine has for the programs of this folder: a GPU, tools, cuBLAS, built programs."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PREBUILT = ROOT / "build" / "gpu-prebuilt"
DEFAULT = "80-real;90a-real"  # as in the Makefile
PROGRAMS = ("kernels_on_gpu", "bench_kernels")


def why_no_gpu() -> str:
    """One sentence, or "". Asks the driver, which is quicker than torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver here (no libcuda.so.1)"
    count = ctypes.c_int()
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error or count.value == 0:
        return f"the NVIDIA driver finds no GPU here (error {error}, {count.value} devices)"
    return ""


def capability() -> int:
    """90 for sm_90, of the first GPU; 0 without one."""
    if why_no_gpu():
        return 0
    driver, numbers = ctypes.CDLL("libcuda.so.1"), []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        numbers.append(value.value)
    return 10 * numbers[0] + numbers[1]


def sources_hash() -> str:
    """Of all that the programs are built from, so that none is run for other sources."""
    folders = ("csrc/kernels", "csrc/common", "csrc/cuda", "tests/gpu", "benchmarks/kernels")
    kept = {".h", ".cu", ".cmake", ".txt"}
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kept]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def runs_on(targets: str, capability: int) -> bool:
    """Whether code for these targets ("80-real;90a-real", as CMake names them) runs on a GPU:
    machine code for later ones of its generation, PTX for all later ones; with a letter alone."""
    for target in targets.replace(" ", ";").split(";"):
        found = re.match(r"(\d+)([af]?)(-real)?", target.strip())
        if found is None:
            continue
        number, letter, real = int(found[1]), found[2], found[3]
        same = number // 10 == capability // 10
        if number == capability or (
            number < capability and letter != "a" and (same or not (letter or real))
        ):
            return True
    return False


def why_not_prebuilt() -> str:
    """Why the programs have to be built here; "" if those that are there can be run."""
    if not all((PREBUILT / program).exists() for program in PROGRAMS):
        return "there are none"
    made_of = PREBUILT / "sources"
    if not made_of.exists() or made_of.read_text().strip() != sources_hash():
        return "they are of other sources"
    targets = PREBUILT / "architectures"
    built_for, here = targets.read_text().strip() if targets.exists() else "", capability()
    if here and not runs_on(built_for, here):
        return f"they are for {built_for or 'nobody knows which GPUs'}, and the GPU is sm_{here}"
    try:
        answer = subprocess.run([PREBUILT / "bench_kernels", "--help"], capture_output=True)
    except OSError as error:
        return f"they cannot be run here: {error.strerror}"
    return "" if answer.returncode == 0 else f"they cannot be run here: {answer.stderr!r}"


@cache
def cublas() -> str:
    """The library that torch multiplies with, without importing torch; "" for the loader's."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(path) for path in (spec.submodule_search_locations or [])] if spec else []
    folders.append(Path("/usr/local/cuda"))
    found = [path for folder in folders for path in sorted(folder.rglob("libcublas.so.1[0-9]"))]
    return str(found[0].resolve()) if found else ""


def tool(name: str) -> str:
    """On PATH, or where the CUDA toolkit has it."""
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which(name, path=os.pathsep.join(places)) or name


def facts() -> dict[str, Any]:
    return {
        "capability": capability(),
        "cublas": cublas(),
        "sources": sources_hash(),
        "prebuilt": why_not_prebuilt() or "used",
        "cpus": os.cpu_count(),
        "python": sys.version.split()[0],
    }
