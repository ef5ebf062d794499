"""Comparison of two reports: has lora_ext become slower, beyond the noise?"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from lora_ext.bench.results import BAD, OK, Report, Row

TOLERANCE = 0.05
_OURS = "lora_ext"


@dataclass(frozen=True)
class Change:
    """A row of lora_ext in both reports."""

    old: Row
    new: Row

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
    def is_regression(self) -> bool:
        if self.old.status == OK and self.new.status in BAD:
            return True  # it was timed, and now it is wrong or fails
        return self.factor is not None and self.factor > 1 + TOLERANCE and not self.within_spread

    @property
    def verdict(self) -> str:
        if self.is_regression:
            return "REGRESSION"
        if self.factor is None:
            return self.new.status
        if self.factor < 1 - TOLERANCE and not self.within_spread:
            return "improvement"
        return "same"


def match(old: Report, new: Report) -> list[Change]:
    """Pair the rows of lora_ext that both reports have; ratios carry over, times do not."""
    known = {row.key: row for row in old.rows}
    return [
        Change(known[row.key], row)
        for row in new.rows
        if row.rival.startswith(_OURS) and row.key in known
    ]


def print_changes(changes: list[Change], old: Report, new: Report, console: Console) -> None:
    """Print every change, and a warning where the reports are of two devices."""
    devices = [report.environment["device"] for report in (old, new)]
    if devices[0] != devices[1]:
        console.print(f"Different devices: {devices[0]} and {devices[1]}", style="yellow")
    table = Table("case", "mode", "rival", title="Ratios to the frozen layer")
    for column in ("old", "new", "new/old"):
        table.add_column(column, justify="right")
    table.add_column("")
    for change in changes:
        row = change.new
        cells = _number(change.old.ratio), _number(row.ratio), _number(change.factor)
        style = {"REGRESSION": "red", "improvement": "green"}.get(change.verdict)
        table.add_row(str(row.case), row.mode, row.rival, *cells, change.verdict, style=style)
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
