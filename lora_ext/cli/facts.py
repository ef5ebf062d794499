"""What `doctor` looks at. Torch and lora_ext are imported by other processes: either may crash."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEPENDENCIES = ("numpy", "regex", "rich", "safetensors")
_ANSWER = "lora-ext-answer:"  # others print, too

# What Python finds where the user is, as `python -c` does: the present folder comes first.
_TORCH = """
import torch
answer = {"version": torch.__version__, "cuda": torch.version.cuda,
          "available": torch.cuda.is_available(), "folder": torch.__path__[0]}
"""
_PLACE = """
import importlib.util
spec = importlib.util.find_spec("lora_ext")
answer = {"folder": spec and os.path.dirname(spec.origin or ""), "path": sys.path}
"""
_BUILD = """
import lora_ext
answer = {k: v if v is None else str(v) for k, v in lora_ext.build_info().items()}
"""


@dataclass(frozen=True)
class Facts:
    """
    Attributes:
        torch: version, cuda, available, folder; None where it cannot be imported.
        torch_error: why not; "" also where there is none.
        folder: of the package that Python finds here; None without one.
        others: folders of other copies on Python's path that have an extension.
        missing: why the package has no extension; "" if it has.
        build: what `build_info()` says; None where the import fails.
        import_error: how it fails.
        gpus: names, from nvidia-smi.
        nvcc: its release, "12.8"; "" without one.
        compiler: command and version; None without one.
        headers: whether Python.h is there.
        uninstalled: dependencies that are missing.
    """

    platform: str = "linux"
    torch: dict[str, Any] | None = None
    torch_error: str = ""
    folder: str | None = None
    others: list[str] = field(default_factory=list)
    missing: str = ""
    build: dict[str, Any] | None = None
    import_error: str = ""
    gpus: list[str] = field(default_factory=list)
    nvcc: str = ""
    compiler: tuple[str, str] | None = None
    headers: bool = True
    uninstalled: list[str] = field(default_factory=list)


def collect() -> Facts:
    """Takes a few seconds, of which most are two imports of torch."""
    torch, torch_error = _ask(_TORCH) if importlib.util.find_spec("torch") else (None, "")
    place, _ = _ask(_PLACE)
    place = place or {"folder": None, "path": []}
    folder = place["folder"]
    build, import_error = _ask(_BUILD) if folder is not None else (None, "")
    return Facts(
        platform=sys.platform,
        torch=torch,
        torch_error=torch_error,
        folder=folder,
        others=_others(place["path"], folder),
        missing="" if folder is None else _why_missing(Path(folder)),
        build=build,
        import_error=import_error,
        gpus=_lines(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]),
        nvcc=_nvcc(),
        compiler=_compiler(),
        headers=Path(sysconfig.get_path("include"), "Python.h").exists(),
        uninstalled=[name for name in DEPENDENCIES if importlib.util.find_spec(name) is None],
    )


def _ask(script: str) -> tuple[dict[str, Any] | None, str]:
    """What the script puts into `answer`, or how it ended."""
    text = f"import json, os, sys\n{script}\nprint({_ANSWER!r} + json.dumps(answer))"
    try:
        result = subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, timeout=300
        )
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(error)
    for line in result.stdout.splitlines():
        if line.startswith(_ANSWER):
            found: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
            return found, ""
    if result.returncode < 0:
        return None, f"Python was ended by signal {-result.returncode}"
    return None, (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]


def _why_missing(folder: Path) -> str:
    if any((folder / f"_C{suffix}").exists() for suffix in _suffixes()):
        return ""
    from lora_ext._missing import why_missing

    return why_missing(folder)


def _others(path: Sequence[str], folder: str | None) -> list[str]:
    """Copies with an extension for this Python behind the one that is found."""
    found = []
    for entry in path:
        other = Path(entry or ".", "lora_ext").resolve()
        has_one = any((other / f"_C{suffix}").exists() for suffix in _suffixes())
        if has_one and (folder is None or other != Path(folder).resolve()):
            found.append(str(other))
    return list(dict.fromkeys(found))


def _suffixes() -> list[str]:
    return [str(sysconfig.get_config_var("EXT_SUFFIX")), ".abi3.so", ".so"]


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")  # where setup.py looks
    command = str(Path(home, "bin", "nvcc")) if home else "nvcc"
    return "\n".join(_lines([command, "--version"])).partition("release ")[2].partition(",")[0]


def _compiler() -> tuple[str, str] | None:
    asked = os.environ.get("CXX", "").strip()
    for command in [asked.split()[0]] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(command):
            first = (_lines([command, "--version"]) or [""])[0]
            version = re.search(r"\d+\.\d+(\.\d+)?", re.sub(r"\(.*?\)", "", first))
            kind = "clang" if "clang" in first else "g++"
            return f"{command} ({kind})", version[0] if version else ""
    return None


def _lines(command: list[str]) -> list[str]:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return result.stdout.strip().splitlines() if result.returncode == 0 else []
