"""Mistakes planted in the CUDA kernels: the emulated tests must notice each.

All mistakes of a program are compiled into one copy of it, and the environment says which of them a
process makes.
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

# In every file that has a switch.
SWITCH = """
#include <cstdlib>
inline const char* const planted_text = std::getenv("PLANTED_MISTAKE");
inline const int planted_mistake = planted_text ? std::atoi(planted_text) : 0;
"""

# Small sizes that reach every part: several tiles and steps, several splits, tails.
SCRIPT = """
import itertools, sys
from pathlib import Path
import kernel_checks
import emulated_multi
from emulated import COMPLETIONS, EmulatedKernels
kernels = EmulatedKernels.load(Path(sys.argv[1]))
print("loaded", flush=True)
kernels.gpu(86, 3)
print("self check:", kernels.self_check("sm80", 264, 136, 264) or "right", flush=True)
few = (37, 192, 200, 16), kernel_checks.Options(bias=False, processors=132)
many = (364, 200, 72, 8), kernel_checks.Options(h=False, processors=1)
for (size, has), schedule in itertools.product([few, many],
                                               itertools.product(COMPLETIONS, range(4))):
    kernel_checks.check(kernels, size, "bf16", 0.1, schedule, has=has)
few = (37, 192, 200, 8), few[1]  # float adapters are rounded and what that leaves
kernel_checks.check(kernels, few[0], "bf16-fp32", 0.1, (COMPLETIONS[0], 0), has=few[1])
for schedule in itertools.product(COMPLETIONS[:1], range(4)):
    kernel_checks.check(kernels, (9, 520, 40, 8), "bf16", 0.0, schedule)
kernel_checks.check_up_grad(kernels, (37, 72, 16), "bf16", (COMPLETIONS[0], 0), "sm80")
emulated_multi.check(kernels, *emulated_multi.make_layers(69, 72, [(72, 8), (40, 0), (136, 24)]))
print("no mistake noticed")
"""

SCRIPTS = {"launches": SCRIPT, "rows": row_kernel_mistakes.SCRIPT}
SCRIPTS["grouped"] = grouped_mistakes.SCRIPT

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
    for part in ("common", "cuda", "kernels"):
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
        return EmulatedKernels.compile(folder, "-O1", "-DSM80_BF16_ONLY", csrc=csrc)
    if driver == "grouped":
        return GroupedKernels.compile(folder, "-O1", "-DBF16_ONLY", csrc=csrc)
    if driver == "rows":
        return RowKernels.compile(folder, "-O1", csrc=csrc)
    source, target = ROOT / "tests" / "simt" / f"{driver}.cpp", folder / driver
    compile_source(source, target, "-O1", "-Wno-psabi", "-DBF16_ONLY", csrc=csrc)
    return target


def run(driver: str, mistake: str, program: Future[Path]) -> Result:
    command = [str(program.result()), "-x"]
    if driver in SCRIPTS:
        command = [sys.executable, "-c", SCRIPTS[driver], command[0]]
    environment = os.environ | {"PLANTED_MISTAKE": str(list(MISTAKES[driver]).index(mistake))}
    return subprocess.run(
        command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Future[Result]]:
    """What the tests that are to run need, two at a time."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host with")
    items = [item for item in request.session.items if item.path == request.path]
    wanted = [
        tuple(item.callspec.params[name] for name in ("driver", "mistake"))  # type: ignore[attr-defined]
        for item in items
    ]
    pool = ThreadPoolExecutor(2)
    programs = {
        driver: pool.submit(build, driver, tmp_path_factory.mktemp(driver))
        for driver in dict.fromkeys(driver for driver, _ in wanted)
    }
    started = {
        (driver, mistake): pool.submit(run, driver, mistake, programs[driver])
        for driver, mistake in wanted
    }
    pool.shutdown(wait=False)
    return started


WANTED = [(driver, mistake) for driver in MISTAKES for mistake in MISTAKES[driver]]


@pytest.mark.parametrize(
    ("driver", "mistake"), [case for case in WANTED if case[1] != NONE], ids=lambda value: value
)
def test_planted_mistake_is_noticed(
    results: dict[tuple[str, str], Future[Result]], driver: str, mistake: str
) -> None:
    result = results[driver, mistake].result()
    if driver in SCRIPTS:
        # Noticed by a check or by the emulator, both exceptions; and no crash.
        assert re.fullmatch("loaded(\nself check: .+)?", result.stdout.strip()), result.stderr[
            -3000:
        ]
        assert result.returncode == 1 and "Error" in result.stderr, result.stderr[-3000:]
    else:
        assert result.returncode == 1 and "FAILED" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", [NONE])
@pytest.mark.parametrize("driver", MISTAKES)
def test_nothing_is_noticed_in_the_right_kernels(
    results: dict[tuple[str, str], Future[Result]], driver: str, mistake: str
) -> None:
    result = results[driver, mistake].result()
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    if driver in SCRIPTS:
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
    results: dict[tuple[str, str], Future[Result]], driver: str, mistake: str, wrong: str
) -> None:
    """In the one order of threads that it meets; it is not for mistakes that others show."""
    told = results[driver, mistake].result().stdout
    assert re.search(f"self check: {wrong} of a check with M = 264, .* is .*, expected ", told), (
        told
    )
