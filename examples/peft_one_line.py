"""A model of PEFT before and after `lora_ext.integrations.peft.patch()`: the same losses, and the
time of a training step.

    pip install peft transformers
    python examples/peft_one_line.py

Takes about half a minute on two CPU cores and needs no network: the model is small and random.
"""

from __future__ import annotations

import statistics
import time

import peft
import torch
import transformers

import lora_ext.integrations.peft as fused


def build(dropout: float) -> peft.PeftModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(r=16, lora_dropout=dropout, target_modules="all-linear")
    return peft.get_peft_model(base, lora)


def train(model: peft.PeftModel, steps: int = 12) -> tuple[list[float], float]:
    """The losses, and the median time of a step in ms."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    tokens = torch.randint(1000, (8, 64), generator=torch.Generator().manual_seed(1))
    losses, times = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1e3 * (time.perf_counter() - start))
        losses.append(loss.item())
    return losses, statistics.median(times)


def main() -> None:
    own, _ = train(build(dropout=0.0))
    fused.patch()
    patched, _ = train(build(dropout=0.0))
    difference = max(abs(a - b) for a, b in zip(own, patched, strict=True))
    print(f"losses from {own[0]:.4f} to {own[-1]:.4f}; patched they differ by {difference:.1e}")
    fused.unpatch()

    with_dropout = build(dropout=0.1)
    times = []
    for switch in (fused.unpatch, fused.patch):
        switch()
        times.append(train(with_dropout)[1])
    print(f"a step with dropout 0.1: {times[0]:.0f} ms as PEFT, {times[1]:.0f} ms patched")
    print(*str(fused.report(with_dropout)).splitlines()[:2], "...", sep="\n")
    print(f"{fused.calls[fused.FUSED]} calls ran fused")


if __name__ == "__main__":
    main()
