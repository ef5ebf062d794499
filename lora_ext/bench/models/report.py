"""The table of whole models."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from lora_ext.bench.environment import summary
from lora_ext.bench.load import busy_warning
from lora_ext.bench.models.cases import ModelCase
from lora_ext.bench.models.run import ModelReport, ModelRow
from lora_ext.bench.models.ways import BLOCKS, PEFT
from lora_ext.bench.report import format_time
from lora_ext.bench.results import BAD, SKIPPED, unique
from lora_ext.bench.rivals import OURS

_MIN_WIDTH = 120
_COLUMNS = ("step", "/ frozen", "tokens/s", "peak", "kept / token")
# (over, under): whose step and peak are told in a sentence
_COMPARED = ((BLOCKS, OURS), (BLOCKS, PEFT), (OURS, PEFT))


def format_bytes(count: float) -> str:
    """Writes three digits with a unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def print_models(report: ModelReport, console: Console) -> None:
    """Prints each case's contenders, what that says of blocks, and what is behind missing cells."""
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)
    table = Table("case", "contender", caption=summary(report.environment))
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for case, rows in report.cases():
        for index, (name, row) in enumerate(rows.items()):
            table.add_row(_head(case, index), name, *_cells(row))
        table.add_section()
    console.print(table)
    for line in comparisons(report):
        console.print(line, markup=False, soft_wrap=True)
    if warning := busy_warning(report.environment):
        console.print(warning, style="yellow", markup=False)
    if left_out := report.environment.get("left_out"):
        console.print(f"Left out at the deadline: {'; '.join(left_out)}", style="yellow")
    for line in unique(f"{row.way}: {row.note}" for row in report.rows if row.status == SKIPPED):
        console.print(line, style="dim", markup=False)
    for row in report.rows:
        if row.status in BAD:
            text = f"{row.status} {row.way}, {row.case}: {row.note}"
            console.print(text, style="red", markup=False)


def _head(case: ModelCase, index: int) -> str:
    """The case in lines beside its contenders."""
    lines = (
        f"{case.model} {case.what}",
        f"M={case.tokens}, {case.targets}, r={case.rank}",
        f"{case.dtype}, p={case.dropout_p:g}",
    )
    return lines[index] if index < len(lines) else ""


def _cells(row: ModelRow) -> Iterator[str]:
    if row.timing is None:
        yield row.status
        return
    yield format_time(row.timing.time_us.median)
    yield f"{row.timing.ratio.median:.2f}x"
    yield f"{row.tokens_per_s:,.0f}"
    yield "-" if row.peak_bytes is None else format_bytes(row.peak_bytes)
    yield "-" if row.kept_bytes is None else format_bytes(row.kept_bytes / row.case.tokens)


def comparisons(report: ModelReport) -> Iterator[str]:
    """Step and peak of one contender over another's, for each case; steps paired by round."""
    for case, rows in report.cases():
        for over, under in _COMPARED:
            if over in rows and under in rows:
                own, other = rows[over], rows[under]
                if (step := own.step_over(other)) is not None:
                    text = f"{over} / {under}, {case}: step {step:.3f}"
                    if own.peak_bytes is not None and other.peak_bytes:
                        text += f", peak {own.peak_bytes / other.peak_bytes:.3f}"
                    if own.kept_bytes is not None and other.kept_bytes:
                        text += f", kept {own.kept_bytes / other.kept_bytes:.3f}"
                    yield text
