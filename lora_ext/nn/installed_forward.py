"""Forwards that are set on a model's linear layers, and that a layer with adapters in the place of
such a one has, too: of its own.

Those of transformers' tensor parallelism (`tp_plan`) make DTensors of what goes in, call the
forward that was there, and make of its result what the plan says. Those of `lora_ext.fuse_blocks`
ask the layer's block."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import nn

from lora_ext.nn.transaction import shallow

Module = TypeVar("Module", bound=nn.Module)

_MODULE = "transformers.distributed.tensor_parallel"
_BLOCKS = "lora_ext.blocks.fusing"


def installed_style(module: nn.Module) -> tuple[Any, Any] | None:
    """(style, mesh) of such a forward; None where there is none."""
    forward: Any = module.__dict__.get("forward")
    if getattr(forward, "__module__", None) != _MODULE or not forward.__closure__:
        return None
    cells = (cell.cell_contents for cell in forward.__closure__)
    held = dict(zip(forward.__code__.co_freevars, cells, strict=True))
    style, mesh = held.get("self"), held.get("mesh")
    return (style, mesh) if hasattr(style, "install_forward") else None


def is_in_block(module: object) -> bool:
    """Whether this is a layer whose forward asks its block."""
    forward = module.__dict__.get("forward") if isinstance(module, nn.Module) else None
    return isinstance(forward, functools.partial) and forward.func.__module__ == _BLOCKS


def in_block_of(source: nn.Module, target: nn.Module) -> Any:
    """The forward of `target` in the place of a layer whose forward asks its block."""
    forward: Any = source.__dict__["forward"]
    block, _, place = forward.args
    return functools.partial(forward.func, block, target, place)


def without_forward(module: Module) -> Module:
    """A copy, with the same tensors, whose forward is its class's."""
    copied = shallow(module)
    copied.__dict__.pop("forward", None)
    return copied


def install_like(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` such a forward if `source` has one."""
    installed = installed_style(source)
    if installed is not None:
        style, mesh = installed
        style.install_forward(target, mesh)
