"""Which path a call on a GPU takes, measured: `autotune`."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_ext._extension import _C, __version__, build_info
from lora_ext.arguments import check_module, refuse, warn
from lora_ext.nn import Linear

# In the order in which they are preferred where the clock sees no difference.
PATHS = tuple(build_info()["cuda_paths"][1:])
NOISE = 0.02  # of the fastest time


@dataclass(frozen=True)
class Call:
    """What calls of `lora_linear` on CUDA are told apart by."""

    backward: bool
    tokens: int  # a power of two: for so many rows, and for fewer than twice as many
    out_features: int
    in_features: int
    r: int
    base: str  # dtype, "bfloat16"
    adapter: str
    dropout: bool

    def on(self, device: int) -> _C.CudaCall:
        facts = asdict(self) | {name: getattr(torch, getattr(self, name)) for name in DTYPES}
        return _C.CudaCall(device=device, **facts)


DTYPES = ("base", "adapter")


@dataclass(frozen=True)
class TunedCall:
    """A call, the path that is taken for it from now on, and what each path took."""

    call: Call
    path: str
    milliseconds: dict[str, float]


def autotune(
    model: nn.Module,
    tokens: Iterable[int] = (2048,),
    *,
    cache: str | os.PathLike[str] | None = None,
    rounds: int = 15,
) -> list[TunedCall]:
    """Measures the paths of each `lora_ext.nn.Linear` of `model` that is on a GPU in bf16 or fp16,
    as it would run now (training or not, its adapters), and lets such calls take the fastest.

    The choice is kept in a file for each kind of GPU, so that the next process only reads it. It
    holds for this process, for calls with as many rows up to a power of two. `explain` shows it.
    The paths round in different places, within the same bounds.

    Args:
        tokens: numbers of rows (batch times sequence) to measure.
        cache: folder of the files; by default $LORA_EXT_CACHE, $XDG_CACHE_HOME/lora_ext or
            ~/.cache/lora_ext.
        rounds: times that each path is measured; the median counts.

    Raises:
        ValueError: no such layer, or tokens or rounds below 1.
        RuntimeError: LORA_EXT_CUDA_PATH asks for one path, which all calls take.
    """
    check_module("autotune", "model", model)
    if isinstance(tokens, int):
        tokens = (tokens,)
    if not isinstance(tokens, Iterable) or isinstance(tokens, str):
        refuse("autotune", "tokens", tokens, "a list of numbers of rows")
    tokens = tuple(tokens)
    for count in (*tokens, rounds):
        if type(count) is not int:
            refuse("autotune", "tokens, rounds", count, "integers of at least 1")
    wanted = sorted({1 << (count.bit_length() - 1) for count in tokens if count >= 1})
    if not wanted or rounds < 1:
        raise ValueError(
            f"autotune: tokens, rounds: got {tokens} and {rounds}, expected at least 1 of each"
        )
    calls = {
        (device.index or 0, call): None
        for device, call in calls_of(model, wanted)
        if device.type == "cuda" and _has_kernels(call, device.index or 0)
    }
    if not calls:
        raise ValueError(
            "autotune: model: got no lora_ext.nn.Linear on a GPU from sm_80 on, in bfloat16 or "
            "float16, with an adapter of rank 1 to 1024 that runs; other layers have one path: "
            "move the model, or leave this out"
        )
    asked = build_info()["cuda_path"]
    if asked != "auto":
        raise RuntimeError(
            f"autotune: LORA_EXT_CUDA_PATH is '{asked}': every call takes that path, so there is "
            "nothing to measure; unset it, or leave this out"
        )
    results = []
    for index in sorted({index for index, _ in calls}):
        file = cache_file(torch.cuda.get_device_name(index), cache)
        known = read_cache(file, versions(index))
        for call in (call for at, call in calls if at == index):
            tuned = known.get(call)
            if tuned is None:
                tuned = choose(call, measure(call, index, rounds))
                known[call] = tuned
                write_cache(file, versions(index), known)
            _C.set_tuned_cuda_path(call.on(index), tuned.path)
            results.append(tuned)
    return results


def _has_kernels(call: Call, device: int) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    return _C.has_cuda_kernels(call.on(device), 10 * major + minor)


def calls_of(model: nn.Module, tokens: Iterable[int]) -> list[tuple[torch.device, Call]]:
    """Forward and backward of each layer, for each number of rows."""
    calls = []
    for layer in model.modules():
        if not isinstance(layer, Linear) or not layer.running_adapters:
            continue
        weight = layer._adapted_weight()
        for adapter in layer.low_rank():
            base, other = (str(t.dtype).removeprefix("torch.") for t in (weight, adapter[0]))
            sizes = (layer.out_features, layer.in_features, len(adapter.lora_A), base, other)
            calls += [
                (weight.device, Call(backward, count, *sizes, adapter.dropout_p > 0.0))
                for count in tokens
                for backward in (False, True)
            ]
    return calls


def choose(call: Call, milliseconds: Mapping[str, float]) -> TunedCall:
    limit = min(milliseconds.values()) * (1 + NOISE)
    path = next(path for path in PATHS if milliseconds[path] <= limit)
    return TunedCall(call, path, dict(milliseconds))


def measure(call: Call, device: int, rounds: int) -> dict[str, float]:
    """Milliseconds of the call by each path, on random numbers; the choice is forgotten."""
    base, adapter = (getattr(torch, name) for name in (call.base, call.adapter))

    def random(*size: int, dtype: torch.dtype = base) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=f"cuda:{device}")

    x, dy = random(call.tokens, call.in_features), random(call.tokens, call.out_features)
    weight = random(call.out_features, call.in_features)
    lora_A = random(call.r, call.in_features, dtype=adapter)
    lora_B = random(call.out_features, call.r, dtype=adapter)
    p = 0.1 if call.dropout else 0.0  # any probability costs the same
    state = torch.tensor([1, 2], device=x.device) if call.dropout else None
    scale = (1.0, None, p, state)
    forward, backward = torch.ops.lora_ext.lora_linear_fwd, torch.ops.lora_ext.lora_linear_bwd
    _, h = forward(x, weight, None, lora_A, lora_B, None, *scale, True)
    wanted = [True, False, False, True, True, False]  # dx, dA, dB

    def run() -> None:
        if call.backward:
            backward(dy, x, h, weight, lora_A, lora_B, *scale, wanted)
        else:
            forward(x, weight, None, lora_A, lora_B, None, *scale, True)

    def by(path: str) -> Callable[[], None]:
        def run_by_path() -> None:
            _C.set_tuned_cuda_path(call.on(device), path)
            run()

        return run_by_path

    try:
        return medians({path: by(path) for path in PATHS}, rounds, x.device)
    finally:
        _C.set_tuned_cuda_path(call.on(device), None)


def medians(
    runs: Mapping[str, Callable[[], None]], rounds: int, device: torch.device, least: float = 2.0
) -> dict[str, float]:
    """Milliseconds of a call of each: medians over rounds in which they take turns, each called for
    about `least` milliseconds at a time."""

    import statistics  # with fractions and decimal, for those who measure

    def timed(run: Callable[[], None], count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(count):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) * 1e3 / count

    for run in runs.values():
        timed(run, 3)
    counts = {name: max(1, round(least / timed(run, 3))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run, counts[name]))
    return {name: statistics.median(values) for name, values in times.items()}


# ---- The cache ---------------------------------------------------------------------------------


def versions(device: int) -> dict[str, str]:
    """What a measurement holds for."""
    return {
        "device": torch.cuda.get_device_name(device),
        "lora_ext": __version__,
        "torch": torch.__version__,
        "cuda": str(build_info()["cuda"]),
    }


def cache_file(device_name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    if folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = os.environ.get("LORA_EXT_CACHE") or Path(home, "lora_ext")
    name = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return Path(folder) / f"autotune-{name}.json"


def read_cache(file: Path, wanted: Mapping[str, str]) -> dict[Call, TunedCall]:
    """What was measured for these versions; nothing, with a warning, from a file that cannot be
    understood."""
    try:
        content = json.loads(file.read_text())
        if content["versions"] != dict(wanted):
            return {}
        tuned = [
            TunedCall(_call(row["call"]), row["path"], row["milliseconds"])
            for row in content["calls"]
        ]
        if any(one.path not in PATHS for one in tuned):
            raise ValueError(f"a path is none of {', '.join(PATHS)}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn(f"autotune: {file} is not used ({error!r}); measuring again")
        return {}
    return {one.call: one for one in tuned}


def _call(row: Mapping[str, Any]) -> Call:
    if row.keys() != {field.name for field in fields(Call)}:
        raise ValueError(f"a call has the facts {sorted(row)}")
    if any(not isinstance(getattr(torch, str(row[name]), None), torch.dtype) for name in DTYPES):
        raise ValueError("a call has a dtype that there is not")
    return Call(**row)


def write_cache(file: Path, made_for: Mapping[str, str], known: Mapping[Call, TunedCall]) -> None:
    """Another process sees the old file or the new one. A cache that cannot be written is said."""
    content = {"versions": dict(made_for), "calls": [asdict(one) for one in known.values()]}
    staged = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(content, indent=1) + "\n")
        staged.replace(file)
    except OSError as error:
        with suppress(OSError):
            staged.unlink()
        warn(f"autotune: {file} is not written: {error}")
