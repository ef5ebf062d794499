"""Layers that run as one: q, k and v of one x, and an MLP with a gate.

What is here is imported when it is asked for."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ext.blocks.fusing import Block, fuse_blocks, fused_blocks, unfuse_blocks
    from lora_ext.blocks.fusing import fuse_or_warn as fuse_or_warn
    from lora_ext.blocks.operators import lora_mlp, lora_qkv

__all__ = ["Block", "fuse_blocks", "fused_blocks", "lora_mlp", "lora_qkv", "unfuse_blocks"]

_MODULES = dict.fromkeys(("lora_mlp", "lora_qkv"), "operators")
_MODULES |= dict.fromkeys(("Block", "fuse_blocks", "fused_blocks", "unfuse_blocks"), "fusing")
_MODULES["fuse_or_warn"] = "fusing"  # for functions of this package


def are_fused() -> bool:
    """Whether any model in this process may have blocks that `fuse_blocks` made."""
    return f"{__name__}.fusing" in sys.modules


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return globals().setdefault(name, found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
