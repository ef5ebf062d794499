"""Where numbers come from: device, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import lora_ext
from lora_ext.bench.load import describe_load

_PACKAGES = ("lora_ext", "torch", "peft")
_GPU_FIELDS = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "temperature.gpu", "power.draw", "power.limit", "utilization.gpu", "memory.used",
)  # fmt: skip


# Of every report; a reader needs them, and so do tables and captions.
REQUIRED = {
    "device": str, "threads": int, "cpus": int, "load_average": float,
    "versions": dict[str, str | None], "commit": str | None, "dirty": bool | None, "date": str,
    "command": str,
}  # fmt: skip
# Of some reports.
OPTIONAL = {
    "other_load": float | None,
    "gpu": dict[str, str] | None,
    "left_out": list[str] | None,
    "quantized": str | None,
}


def describe(
    device: torch.device, arguments: Sequence[str], program: str = "-m lora_ext.bench"
) -> dict[str, Any]:
    """Collects what a reader needs to judge or repeat a run."""
    return {
        "device": _device_name(device),
        "device_type": device.type,
        "gpu": gpu_state(device),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
            "torch": torch.__version__,  # with what it was built for
        },
        "lora_ext_build": {name: str(value) for name, value in lora_ext.build_info().items()},
        **_git_state(Path(__file__)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python {program} {shlex.join(arguments)}".rstrip(),
    }


def summary(environment: dict[str, Any]) -> str:
    """Puts it in one line, for captions."""
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    commit = environment["commit"]
    modified = " (modified)" if environment["dirty"] else ""
    source = f"commit {commit[:10]}{modified}" if commit else "no commit"
    threads = f"CPU threads: {environment['threads']}"
    gpu = environment.get("gpu")
    driver = f", driver {gpu['driver_version']}, {gpu['clocks.sm']}" if gpu else ""
    device = f"{environment['device']}{driver}, {threads}, {describe_load(environment)}"
    return f"{device}; {versions}; {source}; {environment['date'][:10]}"


def gpu_state(device: torch.device) -> dict[str, str] | None:
    """What nvidia-smi says of the GPU now: driver, clocks, temperature, power; None without one.

    Clocks fall within moments when nothing runs, so those that count are read right after a run.
    """
    if device.type != "cuda":
        return None
    fields = f"--query-gpu=uuid,{','.join(_GPU_FIELDS)}"
    command = ["nvidia-smi", fields, "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return parse_gpu_state(answer.stdout, str(torch.cuda.get_device_properties(index).uuid))


def parse_gpu_state(answer: str, uuid: str) -> dict[str, str] | None:
    """The line of this GPU: torch may see fewer of them than nvidia-smi, with other numbers."""
    for line in answer.splitlines():
        found, *values = (value.strip() for value in line.split(","))
        if found.removeprefix("GPU-") == uuid.removeprefix("GPU-"):
            return dict(zip(_GPU_FIELDS, values, strict=False))
    return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(source: Path) -> dict[str, Any]:
    """Finds the commit of the source, if git tracks it: not that of a repository around a venv."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        commit = git("rev-parse", "HEAD")
        return {
            "commit": commit,
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
