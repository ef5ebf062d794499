"""PNG plots of a report: how the overhead grows with rank and shape, and what is kept in memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lora_ext.bench.environment import summary
from lora_ext.bench.grid import FWD_BWD
from lora_ext.bench.load import is_busy
from lora_ext.bench.results import Report, Row, geomean_ratio, unique
from lora_ext.bench.rivals import FROZEN, RIVALS

# One colour per rival, the same in every plot.
_COLORS = {name: f"C{index}" for index, name in enumerate(RIVALS)}
_PANEL_INCHES = 4.5, 3.2


class _Plot:
    """Grouped bars of one quantity: a panel per mode, dtype and dropout, a group per x value."""

    def __init__(
        self,
        x_label: str,
        x_of: Callable[[Row], object],
        y_label: str,
        y_of: Callable[[list[Row]], float],
        base: float = 0.0,
    ) -> None:
        self._x_label, self._x_of = x_label, x_of
        self._y_label, self._y_of = y_label, y_of
        self._base = base  # where the bars start

    def figure(self, rows: list[Row]) -> Figure:
        modes = unique(row.mode for row in rows)
        rivals = unique(row.rival for row in rows)
        kinds = unique((row.case.dtype, row.case.dropout_p) for row in rows)
        width, height = _PANEL_INCHES
        # A Figure of its own, not pyplot's: no global state and no display.
        figure = Figure(figsize=(width * len(kinds), height * len(modes)), layout="constrained")
        panels = figure.subplots(len(modes), len(kinds), squeeze=False, sharey="row")
        for mode, line in zip(modes, panels, strict=True):
            for (dtype, p), axes in zip(kinds, line, strict=True):
                axes.set_title(f"{mode}, {dtype}, p={p:g}", fontsize=9)
                wanted = (mode, dtype, p)
                self._draw(axes, [row for row in rows if _panel_of(row) == wanted])
        handles = [Patch(color=_color(rival), label=rival) for rival in rivals]
        figure.legend(handles=handles, loc="outside upper center", ncols=8, fontsize=8)
        return figure

    def _draw(self, axes: Axes, rows: list[Row]) -> None:
        groups = unique(map(self._x_of, rows))
        rivals = unique(row.rival for row in rows)
        width = 0.8 / max(len(rivals), 1)
        for index, rival in enumerate(rivals):
            for position, group in enumerate(groups):
                own = [row for row in rows if row.rival == rival and self._x_of(row) == group]
                if own:
                    x = position + (index - (len(rivals) - 1) / 2) * width
                    height = self._y_of(own) - self._base
                    axes.bar(x, height, width, bottom=self._base, color=_color(rival))
        axes.axhline(self._base, color="black", linewidth=0.8)
        axes.set_xticks(range(len(groups)), [str(group) for group in groups], fontsize=8)
        axes.set_xlabel(self._x_label, fontsize=8)
        axes.set_ylabel(self._y_label, fontsize=8)


def _panel_of(row: Row) -> tuple[str, str, float]:
    return row.mode, row.case.dtype, row.case.dropout_p


def _color(rival: str) -> str:
    return _COLORS.get(rival, "gray")


def _ratio(rows: list[Row]) -> float:
    return geomean_ratio(rows) or 1.0


def _saved_per_token(rows: list[Row]) -> float:
    return statistics.mean((row.saved_bytes or 0) / row.case.tokens for row in rows)


def caption(report: Report) -> tuple[str, str]:
    """What stands under every plot, and its colour."""
    environment = report.environment
    return summary(environment), "red" if is_busy(environment) else "gray"


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Writes the plots into an existing folder; what is not on an axis is averaged."""
    ratio = "time / frozen layer"
    over_rank = _Plot("rank r", lambda row: row.case.rank, ratio, _ratio, base=1.0)
    over_shape = _Plot("K→N", lambda row: row.case.shape, ratio, _ratio, base=1.0)
    saved = _Plot("K→N", lambda row: row.case.shape, "bytes saved / token", _saved_per_token)

    timed = [row for row in report.rows if row.timing and row.rival != FROZEN]
    # Few tokens would show the fixed part (the RNG state) rather than the cost of a token.
    tokens = max((row.case.tokens for row in timed), default=0)
    kept = [row for row in timed if row.mode == FWD_BWD and row.case.tokens == tokens]

    plots = (("ratio_over_rank", over_rank, timed), ("ratio_over_shape", over_shape, timed))
    paths = []
    for name, plot, rows in (*plots, ("saved_bytes", saved, kept)):
        if not rows:
            continue  # nothing was timed, or not in this mode
        figure = plot.figure(rows)
        text, color = caption(report)
        figure.supxlabel(text, fontsize=6, color=color)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths
