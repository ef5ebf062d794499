"""torchao's weights in plain layouts: NF4Tensor, Int8Tensor, Int4Tensor. The library is not
imported: they are known by their attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_ext.quant.checks import (
    FLOATS,
    check_count,
    check_shape,
    fail,
    is_integer,
    need_finite,
    need_numel,
    need_tensor,
)
from lora_ext.quant.codebooks import twos_complement
from lora_ext.quant.weight import QuantizedWeight

_AFFINE = ("qdata", "scale", "zero_point", "block_size")
_CURES = {
    "Int4": "an Int4Tensor: Int4WeightOnlyConfig(int4_packing_format='plain')",
    "Int": "an Int8Tensor: Int8WeightOnlyConfig()",
}


def read_nf4(weight: Any, name: str) -> QuantizedWeight:
    """An NF4Tensor: its scales are formed here, in the dtype that was quantized, with the roundings
    of torchao, since they are quotients: 16 bits for each block, where torchao keeps 8."""
    N, K = check_shape(name, tuple(weight.shape))
    dtype = getattr(weight.nf4, "dtype", None)  # a cast changes the whole's alone
    if dtype not in FLOATS:
        fail(name, "nf4", weight.nf4, "a float32, float16 or bfloat16 tensor")
    if tuple(weight.stride()) != (K, 1):
        strides = f"strides {list(weight.stride())}"
        fail(name, "strides", strides, f"{[K, 1]}; give the tensor that was transposed")
    size = check_count(name, "block_size", weight.block_size)
    group = check_count(name, "scaler_block_size", weight.scaler_block_size)
    if size % 2 or N * K % size:
        fail(name, "block_size", size, f"an even divisor of {N} * {K} values")
    blocks = N * K // size
    if blocks % group:
        fail(name, "scaler_block_size", group, f"a divisor of {blocks} blocks")
    codes = need_tensor(name, "quantized_data", weight.quantized_data, (torch.uint8,))
    codes = need_numel(name, "quantized_data", codes, N * K // 2, f"{N} * {K} values of 4 bits")
    scalers = need_tensor(name, "quantized_scalers", weight.quantized_scalers, (torch.int8,))
    scalers = need_numel(name, "quantized_scalers", scalers, blocks, f"blocks of {size}")
    factor = need_tensor(name, "quantization_factor", weight.quantization_factor, FLOATS)
    why = f"{blocks} scales in blocks of {group}"
    factor = need_numel(name, "quantization_factor", factor, blocks // group, why)
    mean = need_tensor(name, "scaler_mean", weight.scaler_mean, (dtype,))
    mean = need_numel(name, "scaler_mean", mean, 1, "one mean")
    table = need_tensor(name, "nf4", weight.nf4, (dtype,))
    table = need_numel(name, "nf4", table, 16, "4 bits")
    quotients = scalers.view(-1, group) / factor.unsqueeze(-1)
    return QuantizedWeight(
        shape=(N, K),
        codes=codes,
        packing="high_first",
        scales=need_finite(name, "quantization_factor", quotients.flatten().to(dtype) + mean),
        block_size=size,
        dtype=weight.dtype if weight.dtype in FLOATS else dtype,
        codebook=table.float(),
        rounding=dtype,
        name=name,
        whole=weight,
    )


def read_affine(weight: Any, name: str) -> QuantizedWeight:
    """An Int8Tensor or an Int4Tensor; others of torchao are a ValueError that says what to do."""
    kind = type(weight).__name__
    qdata = getattr(weight, "qdata", None)
    # What IntxUnpackedToInt8Tensor has besides, whose codes are fewer bits than their bytes.
    plain = all(hasattr(weight, field) for field in _AFFINE) and not hasattr(weight, "target_dtype")
    if not plain or not isinstance(qdata, Tensor) or qdata.dtype not in (torch.int8, torch.uint8):
        cure = next((text for part, text in _CURES.items() if kind.startswith(part)), None)
        fail(name, "class", f"torchao's {kind}", cure or "an NF4Tensor, Int8Tensor or Int4Tensor")
    if getattr(weight, "act_pre_scale", None) is not None:
        cure = "None: it scales x, and is no part of the weight"
        fail(name, "act_pre_scale", weight.act_pre_scale, cure)
    N, K = check_shape(name, tuple(weight.shape))
    shape = tuple(qdata.shape)
    if qdata.dtype is torch.int8 and shape == (N, K) and not hasattr(weight, "activation_dtype"):
        return _int8(weight, N, K, name)
    if shape == (N, K // 2) and K % 2 == 0:
        return _int4(weight, N, K, name)
    fail(name, "qdata", qdata, f"int8 [{N}, {K}], or two codes in a byte, [{N}, {K // 2}]")


def _group(weight: Any, N: int, K: int, name: str) -> int:
    """Values in a block, of a block_size [1, group] or [N, K]."""
    got = weight.block_size
    if not isinstance(got, list | tuple) or len(got) != 2 or not all(map(is_integer, got)):
        fail(name, "block_size", got, "two sizes, [1, group]")
    if tuple(got) == (N, K):
        return N * K
    if got[0] != 1 or got[1] < 1 or K % got[1]:
        fail(name, "block_size", got, f"[1, a divisor of {K}] or {[N, K]}")
    return int(got[1])


def _int8(weight: Any, N: int, K: int, name: str) -> QuantizedWeight:
    size = _group(weight, N, K, name)
    blocks, why = N * K // size, f"{N} * {K} values in blocks of {size}"
    codes = need_tensor(name, "qdata", weight.qdata, (torch.int8,))
    scale = need_finite(name, "scale", need_tensor(name, "scale", weight.scale, FLOATS))
    zero_point = weight.zero_point
    if zero_point is not None:
        zero_point = need_tensor(name, "zero_point", zero_point, (torch.int8,))
        zero_point = need_numel(name, "zero_point", zero_point, blocks, why)
        if not zero_point.any():  # a symmetric quantization keeps zeros
            zero_point = None
    return QuantizedWeight(
        shape=(N, K),
        codes=codes.reshape(-1),
        packing="int8",
        scales=need_numel(name, "scale", scale, blocks, why),
        block_size=size,
        dtype=weight.dtype,
        zero_point=zero_point,
        name=name,
        whole=weight,
    )


def _int4(weight: Any, N: int, K: int, name: str) -> QuantizedWeight:
    """Groups of K. scale and zero_point are [K / group, N] and turned here: copies, but small."""
    size = _group(weight, N, K, name)
    if K % size:
        fail(name, "block_size", weight.block_size, f"[1, a divisor of {K}]")
    per_block = {}
    for field in ("scale", "zero_point"):
        value = need_finite(name, field, need_tensor(name, field, getattr(weight, field), FLOATS))
        if tuple(value.shape) != (K // size, N):
            fail(name, field, value, f"shape {[K // size, N]} (groups of {size})")
        per_block[field] = value.t().reshape(-1)
    codes = need_tensor(name, "qdata", weight.qdata, (torch.int8, torch.uint8))
    return QuantizedWeight(
        shape=(N, K),
        codes=codes.reshape(-1).view(torch.uint8),
        packing="low_first",
        scales=per_block["scale"],
        block_size=size,
        dtype=weight.dtype,
        codebook=twos_complement(4).to(codes.device),
        shift=per_block["zero_point"],
        name=name,
        whole=weight,
    )
