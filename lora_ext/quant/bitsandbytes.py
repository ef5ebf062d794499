"""bitsandbytes' weights: NF4, FP4 and LLM.int8(), live or in a state dict. The library is not
imported: a Params4bit is what has a quant_state, an Int8Params what has CB and SCB."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_ext.quant.checks import (
    FLOATS,
    check_count,
    check_shape,
    fail,
    need_finite,
    need_numel,
    need_tensor,
    plain,
)
from lora_ext.quant.codebooks import four_bit
from lora_ext.quant.weight import NestedScales, QuantizedWeight

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
# fp32(1 / 127), by which bitsandbytes multiplies after the row's absolute maximum.
INT8_FACTOR = 7.874015718698502e-3
LARGEST = torch.finfo(torch.float32).max
_BYTES = (torch.uint8,)
MAX_JSON_BYTES = 1 << 16
STATE = "quant_state.bitsandbytes__"
REPACKED = (
    "bitsandbytes' layout for CPUs: a forward in eval mode repacked this weight and rounded its "
    "scales to bfloat16; load the model again and read it before that"
)


def read_4bit(weight: Any, quant_state: Any, name: str) -> QuantizedWeight:
    """A Params4bit, with its quant_state or that of its module."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = quant_state
    if state is None:
        fail(name, "quant_state", None, "one: move the layer to its device, which quantizes it")
    if getattr(state, "packing_format_for_cpu", False):
        fail(name, "quant_state.packing_format_for_cpu", True, f"False, not {REPACKED}")
    storage = getattr(weight, "quant_storage", None)
    if isinstance(storage, torch.dtype) and weight.dtype is not storage:
        cure = (
            "codes as they were: .to(dtype), .half() and the like cast them; load the model again"
        )
        fail(name, f"weight of quant_storage {storage}", weight, cure)
    fields = _attributes(state, "quant_type", "blocksize", "shape", "dtype", "absmax", "code")
    nested = None
    if getattr(state, "state2", None) is not None:
        nested = _attributes(state.state2, "absmax", "code", "blocksize", "dtype")
        nested["offset"] = getattr(state, "offset", None)
    return _four_bit(weight, fields["absmax"], fields["code"], fields, nested, name)


def _attributes(state: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(state, name, None) for name in names}


def read_4bit_state(state: Mapping[str, Any], key: str, quant_type: str) -> QuantizedWeight:
    """The tensors that bitsandbytes saves beside `key`, a weight's."""
    packed = need_tensor(key, f"{STATE}{quant_type}", state[f"{key}.{STATE}{quant_type}"], _BYTES)
    fields = _parse(packed, key)
    if fields.get("quant_type") != quant_type:
        fail(key, "quant_type", fields.get("quant_type"), f"{quant_type!r}, as its key says")
    absmax, code = (_item(state, key, field) for field in ("absmax", "quant_map"))
    nested = None
    if f"{key}.nested_absmax" in state:
        nested = {
            "absmax": state[f"{key}.nested_absmax"],
            "code": _item(state, key, "nested_quant_map"),
            "blocksize": fields.get("nested_blocksize"),
            "dtype": DTYPES.get(str(fields.get("nested_dtype")), fields.get("nested_dtype")),
            "offset": fields.get("nested_offset"),
        }
    fields["dtype"] = DTYPES.get(str(fields.get("dtype")), fields.get("dtype"))
    return _four_bit(state[key], absmax, code, fields, nested, key)


def _item(state: Mapping[str, Any], key: str, field: str) -> Any:
    if f"{key}.{field}" not in state:
        fail(key, field, "no such key", f"{key}.{field} beside it; the state dict is not whole")
    return state[f"{key}.{field}"]


def _parse(packed: Tensor, name: str) -> dict[str, Any]:
    """The JSON object that bitsandbytes packs into a tensor."""
    if packed.dim() != 1 or packed.numel() > MAX_JSON_BYTES:
        fail(name, "quant_state", packed, f"JSON in at most {MAX_JSON_BYTES} bytes")
    try:
        fields = json.loads(bytes(packed.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        fail(name, "quant_state", f"no JSON ({error})", "a JSON object")
    if not isinstance(fields, dict):
        fail(name, "quant_state", fields, "a JSON object")
    return fields


def _four_bit(
    weight: Any,
    absmax: Any,
    code: Any,
    fields: Mapping[str, Any],
    nested: Mapping[str, Any] | None,
    name: str,
) -> QuantizedWeight:
    quant_type = fields["quant_type"]
    if quant_type not in ("nf4", "fp4"):
        fail(name, "quant_type", quant_type, "'nf4' or 'fp4'")
    if fields.get("blocksize") not in BLOCK_SIZES:
        fail(name, "blocksize", fields.get("blocksize"), f"one of {list(BLOCK_SIZES)}")
    N, K = check_shape(name, fields.get("shape"))
    if fields["dtype"] not in FLOATS:
        fail(name, "dtype", fields["dtype"], f"one of {list(DTYPES)}")
    weight = plain(name, "weight", weight)
    if not weight.is_contiguous():
        fail(name, "weight", f"strides {list(weight.stride())}", "contiguous packed codes")
    nbytes = -(-N * K // 2)
    if weight.numel() * weight.element_size() != nbytes:
        fail(name, "weight", weight, f"{nbytes} bytes ({N} * {K} values of 4 bits)")
    blocks = -(-N * K // fields["blocksize"])
    why = f"{N} * {K} values in blocks of {fields['blocksize']}"
    # bitsandbytes looks at the type alone: a table of other values would not be what it computes.
    code = need_numel(name, "quant_map", need_tensor(name, "quant_map", code, FLOATS), 16, "4 bits")
    codebook = four_bit(quant_type, weight.device)
    if not torch.allclose(code.to(codebook), codebook, atol=1e-4):
        fail(name, "quant_map", str(code.tolist()), f"the values of {quant_type}")
    if isinstance(absmax, Tensor) and absmax.dim() != 1:
        fail(name, "absmax", absmax, f"one dimension; two come of {REPACKED}")
    scales: Tensor | NestedScales
    if nested is None:
        scales = need_tensor(name, "absmax", absmax, FLOATS)
        scales = need_finite(name, "absmax", need_numel(name, "absmax", scales, blocks, why))
    else:
        codes = need_tensor(name, "absmax", absmax, _BYTES)
        codes = need_numel(name, "absmax", codes, blocks, why)
        scales = _nested(codes, nested, name)
    return QuantizedWeight(
        shape=(N, K),
        codes=weight.reshape(-1).view(torch.uint8),
        packing="high_first",
        scales=scales,
        block_size=fields["blocksize"],
        dtype=fields["dtype"],
        codebook=codebook,
        name=name,
    )


def _nested(codes: Tensor, nested: Mapping[str, Any], name: str) -> NestedScales:
    size = check_count(name, "nested_blocksize", nested["blocksize"])
    if nested["dtype"] is not torch.float32:
        # After a CPU's repacking bitsandbytes quantizes the scales again, in the weight's dtype.
        fail(name, "nested_dtype", nested["dtype"], f"float32; another comes of {REPACKED}")
    count = -(-codes.numel() // size)
    absmax = need_tensor(name, "nested_absmax", nested["absmax"], (torch.float32,))
    why = f"{codes.numel()} scales in blocks of {size}"
    absmax = need_finite(
        name, "nested_absmax", need_numel(name, "nested_absmax", absmax, count, why)
    )
    table = need_tensor(name, "nested_quant_map", nested["code"], (torch.float32,))
    table = need_numel(name, "nested_quant_map", table, 256, "8 bits")
    table = need_finite(name, "nested_quant_map", table)
    offset = nested["offset"]
    if isinstance(offset, Tensor) and offset.numel() == 1:
        offset = offset.item()
    number = isinstance(offset, int | float) and not isinstance(offset, bool)
    if not number or not abs(offset) <= LARGEST:  # which no integer overflows
        fail(name, "nested_offset", offset, "a finite number in float32")
    return NestedScales(codes, table, absmax, size, float(offset))


def read_int8(weight: Any, scb: Any, name: str) -> QuantizedWeight:
    """int8 rows [N, K] and the absolute maximum of each row."""
    if isinstance(weight, Tensor) and weight.is_floating_point():
        cure = "int8: with has_fp16_weights=False, move the layer to its device, which quantizes it"
        fail(name, "weight", weight, cure)
    weight = need_tensor(name, "weight", weight, (torch.int8,))
    N, K = check_shape(name, tuple(weight.shape))
    if not weight.is_contiguous():
        fail(name, "weight", f"strides {list(weight.stride())}", "contiguous rows")
    scb = need_numel(name, "SCB", need_tensor(name, "SCB", scb, FLOATS), N, "one for each row")
    scb = need_finite(name, "SCB", scb)
    return QuantizedWeight(
        shape=(N, K),
        codes=weight.view(-1),
        packing="int8",
        scales=scb,
        block_size=K,
        dtype=torch.float32,
        factor=INT8_FACTOR,
        name=name,
    )


def read_int8_state(state: Mapping[str, Any], key: str) -> QuantizedWeight:
    """The tensors of a Linear8bitLt: weight, SCB, weight_format."""
    prefix = key.removesuffix("weight")
    layout = state.get(f"{prefix}weight_format", 0)
    if isinstance(layout, Tensor):
        layout = plain(key, "weight_format", layout)
        layout = layout.item() if layout.numel() == 1 else layout
    if isinstance(layout, Tensor) or layout not in (0, "row"):
        cure = "'row' (0); load it with the bitsandbytes that wrote it, and save it from a CPU"
        fail(key, "weight_format", layout, cure)
    return read_int8(state[key], state.get(f"{prefix}SCB"), key)
