"""The programs that run the CUDA kernels without torch: benchmarks/kernels on the emulator, and the
built ones where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from emulated import ROOT, compile_source

EMULATED = ROOT / "tests" / "gpu" / "emulated"
PREBUILT = ROOT / "build" / "gpu-prebuilt"
# Rows of x that no tile divides, of which a sample is checked, and a pass more for ranks beyond 64.
SIZES = ["--tokens", "136", "--shapes", "72x104", "--ranks", "72"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    includes = [f"-I{EMULATED}", f"-I{ROOT / 'tests' / 'gpu'}", "-Wno-psabi"]
    compile_source(EMULATED / "bench_kernels.cpp", folder / "bench_kernels", "-O0", *includes)
    for name, options in {
        "right": [],
        "wrong": ["-DADDED_TO_THE_FIRST=10"],
        "unwritten": ["-DLEFT_OUT=1"],
        "refuses": ["-DREFUSES"],
    }.items():
        cublas = EMULATED / "plain_cublas.cpp"
        compile_source(cublas, folder / f"{name}.so", "-O1", "-fPIC", "-shared", *options)
    return folder


def run(
    built: Path, *arguments: str, cublas: str = "right.so"
) -> tuple[int, list[dict[str, Any]], str]:
    command = [str(built / "bench_kernels"), "--cublas", str(built / cublas), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return result.returncode, rows, result.stderr


PASSES = [
    "copy x",
    *("cublas y", "cublas dx", "product y alone", "product dx alone", "product y", "product dx"),
    *("down", "up_grad", "down_grad", "fused forward", "fused backward"),
    *("hybrid forward", "hybrid backward"),
    *("weight_norm", "column_scale", "column_scale backward", "lora_embedding"),
]


@pytest.mark.parametrize(("adapters", "dropout"), [("bf16", 0.0), ("fp32", 0.5)])
def test_every_pass_of_both_families_is_checked(built: Path, adapters: str, dropout: float) -> None:
    arguments = ["--dropouts", str(dropout), "--adapters", adapters, "--rounds", "0"]
    status, rows, said = run(built, *SIZES, *arguments)
    assert status == 0, said
    assert [row["pass"] for row in rows] == 2 * PASSES
    assert [row["family"] for row in rows] == len(PASSES) * ["sm90"] + len(PASSES) * ["sm80"]
    for row in rows:
        assert row["ok"] and row["adapters"] == adapters and row["p"] == dropout
        for name, error in row["errors"].items():
            exact = name == "dbias"  # few numbers of 16 bits add up without an error
            assert (0 < error or exact) and error <= row["bounds"][name], (row["pass"], name)
        assert row["errors"].keys() == row["bounds"].keys()
        assert row["errors"] or row["pass"] == "copy x"


def test_times_are_beside_those_of_cublas(built: Path) -> None:
    arguments = ["--families", "sm90", "--passes", "cublas,fused,down", "--rounds", "3"]
    status, rows, said = run(built, *SIZES, *arguments, "--seconds", "0", "--commit", "abc")
    assert status == 0, said
    names = [row["pass"] for row in rows]
    assert names == [
        *("cublas y", "cublas dx", "down", "down_grad", "fused forward", "fused backward"),
        "fused forward+backward",
    ]
    found = dict(zip(names, rows, strict=True))
    for row in rows:
        assert row["rounds"] == 3 and row["us_q1"] <= row["us"] <= row["us_q3"]
        assert row["commit"] == "abc" and row["device"] == "emulated"
        assert ("over_cublas" in row) == (not row["pass"].startswith("cublas"))
    flops = 2 * 136 * 72 * 104
    assert found["cublas y"]["tflops"] == pytest.approx(
        flops / found["cublas y"]["us"] * 1e-6, rel=1e-3
    )
    both = found["fused forward+backward"]
    parts = [found["fused forward"]["us_q1"] + found["fused backward"]["us_q1"]]
    parts += [found["fused forward"]["us_q3"] + found["fused backward"]["us_q3"]]
    assert parts[0] * 0.5 < both["us"] < parts[1] * 2


WRONG = {
    "wrong.so": "the worst of the others in row 0 column 0: got",
    "unwritten.so": " not finite or not written",
}


@pytest.mark.parametrize(("cublas", "message"), WRONG.items(), ids=WRONG.keys())
def test_a_wrong_pass_is_told_and_the_next_goes_on(built: Path, cublas: str, message: str) -> None:
    arguments = ["--families", "sm90", "--without", "fused,hybrid,down,up_grad", "--rounds", "0"]
    status, rows, _ = run(built, *SIZES, *arguments, cublas=cublas)
    assert status == 1
    assert [row["pass"] for row in rows] == [*PASSES[:7], "down_grad", *PASSES[-4:]]
    assert [row["ok"] for row in rows] == [True, False, False, *[True] * 9]
    assert message in rows[1]["wrong"] and "wrong" not in rows[3]


def test_without_cublas_there_are_no_ratios(built: Path) -> None:
    arguments = ["--families", "sm90", "--passes", "cublas y,product y alone", "--rounds", "1"]
    status, rows, said = run(built, *SIZES, *arguments, cublas="missing.so")
    assert status == 0 and [row["pass"] for row in rows] == ["product y alone"]
    assert "us" in rows[0] and "over_cublas" not in rows[0]
    assert "without cuBLAS: " in said and "missing.so" in said


def test_a_pass_that_fails_is_told_and_the_next_goes_on(built: Path) -> None:
    arguments = ["--families", "sm90", "--passes", "cublas,product y alone", "--rounds", "1"]
    status, rows, _ = run(built, *SIZES, *arguments, cublas="refuses.so")
    assert status == 1
    told = {row["pass"]: row.get("wrong") for row in rows}
    assert told["cublas y"] == told["cublas dx"] == "cublasGemmEx: cuBLAS's status 15"
    assert rows[-1]["pass"] == "product y alone" and rows[-1]["ok"] and rows[-1]["us"] > 0


REFUSED = {
    "option": (["--sizes", "8"], "there is no option --sizes"),
    "no value": (["--ranks"], "--ranks has no value"),
    "shape": (["--shapes", "64"], "'64' is no shape such as 4096x1024"),
    "number": (["--tokens", "many"], "'many' is no number"),
    "multiple": (["--shapes", "64x100"], "multiples of 8"),
    "family": (["--families", "sm70"], "there is no family 'sm70'"),
    "rank": (["--ranks", "1025"], "ranks 1 to 1024"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_command_line_is_refused(built: Path, arguments: list[str], message: str) -> None:
    status, rows, said = run(built, *arguments)
    assert status == 2 and rows == [] and message in said and len(said.splitlines()) == 1


@cache
def why_not_here() -> str:
    if not (PREBUILT / "bench_kernels").exists():
        return "no build/gpu-prebuilt; make gpu-prebuilt builds it where there is nvcc"
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return "there is a GPU here"
    return ""


@pytest.mark.parametrize("command", ["bench_kernels", "kernels_on_gpu sm90"])
def test_without_a_gpu_one_sentence_says_so(command: str) -> None:
    if reason := why_not_here():
        pytest.skip(reason)
    name, *arguments = command.split()
    result = subprocess.run([PREBUILT / name, *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"{name}: there is no NVIDIA GPU here")
    assert len(result.stderr.splitlines()) == 1


def test_the_built_programs_are_small() -> None:
    if reason := why_not_here():
        pytest.skip(reason)
    assert sum(os.path.getsize(path) for path in PREBUILT.iterdir()) < 16 * 2**20
