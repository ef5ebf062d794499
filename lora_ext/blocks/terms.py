"""What a layer adds to a call of several: its weight, bias and low-rank product.

A fused call reads these and does not call the layer. So the layer must be what it looks like:
whatever else would run with its call leaves it to be called by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from lora_ext import batching
from lora_ext.nn.adapter import LowRank
from lora_ext.nn.linear import Linear
from lora_ext.nn.planned import follows_plan


class NotFused(Exception):
    """Why a layer has to run by itself; not an error."""


class Terms(NamedTuple):
    """y = x weight^T + bias, and what the adapters add."""

    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None
    adapters: list[LowRank]  # which differ in their dropout probability


# Of a layer of this very class, or NotFused. Other libraries' are added where they are known.
KINDS: dict[type[nn.Module], Callable[[Any], Terms]] = {}


def terms_of(layer: nn.Module) -> Terms:
    """Those of a layer now.

    Raises:
        NotFused: it has to run by itself.
    """
    find = KINDS.get(type(layer))
    if find is None:
        raise NotFused(f"is a {type(layer).__module__}.{type(layer).__qualname__}")
    return find(layer)


def why_not_plain(module: nn.Module) -> str | None:
    """What else than its forward would run with a call of the module, if anything."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks"
    if "forward" in module.__dict__:
        return "has a forward set on it"
    if module._compiled_call_impl is not None:
        return "is compiled by itself"
    return None


def has_hooks_of_all() -> bool:
    """Whether hooks of all modules would miss those that a fused call does not call."""
    return bool(
        modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


HOOKS_OF_ALL = "hooks are registered for all modules"


def check_called_plainly(module: nn.Module) -> None:
    """NotFused where more than its forward would run with its call."""
    reason = why_not_plain(module)
    if reason is not None:
        raise NotFused(reason)


def check_no_hooks_of_all() -> None:
    """NotFused where there are such."""
    if has_hooks_of_all():
        raise NotFused(HOOKS_OF_ALL)


def check_tensor(tensor: Tensor | None) -> None:
    """NotFused where a parameter is another kind of tensor, as of several processes, or none."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise NotFused(f"has a {type(tensor).__qualname__} for a parameter")


def _of_plain_linear(layer: nn.Linear) -> Terms:
    weight = layer._parameters.get("weight")
    check_tensor(weight)  # else computed from others, as where it is pruned
    assert weight is not None
    return Terms(weight, layer.bias, [])


def _of_linear(layer: Linear) -> Terms:
    if batching.in_use and follows_plan(layer):
        raise NotFused("follows a plan of lora_ext.batch")
    if layer._lora_variant is not None:
        raise NotFused(f"has an adapter of a variant, {type(layer._lora_variant).__name__}")
    check_tensor(layer._parameters.get("weight"))
    return Terms(layer._weight_matrix(), layer._bias_vector(), layer.low_rank())


KINDS[nn.Linear] = _of_plain_linear
KINDS[Linear] = _of_linear


def is_one_operator(terms: list[Terms]) -> bool:
    """Whether no layer has adapters besides one."""
    return all(len(one.adapters) <= 1 for one in terms)


def is_autocast_on(x: Tensor) -> bool:
    """Whether autocast casts what layers read on x's device; some devices know none."""
    try:
        return torch.is_autocast_enabled(x.device.type)
    except RuntimeError:
        return False


def same_dtype(x: Tensor, terms: list[Terms]) -> bool:
    """Whether an operator takes them: else each layer says what is wrong, or casts."""
    return is_autocast_on(x) or all(t.weight.dtype == x.dtype for t in terms)
