"""What `python -m lora_ext.bench --model` runs."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from functools import partial

import torch
from rich.console import Console

from lora_ext.bench.environment import describe, version
from lora_ext.bench.load import OtherLoad, is_busy
from lora_ext.bench.measure import Budget
from lora_ext.bench.models.cases import MODELS, TARGETS, ModelCase, model_cases
from lora_ext.bench.models.report import print_models
from lora_ext.bench.models.run import ModelReport, run_case
from lora_ext.bench.models.ways import COMPILE, WAYS
from lora_ext.bench.results import BAD

# Of a case, all its contenders together
_SECONDS, _QUICK_SECONDS, _ROUNDS = 30.0, 0.5, 3
_QUICK_TOKENS = 64
# torch.compile takes longer than all of a quick run.
_QUICK_WAYS = tuple(name for name in WAYS if name != COMPILE)


def _cases(options: argparse.Namespace) -> list[ModelCase]:
    sizes = MODELS[options.model].resized(options.sizes, options.layers)
    tokens = options.tokens or ((_QUICK_TOKENS if options.quick else sizes.tokens),)
    targets = [TARGETS[name] for name in options.targets or TARGETS]
    return list(
        model_cases(
            options.model,
            sizes,
            targets,
            tokens,
            options.ranks or (16,),
            options.dtypes or ("fp32", "bf16"),
            options.dropouts or (0.0, 0.1),
        )
    )


def run_models(options: argparse.Namespace, arguments: Sequence[str], console: Console) -> bool:
    """Measures, prints and writes; whether all is well."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.threads:
        torch.set_num_threads(options.threads)
    seconds = options.budget or (_QUICK_SECONDS if options.quick else _SECONDS)
    names = options.rivals or (_QUICK_WAYS if options.quick else tuple(WAYS))
    if options.json:
        options.json.open("a").close()  # what cannot be written fails now
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)

    environment = describe(device, arguments)
    environment["versions"]["transformers"] = version("transformers")
    environment["malloc"] = {n: v for n, v in os.environ.items() if n.startswith("MALLOC_")}
    report = ModelReport(environment, [])
    others, deadline = OtherLoad(), time.monotonic() + (options.deadline or float("inf"))
    progress = Console(stderr=True)
    with progress.status("") as status:
        tell = status.update if progress.is_terminal else partial(progress.print, soft_wrap=True)
        for case in _cases(options):
            if time.monotonic() > deadline:
                environment.setdefault("left_out", []).append(str(case))
                continue
            report.rows.extend(run_case(case, names, Budget(seconds, _ROUNDS), device, tell))
            environment["other_load"] = others.cpus()
            environment["busy"] = is_busy(environment)
            if options.json:  # what is measured stays, whatever ends the run
                report.save(options.json)
    print_models(report, console)
    if options.plots:
        from lora_ext.bench.models.plots import write_plot  # matplotlib takes a second to import

        write_plot(report, options.plots / "models.png")
    return all(row.status not in BAD for row in report.rows)
