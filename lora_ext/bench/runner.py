"""The main loop: build, check, then time the contenders of a case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch

from lora_ext.bench.check import Checker
from lora_ext.bench.grid import FWD_BWD, Case
from lora_ext.bench.measure import Budget, peak_bytes, saved_bytes, time_row
from lora_ext.bench.problem import Problem, make_problem
from lora_ext.bench.results import FAILED, OK, SKIPPED, WRONG, Row, Timing
from lora_ext.bench.rivals import FROZEN, RIVALS, Contender, Rival, Unavailable


@dataclass(frozen=True)
class _Entrant:
    """A rival after its check; only one that is ok has a contender to time."""

    name: str
    status: str
    note: str | None = None
    contender: Contender | None = None
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def run_case(
    case: Case,
    rivals: Sequence[Rival],
    modes: Sequence[str],
    budget: Budget,
    device: torch.device,
    quant_type: str | None = None,
) -> Iterator[list[Row]]:
    """Yield the rows of each mode. The frozen layer, the unit of the ratios, always takes part."""
    problem = make_problem(case, device, quant_type)
    checker = Checker(problem)
    others = [rival for rival in rivals if rival.name != FROZEN]
    entrants = [_admit(rival, problem, checker) for rival in (RIVALS[FROZEN], *others)]
    for mode in modes:
        calls = {e.name: e.contender.call(mode) for e in entrants if e.contender}
        timings = time_row(calls, problem.batches, budget)
        yield [_row(entrant, problem, mode, timings.get(entrant.name)) for entrant in entrants]


def _admit(rival: Rival, problem: Problem, checker: Checker) -> _Entrant:
    reason = rival.skip_reason(problem.case)
    if reason:
        return _Entrant(rival.name, SKIPPED, reason)
    try:
        contender = rival.build(problem)
        verdict = checker.check(rival, contender)
    except Unavailable as error:
        return _Entrant(rival.name, SKIPPED, str(error))
    except Exception as error:  # whatever breaks one contender must not end the run of the others
        return _Entrant(rival.name, FAILED, f"{type(error).__name__}: {error}")
    errors = {name: asdict(error) for name, error in verdict.errors.items()}
    if verdict.faults:
        return _Entrant(rival.name, WRONG, "; ".join(verdict.faults), errors=errors)
    return _Entrant(rival.name, OK, contender=contender, errors=errors)


def _row(entrant: _Entrant, problem: Problem, mode: str, timing: Timing | None) -> Row:
    saved = peak = None
    if entrant.contender:
        batch = problem.batches[0]
        saved = saved_bytes(entrant.contender, batch) if mode == FWD_BWD else None
        peak = peak_bytes(entrant.contender.call(mode), batch)
    return Row(
        problem.case,
        mode,
        entrant.name,
        entrant.status,
        entrant.note,
        timing,
        saved,
        peak,
        entrant.errors,
    )
