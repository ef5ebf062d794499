"""Layers in the place of one with a quantized weight, with another weight: dense, or quantized anew
as it was."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_ext.quant.call import Dequantizable
from lora_ext.quant.encode import quantize
from lora_ext.quant.kinds import has_quant_state, has_scb, is_torchao
from lora_ext.quant.linear import Linear
from lora_ext.quant.weight import NestedScales, QuantizedWeight

Module = TypeVar("Module", bound=nn.Module)


def dense_layer(
    base: nn.Module,
    matrix: Dequantizable,
    weight: Tensor,
    bias: nn.Parameter | None,
    cast_to: torch.dtype | None = None,
) -> nn.Linear:
    """A plain nn.Linear, frozen as its base was, in the dtype that the base was cast to, or that
    was quantized: what is around it has that, where bitsandbytes' compute_dtype may be another. Its
    int8 tells of none, and torchao's of none that it was cast to: that of the bias, then."""
    dtype, old = cast_to or matrix.dtype, base._parameters.get("weight")
    if bias is not None and not cast_to and (has_scb(old) or is_torchao(old)):
        dtype = bias.dtype
    if bias is not None and bias.dtype is not dtype:
        bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(_finite(weight.to(dtype)), requires_grad=False)
    layer.register_parameter("bias", bias)
    source = getattr(base, "source_cls", None)
    if source is not None and source.__name__ == "Conv1D":
        layer.source_cls = source
    return layer.train(base.training)


def as_it_was(layer: nn.Module) -> nn.Module:
    """The Conv1D of transformers that a dense layer stands for (`source_cls`, also in
    bitsandbytes' models), which its model saves and loads; any other layer itself."""
    source: Any = vars(layer).get("source_cls")
    if type(layer) is not nn.Linear or source is None:
        return layer
    made: Any = source.__new__(source)
    nn.Module.__init__(made)
    made.nf, made.nx = layer.out_features, layer.in_features
    made.weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)
    made.bias = layer.bias
    return made.train(layer.training)  # type: ignore[no-any-return]


def turned(conv1d: Any) -> nn.Linear:
    """The nn.Linear that computes what a Conv1D of transformers does."""
    layer = nn.Linear(conv1d.nx, conv1d.nf, bias=False, device="meta")
    layer.weight = nn.Parameter(conv1d.weight.detach().t().contiguous(), requires_grad=False)
    layer.bias = conv1d.bias
    return layer.train(conv1d.training)


def requantized_layer(
    base: nn.Module, matrix: Any, weight: Tensor, bias: nn.Parameter | None
) -> nn.Module:
    """A layer of the base's class, whose weight [N, K] is quantized as the base's is.

    Raises:
        ValueError: not for weights of this library; or values are not finite.
    """
    old = base._parameters.get("weight")
    four_bit, int8 = has_quant_state(old), has_scb(old)
    if not isinstance(matrix, QuantizedWeight) or not (
        isinstance(base, Linear) or four_bit or int8
    ):
        raise ValueError(
            f"requantize: got True for the weight of a {type(base).__qualname__} "
            f"({type(old).__qualname__}), expected False, or a layer of bitsandbytes or "
            "lora_ext.quant: merge into the dequantised weight, and quantize that by its library"
        )
    quant_type = "int8" if matrix.packing == "int8" else _quant_type(base, old)
    block = {}
    if quant_type != "int8":
        nested = isinstance(matrix.scales, NestedScales)
        block = {"block_size": matrix.block_size, "nested": nested}
    given = _finite(weight.half() if int8 else weight.float())  # fp16: as a Linear8bitLt does
    made = replace(quantize(given, quant_type, **block), dtype=matrix.dtype)  # type: ignore[arg-type]
    own = Linear.from_weight(made, quant_type, bias)
    if isinstance(base, Linear):
        own.compute_dtype, own.source_cls = base.compute_dtype, base.source_cls
        return own.train(base.training)
    layer: Any = _copied(base)
    layer._parameters["bias"] = bias
    kind: Any = type(old)
    if kind is nn.Parameter:  # what pickle makes of a parameter, with its attributes
        library: Any = sys.modules["bitsandbytes"]
        kind = library.nn.Int8Params if int8 else library.nn.Params4bit
    if int8:
        layer.weight = kind(own.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.weight.CB, layer.weight.SCB = layer.weight.data, made.scales
        layer.state = copy.copy(layer.state)
        layer.state.CB = layer.state.SCB = None
        return layer  # type: ignore[no-any-return]
    stats = {
        key.removeprefix("weight."): value
        for key, value in own.state_dict().items()
        if key.startswith("weight.")
    }
    codes, storage = own.weight.data, getattr(base, "quant_storage", torch.uint8)
    if codes.numel() % storage.itemsize == 0:
        codes = codes.view(-1).view(storage).view(-1, 1)
    layer.weight = kind.from_prequantized(codes, stats, False, codes.device, module=layer)
    return layer  # type: ignore[no-any-return]


def _finite(weight: Tensor) -> Tensor:
    """What is merged, in the dtype that it is to be in."""
    if not torch.isfinite(weight).all():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            "merge: the merged weight would hold NaN or Inf (in the weight, lora_A, lora_B or by "
            f"overflow of {dtype}), expected finite values; nothing changed"
        )
    return weight


def _quant_type(base: Any, weight: Any) -> str:
    found: str = base.quant_type if isinstance(base, Linear) else weight.quant_type
    return found


def _copied(module: Module) -> Module:
    """A module with the same tensors, in registries of its own."""
    copied = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[registry] = dict(module.__dict__[registry])
    return copied
