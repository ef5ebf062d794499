"""Mistakes planted in the CUDA kernels: the emulated tests must notice each.

All mistakes of a program, or of a library that Python checks (noticed_mistakes.py), are compiled
into one copy of it, and each process says which of them it makes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grouped_mistakes
import low_rank_mistakes
import pytest
import row_kernel_mistakes
from emulated import ROOT, EmulatedKernels, compile_source
from emulated_grouped import GroupedKernels
from emulated_rows import RowKernels
from planted_mistakes import LAUNCHES, PRODUCTS

NONE = "none"
MISTAKES = {driver: {NONE: ("", "", "")} | mistakes for driver, mistakes in PRODUCTS.items()}
MISTAKES["test_low_rank_sm90"] = {NONE: ("", "", "")} | low_rank_mistakes.MISTAKES
MISTAKES["launches"] = {NONE: ("", "", "")} | LAUNCHES
MISTAKES["grouped"] = {NONE: ("", "", "")} | grouped_mistakes.MISTAKES
MISTAKES["rows"] = {NONE: ("", "", "")} | row_kernel_mistakes.MISTAKES
LIBRARIES = ("launches", "grouped", "rows")

# In every file that has a switch.
SWITCH = """
#include <cstdlib>
inline const char* const planted_text = std::getenv("PLANTED_MISTAKE");
inline int planted_mistake = planted_text ? std::atoi(planted_text) : 0;  // or told later
"""

Result = subprocess.CompletedProcess[str]


def switched(right: str, wrong: Mapping[int, str]) -> str:
    """What stands there and all that may take its place, by the numbers of the mistakes."""
    if right.endswith(";"):
        cases = "".join(
            f"if (planted_mistake == {i}) {{ {text} }} else " for i, text in wrong.items()
        )
        return f"{{ {cases}{{ {right} }} }}"
    cases = "".join(f"planted_mistake == {i} ? ({text}) : " for i, text in wrong.items())
    return f"({cases}({right}))"


def plant(driver: str, folder: Path) -> Path:
    """A copy of csrc with a switch for each mistake of a program."""
    csrc = folder / "csrc"
    for part in ("common", "cuda", "kernels", "quant"):
        shutil.copytree(ROOT / "csrc" / part, csrc / part)
    (csrc / "kernels" / "planted.h").write_text(f"#pragma once\n{SWITCH}")
    places: dict[str, dict[tuple[int, int], dict[int, str]]] = {}  # by file and span of its text
    for number, (name, marked, wrong) in enumerate(MISTAKES[driver].values()):
        if number == 0:
            continue
        text = (csrc / "kernels" / name).read_text()
        before, right, after = marked.split("`") if "`" in marked else ("", marked, "")
        found = list(re.finditer(re.escape(before + right + after), text))
        assert found, f"{name} no longer holds what this test replaces: {marked}"
        for match in found:
            begin = match.start() + len(before)
            span = places.setdefault(name, {}).setdefault((begin, begin + len(right)), {})
            span[number] = wrong
    for name, spans in places.items():
        file = csrc / "kernels" / name
        text = file.read_text()
        nearest = len(text)
        for (begin, end), wrong_texts in sorted(spans.items(), reverse=True):
            assert end <= nearest, f"mistakes overlap in {name}: {text[begin:end]}"
            text = text[:begin] + switched(text[begin:end], wrong_texts) + text[end:]
            nearest = begin
        if name.endswith(".cu"):
            file.write_text(f'#include "planted.h"\n{text}')
        else:
            file.write_text(text.replace("#pragma once", '#pragma once\n#include "planted.h"', 1))
    return csrc


def build(driver: str, folder: Path) -> Path:
    csrc = plant(driver, folder)
    if driver == "launches":
        return EmulatedKernels.compile(folder, "-DSM80_BF16_ONLY", csrc=csrc)
    if driver == "grouped":
        return GroupedKernels.compile(folder, "-DBF16_ONLY", csrc=csrc)
    if driver == "rows":
        return RowKernels.compile(folder, csrc=csrc)
    source, target = ROOT / "tests" / "simt" / f"{driver}.cpp", folder / driver
    compile_source(source, target, "-O1", "-Wno-psabi", "-DBF16_ONLY", csrc=csrc)
    return target


def run_program(driver: str, mistake: str, program: Future[Path]) -> Result:
    environment = os.environ | {"PLANTED_MISTAKE": str(list(MISTAKES[driver]).index(mistake))}
    cases = [low_rank_mistakes.CASES[mistake]] if mistake in low_rank_mistakes.CASES else []
    return subprocess.run(
        [str(program.result()), "-x", *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_library(driver: str, wanted: list[str], library: Future[Path]) -> dict[str, Result]:
    folder = library.result().parent
    numbers = {mistake: list(MISTAKES[driver]).index(mistake) for mistake in wanted}
    command = [sys.executable, "noticed_mistakes.py", driver, str(library.result()), str(folder)]
    done = subprocess.run(
        [*command, *map(str, numbers.values())],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def of(number: int) -> Result:
        out, err, code = (
            (folder / f"{number}.{name}").read_text() for name in ("out", "err", "code")
        )
        return Result([], int(code), out, err)

    return {mistake: of(number) for mistake, number in numbers.items()}


class Results:
    """What the tests that are to run need, two at a time."""

    def __init__(self, wanted: list[tuple[str, str]], folder: pytest.TempPathFactory) -> None:
        by_driver: dict[str, list[str]] = {}
        for driver, mistake in wanted:
            by_driver.setdefault(driver, []).append(mistake)
        pool = ThreadPoolExecutor(2)
        built = {one: pool.submit(build, one, folder.mktemp(one)) for one in by_driver}
        self.libraries: dict[str, Future[dict[str, Result]]] = {}
        self.programs: dict[tuple[str, str], Future[Result]] = {}
        for driver, mistakes in by_driver.items():
            if driver in LIBRARIES:
                checked = pool.submit(check_library, driver, mistakes, built[driver])
                self.libraries[driver] = checked
        for driver, mistake in wanted:
            if driver not in LIBRARIES:
                run = pool.submit(run_program, driver, mistake, built[driver])
                self.programs[driver, mistake] = run
        pool.shutdown(wait=False)

    def __getitem__(self, case: tuple[str, str]) -> Result:
        if case in self.programs:
            return self.programs[case].result()
        return self.libraries[case[0]].result()[case[1]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host with")
    items = [item for item in request.session.items if item.path == request.path]
    wanted = [
        tuple(item.callspec.params[name] for name in ("driver", "mistake"))  # type: ignore[attr-defined]
        for item in items
    ]
    return Results(list(dict.fromkeys(wanted)), tmp_path_factory)


WANTED = [(driver, mistake) for driver in MISTAKES for mistake in MISTAKES[driver]]


@pytest.mark.parametrize(
    ("driver", "mistake"), [case for case in WANTED if case[1] != NONE], ids=lambda value: value
)
def test_planted_mistake_is_noticed(results: Results, driver: str, mistake: str) -> None:
    result = results[driver, mistake]
    if driver in LIBRARIES:
        # Noticed by a check or by the emulator, both exceptions; and no crash.
        assert re.fullmatch("(self check: .+)?", result.stdout.strip()), result.stderr[-3000:]
        assert result.returncode == 1 and "Error" in result.stderr, result.stderr[-3000:]
    else:
        assert result.returncode == 1 and "FAILED" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", [NONE])
@pytest.mark.parametrize("driver", MISTAKES)
def test_nothing_is_noticed_in_the_right_kernels(
    results: Results, driver: str, mistake: str
) -> None:
    result = results[driver, mistake]
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    if driver in LIBRARIES:
        assert "no mistake noticed" in result.stdout
    if driver == "launches":
        assert "self check: right" in result.stdout


@pytest.mark.parametrize(
    ("mistake", "wrong"),
    [
        ("down_grad: a mask of the wrong columns", r"dx\[0, \d+\]"),
        ("up_grad: no barrier before the sums are stored", r"dB\[\d+, 0\]"),
        ("few rows: warps that have the same steps", r"y of few rows\[0, \d+\]"),
    ],
)
@pytest.mark.parametrize("driver", ["launches"])
def test_the_check_at_the_first_use_tells_what_is_wrong(
    results: Results, driver: str, mistake: str, wrong: str
) -> None:
    """In the one order of threads that it meets; it is not for mistakes that others show."""
    told = results[driver, mistake].stdout
    assert re.search(f"self check: {wrong} of a check with M = 264, .* is .*, expected ", told), (
        told
    )
