"""The grid for a GPU in less than ten minutes: all ways to write the layer, all paths of ours.

Runs `python -m lora_ext.bench` in parts: all rivals at rank 16, those that need no compiling at
rank 64, and lora_ext once more for each other value of LORA_EXT_CUDA_PATH, which a process reads
once. A ratio is to the frozen layer in the same process and round, so ratios of several processes
stand in one table. The results go to benchmarks/results/DATE-DEVICE.json. See make gpu-bench.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.benchmark import Timer

from lora_ext import build_info
from lora_ext.bench.grid import FWD
from lora_ext.bench.report import print_report
from lora_ext.bench.results import Report, Row
from lora_ext.bench.rivals import FROZEN, RIVALS

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(name for name in RIVALS if name.startswith("lora_ext"))
SHAPES = "4096x4096,4096x14336,14336x4096,4096x1024,8192x8192"  # of Llama 8B; of 70B q and o
RANK = 16  # of the comparison with the base product alone


@dataclass(frozen=True)
class Part:
    """One run of lora_ext.bench."""

    path: str  # LORA_EXT_CUDA_PATH
    ranks: str
    rivals: Sequence[str]
    seconds: float  # after which it begins no case
    budget: float  # of seconds for each row


def cuda_paths() -> list[str]:
    """The values of LORA_EXT_CUDA_PATH, the default first."""
    return list(build_info()["cuda_paths"])


def plan(rivals: Sequence[str], budget: float) -> list[Part]:
    """All parts; with what begins before a deadline and ends after it, about nine minutes."""
    default, *others = cuda_paths()
    quick = [name for name in rivals if name != "compile"]
    ours = [name for name in rivals if name in OURS]
    both = f"{RANK},64"
    return [
        Part(default, f"{RANK}", rivals, 210, budget),
        Part(default, "64", quick, 50, budget),
        *(Part(path, both, ours, 150 / len(others), budget / 4) for path in others),
    ]


def run(part: Part, options: argparse.Namespace, result: Path) -> int:
    """The exit status of lora_ext.bench; what was measured until then is in `result`."""
    command = [sys.executable, "-m", "lora_ext.bench", "--device", options.device]
    command += ["--shapes", options.shapes, "--tokens", options.tokens, "--dtypes", "bf16"]
    command += ["--ranks", part.ranks, "--dropouts", "0,0.1", "--rivals", ",".join(part.rivals)]
    command += ["--budget", str(part.budget), "--deadline", str(part.seconds)]
    environment = os.environ | {"LORA_EXT_CUDA_PATH": part.path}
    print(f"LORA_EXT_CUDA_PATH={part.path} {' '.join(command[1:])}", flush=True)
    start = time.monotonic()
    command += ["--json", str(result)]
    quiet = subprocess.DEVNULL  # its table; that of all parts comes last
    status = subprocess.run(command, env=environment, cwd=ROOT, stdout=quiet).returncode
    print(f"  {time.monotonic() - start:.0f} s, exit status {status}", flush=True)
    return status


def merge(reports: Sequence[tuple[str, Report]]) -> Report:
    """One report of those of the default path and, renamed, our rows of the other paths."""
    groups: dict[object, list[Row]] = {}
    default, first = reports[0]
    left_out = []
    for path, report in reports:
        left_out += [f"{path}: {case}" for case in report.environment.get("left_out", [])]
        for row in report.rows:
            if path == default:
                groups.setdefault((row.case, row.mode), []).append(row)
            elif row.rival != FROZEN:
                renamed = replace(row, rival=f"{row.rival}:{path}")
                groups.setdefault((row.case, row.mode), []).append(renamed)
    # A case without the default's rows has no frozen layer to stand beside.
    complete = (rows for rows in groups.values() if rows[0].rival == FROZEN)
    environment = first.environment | {"left_out": left_out} if left_out else first.environment
    return Report(environment, [row for rows in complete for row in rows])


def copy_bandwidth(device: str) -> float:
    """Bytes that a copy reads and writes in a second."""
    source = torch.empty(2**28 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    timer = Timer("target.copy_(source)", globals={"source": source, "target": source.clone()})
    return 2 * source.nbytes / timer.blocked_autorange(min_run_time=0.2).median


def base_product(report: Report, bandwidth: float) -> list[dict[str, object]]:
    """How the product inside our forward compares with cuBLAS, which runs the frozen layer.

    It cannot be called alone. So: forward without dropout, less the time to read x once more, over
    the frozen layer's time and the rank's share of more products. An estimate.
    """
    frozen = {row.case: row.timing for row in report.rows if (row.mode, row.rival) == (FWD, FROZEN)}
    lines: list[dict[str, object]] = []
    for row in report.rows:
        case, base = row.case, frozen.get(row.case)
        ours = row.rival.startswith("lora_ext") and "fp32" not in row.rival
        if not (ours and row.mode == FWD and row.timing and base):
            continue
        if case.rank != RANK or case.dropout_p > 0:
            continue
        read = case.tokens * case.in_features * case.torch_dtype.itemsize / bandwidth * 1e6
        ratio, time_us = row.timing.ratio.median, base.time_us.median
        products = 1 + case.rank / case.in_features
        lines.append(
            {
                "case": str(case),
                "rival": row.rival,
                "forward": round(ratio, 4),
                "product": round((ratio - read / time_us) / products, 4),
            }
        )
    return lines


def print_base_product(lines: Sequence[dict[str, object]], bandwidth: float) -> None:
    print(
        f"\nForward of lora_ext at r = {RANK} over F.linear, and an estimate for the product in\n"
        f"it alone: less one more read of x at the {bandwidth / 1e12:.3g} TB/s of a copy, and the "
        "rank's own products"
    )
    for line in lines:
        forward, product = f"{line['forward']:.3f}x", f"{line['product']:.3f}x"
        print(f"  {line['case']:<38} {line['rival']:<20} {forward:>8}  product {product:>8}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks/gpu.py", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", default=SHAPES, help="in_features x out_features, as of Llama")
    parser.add_argument("--tokens", default="8192")
    parser.add_argument("--rivals", default=",".join(RIVALS))
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each row")
    parser.add_argument("--out", type=Path, help="the results file")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu tries the program out")

    status, reports = 0, []
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(plan(options.rivals.split(","), options.budget)):
            result = Path(folder) / f"{number}.json"
            status = max(status, abs(run(part, options, result)))
            if result.exists() and result.stat().st_size:
                reports.append((part.path, Report.load(result)))
    if not reports or reports[0][0] != cuda_paths()[0]:
        print("benchmarks/gpu.py: the first part measured nothing; see above", file=sys.stderr)
        return 1
    report = merge(reports)
    bandwidth = copy_bandwidth(options.device)
    report.environment["copy_bandwidth"] = bandwidth
    report.environment["base_product"] = base_product(report, bandwidth)
    name = re.sub(r"[^a-z0-9]+", "-", report.environment["device"].lower()).strip("-")
    date = report.environment["date"][:10]
    out = options.out or ROOT / "benchmarks" / "results" / f"{date}-{name}.json"
    report.save(out)
    print_report(report, Console())
    print_base_product(report.environment["base_product"], bandwidth)
    print(json.dumps(report.environment.get("gpu")))
    print(f"written: {out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
