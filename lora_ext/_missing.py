"""Whether this package has its compiled extension, and what to say if not; without torch, which
takes seconds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def has_extension(folder: Path) -> bool:
    """Whether the package in `folder` has its own: that of an editable installation of another
    checkout is found for it, too."""
    spec = importlib.util.find_spec("lora_ext._C")
    return spec is not None and Path(spec.origin or "").parent.resolve() == folder.resolve()


def why_missing(folder: Path) -> str:
    """What is wrong with a package in `folder` that has no extension for this Python."""
    others = [path.name for path in folder.glob("_C.*.so")]
    if others:
        return (
            f"{folder} holds an extension for another Python ({others[0]}); install lora_ext again "
            f"with {sys.executable}"
        )
    if (folder.parent / "setup.py").exists():
        return (
            f"{folder} is lora_ext's source folder, without a compiled extension. Python finds "
            f"it before an installed lora_ext if it is started in {folder.parent}: start it "
            "elsewhere, or compile in place: pip install -e ."
        )
    return f"{folder} holds no compiled extension; install lora_ext again"
