"""Timing and memory of the contenders of one row."""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lora_ext.bench.problem import Batch
from lora_ext.bench.results import Quartiles, Timing
from lora_ext.bench.rivals import FROZEN, Contender


class Inputs(Protocol):
    """What calls are given in turn."""

    @property
    def x(self) -> Tensor: ...


B = TypeVar("B", bound=Inputs)
Call = Callable[[B], object]

_WARM_UP_CALLS = 3
_LONG_CALL_S = 0.2
# Short calls are grouped until the fastest contender fills this: far above the clock's resolution
# and, on CUDA, above what the first launch of a sample waits for the CPU, which training hides.
_MIN_SAMPLE_S = {"cpu": 5e-4, "cuda": 5e-3}
_MAX_CALLS_PER_SAMPLE = 200


@dataclass(frozen=True)
class Budget:
    """How long one row may take, all its contenders together, after the warm-up."""

    seconds: float
    min_rounds: int = 5
    max_rounds: int = 100


def _cpu_seconds(call: Call[B], batches: Sequence[B]) -> float:
    start = time.perf_counter_ns()
    for batch in batches:
        call(batch)
    return (time.perf_counter_ns() - start) * 1e-9


def _cuda_seconds(call: Call[B], batches: Sequence[B]) -> float:
    new_event: Callable[..., Any] = torch.cuda.Event
    start, end = (new_event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for batch in batches:
        call(batch)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_row(
    calls: Mapping[str, Call[B]], batches: Sequence[B], budget: Budget
) -> dict[str, Timing]:
    """Times the contenders in rounds of one sample each, so that drift hits all of them alike.

    The order within a round is shuffled, since each contender runs in the caches of the one before.
    """
    seconds = _cuda_seconds if batches[0].x.is_cuda else _cpu_seconds
    rotation = itertools.cycle(batches)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    with _no_garbage_collection():
        fastest = min(_warm_up(call, batches, seconds) for call in calls.values())
        sample = _MIN_SAMPLE_S[batches[0].x.device.type]
        count = min(math.ceil(sample / fastest), _MAX_CALLS_PER_SAMPLE)
        deadline = time.perf_counter() + budget.seconds
        for done in range(budget.max_rounds):
            if done >= budget.min_rounds and time.perf_counter() > deadline:
                break
            shuffle(order)
            for name in order:
                inputs = list(itertools.islice(rotation, count))
                samples[name].append(seconds(calls[name], inputs) / count)
    return {name: _timing(taken, samples[FROZEN], count) for name, taken in samples.items()}


def _warm_up(call: Call[B], batches: Sequence[B], seconds: Callable[..., float]) -> float:
    """Returns the usual time of a few calls, or of one long call: checks have warmed up too."""
    taken: list[float] = []
    while len(taken) < _WARM_UP_CALLS and sum(taken) < _LONG_CALL_S:
        taken.append(seconds(call, batches[:1]))
    return statistics.median(taken)


def _timing(samples: list[float], frozen: list[float], count: int) -> Timing:
    ratios = [own / base for own, base in zip(samples, frozen, strict=True)]
    times = [round(seconds * 1e6, 3) for seconds in samples]
    return Timing(Quartiles.of(times), Quartiles.of(ratios), times, count)


def saved_bytes(contender: Contender, batch: Batch) -> int:
    """Counts the bytes that a forward keeps for backward: unique storages, without parameters.

    x counts where it is kept, although whoever produced it may share it.
    """
    return kept_bytes(lambda: contender.layer(batch.x), contender.layer.parameters())


def kept_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """The same of any forward."""
    own = set(map(_storage, parameters))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()  # held, so that no storage is freed and its address reused
    del y
    return sum(size for storage, size in kept.items() if storage not in own)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def peak_bytes(call: Call[B], batch: B) -> int | None:
    """Measures what a call allocates at its peak, over what was there before; CUDA only."""
    device = batch.x.device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before
