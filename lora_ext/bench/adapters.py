"""Many adapters in one batch: `python -m lora_ext.bench --adapters 8,64`.

The denominator is one adapter of the mean rank on all rows, as `lora_ext` runs it. Contenders take
turns in shuffled rounds; each is checked against float64 before it is timed.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lora_ext
from lora_ext.bench.grid import DTYPES, FWD, FWD_BWD
from lora_ext.bench.measure import Budget, time_row
from lora_ext.bench.problem import SCALING, Batch
from lora_ext.bench.rivals import FROZEN
from lora_ext.functional import LowRank

ONE, OURS, SEGMENTS, PEFT, STACK = "one adapter", "lora_ext", "calls", "peft", "stack + bmm"
_MIN_WIDTH = 100  # of the table, where there is no terminal
_RANKS = (4, 64, 16, 8, 32, 12, 48, 24)  # taken in turn

Way = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """What was measured of one size: times over those of one adapter, medians of paired rounds."""

    shape: str
    tokens: int
    adapters: int
    dtype: str
    mode: str
    us: dict[str, float]
    ratio: dict[str, float]


@dataclass(frozen=True)
class Mixed:
    """The operands: rows of x belong to the adapters one after another, the same number to each."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    As: list[Tensor]
    Bs: list[Tensor]

    @property
    def rows(self) -> int:
        return len(self.x) // len(self.As)

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.As, *self.Bs]


def make_mixed(shape: tuple[int, int], tokens: int, adapters: int, dtype: torch.dtype) -> Mixed:
    K, N = shape
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator)
        return values.mul_(columns**-0.5).to(dtype)

    ranks = list(itertools.islice(itertools.cycle(_RANKS), adapters))
    return Mixed(
        torch.randn(tokens, K, generator=generator).to(dtype),
        normal(N, K),
        [normal(r, K).requires_grad_() for r in ranks],
        [normal(N, r).requires_grad_() for r in ranks],
    )


def _one(mixed: Mixed) -> tuple[Way, list[Tensor]]:
    r = round(statistics.mean(len(A) for A in mixed.As))
    K, N = mixed.x.shape[1], len(mixed.weight)
    A = torch.randn(r, K, dtype=mixed.x.dtype, requires_grad=True)
    B = torch.randn(N, r, dtype=mixed.x.dtype, requires_grad=True)
    return lambda x: lora_ext.lora_linear(x, mixed.weight, None, A, B, scaling=SCALING), [A, B]


def _ours(mixed: Mixed) -> Way:
    adapters = {
        str(i): LowRank(A, B, None, SCALING, 0.0)
        for i, (A, B) in enumerate(zip(mixed.As, mixed.Bs, strict=True))
    }
    # A forward of a model makes it once for all layers.
    plan = lora_ext.batch(list(adapters), lengths=[mixed.rows] * len(adapters))
    return lambda x: lora_ext.lora_linear_grouped(x, mixed.weight, None, adapters, plan)


def _segments(mixed: Mixed) -> Way:
    def run(x: Tensor) -> Tensor:
        parts = zip(torch.split(x, mixed.rows), mixed.As, mixed.Bs, strict=True)
        return torch.cat(
            [
                lora_ext.lora_linear(p, mixed.weight, None, A, B, scaling=SCALING)
                for p, A, B in parts
            ]
        )

    return run


def _stack(mixed: Mixed) -> Way:
    """Adapters filled up to the largest rank and stacked in each forward, as others train them."""
    most = max(len(A) for A in mixed.As)

    def run(x: Tensor) -> Tensor:
        pad = torch.nn.functional.pad
        A = torch.stack([pad(A, (0, 0, 0, most - len(A))) for A in mixed.As])
        B = torch.stack([pad(B, (0, most - B.shape[1])) for B in mixed.Bs])
        own = x.view(len(A), mixed.rows, -1)
        update = torch.bmm(torch.bmm(own, A.mT), B.mT).view(len(x), -1)
        return torch.nn.functional.linear(x, mixed.weight) + SCALING * update

    return run


def _peft(mixed: Mixed) -> tuple[Way, list[Tensor]]:
    """Its mixed batch, which it has for inference; in that mode gradients are made all the same."""
    import peft

    N, K = mixed.weight.shape
    linear = torch.nn.Linear(K, N, bias=False, dtype=mixed.x.dtype)
    linear.weight.data.copy_(mixed.weight)
    base = torch.nn.Sequential(linear)
    model: Any = None
    for i, (A, B) in enumerate(zip(mixed.As, mixed.Bs, strict=True)):
        config = peft.LoraConfig(
            r=len(A), lora_alpha=int(SCALING * len(A)), target_modules=["0"], lora_dropout=0.0
        )
        if model is None:
            model = peft.get_peft_model(base, config, str(i), autocast_adapter_dtype=False)
        else:
            model.add_adapter(str(i), config, autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
        layer.lora_A[str(i)].weight.data.copy_(A)
        layer.lora_B[str(i)].weight.data.copy_(B)
    model.eval()
    names = list(map(str, range(len(mixed.As))))
    leaves = [layer.lora_A[n].weight.requires_grad_() for n in names]
    leaves += [layer.lora_B[n].weight.requires_grad_() for n in names]

    def run(x: Tensor) -> Tensor:
        own = x.view(len(names), mixed.rows, -1)
        y: Tensor = model(own, adapter_names=names)
        return y.reshape(len(x), -1)

    return run, leaves


def ways(mixed: Mixed) -> dict[str, tuple[Way, list[Tensor]]]:
    """How to run it, and what trains."""
    found = {
        FROZEN: (lambda x: torch.nn.functional.linear(x, mixed.weight), []),
        ONE: _one(mixed),
        OURS: (_ours(mixed), mixed.leaves),
        SEGMENTS: (_segments(mixed), mixed.leaves),
        STACK: (_stack(mixed), mixed.leaves),
    }
    try:
        found[PEFT] = _peft(mixed)
    except ImportError:
        pass
    return found


def check(mixed: Mixed, found: dict[str, tuple[Way, list[Tensor]]]) -> None:
    """Against float64: a contender that leaves out an adapter, or gives rows another's, errs by
    most of the update; rounding by a hundredth of it, in 16 bits by few of their units."""
    exact = Mixed(*(_double(value) for value in (mixed.x, mixed.weight, mixed.As, mixed.Bs)))
    with torch.no_grad():
        base = torch.nn.functional.linear(exact.x, exact.weight)
        wanted = _segments(exact)(exact.x)
        for name, (way, _) in found.items():
            if name in (FROZEN, ONE):
                continue
            error = float((way(mixed.x).double() - wanted).norm() / (wanted - base).norm())
            if error > 0.01 + 4 * torch.finfo(mixed.x.dtype).eps:
                raise AssertionError(f"{name} is wrong: an error of {error:.3g} of the update")


def _double(value: Any) -> Any:
    return [one.double() for one in value] if isinstance(value, list) else value.double()


def measure(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    adapters: Sequence[int],
    dtypes: Sequence[str],
    modes: Sequence[str],
    budget: Budget,
) -> Iterator[Row]:
    """Row by row; sizes of which adapters have unequal shares are left out."""
    for shape, M, count, dtype in itertools.product(shapes, tokens, adapters, dtypes):
        if M % count:
            continue
        mixed = make_mixed(shape, M, count, DTYPES[dtype])
        found = ways(mixed)
        check(mixed, found)
        batches = [
            Batch(
                torch.randn_like(mixed.x).requires_grad_(),
                torch.randn(M, len(mixed.weight), dtype=mixed.x.dtype),
            )
            for _ in range(3)
        ]
        for mode in modes:
            calls = {name: _call(way, trained, mode) for name, (way, trained) in found.items()}
            timings = time_row(calls, batches, budget)
            one = timings[ONE].samples_us
            yield Row(
                f"{shape[0]}x{shape[1]}",
                M,
                count,
                dtype,
                mode,
                {n: statistics.median(t.samples_us) for n, t in timings.items()},
                {
                    n: statistics.median(a / b for a, b in zip(t.samples_us, one, strict=True))
                    for n, t in timings.items()
                },
            )


def _call(way: Way, trained: list[Tensor], mode: str) -> Callable[[Batch], object]:
    def run(batch: Batch) -> object:
        if mode == FWD:
            with torch.no_grad():
                return way(batch.x)
        return torch.autograd.grad(way(batch.x), [batch.x, *trained], batch.dy)

    return run


def report(rows: Iterator[Row], console: Console, file: Path | None) -> None:
    """Prints the rows as a table, and writes them."""
    done: list[Row] = []
    for row in rows:
        done.append(row)
        if file is not None:
            file.write_text(json.dumps([asdict(one) for one in done], indent=1))
    if not done:
        raise ValueError("no size of which each adapter has the same number of rows")
    columns = [name for name in (OURS, SEGMENTS, STACK, PEFT) if name in done[0].ratio]
    table = Table(
        *("layer", "rows", "adapters", "dtype", "mode", "one, µs", *columns),
        title="many adapters in one batch: times over those of one adapter of the mean rank",
    )
    for row in done:
        size = (row.shape, str(row.tokens), str(row.adapters), row.dtype, row.mode)
        ratios = (f"{row.ratio[name]:.2f}" for name in columns)
        table.add_row(*size, f"{row.us[ONE]:.0f}", *ratios)
    console.width = max(console.width, _MIN_WIDTH)
    console.print(table)
    console.print(f"calls: one lora_linear for each adapter; modes {FWD}, {FWD_BWD}")
