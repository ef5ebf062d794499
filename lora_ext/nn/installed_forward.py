"""The forwards that transformers' tensor parallelism (`tp_plan`) sets on a model's linear layers:
they make DTensors of what goes in, call the forward that was there, and make of its result what the
plan says. A layer with adapters in the place of such a one has its own, made by the same style."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from lora_ext.nn.transaction import shallow

Module = TypeVar("Module", bound=nn.Module)

_MODULE = "transformers.distributed.tensor_parallel"


def installed_style(module: nn.Module) -> tuple[Any, Any] | None:
    """(style, mesh) of such a forward; None where there is none."""
    forward: Any = module.__dict__.get("forward")
    if getattr(forward, "__module__", None) != _MODULE or not forward.__closure__:
        return None
    cells = (cell.cell_contents for cell in forward.__closure__)
    held = dict(zip(forward.__code__.co_freevars, cells, strict=True))
    style, mesh = held.get("self"), held.get("mesh")
    return (style, mesh) if hasattr(style, "install_forward") else None


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
