"""Which modules have a quantized matrix as their weight. No more is imported for a model that has
none: libraries' tensors are known by what they have, and layers of our own add themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Dequantize = Callable[[Any], Tensor]

# What the layers of other classes are dequantised by.
DEQUANTIZERS: dict[type[nn.Module], Dequantize] = {}
# Classes of this package.
OWN: set[type[nn.Module]] = set()

_NF4 = ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean", "nf4")


def register_dequantizer(kind: type[nn.Module], function: Dequantize) -> None:
    """Has linear layers of a class that is not known here (GPTQ's, AWQ's, HQQ's) take adapters.

    Args:
        kind: the class; of subclasses only those that keep its forward run as this one.
        function: of a layer, gives its weight [out_features, in_features], in floating point. It
            is called in every forward, and in backward again: nothing of it is kept.

    Raises:
        TypeError: kind is no class of modules, or one of torch's or this package's, all of whose
            layers it would be, or function cannot be called.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"register_dequantizer: kind: got {kind!r}, expected a class of modules")
    if kind.__module__.split(".")[0] in ("torch", "lora_ext"):
        raise TypeError(
            f"register_dequantizer: kind: got {kind.__qualname__}, which all such layers of this "
            "process are, expected the class of a library's, or your, quantized layers"
        )
    if not callable(function):
        raise TypeError(f"register_dequantizer: function: got {function!r}, expected a function")
    DEQUANTIZERS[kind] = function


def quantized_kind(module: object) -> type[nn.Module] | None:
    """The class whose forward is the product of a quantized weight, if module is of such a one."""
    if not isinstance(module, nn.Module):
        return None
    for kind in type(module).__mro__:
        if kind in DEQUANTIZERS:
            return kind
    if not isinstance(module, nn.Linear):
        return None
    for kind in type(module).__mro__:
        if kind in OWN:
            return kind
    weight = module.__dict__["_parameters"].get("weight")
    if weight is None or (type(weight) is nn.Parameter and not weight.__dict__):
        return None
    if has_quant_state(weight) or has_scb(weight):
        owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
        return owner if owner.__module__.startswith("bitsandbytes.") else _library_kind(module)
    if is_nf4(weight) or is_torchao(weight):
        return nn.Linear
    return None


def _library_kind(module: nn.Module) -> type[nn.Module]:
    for kind in type(module).__mro__:
        if kind.__module__.startswith("bitsandbytes.") and "forward" in vars(kind):
            return kind
    return nn.Linear


def is_own(module: nn.Module) -> bool:
    """Whether it is a `lora_ext.quant.Linear`."""
    return not OWN.isdisjoint(type(module).__mro__)


def has_quant_state(weight: Any) -> bool:
    """Whether it is a Params4bit of bitsandbytes."""
    return hasattr(weight, "quant_state") and hasattr(weight, "quant_type")


def has_scb(weight: Any) -> bool:
    """Whether it is an Int8Params of bitsandbytes."""
    return hasattr(weight, "CB") and hasattr(weight, "SCB")


def is_nf4(weight: Any) -> bool:
    """Whether it is torchao's NF4Tensor."""
    return all(hasattr(weight, field) for field in _NF4)


def is_torchao(weight: Any) -> bool:
    """Whether torchao defines its class."""
    return any(kind.__module__.split(".")[0] == "torchao" for kind in type(weight).__mro__)
