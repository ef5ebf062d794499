"""Modules that hold a quantized matrix as their weight, whichever library made them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from lora_ext.quant.call import Dequantizable
from lora_ext.quant.checks import fail, is_integer, version
from lora_ext.quant.kinds import DEQUANTIZERS, Dequantize
from lora_ext.quant.linear import Linear
from lora_ext.quant.read import read_weight

# What was read of a module, and of which tensors.
_READ: WeakKeyDictionary[nn.Module, tuple[object, Dequantizable]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class CalledWeight:
    """The matrix of a layer that a function dequantises, in every call anew."""

    layer: ref[nn.Module]
    function: Dequantize
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [N, K], as the function gives it."""
        layer = self.owner()
        found = self.function(layer).detach()
        if tuple(found.shape) != self.shape:
            expected = f"shape {list(self.shape)}, as before"
            what = f"the function registered for {type(layer).__qualname__}"
            fail(what, "result", found, expected)
        return found.to(self.dtype if dtype is None else dtype)

    def owner(self) -> nn.Module:
        """The layer, of which it holds a weak reference: what was read of a layer does not keep
        that alive."""
        layer = self.layer()
        assert layer is not None, "the layer is gone"
        return layer

    def versions(self) -> tuple[int, ...]:
        """How often each of the layer's tensors was changed in place."""
        layer = self.owner()
        return tuple(version(t) for t in (*layer.parameters(), *layer.buffers()))


def quantized_weight(module: nn.Module, name: str = "weight") -> Dequantizable:
    """The matrix of a module of a `quantized_kind`; read anew when its tensors are others.

    Raises:
        ValueError: it is not quantized yet, or in a layout that is not read; says what to do.
    """
    state = _state(module)
    known = _READ.get(module)
    if known is not None and known[0] == state:
        return known[1]
    function = next((DEQUANTIZERS[k] for k in type(module).__mro__ if k in DEQUANTIZERS), None)
    found: Dequantizable
    if function is None:
        found = read_weight(module, name)
    else:
        values = function(module)
        if not isinstance(values, Tensor) or values.dim() != 2 or not values.is_floating_point():
            expected = "a matrix [out_features, in_features] in floating point"
            kind = type(module).__qualname__
            fail(name, f"result of the function registered for {kind}", values, expected)
        shape = (values.shape[0], values.shape[1])
        sizes = tuple(getattr(module, name, None) for name in ("out_features", "in_features"))
        if all(map(is_integer, sizes)) and sizes != shape:
            kind = type(module).__qualname__
            expected = f"shape {list(sizes)}, [out_features, in_features] of the layer"
            fail(name, f"result of the function registered for {kind}", values, expected)
        found = CalledWeight(ref(module), function, shape, values.dtype, values.device)
    _READ[module] = state, found
    return found


def _state(module: nn.Module) -> object:
    """What tells whether a module's tensors are those that were read."""
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return [t.device for t in (*module.parameters(), *module.buffers())][:1]
    if isinstance(module, Linear):
        return id(module.quantized_weight)
    inner = getattr(weight, "__tensor_flatten__", None)
    tensors = [weight] if inner is None else [getattr(weight, name) for name in inner()[0]]
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    scales: list[Any] = [getattr(state, name, None) for name in ("absmax", "offset")]
    scales += [getattr(getattr(state, "state2", None), "absmax", None)]
    scales += [getattr(owner, "SCB", None) for owner in (weight, getattr(module, "state", None))]
    tensors += [tensor for tensor in scales if isinstance(tensor, Tensor)]
    marks = [(t.data_ptr(), version(t), t.device, t.shape) for t in tensors]
    # A subclass's copy_ runs below autograd, which counts it for the whole, not for what is inside.
    whole = None if inner is None else version(weight)
    repacked = getattr(state, "packing_format_for_cpu", False)
    return [id(weight), weight.dtype, id(state), repacked, whole, marks]


def resting_dtype(
    module: nn.Module, matrix: Dequantizable, cast_to: torch.dtype | None = None
) -> torch.dtype:
    """That of the weight where there is no x, and of adapters."""
    own = getattr(module, "compute_dtype", None)
    return own if isinstance(own, torch.dtype) else cast_to or matrix.dtype
