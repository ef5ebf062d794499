"""Prints TORCH_CUDA_ARCH_LIST for the GPU of this machine, or says in one sentence what is missing.

For `make gpu-build`, which builds for this one GPU.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def missing() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}); choose a Python that has it, with PYTHON"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with it"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc") if home is None else Path(home) / "bin" / "nvcc"
    if nvcc is None or not Path(nvcc).exists():
        return "there is no nvcc on PATH or in CUDA_HOME; install the CUDA toolkit of torch's CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU; nvidia-smi says whether the driver does"
    return None


def architecture() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"  # a: TMA and wgmma


if __name__ == "__main__":
    if reason := missing():
        sys.exit(f"make gpu: {sys.executable}: {reason}")
    print(architecture())
