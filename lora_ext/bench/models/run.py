"""The main loop: build, check, measure the contenders of each case."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_ext.bench.measure import Budget, kept_bytes, time_row
from lora_ext.bench.models.bases import Base, Inputs, make_base
from lora_ext.bench.models.cases import ModelCase
from lora_ext.bench.models.check import ModelChecker
from lora_ext.bench.models.memory import peak_of_step
from lora_ext.bench.models.ways import WAYS, Trained, Way
from lora_ext.bench.results import FAILED, OK, SKIPPED, WRONG, Timing, as_
from lora_ext.bench.rivals import FROZEN, Unavailable

_KIND, SCHEMA = "models", 1


@dataclass(frozen=True)
class ModelRow:
    """One contender of one case."""

    case: ModelCase
    way: str
    status: str
    note: str | None = None
    timing: Timing | None = None
    tokens_per_s: float | None = None
    kept_bytes: int | None = None  # for backward, without parameters
    peak_bytes: int | None = None  # of a step, over what was there before
    errors: dict[str, float] = field(default_factory=dict)  # over what is allowed

    def step_over(self, other: ModelRow) -> float | None:
        """The median over rounds of this step's time over the other's; None where one has none."""
        if self.timing is None or other.timing is None:
            return None
        pairs = zip(self.timing.samples_us, other.timing.samples_us, strict=True)
        return statistics.median(own / its for own, its in pairs)


@dataclass(frozen=True)
class ModelReport:
    """The rows of a run and where they come from."""

    environment: dict[str, Any]
    rows: list[ModelRow]

    def save(self, path: Path) -> None:
        data = {"schema": SCHEMA, "kind": _KIND, "environment": self.environment}
        data["rows"] = [asdict(row) for row in self.rows]
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ModelReport:
        """Raise OSError or ValueError, naming the file, where it is not such a report."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if (data["kind"], data["schema"]) != (_KIND, SCHEMA):
                raise ValueError(f"schema {data['schema']} of {data['kind']}, expected {SCHEMA}")
            return cls(data["environment"], as_(list[ModelRow], data["rows"], "rows"))
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a report of whole models: {error}") from error

    def cases(self) -> list[tuple[ModelCase, dict[str, ModelRow]]]:
        """The rows of each case, by contender."""
        found: dict[ModelCase, dict[str, ModelRow]] = {}
        for row in self.rows:
            found.setdefault(row.case, {})[row.way] = row
        return list(found.items())


def run_case(
    case: ModelCase,
    names: Sequence[str],
    budget: Budget,
    device: torch.device,
    tell: Callable[[str], None] = lambda text: None,
) -> list[ModelRow]:
    """The rows of a case. The frozen model, the unit of the ratios, always takes part."""
    ways = [WAYS[name] for name in (FROZEN, *(name for name in names if name != FROZEN))]
    base = make_base(case, device)
    checker = ModelChecker(base)
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, Trained] = {}
    for way in ways:
        tell(f"{case}: checks {way.name}")
        rows[way.name], trained = _admit(way, base, checker)
        if trained is not None:
            running[way.name] = trained
    tell(f"{case}: times steps")
    for name, facts in _measure(running, base.inputs(), budget).items():
        rows[name] |= facts
    names = list(running)
    del checker, running, trained, base  # the processes that follow have models of their own
    for name in names:
        tell(f"{case}: memory of {name}")
        rows[name]["peak_bytes"] = peak_of_step(case, name, device, torch.get_num_threads())
    return [ModelRow(case, name, **facts) for name, facts in rows.items()]


def _measure(
    running: dict[str, Trained], inputs: list[Inputs], budget: Budget
) -> dict[str, dict[str, Any]]:
    """What backward keeps, and the times."""
    first = inputs[0]
    kept = {
        name: kept_bytes(partial(trained.loss, first), trained.model.parameters())
        for name, trained in running.items()
    }
    timings = time_row({name: one.step for name, one in running.items()}, inputs, budget)
    tokens = first.labels.numel()
    return {
        name: {
            "kept_bytes": kept[name],
            "timing": timing,
            "tokens_per_s": round(tokens / (timing.time_us.median * 1e-6), 1),
        }
        for name, timing in timings.items()
    }


def _admit(way: Way, base: Base, checker: ModelChecker) -> tuple[dict[str, Any], Trained | None]:
    """Its row, and the contender where it is right."""
    if reason := way.skip_reason(base.case):
        return {"status": SKIPPED, "note": reason}, None
    try:
        trained = way.build(base)
        faults, errors = checker.check(way, trained)
    except Unavailable as error:
        return {"status": SKIPPED, "note": str(error)}, None
    except Exception as error:  # whatever breaks one must not end the run of the others
        return {"status": FAILED, "note": f"{type(error).__name__}: {error}"}, None
    if faults:
        return {"status": WRONG, "note": "; ".join(faults[:3]), "errors": errors}, None
    return {"status": OK, "errors": errors}, trained
