"""What to say where this package has no compiled extension; without torch, which takes seconds."""

from __future__ import annotations

import sys
from pathlib import Path


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
