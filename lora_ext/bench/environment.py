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

_PACKAGES = ("lora_ext", "torch", "peft")


def describe(device: torch.device, arguments: Sequence[str]) -> dict[str, Any]:
    """Collect what a reader needs to judge or repeat a run."""
    return {
        "device": _device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "lora_ext_build": {name: str(value) for name, value in lora_ext.build_info().items()},
        **_git_state(Path(__file__)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "lora_ext.bench", *arguments]),
    }


def summary(environment: dict[str, Any]) -> str:
    """Put it in one line, for captions."""
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    commit = environment["commit"]
    modified = " (modified)" if environment["dirty"] else ""
    source = f"commit {commit[:10]}{modified}" if commit else "no commit"
    threads = f"CPU threads: {environment['threads']}"
    return f"{environment['device']}, {threads}; {versions}; {source}; {environment['date'][:10]}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(source: Path) -> dict[str, Any]:
    """Find the commit of the source, if git tracks it: not that of a repository around a venv."""

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
