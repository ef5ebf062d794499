"""Rows of results: what was measured, and how it is kept in JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_ext.bench.environment import REQUIRED
from lora_ext.bench.grid import Case

SCHEMA = 1

OK = "ok"
WRONG = "WRONG"  # failed its check, and was not timed
FAILED = "failed"  # raised an exception
SKIPPED = "skipped"  # not applicable or not installed
BAD = (WRONG, FAILED)


@dataclass(frozen=True)
class Quartiles:
    """The middle of a set of samples."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quartiles:
        return cls(*statistics.quantiles(samples, n=4, method="inclusive"))

    def overlaps(self, other: Quartiles) -> bool:
        return self.q1 <= other.q3 and other.q1 <= self.q3


@dataclass(frozen=True)
class Timing:
    """The times of one contender, with the frozen layer's time of the same round as unit."""

    time_us: Quartiles  # of one call
    ratio: Quartiles  # to the frozen layer, paired by round
    samples_us: list[float]  # one per round, in the order taken; none is dropped
    calls_per_sample: int


@dataclass(frozen=True)
class Row:
    """One contender in one mode of one case."""

    case: Case
    mode: str
    rival: str
    status: str
    note: str | None = None
    timing: Timing | None = None
    saved_bytes: int | None = None  # kept from forward to backward; fwd+bwd only
    peak_bytes: int | None = None  # allocated at the peak of a call; CUDA only
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Case, str, str]:
        return self.case, self.mode, self.rival

    @property
    def ratio(self) -> float | None:
        return self.timing.ratio.median if self.timing else None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        timing = data["timing"]
        if timing:
            quartiles = {name: Quartiles(**timing[name]) for name in ("time_us", "ratio")}
            timing = Timing(**{**timing, **quartiles})
        return cls(**{**data, "case": Case(**data["case"]), "timing": timing})


@dataclass(frozen=True)
class Report:
    """The rows of a run and where they come from."""

    environment: dict[str, Any]
    rows: list[Row]

    def save(self, path: Path) -> None:
        data = {
            "schema": SCHEMA,
            "environment": self.environment,
            "rows": [asdict(row) for row in self.rows],
        }
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Raise OSError or ValueError, naming the file, where it is not a report."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']}, expected {SCHEMA}")
            missing = [name for name in REQUIRED if name not in data["environment"]]
            if missing:
                raise ValueError(f"its environment has no {missing[0]}")
            return cls(data["environment"], [Row.from_json(row) for row in data["rows"]])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a benchmark report: {error}") from error


def geomean_ratio(rows: Iterable[Row]) -> float | None:
    """Take the geometric mean of the ratios; None where no row was timed."""
    ratios = [row.ratio for row in rows if row.ratio is not None]
    return statistics.geometric_mean(ratios) if ratios else None


def unique(values: Iterable[Any]) -> list[Any]:
    """Drop repetitions and keep the order."""
    return list(dict.fromkeys(values))
