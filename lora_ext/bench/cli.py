"""Command line of `python -m lora_ext.bench`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_ext.bench import grid
from lora_ext.bench.compare import check_kinds, match, print_changes
from lora_ext.bench.environment import describe, gpu_state
from lora_ext.bench.load import OtherLoad, is_busy
from lora_ext.bench.measure import Budget
from lora_ext.bench.options import check_meaning, make_parser
from lora_ext.bench.quantized import QUANTIZED_RIVALS
from lora_ext.bench.report import MarkdownFile, print_report
from lora_ext.bench.results import BAD, Report, Row
from lora_ext.bench.rivals import RIVALS
from lora_ext.bench.runner import run_case

_BUDGET = Budget(seconds=2.0)
_ADAPTERS_SHAPES = ((768, 768), (2048, 2048), (1024, 4096))
_QUICK_BUDGET = Budget(seconds=0.1, min_rounds=3, max_rounds=20)
_LINE_SECONDS = 10.0  # between lines of progress where there is no terminal
# torch.compile takes longer than all of a quick run.
_QUICK_RIVALS = tuple(name for name in RIVALS if name != "compile")


def _grid(options: argparse.Namespace, device: torch.device) -> grid.Grid:
    if options.quick:
        chosen = grid.QUICK
    else:
        chosen = grid.full_grid(device) if options.full else grid.default_grid(device)
    axes = ("shapes", "tokens", "ranks", "dtypes", "dropouts")
    filters = {axis: values for axis in axes if (values := getattr(options, axis))}
    return replace(chosen, **filters)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.threads:
        torch.set_num_threads(options.threads)
    names = options.rivals or (_QUICK_RIVALS if options.quick else tuple(RIVALS))
    rivals = QUANTIZED_RIVALS if options.quantized else [RIVALS[name] for name in names]
    modes = options.modes or grid.MODES
    budget = _QUICK_BUDGET if options.quick else _BUDGET
    if options.budget:
        budget = replace(budget, seconds=options.budget)

    environment = describe(device, arguments)  # before the run, which is a load of its own
    environment["quantized"] = options.quantized
    others = OtherLoad()
    cases = _grid(options, device).cases()
    rows: list[Row] = []
    left_out: list[str] = []
    deadline = time.monotonic() + (options.deadline or float("inf"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console, told = Console(stderr=True), time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases) * len(modes))
        for number, case in enumerate(cases, start=1):
            progress.update(task, description=str(case))
            if not console.is_terminal and time.monotonic() - told > _LINE_SECONDS:
                console.print(f"case {number} of {len(cases)}: {case}")  # there is no bar
                told = time.monotonic()
            if time.monotonic() > deadline:
                left_out.append(str(case))
                continue
            for mode_rows in run_case(case, rivals, modes, budget, device, options.quantized):
                rows += mode_rows
                progress.advance(task)
            environment["other_load"] = others.cpus()
            environment["busy"] = is_busy(environment)
            if options.json:  # what is measured stays, whatever ends the run
                Report(environment, rows).save(options.json)
    if (gpu := gpu_state(device)) is not None:
        environment["gpu"] = gpu  # its clocks under load
    if left_out:
        environment["left_out"] = left_out
    return Report(environment, rows)


def _run_adapters(options: argparse.Namespace, console: Console) -> None:
    from lora_ext.bench import adapters

    if options.threads:
        torch.set_num_threads(options.threads)
    quick = options.quick and not options.budget
    rows = adapters.measure(
        options.shapes or (((256, 256),) if options.quick else _ADAPTERS_SHAPES),
        options.tokens or ((128,) if options.quick else (2048,)),
        options.adapters,
        options.dtypes or ("fp32", "bf16"),
        options.modes or grid.MODES,
        _QUICK_BUDGET if quick else Budget(options.budget or 4.0),
    )
    adapters.report(rows, console, options.json)


def _writers(options: argparse.Namespace) -> list[Callable[[Report], object]]:
    """Prepares the outputs before a long run, so that what cannot work fails now."""
    writers: list[Callable[[Report], object]] = []
    if options.json:
        options.json.open("a").close()
        writers.append(lambda report: report.save(options.json))
    if options.markdown:
        writers.append(MarkdownFile(options.markdown).write)
    if options.plots:
        from lora_ext.bench.plots import write_plots  # matplotlib takes a second to import

        options.plots.mkdir(parents=True, exist_ok=True)
        writers.append(lambda report: write_plots(report, options.plots))
    return writers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    options = parser.parse_args(arguments)
    files: list[Path] = options.compare or []
    if len(files) > 2:
        parser.error("--compare takes one or two files")
    check_meaning(parser, options)
    needs_cuda = options.device == "cuda" and len(files) < 2
    if needs_cuda and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device here; use cpu")
    try:
        old, new = [Report.load(path) for path in files] + [None] * (2 - len(files))
        if old:
            kind = new.environment.get("quantized") if new else options.quantized
            check_kinds(old, str(files[0]), kind)
        writers = _writers(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    console = Console()
    if options.model:
        try:
            from lora_ext.bench.models.command import run_models

            return 0 if run_models(options, arguments, console) else 1
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if options.adapters:
        try:
            _run_adapters(options, console)
        except ValueError as error:
            parser.error(f"--adapters: {error}")
        return 0
    try:
        report = new or _run(options, arguments)
        print_report(report, console)
        for write in writers:
            write(report)
    except OSError as error:  # a disk became full, say
        parser.error(str(error))
    bad = any(row.status in BAD for row in report.rows)
    if old:
        changes = match(old, report)
        if not changes:
            parser.error(f"{files[0]} has no row of lora_ext in common with the new results")
        print_changes(changes, old, report, console)
        bad = bad or any(change.is_regression for change in changes)
    return 1 if bad else 0
