"""The whole way of an adapter in lora_ext's public calls, with a check at each step: part 1 of
finetune_encoder.py."""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from pretrained import Task, classifier
from progress import track
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.nn import LoraLayer

MIB = 2**20
SHOWN = 8  # held-out docstrings


class Checks:
    """Says what was checked and keeps what failed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.failed: list[str] = []

    def __call__(self, what: str, holds: bool) -> None:
        mark = "[green]ok[/]    " if holds else "[red]FAILED[/]"
        self.console.print(f"   {mark} {what}")
        if not holds:
            self.failed.append(what)


def whole_way(args: argparse.Namespace, task: Task, console: Console) -> list[str]:
    """What failed of the checks."""
    check, folder = Checks(console), args.out / "adapter"

    console.print("\n[bold]1. Adapt[/]: get_lora_model")
    model = get_lora_model(
        classifier(task, args.seed),
        LoraConfig(
            r=args.rank,
            lora_alpha=args.alpha,
            lora_dropout=args.dropout,
            target_modules=list(args.target_modules),
            modules_to_save=["head"],  # new, so it is trained and saved whole
        ),
    )
    trained, total = model.get_nb_trainable_parameters()
    layers = len(model.targeted_module_names)
    console.print(f"   {layers} linears have adapters; {trained:,} of {total:,} parameters train")
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = accuracy(logits(model, task), task)
    console.print(f"   held-out accuracy before training: {before:.1%}")

    console.print("\n[bold]2. Train[/]: any loop; this one is PyTorch's")
    losses = train(model, task, args, console)
    trained_logits = logits(model, task)
    after = accuracy(trained_logits, task)
    part = max(1, len(losses) // 4)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    check(f"the loss fell from {first:.2f} to {last:.2f} (means of {part} steps)", last < first)
    console.print(f"   held-out accuracy after training: {after:.1%}")
    now = dict(model.named_parameters())
    same = all(torch.equal(now[name], value) for name, value in frozen.items())
    check(f"all {len(frozen)} frozen tensors are what they were, bit for bit", same)

    console.print(f"\n[bold]3. Save[/]: model.save_pretrained('{folder}')")
    model.save_pretrained(folder)
    adapter = (folder / "adapter_model.safetensors").stat().st_size
    whole = sum(p.numel() * p.element_size() for p in frozen.values())
    check(
        f"adapter and head take {adapter / MIB:.1f} MiB beside the model's {whole / MIB:.1f} MiB",
        adapter < whole,
    )

    console.print(f"\n[bold]4. Load[/]: LoraModel.from_pretrained(base, '{folder}')")
    loaded = LoraModel.from_pretrained(classifier(task, args.seed + 1), folder)
    same = torch.equal(logits(loaded, task), trained_logits)
    check(f"{trained_logits.numel():,} logits equal the trained model's, bit for bit", same)

    console.print("\n[bold]5. Merge[/]: model.merge_and_unload()")
    bound = rounding(loaded)
    merged = loaded.merge_and_unload()
    left = [m for m in merged.modules() if isinstance(m, LoraLayer)]
    check(f"the result is a plain {type(merged).__name__} without adapter layers", not left)
    merged_logits = logits(merged, task)
    difference = (merged_logits - trained_logits).abs().max().item()
    largest = trained_logits.abs().max().item()
    check(
        f"its logits differ by {difference / largest:.0e} of the largest; "
        f"rounding may make {bound:.0e}",
        difference <= bound * largest,
    )

    console.print("\n[bold]6. Use[/]: held-out docstrings, none of which was trained on")
    console.print(answers(merged_logits, task))
    share = accuracy(merged_logits, task)
    chance = 1 / len(task.data.labels)
    console.print(
        f"   {share:.1%} of all {len(merged_logits)} are right; guessing gives {chance:.1%}"
    )
    return check.failed


def train(model: nn.Module, task: Task, args: argparse.Namespace, console: Console) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)
    losses = []
    model.train()
    for rows in track(task.batches(args.steps, args.batch_size, args.seed), "step", console):
        inputs, labels = task.train.take(rows)
        loss = F.cross_entropy(model(**inputs), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: nn.Module, task: Task) -> Tensor:
    """Of the held-out texts, [n, classes]."""
    model.eval()
    rows = torch.arange(len(task.held_out.labels)).split(32)
    return torch.cat([model(**task.held_out.take(some)[0]) for some in rows])


def accuracy(logits: Tensor, task: Task) -> float:
    return (logits.argmax(-1) == task.held_out.labels).double().mean().item()


def rounding(model: LoraModel) -> float:
    """How far, relative to the logits, merging may move them: each merged layer sums K products in
    another order, which moves its result by about sqrt(K) roundings; layers add up at worst."""
    layers = [layer for _, layer in model.lora_layers()]
    return torch.finfo(torch.float32).eps * sum(math.sqrt(m.in_features) for m in layers)


def answers(logits: Tensor, task: Task) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 3))
    for header in ("docstring (module names removed)", "prediction", "right answer"):
        table.add_column(header, no_wrap=True)
    shown = zip(task.data.held_out[:SHOWN], logits.argmax(-1).tolist(), strict=False)
    for (text, label), guess in shown:
        color = "green" if guess == label else "red"
        cut = text if len(text) <= 34 else text[:33] + "…"
        names = task.data.labels
        table.add_row(escape(cut), f"[{color}]{names[guess]}[/]", names[label])
    return table
