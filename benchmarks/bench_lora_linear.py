"""LoRA linear against its rivals, under pytest-benchmark: one group per case and mode.

For numbers to publish use ``python -m lora_ext.bench``, which interleaves the contenders.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from lora_ext.bench.check import Checker
from lora_ext.bench.grid import MODES, Case, Grid
from lora_ext.bench.problem import Problem, make_problem
from lora_ext.bench.rivals import RIVALS, Unavailable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GRID = Grid(shapes=((768, 768), (1024, 4096)), tokens=(1, 512), ranks=(16,))


def case_id(case: Case) -> str:
    """Name a case in letters that ``-k`` understands."""
    size = f"{case.in_features}x{case.out_features}-M{case.tokens}-r{case.rank}"
    return f"{size}-{case.dtype}-p{case.dropout_p:g}"


@lru_cache(maxsize=1)  # cases come one after the other
def problem_of(case: Case) -> tuple[Problem, Checker]:
    """Share the tensors and the references of a case between its contenders and modes."""
    problem = make_problem(case, DEVICE)
    return problem, Checker(problem)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GRID.cases(), ids=case_id)
def test_lora_linear(benchmark: BenchmarkFixture, case: Case, mode: str, rival: str) -> None:
    reason = RIVALS[rival].skip_reason(case)
    if reason:
        pytest.skip(reason)
    problem, checker = problem_of(case)
    try:
        contender = RIVALS[rival].build(problem)
    except Unavailable as error:
        pytest.skip(str(error))
    assert not checker.check(RIVALS[rival], contender).faults

    call = contender.call(mode)
    batches = itertools.cycle(problem.batches)

    def run() -> None:
        call(next(batches))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case} {mode}"
    benchmark.name = rival
    benchmark(run)
