"""What `make gpu` runs, as far as it goes without a GPU: what it says, and benchmarks/gpu.py."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("rich")

from lora_ext.bench.environment import parse_gpu_state
from lora_ext.bench.grid import FWD, FWD_BWD
from lora_ext.bench.results import Report

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_bench", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_bench"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def test_paths_are_those_of_the_backend(gpu: ModuleType) -> None:
    assert gpu.cuda_paths()[0] == "auto"
    assert {"fused", "composed"} <= set(gpu.cuda_paths())


def test_make_tests_every_path(gpu: ModuleType) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make to read the Makefile with")
    command = ["make", "-n", "gpu", f"PYTHON={sys.executable}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"for path in {' '.join(gpu.cuda_paths()[1:])}; do" in result.stdout
    parts = ["setup.py", "cuda_check.py", "-m pytest tests", "kernels_on_gpu", "benchmarks/gpu.py"]
    assert all(part in result.stdout for part in parts)


def test_make_builds_programs_before_and_has_first_minutes() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make to read the Makefile with")
    command = [
        "make",
        "-n",
        "gpu-prebuilt",
        "gpu-first",
        "GPU_FIRST_ARGS=--seconds 9",
        "MAX_JOBS=3",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    parts = ["cmake -S tests/gpu -B", "--parallel 3", "first.py --hash >", "first.py --seconds 9"]
    places = [result.stdout.index(part) for part in parts]
    assert places == sorted(places)
    assert '-DCMAKE_CUDA_ARCHITECTURES="80-real;90a-real"' in result.stdout


def test_programs_for_older_gpus_are_refused(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    command = [cmake, "-S", str(ROOT / "tests" / "gpu"), "-B", str(tmp_path)]
    command += ["-DCMAKE_CUDA_ARCHITECTURES=80-real;75-real"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    if "or higher is required" in result.stderr:
        pytest.skip("a cmake that is too old")
    assert "GPU_ARCHITECTURES: got '75-real', expected numbers from 80 on" in result.stderr


def test_the_architecture_of_the_gpu_or_what_is_missing() -> None:
    program = str(ROOT / "tests" / "gpu" / "architecture.py")
    result = subprocess.run([sys.executable, program], capture_output=True, text=True)
    if result.returncode == 0:
        assert re.fullmatch(r"\d+\.\da?\n", result.stdout)
    else:
        assert result.stderr.startswith("make gpu: ") and len(result.stderr.splitlines()) == 1


def test_parts_end_in_time(gpu: ModuleType) -> None:
    parts = gpu.plan(["frozen", "compile", "lora_ext"], 2.0)
    assert [part.path for part in parts] == ["auto", *gpu.cuda_paths()]
    assert sum(part.seconds for part in parts) <= 420  # and three minutes for what they begin with
    assert [part for part in parts if "compile" in part.rivals] == parts[:1]


def test_the_state_of_the_right_gpu_is_told() -> None:
    values = "580.65.06, {} MHz, 3201 MHz, 1980 MHz, 3201 MHz, 31, 75.1 W, 700.00 W, 0 %, 4 MiB"
    answer = "\n".join(
        f"GPU-{name}, {values.format(clock)}" for name, clock in (("a", 1), ("b", 2))
    )
    state = parse_gpu_state(answer + "\n", "b")
    assert state is not None and len(state) == 10
    assert (state["driver_version"], state["clocks.sm"]) == ("580.65.06", "2 MHz")
    assert state["memory.used"] == "4 MiB"
    assert parse_gpu_state(answer, "c") is None


@pytest.mark.timeout(600)
def test_a_run(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    options = ["--device", "cpu", "--shapes", "64x96", "--tokens", "4", "--budget", "0.01"]
    assert gpu.main([*options, "--rivals", "frozen,lora_ext", "--out", str(out)]) == 0
    report = Report.load(out)
    rivals = ["frozen", "lora_ext", *(f"lora_ext:{path}" for path in gpu.cuda_paths()[1:])]
    groups: dict[object, list[str]] = {}
    for row in report.rows:
        groups.setdefault((row.case.rank, row.case.dropout_p, row.mode), []).append(row.rival)
    assert groups.keys() == {
        (r, p, m) for r in (16, 64) for p in (0.0, 0.1) for m in (FWD, FWD_BWD)
    }
    assert all(found == rivals for found in groups.values())

    estimates = json.loads(out.read_text(encoding="utf-8"))["environment"]["base_product"]
    assert [line["rival"] for line in estimates] == rivals[1:]
    for line in estimates:  # reading x and the rank's products took some of it
        assert line["product"] < line["forward"]
    printed = capsys.readouterr().out
    assert "lora_ext:composed" in printed and "an estimate for the product" in printed
