"""Rows of results: what was measured, and how it is kept in JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from lora_ext.bench.environment import OPTIONAL, REQUIRED
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

    def __post_init__(self) -> None:
        if not 0 < self.q1 <= self.median <= self.q3 < math.inf:
            raise ValueError(f"expected finite quartiles above 0 in their order, got {self}")

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
            environment = as_(dict[str, Any], data["environment"], "environment")
            missing = [name for name in REQUIRED if name not in environment]
            if missing:
                raise ValueError(f"its environment has no {missing[0]}")
            for name, kind in (REQUIRED | OPTIONAL).items():
                as_(kind, environment.get(name), f"environment.{name}")
            return cls(environment, as_(list[Row], data["rows"], "rows"))
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a benchmark report: {error}") from error


def as_(kind: Any, value: Any, where: str) -> Any:
    """What JSON holds as what an annotation says; TypeError or ValueError where it is not that."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:  # ... | None
        return None if value is None else as_(parts[0], value, where)
    if is_dataclass(kind) and isinstance(value, dict):
        kinds = get_type_hints(kind)
        values = {k: as_(kinds.get(k, Any), v, f"{where}.{k}") for k, v in value.items()}
        return cast(Any, kind)(**values)
    if origin is list and isinstance(value, list):
        return [as_(parts[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {k: as_(parts[1], item, f"{where}.{k}") for k, item in value.items()}
    if kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    raise TypeError(f"{where}: got {value!r:.40}, expected {getattr(kind, '__name__', kind)}")


def geomean_ratio(rows: Iterable[Row]) -> float | None:
    """Take the geometric mean of the ratios; None where no row was timed."""
    ratios = [row.ratio for row in rows if row.ratio is not None]
    return statistics.geometric_mean(ratios) if ratios else None


def unique(values: Iterable[Any]) -> list[Any]:
    """Drop repetitions and keep the order."""
    return list(dict.fromkeys(values))
