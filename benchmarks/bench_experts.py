"""Adapters of a mixture of experts, each expert on its own rows, beside the frozen ones and PEFT.

    python benchmarks/bench_experts.py --help

Forward and backward of transformers' Mixtral experts, adapters on both weights. The contenders take
turns in shuffled rounds of one process; a ratio is the median over rounds of two times of the same
round. PEFT forms W + ΔW of all experts in every call.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lora_ext.bench.grid import DTYPES
from lora_ext.bench.measure import Budget, time_row
from lora_ext.bench.rivals import FROZEN
from lora_ext.nn import ParamLayer

OURS, PEFT = "ours", "peft"
WEIGHTS = ["gate_up_proj", "down_proj"]


class Tokens(NamedTuple):
    x: Tensor  # [tokens, hidden]
    chosen: Tensor  # [tokens, k]
    weights: Tensor  # [tokens, k]


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: Tensor) -> Any:
        return self.experts(*inputs)


def make_experts(options: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_local_experts=options.experts,
    )
    config._experts_implementation = options.implementation
    torch.manual_seed(0)
    experts: nn.Module = MixtralExperts(config).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts.requires_grad_(False)


def contenders(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same experts and the same adapters, in the dtype of the experts."""
    frozen = make_experts(options, dtype)
    ours = ParamLayer.from_module(make_experts(options, dtype), WEIGHTS, r=options.rank)
    config = peft.LoraConfig(r=options.rank, lora_alpha=8, target_parameters=WEIGHTS)
    theirs = peft.get_peft_model(
        Block(make_experts(options, dtype)), config, autocast_adapter_dtype=False
    )
    for module in (ours, theirs):
        torch.manual_seed(1)
        for parameter in module.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
    mine, others = (
        {tuple(p.shape): p for p in module.parameters() if p.requires_grad}
        for module in (ours, theirs)
    )
    for shape, parameter in mine.items():
        others[shape].data.copy_(parameter.data)
    return {FROZEN: frozen, OURS: ours, PEFT: theirs}


def step(module: nn.Module) -> Callable[[Tokens], object]:
    trained = [p for p in module.parameters() if p.requires_grad]

    def run(batch: Tokens) -> object:
        y = module(*batch)
        return torch.autograd.grad(y, [batch.x, *trained], torch.ones_like(y))

    return run


def check(modules: dict[str, nn.Module], batch: Tokens) -> None:
    found, wanted = (modules[name](*batch).detach().double() for name in (OURS, PEFT))
    error = float((found - wanted).norm() / wanted.norm())
    assert error < 0.03, f"PEFT's result differs by {error:.3g}"


def ratio(of: list[float], over: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(of, over, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--each", nargs="+", type=int, default=[1, 2, 8], help="experts of a token")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--implementation", default="grouped_mm", help="transformers'")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("tokens each dtype  ours ms  ours/frozen  peft/frozen  peft/ours  rounds")
    for tokens, k, name in itertools.product(options.tokens, options.each, options.dtypes):
        dtype = DTYPES[name]
        modules = contenders(options, dtype)
        batches = [
            Tokens(
                torch.randn(tokens, options.hidden).to(dtype).requires_grad_(),
                torch.rand(tokens, options.experts).topk(k, -1).indices,
                torch.rand(tokens, k).to(dtype),
            )
            for _ in range(2)
        ]
        check(modules, batches[0])
        calls = {one: step(module) for one, module in modules.items()}
        times = {
            one: list(timing.samples_us)
            for one, timing in time_row(calls, batches, Budget(options.seconds)).items()
        }
        print(
            f"{tokens:<6} {k:<4} {name:5} {statistics.median(times[OURS]) / 1000:8.1f}"
            f"{ratio(times[OURS], times[FROZEN]):13.3f}{ratio(times[PEFT], times[FROZEN]):13.3f}"
            f"{ratio(times[PEFT], times[OURS]):11.3f}{len(times[OURS]):8}",
            flush=True,
        )


if __name__ == "__main__":
    main()
