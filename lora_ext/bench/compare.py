"""Comparison of two reports: has lora_ext become slower, beyond the noise?

A change is told only where it is larger than the tolerance and the quartiles of the two do not
overlap; that there is none only where they leave no room for a larger one. Where one of them comes
from a busy machine neither is: what waits for other work can be any number of times as slow."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from lora_ext.bench.environment import summary
from lora_ext.bench.load import is_busy
from lora_ext.bench.results import BAD, OK, Report, Row
from lora_ext.bench.rivals import OURS

TOLERANCE = 0.05
UNCLEAR = "not distinguishable"
_STYLES = {"REGRESSION": "red", "improvement": "green", UNCLEAR: "yellow"}


@dataclass(frozen=True)
class Change:
    """A row of lora_ext in both reports."""

    old: Row
    new: Row
    busy: bool = False  # one of the machines was

    @property
    def factor(self) -> float | None:
        """How much the ratio to the frozen layer grew; None if a report has no timing."""
        if self.old.ratio is None or self.new.ratio is None:
            return None
        return self.new.ratio / self.old.ratio

    @property
    def within_spread(self) -> bool:
        if self.old.timing is None or self.new.timing is None:
            return False
        return self.old.timing.ratio.overlaps(self.new.timing.ratio)

    @property
    def is_certain(self) -> bool:
        """Whether the quartiles leave room only for changes of twice the tolerance."""
        if self.old.timing is None or self.new.timing is None:
            return False
        old, new = self.old.timing.ratio, self.new.timing.ratio
        low, high = new.q1 / old.q3, new.q3 / old.q1
        return 1 - 2 * TOLERANCE <= low and high <= 1 + 2 * TOLERANCE

    @property
    def is_regression(self) -> bool:
        if self.old.status == OK and self.new.status in BAD:
            return True  # it was timed, and now it is wrong or fails
        slower = self.factor is not None and self.factor > 1 + TOLERANCE
        return slower and not self.within_spread and not self.busy

    @property
    def verdict(self) -> str:
        if self.is_regression:
            return "REGRESSION"
        if self.factor is None:
            return self.new.status
        if self.busy:
            return UNCLEAR
        if self.factor < 1 - TOLERANCE and not self.within_spread:
            return "improvement"
        return "same" if self.is_certain else UNCLEAR


def check_kinds(old: Report, name: str, quantized: str | None) -> None:
    """Raise ValueError where the old report, of this name, is over another base than the new."""
    before = old.environment.get("quantized")
    if before != quantized:
        raise ValueError(
            f"--compare: {name} is {_over(before)}, expected one {_over(quantized)}, as the new "
            "results: their ratios are to frozen layers of other weights"
        )


def _over(quantized: str | None) -> str:
    return f"of --quantized {quantized}" if quantized else "over plain weights"


def match(old: Report, new: Report) -> list[Change]:
    """Pairs the rows of lora_ext that both reports have; ratios carry over, times do not."""
    known = {row.key: row for row in old.rows}
    busy = is_busy(old.environment) or is_busy(new.environment)
    return [
        Change(known[row.key], row, busy)
        for row in new.rows
        if row.rival.startswith(OURS) and row.key in known
    ]


def print_changes(changes: list[Change], old: Report, new: Report, console: Console) -> None:
    """Prints where both come from, with a warning where that is no ground for a comparison, and
    every change."""
    for name, report in (("old", old), ("new", new)):
        style = "yellow" if is_busy(report.environment) else "dim"
        console.print(f"{name}: {summary(report.environment)}", style=style, markup=False)
    for fact, plural in (("device", "devices"), ("threads", "threads")):
        values = [report.environment[fact] for report in (old, new)]
        if values[0] != values[1]:
            text = f"Different {plural}: {values[0]} and {values[1]}"
            console.print(text, style="yellow", markup=False)
    table = Table("case", "mode", "rival", title="Ratios to the frozen layer")
    for column in ("old", "new", "new/old"):
        table.add_column(column, justify="right")
    table.add_column("")
    for change in changes:
        row = change.new
        cells = _number(change.old.ratio), _number(row.ratio), _number(change.factor)
        verdict = change.verdict
        names = str(row.case), row.mode, row.rival
        table.add_row(*names, *cells, verdict, style=_STYLES.get(verdict))
    console.print(table)
    unclear = sum(change.verdict == UNCLEAR for change in changes)
    if unclear:
        text = f"{unclear} of {len(changes)} are not distinguishable: measure longer (--budget)"
        console.print(f"{text} on a quiet machine", style="yellow")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
