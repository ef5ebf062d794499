"""Loads the compiled extension, and says in one line why if it cannot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lora_ext._missing import has_extension, why_missing

if sys.platform != "linux":
    raise ImportError(f"lora_ext runs on Linux only; this is {sys.platform}")
if not has_extension(Path(__file__).parent):
    raise ImportError(why_missing(Path(__file__).parent))

import torch

try:
    # Importing registers the operators under torch.ops.lora_ext.
    from lora_ext import _C as _C
except ImportError as error:
    raise ImportError(
        f"lora_ext's compiled extension does not load with torch {torch.__version__} ({error}); "
        "it is built for one torch release: reinstall lora_ext with this torch installed"
    ) from error


def build_info() -> dict[str, Any]:
    """What the extension was built for: version, torch, cuda (None on a CPU build), compiler; the
    `cpu_capability` whose kernels it runs (default, avx2, avx512, avx512_bf16 or
    amx_bf16); `cuda_paths`, what LORA_EXT_CUDA_PATH can ask for, the default first; and
    `cuda_path`, what it asks for (None on a CPU build)."""
    return _C.build_info()


__version__: str = build_info()["version"]

_built_for = build_info()["torch"].split("+")[0].split(".")[:2]
if _built_for != torch.__version__.split("+")[0].split(".")[:2]:
    raise ImportError(
        f"lora_ext was built for torch {build_info()['torch']}, but torch {torch.__version__} is "
        "installed; reinstall lora_ext so that it is compiled again"
    )
