"""What a step needs of memory at its peak, each contender in a process of its own.

`python -m lora_ext.bench.models.memory`, with a case as JSON on stdin, prints the bytes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_ext.bench.models.bases import make_base
from lora_ext.bench.models.cases import ModelCase, Sizes
from lora_ext.bench.models.ways import WAYS

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of_step(case: ModelCase, way: str, device: torch.device, threads: int) -> int | None:
    """What a step after the first has at its peak over what it found: activations, gradients and
    scratch, without the model and the optimizer's state; None where the system does not tell."""
    asked = {"case": asdict(case), "way": way, "device": str(device), "threads": threads}
    command = [sys.executable, "-m", "lora_ext.bench.models.memory"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory ended with {_last_line(done.stderr)}")
    found: int | None = json.loads(_last_line(done.stdout))
    return found


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing"])[-1]


def peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """What a call has at its peak over what was there before; None where nothing tells."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _give_back()
        _CLEAR.write_text("5", encoding="ascii")  # the peak becomes what is resident now
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except OSError:  # not Linux
        return None


def _give_back() -> None:
    """What the allocator holds of the step before would hide what this one needs."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"{_STATUS} has no {name}")


def _main(asked: dict[str, Any]) -> int | None:
    torch.set_num_threads(asked["threads"])
    device = torch.device(asked["device"])
    case = ModelCase(**asked["case"] | {"sizes": Sizes(**asked["case"]["sizes"])})
    base = make_base(case, device)
    trained = WAYS[asked["way"]].build(base)
    first, second, *_ = base.inputs()
    trained.step(first)  # what a first step makes for all that follow stays out
    return peak_of(lambda: trained.step(second), device)


if __name__ == "__main__":
    print(json.dumps(_main(json.load(sys.stdin))))
