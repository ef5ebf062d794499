"""Tables for people: on the terminal, and in Markdown for a README."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_ext.bench.environment import summary
from lora_ext.bench.grid import Case
from lora_ext.bench.load import busy_warning
from lora_ext.bench.results import BAD, OK, SKIPPED, Report, Row, geomean_ratio, unique
from lora_ext.bench.rivals import FROZEN, OURS, OURS_QUANTIZED

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

# Of a table that goes to a file or a pipe, and of each contender's column in it
_MIN_WIDTH, _COLUMN_WIDTH = 150, 17
_NEAR = 0.02  # behind the best rival: hardly to be told from it
_CASE_COLUMNS = ("K→N", "M", "r", "dtype", "p", "mode")


def format_time(microseconds: float) -> str:
    """Writes three digits with a unit."""
    for unit in ("µs", "ms"):
        if microseconds < 999.5:
            return f"{microseconds:.3g} {unit}"
        microseconds /= 1000
    return f"{microseconds:.3g} s"


def print_report(report: Report, console: Console) -> None:
    """Prints ratios and medians for each case and mode, then what is behind missing ones."""
    rivals = unique(row.rival for row in report.rows)
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH, _COLUMN_WIDTH * (3 + len(rivals)))
    table = Table(*_CASE_COLUMNS, caption=summary(report.environment))
    for rival in rivals:
        table.add_column(rival, justify="right", no_wrap=True)
    for case, mode, rows in _groups(report.rows):
        table.add_row(*_case_cells(case, mode), *(_rich_cell(rows.get(name)) for name in rivals))
    table.add_section()
    for mode in unique(row.mode for row in report.rows):
        means = (_geomean_cell(report.rows, mode, name) for name in rivals)
        table.add_row("geomean", "", "", "", "", mode, *means, style="bold")
    console.print(table)
    if text := standing(report.rows):
        console.print(text, style="bold", markup=False)
    if warning := busy_warning(report.environment):
        console.print(warning, style="yellow", markup=False)
    if left_out := report.environment.get("left_out"):
        console.print(f"Left out at the deadline: {'; '.join(left_out)}", style="yellow")
    for line in unique(f"{row.rival}: {row.note}" for row in report.rows if row.status == SKIPPED):
        console.print(line, style="dim", markup=False)
    for row in report.rows:
        if row.status in BAD:
            where = f"{row.rival}, {row.case}, {row.mode}"
            console.print(f"{row.status} {where}: {row.note}", style="red", markup=False)


def standing(rows: Sequence[Row]) -> str | None:
    """In how many cases and modes lora_ext is the fastest, by the medians, and how far it is behind
    the best rival in the others; None where there is no rival."""
    behind = []
    for _, _, by_name in _groups(rows):
        ratios = {name: row.ratio for name, row in by_name.items() if row.ratio is not None}
        best = [r for name, r in ratios.items() if name != FROZEN and not name.startswith(OURS)]
        ours = ratios.get(OURS_QUANTIZED, ratios.get(OURS))
        if best and ours is not None:
            behind.append(ours / min(best) - 1)
    if not behind:
        return None
    fastest, near = (sum(one <= limit for one in behind) for limit in (0.0, _NEAR))
    text = f"By the medians lora_ext is the fastest in {fastest} of {len(behind)}"
    if near > fastest:
        text += f", up to {_NEAR:.0%} behind the best rival in {near - fastest}"
    if far := [one for one in behind if one > _NEAR]:
        text += f", {min(far):.1%} to {max(far):.1%} in {len(far)}"
    return text


def _groups(rows: Sequence[Row]) -> Iterator[tuple[Case, str, dict[str, Row]]]:
    for (case, mode), group in itertools.groupby(rows, key=lambda row: (row.case, row.mode)):
        yield case, mode, {row.rival: row for row in group}


def _case_cells(case: Case, mode: str) -> tuple[str, ...]:
    return (
        case.shape,
        str(case.tokens),
        str(case.rank),
        case.dtype,
        f"{case.dropout_p:g}",
        mode,
    )


def _rich_cell(row: Row | None) -> str:
    if row is None or row.timing is None:
        return "-" if row is None or row.status not in BAD else f"[red]{row.status}[/]"
    return f"{row.timing.ratio.median:.2f}x\n[dim]{format_time(row.timing.time_us.median)}[/]"


def _geomean_cell(rows: Sequence[Row], mode: str, rival: str) -> str:
    """Names the number of rows where some are missing: such a mean is over other cases."""
    own = [row for row in rows if row.mode == mode and row.rival == rival]
    mean = geomean_ratio(own)
    timed = sum(row.status == OK for row in own)
    if mean is None:
        return "-"
    return f"{mean:.2f}x" if timed == len(own) else f"{mean:.2f}x ({timed}/{len(own)})"


def markdown_table(report: Report) -> str:
    """Writes the frozen layer's time, and everybody's ratio to it."""
    rivals = [name for name in unique(row.rival for row in report.rows) if name != FROZEN]
    header = [*_CASE_COLUMNS, FROZEN, *rivals]
    lines = [header, ["---"] * len(_CASE_COLUMNS) + ["---:"] * (1 + len(rivals))]
    for case, mode, rows in _groups(report.rows):
        timing = rows[FROZEN].timing
        frozen = format_time(timing.time_us.median) if timing else "-"
        ratios = (_markdown_cell(rows.get(name)) for name in rivals)
        lines.append([*_case_cells(case, mode), frozen, *ratios])
    for mode in unique(row.mode for row in report.rows):
        means = (_geomean_cell(report.rows, mode, name) for name in rivals)
        lines.append(["**geomean**", "", "", "", "", mode, "", *means])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    if warning := busy_warning(report.environment):
        table = f"**{warning}.**\n\n{table}"
    return f"{table}\n\nTimes over the frozen layer; median of paired rounds. {_source(report)}\n"


def _markdown_cell(row: Row | None) -> str:
    if row is None or row.ratio is None:
        return row.status if row and row.status in BAD else "-"
    return f"{row.ratio:.2f}x"


def _source(report: Report) -> str:
    return f"{summary(report.environment)}. `{report.environment['command']}`"


class MarkdownFile:
    """A file with a table between markers; a file that does not exist is written as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before, self._after = "", "\n"
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OSError(f"{path} cannot be written")
        if path.exists():
            self._before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
            _, end, self._after = rest.partition(END)
            if not (begin and end):
                raise ValueError(f"{path}: the markers {BEGIN} and {END} are missing")

    def write(self, report: Report) -> None:
        text = f"{self._before}{BEGIN}\n{markdown_table(report)}{END}{self._after}"
        self._path.write_text(text, encoding="utf-8")
