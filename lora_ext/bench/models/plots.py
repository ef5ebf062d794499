"""The plot of whole models: step, peak and what is kept, of each contender."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_ext.bench.environment import summary
from lora_ext.bench.load import is_busy
from lora_ext.bench.models.run import ModelReport, ModelRow
from lora_ext.bench.models.ways import WAYS

_COLORS = {name: f"C{index}" for index, name in enumerate(WAYS)}
_PANEL_INCHES = 3.2, 2.6


def _step(row: ModelRow) -> float | None:
    return row.timing.ratio.median if row.timing else None


def _peak(row: ModelRow) -> float | None:
    return None if row.peak_bytes is None else row.peak_bytes / 2**20


def _kept(row: ModelRow) -> float | None:
    return None if row.kept_bytes is None else row.kept_bytes / row.case.tokens / 2**10


_QUANTITIES = (("step / frozen", _step), ("peak, MiB", _peak), ("kept / token, KiB", _kept))


def write_plot(report: ModelReport, path: Path) -> None:
    """A column of panels for each case, a row for each quantity."""
    cases = report.cases()
    width, height = _PANEL_INCHES
    size = width * max(len(cases), 1), height * len(_QUANTITIES)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(_QUANTITIES), max(len(cases), 1), squeeze=False, sharey="row")
    for (label, quantity), line in zip(_QUANTITIES, panels, strict=True):
        for (case, rows), axes in zip(cases, line, strict=True):
            title = (
                f"{case.what}, {case.targets}, M={case.tokens}\n{case.dtype}, p={case.dropout_p:g}"
            )
            axes.set_title(title, fontsize=8)
            _draw(axes, list(rows.values()), quantity)
        line[0].set_ylabel(label, fontsize=8)
    color = "red" if is_busy(report.environment) else "gray"
    figure.supxlabel(summary(report.environment), fontsize=6, color=color)
    figure.savefig(path, dpi=100)


def _draw(axes: Axes, rows: list[ModelRow], quantity: Callable[[ModelRow], float | None]) -> None:
    known = [(row.way, value) for row in rows if (value := quantity(row)) is not None]
    for place, (way, value) in enumerate(known):
        axes.bar(place, value, color=_COLORS[way])
    axes.set_xticks(range(len(known)), [way for way, _ in known], fontsize=7, rotation=60)
    axes.tick_params(axis="y", labelsize=7)
