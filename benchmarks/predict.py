"""Predicts the times of the CUDA kernels on GPUs that are not here. Nothing it prints is measured.

    python benchmarks/predict.py --card h200 --tokens 8192 --ranks 16,64,128
    python benchmarks/predict.py --paths               # is the default path the fastest one?
    python benchmarks/predict.py --passes --ranks 16   # where the time goes
    python benchmarks/predict.py --dora                # what DoRA adds
    python benchmarks/predict.py --group 4096x4096,4096x1024,4096x1024   # layers of one x
    python benchmarks/predict.py --compare run.json    # beside rows that were measured

Launches are those of the real launchers, recorded by the emulator of the tests (g++ compiles it);
instructions are counted in nvcc's machine code, kept in sass_counts.json (--refresh-counts, where
there are nvcc and nvdisasm, counts again); the card's numbers and the rest of the model are in
predictor/. benchmarks/README.md says what it assumes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from predictor import counts, rows
from predictor.cards import CARDS, SCENARIOS, Card
from predictor.groups import predict_group
from predictor.launches import Call
from predictor.model import PATHS, Prediction, calibration, predict
from rich.console import Console
from rich.table import Table

from lora_ext.bench.grid import FWD
from lora_ext.bench.results import Report

# in_features x out_features of Llama 8B's layers, and of 70B's q and o
SHAPES = "4096x4096,4096x1024,4096x14336,14336x4096,8192x8192"
FEW_TO_MANY = "1,16,128,512,2048,8192"
MOST = 1 << 24  # tokens, features, ranks: beyond, the model says nothing
MARGIN = 0.02  # of a time: less is no difference to the model
OURS = {"lora_ext": False, "lora_ext_fp32": True}  # rivals of lora_ext.bench: with fp32 adapters?


def refused(got: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"got '{got}', expected {expected}")


def sizes(text: str) -> list[int]:
    try:
        values = [int(item) for item in text.split(",")]
    except ValueError:
        raise refused(text, "whole numbers with commas between, as 16,64") from None
    if not 1 <= min(values) <= max(values) <= MOST:
        raise refused(text, f"numbers of 1 to {MOST}")
    return values


def shapes(text: str) -> list[tuple[int, int]]:
    pairs = [item.split("x") for item in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise refused(text, "in_features x out_features with commas between, as 4096x1024")
    return [(sizes(K)[0], sizes(N)[0]) for K, N in pairs]


def dropout(text: str) -> float:
    try:
        p = float(text)
    except ValueError:
        p = math.nan
    if not 0.0 <= p < 1.0:
        raise refused(text, "a probability from 0 up to, but not, 1")
    return p


def parser() -> argparse.ArgumentParser:
    self = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    self.add_argument("--card", choices=CARDS, default="h200")
    self.add_argument("--tokens", type=sizes, help="M; 8192, with --paths 1 to 8192")
    self.add_argument("--ranks", type=sizes, default=sizes("16,64,128"))
    self.add_argument("--shapes", type=shapes, default=shapes(SHAPES), metavar="KxN,...")
    self.add_argument("--dropout", type=dropout, default=0.0, help="0 by default")
    self.add_argument("--fp32-adapters", action="store_true", help="beside the 16-bit base")
    self.add_argument("--fp16", action="store_true", help="a base of fp16 instead of bf16")
    self.add_argument("--scenario", choices=SCENARIOS, default="central")
    self.add_argument("--path", choices=("auto", *PATHS), default="auto")
    self.add_argument("--passes", action="store_true", help="every launch of ours")
    one_of = self.add_mutually_exclusive_group()
    one_of.add_argument("--paths", action="store_true", help="where the default is not the fastest")
    one_of.add_argument("--dora", action="store_true", help="what DoRA without dropout adds")
    one_of.add_argument(
        "--group", type=shapes, metavar="KxN,...", help="layers of one lora_linear_multi"
    )
    one_of.add_argument("--compare", type=Path, metavar="FILE", help="measured by lora_ext.bench")
    self.add_argument("--json", action="store_true", help="instead of tables")
    self.add_argument("--refresh-counts", action="store_true", help="with nvcc, into the file")
    return self


def calls(options: argparse.Namespace) -> Iterator[Call]:
    tokens = options.tokens or sizes(FEW_TO_MANY if options.paths else "8192")
    for (K, N), M, r in itertools.product(options.shapes, tokens, options.ranks):
        yield Call(M, N, K, r, options.fp32_adapters, options.dropout, options.fp16)


def label(call: Call) -> tuple[str, str, str, str]:
    adapters = call.types.replace("-fp32", ", fp32 adapters")
    p = f", p={call.dropout_p:g}" if call.dropout_p else ""
    return f"{call.K}→{call.N}", str(call.M), str(call.r), adapters + p


LABELS = ("K→N", "M", "r", "dtype")


def as_json(one: Prediction) -> dict[str, Any]:
    row = asdict(one) | {"kind": "predicted", "forward_ratio": one.forward_ratio}
    return row | {"ratio": one.ratio, "flat_ratios": one.flat_ratios}


Rows = list[dict[str, Any]]


def times(card: Card, options: argparse.Namespace, known: Any) -> tuple[Table, Rows]:
    """Predictions of the path that was asked for, with how far the scenarios are apart."""
    table = Table(title=f"{card.name}: PREDICTED times over the frozen layer, {options.scenario}")
    columns = ("kind", "path", "frozen fwd, dx", "fwd", "fwd+bwd", "least - most", "flat cuBLAS")
    for name in (*LABELS, *columns):
        table.add_column(name, no_wrap=True)
    rows: Rows = []
    reasons: dict[str, str] = {}
    for call in calls(options):
        all_of = {name: predict(card, call, known, options.path, name) for name in SCENARIOS}
        one = all_of[options.scenario]
        around = [other.ratio for other in all_of.values()]
        reasons.setdefault(one.reason, one.path)
        frozen = " ".join(f"{us:.0f} us" for us in one.frozen)
        cells = (one.path, frozen, f"{one.forward_ratio:.3f}", f"{one.ratio:.3f}")
        flat = "/".join(f"{ratio:.3f}" for ratio in one.flat_ratios)
        table.add_row(
            *label(call), "predicted", *cells, f"{min(around):.3f} - {max(around):.3f}", flat
        )
        rows.append(as_json(one) | {"scenarios": {n: o.ratio for n, o in all_of.items()}})
    table.caption = (
        "least - most: fwd+bwd, of all scenarios. Flat cuBLAS: fwd/fwd+bwd over it, if it ran "
        "every shape at the rate of its largest product"
        + "".join(f". {path}: {reason}" for reason, path in reasons.items())
    )
    return table, rows


def passes(card: Card, options: argparse.Namespace, known: Any) -> tuple[Table, Rows]:
    """Launches one by one; what cuBLAS makes is not among them."""
    table = Table(title=f"{card.name}: PREDICTED times of our launches, {options.scenario}")
    for name in (*LABELS, "kind", "", "what", "kernel", "blocks", "us", "bound by"):
        table.add_column(name)
    rows: Rows = []
    for call in calls(options):
        one = predict(card, call, known, options.path, options.scenario)
        for direction, launches in zip(("fwd", "bwd"), one.passes, strict=True):
            for entry in launches:
                cells = (
                    entry.what,
                    entry.kernel.replace("(Major)", ""),
                    str(entry.blocks),
                    f"{entry.us:.1f}",
                )
                table.add_row(*label(call), "predicted", direction, *cells, entry.bound)
        rows.append(as_json(one))
    return table, rows


def group(card: Card, options: argparse.Namespace, known: Any) -> tuple[Table, Rows]:
    """Layers of one x together and by a call for each, over the frozen layers; with --passes what
    they launch together."""
    K = options.group[0][0]
    if any(own_K != K for own_K, _ in options.group):
        raise ValueError("--group: layers of one x have the same K")
    table = Table(title=f"{card.name}: PREDICTED, layers of one x, {options.scenario}")
    if options.passes:
        columns = ["kind", "", "what", "kernel", "blocks", "us", "bound by"]
    else:
        columns = ["kind", "path", "frozen fwd, dx", "by calls fwd, fwd+bwd", "together"]
    for name in (*LABELS, *columns):
        table.add_column(name)
    rows: Rows = []
    alone: dict[str, str] = {}
    caption = ""
    for M, r in itertools.product(options.tokens or [8192], options.ranks):
        more = options.fp32_adapters, options.dropout, options.fp16
        layers = [Call(M, N, K, r, *more) for _, N in options.group]
        one = predict_group(card, layers, known, options.path, options.scenario)
        names = (f"{K}→{','.join(str(N) for _, N in options.group)}", *label(layers[0])[1:])
        if options.passes:
            for direction, launches in zip(("fwd", "bwd"), one.passes, strict=True):
                for entry in launches:
                    kernel = entry.kernel.replace("(Major)", "")
                    told = (entry.what, kernel, str(entry.blocks), f"{entry.us:.1f}", entry.bound)
                    table.add_row(*names, "predicted", direction, *told)
        else:
            frozen = " ".join(f"{us:.0f} us" for us in one.frozen)
            ratios = [
                "{:.3f} {:.3f}".format(*one.ratios(us)) for us in (one.separate, one.together)
            ]
            table.add_row(*names, "predicted", one.path, frozen, *ratios)
        found = asdict(one) | {"kind": "predicted", "by_calls": one.ratios(one.separate)}
        rows.append(found | {"ratios": one.ratios(one.together)})
        caption = (
            "Over the frozen layers as so many products. Those, and calls for each, also add up "
            f"dx: {one.additions:.0f} us, counted nowhere"
        )
        for direction, reasons in zip(("forward", "backward"), one.alone, strict=True):
            for why in dict.fromkeys(filter(None, reasons)):
                which = [str(i + 1) for i, reason in enumerate(reasons) if reason == why]
                alone[f"{direction}, layer {' and '.join(which)} (M {M}, r {r})"] = why
    if alone:
        caption += ". A call of its own: "
        caption += "; ".join(f"{where}: {why}" for where, why in alone.items())
    table.caption = caption
    return table, rows


def paths(card: Card, options: argparse.Namespace, known: Any) -> tuple[Table, Rows]:
    """Where another path than the default is predicted to be faster, forward or both ways."""
    table = Table(title=f"{card.name}: PREDICTED, where the default path is not the fastest")
    for name in (*LABELS, "kind", "", "default", "us", "fastest", "us", "default over it"):
        table.add_column(name)
    rows: Rows = []
    asked, slower_than_composed = 0, 0
    for call in calls(options):
        default = predict(card, call, known, "auto", options.scenario)
        others = [predict(card, call, known, path, options.scenario) for path in PATHS]
        for mode, time in (("fwd", forward_us), ("fwd+bwd", both_us)):
            asked += 1
            best = min([*others, default], key=time)
            over = time(default) / time(best)
            slower_than_composed += time(default) > time(others[-1]) * (1 + MARGIN)
            row = {"kind": "predicted", "mode": mode, "call": asdict(call), "default": default.path}
            row |= {"fastest": best.path, "default_over_fastest": over, "auto": time(default)}
            row |= {other.asked: time(other) for other in others}
            rows.append(row)
            if over > 1 + MARGIN:
                cells = (default.path, f"{time(default):.1f}", best.path, f"{time(best):.1f}")
                table.add_row(*label(call), "predicted", mode, *cells, f"{over:.2f}")
    table.caption = (
        f"{table.row_count} of {asked} by more than {MARGIN:.0%}; the default is slower than the "
        f"composed path in {slower_than_composed}. Times on the GPU alone: few rows in eager mode "
        "are bound by the host"
    )
    return table, rows


def dora(card: Card, options: argparse.Namespace, known: Any) -> tuple[Table, Rows]:
    """DoRA's own passes beside the layer that they are added to."""
    table = Table(title=f"{card.name}: PREDICTED us that DoRA adds, {options.scenario}")
    heads = ("kind", "norm", "scale", "scale, backward", "fwd+bwd", "by ATen", "over the layer's")
    for name in (*LABELS, *heads, "scale over fwd"):
        table.add_column(name, no_wrap=True)
    found: Rows = []
    how = SCENARIOS[options.scenario]
    for call in calls(options):
        layer = predict(card, call, known, options.path, options.scenario)
        ours, aten = rows.by_kernels(card, how, call), rows.by_aten(card, how, call)
        parts = (ours.norm, ours.scale, ours.scale_backward, ours.both, aten.both)
        ratios = ours.both / both_us(layer), ours.scale / forward_us(layer)
        cells = [f"{us:.0f}" for us in parts] + [f"{ratio:.3f}" for ratio in ratios]
        table.add_row(*label(call), "predicted", *cells)
        found.append(
            {"kind": "predicted", "call": asdict(call), "kernels": asdict(ours)}
            | {"aten": asdict(aten), "forward": forward_us(layer), "layer": both_us(layer)}
        )
    return table, found


def forward_us(one: Prediction) -> float:
    return one.layer[0]


def both_us(one: Prediction) -> float:
    return sum(one.layer)


def compare(card: Card, options: argparse.Namespace, known: Any) -> tuple[Table, Rows]:
    """Rows of a report of lora_ext.bench beside what the model says of the same calls."""
    report = Report.load(options.compare)
    device = report.environment["device"]
    if card.name.split()[-1] not in device and card.name.split()[0] not in device:
        raise ValueError(
            f"{options.compare}: measured on {device}, which is not the card {card.name}: choose "
            f"with --card of {', '.join(CARDS)}; other devices are not predicted"
        )
    title = f"measured on {device}, beside what is PREDICTED for {card.name}, {options.scenario}"
    table = Table(title=title)
    heads = ("mode", "rival", "measured", "predicted", "measured over it", "within least - most")
    for name in (*LABELS, *heads):
        table.add_column(name)
    rows: Rows = []
    for row in report.rows:
        # gpu.py's rows of another path than the default: "lora_ext:hybrid"
        rival, _, path = row.rival.partition(":")
        if rival not in OURS or row.ratio is None or row.case.dtype not in ("bf16", "fp16"):
            continue
        case = row.case
        call = Call(
            case.tokens, case.out_features, case.in_features, case.rank, OURS[rival],
            case.dropout_p, case.dtype == "fp16",
        )  # fmt: skip
        ratios = []
        for scenario in SCENARIOS:
            one = predict(card, call, known, path or "auto", scenario)
            ratios.append(one.forward_ratio if row.mode == FWD else one.ratio)
        predicted = ratios[list(SCENARIOS).index(options.scenario)]
        inside = min(ratios) <= row.ratio <= max(ratios)
        cells = (f"{row.ratio:.3f}", f"{predicted:.3f}", f"{row.ratio / predicted:.3f}")
        table.add_row(*label(call), row.mode, row.rival, *cells, "yes" if inside else "NO")
        rows.append(
            {"call": asdict(call), "mode": row.mode, "rival": row.rival, "measured": row.ratio}
            | {"predicted": predicted, "scenarios": dict(zip(SCENARIOS, ratios, strict=True))}
        )
    if not rows:
        raise ValueError(f"{options.compare}: no row of lora_ext in bf16 or fp16 was timed")
    return table, rows


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser()
    options = command.parse_args(arguments)
    if options.passes and (options.paths or options.dora or options.compare):
        command.error("--passes is of the calls alone, or of a --group")
    off = os.environ.get("LORA_EXT_CUDA_OFF", "")
    console = Console(width=None if sys.stdout.isatty() else 160)
    card = CARDS[options.card]
    what: Callable[..., tuple[Table, Rows]] = times
    ways = (passes, options.passes), (paths, options.paths), (dora, options.dora)
    for chosen, wanted in ways:
        what = chosen if wanted else what
    what = group if options.group else what
    what = compare if options.compare else what
    try:
        known = counts.refresh() if options.refresh_counts else counts.load()
        table, found = what(card, options, known)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    assumed = calibration(card, known, options.scenario)
    if options.json:
        facts = {"kind": "predicted", "card": asdict(card), "scenario": options.scenario}
        facts |= {"LORA_EXT_CUDA_OFF": off} if off else {}
        facts |= {"counts": counts.origin(known), "calibration": assumed, "rows": found}
        print(json.dumps(facts, indent=1))
        return 0
    if off:
        table.caption = f"LORA_EXT_CUDA_OFF={off} changes what is predicted. {table.caption or ''}"
    console.print(table)
    console.print(f"Predicted, not measured: {counts.origin(known)}.", highlight=False)
    console.print(
        f"cuBLAS at 8192³, modelled: {assumed['cublas']:.0f} TFLOP/s ({card.cublas_source}: "
        f"{card.cublas:.0f}); our product there: {assumed['ours']:.3f} of it.",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
