"""PEFT's `lora.Linear` in blocks that run as one operator (`lora_ext.fuse_blocks`)."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer as peft_layer

from lora_ext.blocks.terms import KINDS, NotFused, Terms
from lora_ext.integrations.peft import layers
from lora_ext.integrations.peft.fusible import (
    LeftToPeft,
    check_exportable,
    check_own_methods,
    check_pair,
)
from lora_ext.integrations.peft.linear import adapters_of, base_tensors, runs_base_alone
from lora_ext.nn.adapter import stacked


def _of_peft(layer: Any) -> Terms:
    if type(layer).forward is not layers.linear_forward:
        raise NotFused("is PEFT's, which patch() or accelerate(model) would run fused")
    try:
        return _terms(layer)
    except LeftToPeft as error:
        raise NotFused(f"is left to PEFT: {error}") from None


def _terms(layer: Any) -> Terms:
    check_exportable()
    check_own_methods(layer, peft_layer.Linear)
    weight, bias = base_tensors(layer)
    if layer.disable_adapters and layer.merged:
        raise LeftToPeft("a call takes out what is merged while adapters are disabled")
    if runs_base_alone(layer):
        return Terms(weight, bias, [])
    adapters = adapters_of(layer, layer.active_adapters)
    for one, magnitude in adapters:
        check_pair(weight.dtype, one.lora_A.dtype)
        if magnitude is not None:
            raise LeftToPeft("DoRA runs by itself")
    still = [one for one, _ in adapters if one.dropout_p == 0.0]
    dropping = [one for one, _ in adapters if one.dropout_p > 0.0]
    return Terms(weight, bias, [*dropping, *([stacked(still)] if still else [])])


KINDS[peft_layer.Linear] = KINDS[layers.Linear] = _of_peft
