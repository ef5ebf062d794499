"""Several layers of one x: lora_linear_multi beside calls of lora_linear for each, and beside plain
PyTorch.

    python benchmarks/bench_lora_linear_multi.py --help

The contenders take turns in shuffled rounds of one process, so that drift hits all alike. A ratio
is the median over rounds of two times of the same round.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_ext
from lora_ext.bench.grid import DTYPES
from lora_ext.bench.measure import Budget, time_row
from lora_ext.bench.problem import SCALING
from lora_ext.bench.rivals import FROZEN

# The layers' sizes: q, k, v with grouped queries, and gate and up, of models of 0.5 to 1 G weights.
LAYERS = {"qkv": (2048, (2048, 512, 512)), "gate-up": (1024, (2816, 2816))}
MULTI, SEPARATE, PLAIN = "multi", "separate", "plain"


@dataclass(frozen=True)
class Layers:
    """The operands of every layer; weights are frozen, adapters are trained."""

    weights: list[Tensor]  # each [N, K]
    lora_As: list[Tensor]  # each [r, K]
    lora_Bs: list[Tensor]  # each [N, r]
    dropout_p: float

    def frozen(self, x: Tensor) -> list[Tensor]:
        return [F.linear(x, weight) for weight in self.weights]

    def plain(self, x: Tensor) -> list[Tensor]:
        return [
            F.linear(x, weight) + SCALING * F.linear(F.linear(F.dropout(x, self.dropout_p), A), B)
            for weight, A, B in zip(self.weights, self.lora_As, self.lora_Bs, strict=True)
        ]

    def separate(self, x: Tensor) -> list[Tensor]:
        return [
            lora_ext.lora_linear(x, weight, None, A, B, scaling=SCALING, dropout_p=self.dropout_p)
            for weight, A, B in zip(self.weights, self.lora_As, self.lora_Bs, strict=True)
        ]

    def multi(self, x: Tensor) -> list[Tensor]:
        return lora_ext.lora_linear_multi(
            x, self.weights, None, self.lora_As, self.lora_Bs,
            scalings=SCALING, dropout_p=self.dropout_p,
        )  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    x: Tensor  # [M, K], a leaf that requires grad
    dys: list[Tensor]  # of each layer [M, N]


def make_layers(name: str, r: int, dtype: torch.dtype, dropout_p: float) -> Layers:
    K, widths = LAYERS[name]
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)

    return Layers(
        [normal(N, K) for N in widths],
        [normal(r, K).requires_grad_() for _ in widths],
        [normal(N, r).requires_grad_() for N in widths],
        dropout_p,
    )


def check(layers: Layers, x: Tensor) -> None:
    """The same bits as separate calls, of the same masks."""
    torch.manual_seed(0)
    multi = layers.multi(x)
    torch.manual_seed(0)
    for one, other in zip(multi, layers.separate(x), strict=True):
        assert torch.equal(one, other)


def measure(layers: Layers, tokens: int, backward: bool, seconds: float) -> dict[str, list[float]]:
    """µs of each contender in each round."""
    K, dtype = layers.weights[0].shape[1], layers.weights[0].dtype
    widths = [len(weight) for weight in layers.weights]
    batches = [
        Inputs(
            torch.randn(tokens, K).to(dtype).requires_grad_(),
            [torch.randn(tokens, N).to(dtype) for N in widths],
        )
        for _ in range(3)
    ]
    check(layers, batches[0].x)
    trained = [*layers.lora_As, *layers.lora_Bs]

    def call(
        way: Callable[[Tensor], list[Tensor]], leaves: list[Tensor]
    ) -> Callable[[Inputs], object]:
        def run(batch: Inputs) -> object:
            if not backward:
                with torch.no_grad():
                    return way(batch.x)
            return torch.autograd.grad(way(batch.x), [batch.x, *leaves], batch.dys)

        return run

    calls = {
        FROZEN: call(layers.frozen, []),
        PLAIN: call(layers.plain, trained),
        SEPARATE: call(layers.separate, trained),
        MULTI: call(layers.multi, trained),
    }
    timings = time_row(calls, batches, Budget(seconds))
    return {name: list(timing.samples_us) for name, timing in timings.items()}


def ratio(of: list[float], over: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(of, over, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 2048])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("layers   M     dtype p    mode     multi ms  multi/separate  multi/plain  "
          "separate/frozen  multi/frozen  rounds")  # fmt: skip
    axes = itertools.product(
        options.layers, options.tokens, options.dtypes, options.dropouts, (False, True)
    )
    for name, tokens, dtype, p, backward in axes:
        layers = make_layers(name, options.rank, DTYPES[dtype], p)
        times = measure(layers, tokens, backward, options.seconds)
        multi = times[MULTI]
        print(
            f"{name:8} {tokens:<5} {dtype:5} {p:<4} {'fwd+bwd' if backward else 'fwd':8}"
            f"{statistics.median(multi) / 1000:9.2f}  {ratio(multi, times[SEPARATE]):14.3f}  "
            f"{ratio(multi, times[PLAIN]):11.3f}  {ratio(times[SEPARATE], times[FROZEN]):15.3f}  "
            f"{ratio(multi, times[FROZEN]):12.3f}  {len(multi):6}",
            flush=True,
        )


if __name__ == "__main__":
    main()
