"""The emulator of CUDA kernels in tests/simt: what it emulates, and mistakes that it notices."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from emulated import ROOT, compile_source

SIMT = ROOT / "tests" / "simt"
PROGRAMS = (
    "test_primitives", "test_mistakes", "test_product_sm80", "test_sm90", "test_stores_sm90",
    "test_product_sm90", "test_low_rank_sm90", "test_few_rows", "test_host",
)  # fmt: skip
BUILDS = {
    "plain": ("-O2",),
    "sanitized": ("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    # The way that fibers switch where no assembler is written for the CPU
    "ucontext": ("-O1", "-DSIMT_USE_UCONTEXT"),
}
WANTED = [(program, "sanitized") for program in PROGRAMS]
WANTED += [("test_primitives", "plain"), ("test_mistakes", "plain")]
WANTED.append(("test_primitives", "ucontext"))

Programs = dict[tuple[str, str], Future[Path]]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host with")
    folder = tmp_path_factory.mktemp("simt")

    def build(program: str, kind: str) -> Path:
        target = folder / f"{program}_{kind}"
        # psABI: a note that old compilers passed tensor maps in another way
        compile_source(SIMT / f"{program}.cpp", target, *BUILDS[kind], "-Wextra", "-Wno-psabi")
        return target

    pool = ThreadPoolExecutor(2)
    built = {wanted: pool.submit(build, *wanted) for wanted in WANTED}
    pool.shutdown(wait=False)
    return built


def run(program: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *cases], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(("program", "build"), WANTED)
def test_program(programs: Programs, program: str, build: str) -> None:
    result = run(programs[program, build].result())
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


@pytest.mark.parametrize("case", ["read_outside", "write_outside"])
def test_address_sanitizer_sees_accesses_outside_of_shared_memory(
    programs: Programs, case: str
) -> None:
    result = run(programs["test_mistakes", "sanitized"].result(), case)
    assert result.returncode != 0
    assert "AddressSanitizer" in result.stderr
    assert f"{case}_kernel" in result.stderr


def test_sm90_instructions_assemble(tmp_path: Path) -> None:
    """Their PTX, in a build that is also for an architecture that lacks them."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to assemble the instructions of sm_90a with")
    command = [nvcc, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v"]
    for architecture in ("80", "90a"):
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-c", str(SIMT / "sm90_instructions.cu"), "-o", str(tmp_path / "sm90.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "0 bytes spill stores" in result.stderr
    assert not re.search(r"[1-9]\d* bytes (stack frame|spill)", result.stderr), result.stderr
    assert "setmaxnreg' ignored" not in result.stderr
    assert "serialized" not in result.stderr
