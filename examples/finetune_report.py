"""What finetune_encoder.py shows: tables for the terminal, one plot, one JSON file."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a PNG
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.table import Table

from lora_ext.bench.environment import summary
from lora_ext.bench.load import busy_warning

Environment = Mapping[str, Any]  # of lora_ext.bench.environment.describe
REFERENCE = "naive"  # the implementation that the others are compared with
MIB = 2**20


@dataclass(frozen=True)
class Measurement:
    """What one implementation did in one run."""

    name: str
    losses: list[float]
    step_ms: list[float]
    saved_bytes: int  # kept for the backward pass of one step
    accuracy: float | None = None  # on held-out texts after training


def relative_differences(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True)]


def max_differences(runs: Sequence[Measurement]) -> dict[str, float]:
    """Largest relative loss difference to the reference over the run, by implementation."""
    reference = _reference(runs)
    result: dict[str, float] = {}
    for run in runs:
        differences = relative_differences(run.losses, reference.losses)
        # max() skips a nan that is not in first place; a diverged run must not pass for equal.
        result[run.name] = max(differences) if all(d == d for d in differences) else float("nan")
    return result


def captions(environment: Environment) -> list[str]:
    """Device, versions and load of a run, and a warning if that makes its times worthless."""
    warning = busy_warning(environment)
    return [summary(environment)] + ([warning] if warning else [])


def loss_table(runs: Sequence[Measurement], rows: int = 9) -> Table:
    table = Table(title="Training loss, same batches and initial weights")
    table.add_column("step", justify="right")
    for run in runs:
        table.add_column(run.name, justify="right")
    n_steps = len(runs[0].losses)
    steps = sorted({round(i * (n_steps - 1) / (rows - 1)) for i in range(rows)})
    for step in steps:
        table.add_row(str(step + 1), *(f"{run.losses[step]:.6f}" for run in runs))
    table.add_section()
    differences = max_differences(runs)
    table.add_row(
        f"max rel. diff. to {REFERENCE}",
        *("-" if run.name == REFERENCE else f"{differences[run.name]:.1e}" for run in runs),
    )
    return table


def cost_table(title: str, runs: Sequence[Measurement], environment: Environment) -> Table:
    table = Table(title=title, caption="\n".join(captions(environment)))
    headers = ["ms/step", "p20", "p80", f"vs {REFERENCE}", "saved MiB"]
    headers += ["accuracy"] if runs[0].accuracy is not None else []
    table.add_column("")
    for header in headers:
        table.add_column(header, justify="right")
    for run in runs:
        p20, _, _, p80 = statistics.quantiles(run.step_ms, n=5, method="inclusive")
        cells = [f"{value:.0f}" for value in (statistics.median(run.step_ms), p20, p80)]
        cells += [f"{_time_ratio(run, _reference(runs)):.3f}x", f"{run.saved_bytes / MIB:.1f}"]
        cells += [f"{run.accuracy:.1%}"] if run.accuracy is not None else []
        table.add_row(run.name, *cells)
    return table


def kernel_table(explained: Mapping[str, Iterable[Any]]) -> Table:
    """lora_ext.explain's rows (name, path, reason) of every run, equal modules counted together."""
    table = Table(title="Which code the adapted modules run (lora_ext.explain)")
    table.add_column("")
    table.add_column("modules", justify="right")
    table.add_column("path")
    table.add_column("reason")
    for group, rows in explained.items():
        for (path, reason), count in Counter((row.path, row.reason) for row in rows).items():
            table.add_row(group, str(count), path, reason)
    return table


def save_plot(
    path: Path,
    groups: Mapping[str, Sequence[Measurement]],
    environment: Environment,
    allowed: float,
) -> None:
    """Loss curves of the first group and how far they are apart; time per step and saved memory of
    every group as bars. `allowed`: the difference that the curves may have."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8))
    (loss_axis, difference_axis), (time_axis, memory_axis) = axes
    name, runs = next(iter(groups.items()))
    reference = _reference(runs)
    steps = range(1, len(reference.losses) + 1)
    # They lie on one another: wide ones below narrow ones show all.
    for i, run in enumerate(runs):
        loss_axis.plot(steps, run.losses, color=f"C{i}", linewidth=7 - 3 * i, label=run.name)
        if run is not reference:
            differences = relative_differences(run.losses, reference.losses)
            difference_axis.plot(steps, differences, ".-", color=f"C{i}", label=run.name)
    loss_axis.set(
        title=f"Training loss, {name}: {len(runs)} curves on one another",
        xlabel="training step",
        ylabel="cross-entropy of the batch (nats)",
    )
    difference_axis.axhline(allowed, color="red", linestyle="--", label="allowed")
    # A line where differences are zero, which a logarithm has no place for.
    difference_axis.set_yscale("symlog", linthresh=1e-8)
    difference_axis.set(
        title=f"Difference of these losses to {REFERENCE}'s",
        xlabel="training step",
        ylabel="relative difference of the loss",
        ylim=(0, 10 * allowed),
    )
    for axis in (loss_axis, difference_axis):
        axis.legend()
    _bars(time_axis, groups, lambda run: statistics.median(run.step_ms))
    time_axis.set(title="Time of a training step", ylabel="median time (ms)")
    _bars(memory_axis, groups, lambda run: run.saved_bytes / MIB)
    memory_axis.set(title="Kept from forward for backward", ylabel="memory (MiB)")
    for axis in (time_axis, memory_axis):
        axis.set_xlabel("dropout of the LoRA layers")
    color = "red" if busy_warning(environment) else "gray"
    figure.supxlabel("\n".join(captions(environment)), fontsize=7, color=color)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_json(
    path: Path,
    settings: Mapping[str, Any],
    groups: Mapping[str, Sequence[Measurement]],
    environment: Environment,
) -> None:
    runs = {group: [asdict(run) for run in members] for group, members in groups.items()}
    told = {**environment, "busy": busy_warning(environment)}
    content = {"environment": told, "settings": dict(settings), "runs": runs}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")  # str: Path settings


def _bars(
    axis: Axes,
    groups: Mapping[str, Sequence[Measurement]],
    value: Callable[[Measurement], float],
) -> None:
    width = 0.26
    for column, runs in enumerate(groups.values()):
        for i, run in enumerate(runs):
            bar = axis.bar(column + (i - 1) * width, value(run), 0.9 * width, color=f"C{i}")
            axis.bar_label(bar, labels=[f"{run.name}\n{value(run):.0f}"], fontsize=8)
    axis.set_xticks(range(len(groups)), [name.removeprefix("dropout ") for name in groups])
    axis.margins(y=0.15)  # room for the labels on the bars


def _reference(runs: Sequence[Measurement]) -> Measurement:
    return next(run for run in runs if run.name == REFERENCE)


def _time_ratio(run: Measurement, reference: Measurement) -> float:
    """Median over the steps of the time ratio: both ran every step right after one another, so a
    machine that is slower for a while does not favour either."""
    ratios = (a / b for a, b in zip(run.step_ms, reference.step_ms, strict=True))
    return statistics.median(ratios)
