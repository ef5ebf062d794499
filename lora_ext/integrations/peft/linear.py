"""PEFT's `lora.Linear` on `lora_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from lora_ext.batching import batch
from lora_ext.functional import lora_linear, lora_linear_grouped, weight_norm
from lora_ext.integrations.peft.fusible import (
    LeftToPeft,
    check_arguments,
    check_called_plainly,
    check_dtypes,
    check_exportable,
    check_no_global_hooks,
    check_own_methods,
    check_pair,
    check_scaling,
    check_tensor,
    check_variant,
    check_x,
    conv1d,
    dropout_p,
    magnitude_of,
    own_tensor,
)
from lora_ext.nn.adapter import LowRank, stacked
from lora_ext.nn.dora import dora, scale_of
from lora_ext.nn.linear import adapted_linear


def runs_base_alone(layer: Any) -> bool:
    """Whether a call is one of the base layer, in which nothing can be fused."""
    if layer.disable_adapters or layer.merged:
        return True
    adapters = layer._modules["lora_A"]._modules
    return all(name not in adapters for name in layer.active_adapters)


def fused_forward(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`layer(x)` where adapters run.

    x [..., in_features] → [..., out_features].

    Raises:
        LeftToPeft: PEFT has to run the layer.
    """
    check_arguments(args, kwargs)
    check_exportable()
    check_own_methods(layer, peft_layer.Linear)
    check_no_global_hooks()
    check_x(x)
    names = kwargs.get("adapter_names")
    weight, bias = base_tensors(layer)
    if names is None:
        adapters = adapters_of(layer, layer.active_adapters)
    else:
        layer._check_forward_args(x, adapter_names=names)
        known = layer._modules["lora_A"]._modules
        asked = [name for name in dict.fromkeys(names) if name in known]
        if not asked:
            raise LeftToPeft("no row has an adapter here")
        adapters = adapters_of(layer, asked)
    for one, g in adapters:
        check_dtypes(x.dtype, weight.dtype, one.lora_A.dtype, x.device.type)
        if g is not None:
            check_pair(weight.dtype, one.lora_A.dtype)
    if names is not None and len(set(names)) > 1:
        return _mixed(x, weight, bias, names, asked, [one for one, _ in adapters])
    if any(g is not None for _, g in adapters):
        return dora(x, weight, bias, [(one, _g(layer, weight, one, g)) for one, g in adapters])
    if len(adapters) == 1:
        A, B, lora_bias, scaling, p = adapters[0][0]
        return lora_linear(x, weight, bias, A, B, lora_bias, scaling=scaling, dropout_p=p)
    # Those without dropout in one call. Each of the others has a mask of its own, as in PEFT.
    still = [one for one, _ in adapters if one.dropout_p == 0.0]
    dropping = [one for one, _ in adapters if one.dropout_p > 0.0]
    return adapted_linear(x, weight, bias, [*dropping, *([stacked(still)] if still else [])])


def base_tensors(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The base's weight [out_features, in_features] and bias. LeftToPeft where it is no plain
    linear layer."""
    base = layer._modules["base_layer"]
    transposed = conv1d()
    if transposed is not None and isinstance(base, transposed):
        check_called_plainly(base, "base_layer", transposed.forward)
        weight = own_tensor(base, "weight")
        check_tensor(weight, "the base's weight")
        weight = weight.t()
    else:
        check_called_plainly(base, "base_layer", nn.Linear.forward)
        weight = own_tensor(base, "weight")
        check_tensor(weight, "the base's weight")
    bias = own_tensor(base, "bias")
    if bias is not None:
        check_tensor(bias, "the base's bias")
        if bias.dtype != weight.dtype:
            raise LeftToPeft(f"dtypes: weight {weight.dtype}, bias {bias.dtype}")
    return weight, bias


def adapters_of(layer: Any, names: Sequence[str]) -> list[tuple[LowRank, Tensor | None]]:
    """Those of the names that the layer has, each with the magnitude of its DoRA, or None."""
    modules = layer._modules
    lora_A, lora_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    adapters: list[tuple[LowRank, Tensor | None]] = []
    for name in names:
        A, B = lora_A.get(name), lora_B.get(name)
        if A is None:
            continue
        check_called_plainly(A, "lora_A", nn.Linear.forward)
        check_called_plainly(B, "lora_B", nn.Linear.forward)
        a, b = own_tensor(A, "weight"), own_tensor(B, "weight")
        lora_bias = own_tensor(B, "bias")
        check_tensor(a, "lora_A")
        check_tensor(b, "lora_B")
        if lora_bias is not None:
            check_tensor(lora_bias, "lora_B's bias")
        if own_tensor(A, "bias") is not None:
            raise LeftToPeft("lora_A has a bias")
        if a.dtype != b.dtype or (lora_bias is not None and lora_bias.dtype != b.dtype):
            raise LeftToPeft(f"dtypes: lora_A {a.dtype}, lora_B {b.dtype}")
        scaling = layer.scaling[name]
        check_scaling(scaling, name)
        p = dropout_p(modules["lora_dropout"]._modules[name])
        magnitude = None
        if check_variant(layer, name, DoraLinearVariant):
            part = modules["lora_magnitude_vector"]._modules[name]
            magnitude = magnitude_of(part, DoraLinearLayer.forward)
            if lora_bias is not None:
                raise LeftToPeft("DoRA's lora_B has a bias")
            drops = (
                layer.training and type(modules["lora_dropout"]._modules[name]) is not nn.Identity
            )
            if drops and p == 0.0 and adapters:
                raise LeftToPeft("DoRA's dropout of 0 leaves out the adapters before it")
            p = p if drops else 0.0  # the layer's mode counts, not its dropout's
        adapters.append((LowRank(a, b, lora_bias, scaling, p), magnitude))
    return adapters


def _g(layer: Any, weight: Tensor, one: LowRank, magnitude: Tensor | None) -> Tensor | None:
    """What DoRA multiplies an adapter's output features by."""
    if magnitude is None:
        return None
    A, B, _, scaling, _ = one
    if isinstance(scaling, Tensor):
        B, scaling = B * scaling, 1.0
    return scale_of(magnitude, weight_norm(weight.detach(), A.detach(), B.detach(), scaling))


def _mixed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    names: Sequence[str],
    asked: Sequence[str],
    adapters: Sequence[LowRank],
) -> Tensor:
    """A batch in which row i of x [batch, ..., in_features] has the adapter names[i]: the base
    once, and each adapter on its own rows."""
    if torch.compiler.is_compiling():
        raise LeftToPeft("a mixed batch in compiled code: how many rows an adapter has is data")
    if x.numel() == 0:
        raise LeftToPeft("a mixed batch without rows")
    own = {name: one.for_any() for name, one in zip(asked, adapters, strict=True)}
    plan = batch([name if name in own else None for name in names])
    return lora_linear_grouped(x, weight, bias, own, plan, where="adapter_names")
