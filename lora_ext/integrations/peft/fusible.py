"""What a fused call of a PEFT layer takes, or why PEFT has to run the layer itself.

A fused call reads the tensors of the layer's modules and does not call these modules. So they must
be what they look like: anything that would have run with their call (hooks, a forward or a class of
someone's own, a compiled call) leaves the layer to PEFT.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft.tuners.lora import dora
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lora_ext._extension import build_info
from lora_ext.blocks.terms import HOOKS_OF_ALL, has_hooks_of_all, why_not_plain

TENSORS = frozenset((Tensor, nn.Parameter, FakeTensor))
# What a call of PEFT's layers goes through besides forward, and a fused call does not.
_OVERRIDABLE = ("_cast_input_dtype", "_check_forward_args", "_mixed_batch_forward", "_embed")
_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))
_DEVICES = frozenset(("cpu", "meta") if build_info()["cuda"] is None else ("cpu", "cuda", "meta"))
_NARROW = (torch.bfloat16, torch.float16)


class LeftToPeft(Exception):
    """Why PEFT runs a layer itself."""


def conv1d() -> Any:
    """transformers' Conv1D; None while nobody imported it."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def check_called_plainly(module: nn.Module, what: str, forward: Any) -> None:
    """LeftToPeft unless a call of `module` is this forward and nothing else."""
    kind = type(module)
    if kind.forward is not forward or kind.__call__ is not nn.Module.__call__:
        raise LeftToPeft(f"{what} is a {kind.__module__}.{kind.__qualname__}, of its own forward")
    reason = why_not_plain(module)
    if reason is not None:
        raise LeftToPeft(f"{what} {reason}")


def check_exportable() -> None:
    """LeftToPeft while torch.onnx exports, which knows PyTorch's own operators only."""
    if torch.onnx.is_in_onnx_export():
        raise LeftToPeft("torch.onnx exports")


def check_own_methods(layer: Any, kind: Any) -> None:
    """LeftToPeft where methods of PEFT's class `kind` are overridden."""
    for name in _OVERRIDABLE:
        own = getattr(kind, name, None)
        if getattr(type(layer), name, None) is not own or name in layer.__dict__:
            raise LeftToPeft(f"{name} is overridden")


def check_no_global_hooks() -> None:
    """LeftToPeft where hooks of all modules would miss those that a fused call does not call."""
    if has_hooks_of_all():
        raise LeftToPeft(HOOKS_OF_ALL)


def own_tensor(module: nn.Module, name: str) -> Any:
    """A parameter, or what stands in its place (pruning, parametrization)."""
    try:
        tensor = module._parameters[name]  # without nn.Module.__getattr__, which shows at one row
    except KeyError:
        return getattr(module, name)
    return tensor


def check_tensor(tensor: Tensor, what: str) -> None:
    """LeftToPeft unless the operators here know this kind of tensor."""
    if type(tensor) not in TENSORS:
        raise LeftToPeft(f"{what} is a {type(tensor).__qualname__}")
    if tensor.layout is not torch.strided:
        raise LeftToPeft(f"{what} is not dense")


def check_x(x: Tensor) -> None:
    """LeftToPeft unless the operators here know this kind of input, and its device."""
    check_tensor(x, "x")
    if x.is_nested:
        raise LeftToPeft("x is not dense")
    check_device(x.device)


def check_device(device: torch.device) -> None:
    """LeftToPeft where there are no kernels."""
    if device.type not in _DEVICES:
        raise LeftToPeft(f"there are no kernels for {device.type}")


def check_dtypes(x: torch.dtype, base: torch.dtype, adapter: torch.dtype, device: str) -> None:
    """LeftToPeft unless the operators take these dtypes: one for all, or float32 adapters beside a
    16-bit base. Under autocast they are what it makes of them."""
    if not _DTYPES.issuperset((x, base, adapter)):
        fits = False
    elif device != "meta" and torch.is_autocast_enabled(device):
        fits = torch.float64 not in (x, base, adapter)
    else:
        fits = x == base and (adapter == base or (adapter == torch.float32 and base in _NARROW))
    if not fits:
        raise LeftToPeft(f"dtypes: x {x}, base {base}, adapter {adapter}")


def check_pair(base: torch.dtype, adapter: torch.dtype) -> None:
    """LeftToPeft unless operators to which autocast does nothing (DoRA's norm, embeddings) take an
    adapter beside a base of these dtypes."""
    fits = adapter == base or (adapter == torch.float32 and base in _NARROW)
    if not fits or base not in _DTYPES:
        raise LeftToPeft(f"dtypes: base {base}, adapter {adapter}")


def check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """LeftToPeft where a call passes more than x to the base layer."""
    if args or (kwargs and not kwargs.keys() <= {"adapter_names", "alora_offsets"}):
        raise LeftToPeft("the base layer is called with further arguments")


def check_variant(layer: Any, name: str, dora_variant: type) -> bool:
    """Whether an adapter is DoRA's; LeftToPeft if it is of another variant."""
    variant = layer.lora_variant.get(name)
    if variant is None:
        return False
    if type(variant) is not dora_variant:
        raise LeftToPeft(f"'{name}' is of a variant, {type(variant).__name__}")
    if dora.ENABLE_DORA_CACHING:
        raise LeftToPeft("DoRA's caching is on")
    return True


def magnitude_of(part: nn.Module, forward: Any) -> Tensor:
    """Of a module of PEFT's that holds DoRA's magnitude."""
    check_called_plainly(part, "lora_magnitude_vector", forward)
    if part._dora_cache:  # as PEFT's own call without caching does: it would be out of date later
        part._cache_clear()  # type: ignore[operator]
    magnitude: Tensor = part.weight  # type: ignore[assignment]
    check_tensor(magnitude, "lora_magnitude_vector")
    return magnitude


def dropout_p(module: nn.Module) -> float:
    """Of a dropout module as it would run now."""
    if type(module) is nn.Identity:
        check_called_plainly(module, "lora_dropout", nn.Identity.forward)
        return 0.0
    check_called_plainly(module, "lora_dropout", nn.Dropout.forward)
    if module.inplace:
        raise LeftToPeft("lora_dropout works in place")
    p: float = module.p if module.training else 0.0  # type: ignore[assignment]
    return p


def check_scaling(scaling: Any, name: str) -> None:
    """LeftToPeft unless it is a number, or a 0-d tensor without a gradient."""
    if isinstance(scaling, Tensor):
        if scaling.dim() or scaling.requires_grad or type(scaling) not in TENSORS:
            raise LeftToPeft(f"the scaling of '{name}' is no plain 0-d tensor")
    elif not isinstance(scaling, (int, float)):
        raise LeftToPeft(f"the scaling of '{name}' is a {type(scaling).__name__}")
