"""Malformed quantized states: a ValueError with the tensor's name, the field, what was got and what
was expected, before anything of the claimed size is allocated. Without the libraries themselves."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from measured import MAX_BYTES, MAX_SECONDS, attempt
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from lora_ext.quant import (
    NestedScales,
    quantize,
    read_gguf,
    read_state_dict,
    read_weight,
)

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "layers.0.q.weight"
N, K = 6, 50
BLOCKS = 5  # of 64 values
STATE = "quant_state.bitsandbytes__nf4"
HUGE = 1 << 31


def packed(fields: Any) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def saved(nested: bool = True, **changes: Any) -> dict[str, Any]:
    """What bitsandbytes saves of a weight; `changes` of its JSON, None removes one."""
    made = quantize(torch.randn(N, K), "nf4", nested=nested, name=KEY)
    fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [N, K]}
    state = {"": made.codes.unsqueeze(1), ".quant_map": made.codebook, ".absmax": made.scales}
    if isinstance(made.scales, NestedScales):
        scales = made.scales
        fields |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        fields["nested_offset"] = scales.offset
        state |= {".absmax": scales.codes, ".nested_absmax": scales.absmax}
        state[".nested_quant_map"] = scales.codebook
    fields = {k: v for k, v in (fields | changes).items() if v is not None}
    return {f"{KEY}{k}": v for k, v in (state | {f".{STATE}": packed(fields)}).items()}


def int8_saved() -> dict[str, Any]:
    made = quantize(torch.randn(N, K), "int8")
    prefix = KEY.removesuffix("weight")
    return {
        KEY: made.codes.view(N, K),
        f"{prefix}SCB": made.scales,
        f"{prefix}weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def test_the_whole_states_are_read() -> None:
    for nested in (False, True):
        assert read_state_dict(saved(nested), KEY).shape == (N, K)
    assert read_state_dict(int8_saved(), KEY).shape == (N, K)


JSON = {
    "another type": ({"quant_type": "fp4"}, "quant_type"),
    "no type": ({"quant_type": None}, "quant_type"),
    "no block size": ({"blocksize": None}, "blocksize"),
    "block size 0": ({"blocksize": 0}, "blocksize"),
    "block size 48": ({"blocksize": 48}, "blocksize"),
    "block size 128": ({"blocksize": 128}, "absmax"),
    "block size of text": ({"blocksize": "64"}, "blocksize"),
    "block sizes": ({"blocksize": [64]}, "blocksize"),
    "no shape": ({"shape": None}, "shape"),
    "one size": ({"shape": [N * K]}, "shape"),
    "three sizes": ({"shape": [1, N, K]}, "shape"),
    "a size below 0": ({"shape": [-N, -K]}, "shape"),
    "a size of 0": ({"shape": [0, K]}, "shape"),
    "a size that is true": ({"shape": [True, N * K]}, "shape"),
    "a fraction": ({"shape": [N, 50.0]}, "shape"),
    "another shape": ({"shape": [N, K + 1]}, "weight"),
    "a huge shape": ({"shape": [HUGE, HUGE - 1]}, "weight"),
    "a shape beyond 64 bits": ({"shape": [1 << 62, 1 << 62]}, "shape"),
    "no dtype": ({"dtype": None}, "dtype"),
    "dtype int8": ({"dtype": "int8"}, "dtype"),
    "a dtype that is a list": ({"dtype": ["float32"]}, "dtype"),
    "no nested block size": ({"nested_blocksize": None}, "nested_blocksize"),
    "nested block size -1": ({"nested_blocksize": -1}, "nested_blocksize"),
    "nested block size 1": ({"nested_blocksize": 1}, "nested_absmax"),
    "nested dtype": ({"nested_dtype": "bfloat16"}, "nested_dtype"),
    "no offset": ({"nested_offset": None}, "nested_offset"),
    "an offset that is NaN": ({"nested_offset": math.nan}, "nested_offset"),
    "an offset that fp32 does not hold": ({"nested_offset": 1e300}, "nested_offset"),
    "an offset that no float holds": ({"nested_offset": 10**400}, "nested_offset"),
    "an offset of text": ({"nested_offset": "0.1"}, "nested_offset"),
}


@pytest.mark.parametrize("name", JSON)
def test_fields(name: str) -> None:
    changes, field = JSON[name]
    with pytest.raises(ValueError, match=rf"^{KEY}: {field}: got .*, expected "):
        read_state_dict(saved(**changes), KEY)


TENSORS: dict[str, tuple[str, Any, str]] = {
    "codes cut": ("", torch.zeros(7, 1, dtype=torch.uint8), "weight"),
    "codes with strides": ("", torch.zeros(150, 2, dtype=torch.uint8)[:, :1], "weight"),
    "codes that are no tensor": ("", [1, 2], "weight"),
    "sparse codes": ("", torch.zeros(150, 1).to_sparse(), "weight"),
    "absmax cut": (".absmax", torch.zeros(BLOCKS - 1, dtype=torch.uint8), "absmax"),
    "absmax of two dimensions": (".absmax", torch.zeros(1, BLOCKS, dtype=torch.uint8), "absmax"),
    "absmax not nested": (".absmax", torch.zeros(BLOCKS), "absmax"),
    "no absmax": (".absmax", None, "absmax"),
    "table": (".quant_map", torch.linspace(-1, 1, 16), "quant_map"),
    "table of 8": (".quant_map", torch.zeros(8), "quant_map"),
    "a table of NaN": (".quant_map", torch.full((16,), math.nan), "quant_map"),
    "no table": (".quant_map", None, "quant_map"),
    "nested absmax": (".nested_absmax", torch.zeros(2), "nested_absmax"),
    "nested absmax in fp16": (".nested_absmax", torch.zeros(1).half(), "nested_absmax"),
    "nested absmax of NaN": (".nested_absmax", torch.full((1,), math.nan), "nested_absmax"),
    "a nested table of Inf": (
        ".nested_quant_map",
        torch.full((256,), math.inf),
        "nested_quant_map",
    ),
    "codes on meta": ("", torch.empty(150, 1, dtype=torch.uint8, device="meta"), "weight"),
    "a table on meta": (".quant_map", torch.empty(16, device="meta"), "quant_map"),
    "JSON on meta": (f".{STATE}", torch.empty(9, dtype=torch.uint8, device="meta"), STATE),
    "nested table": (".nested_quant_map", torch.zeros(16), "nested_quant_map"),
    "no nested table": (".nested_quant_map", None, "nested_quant_map"),
    "no JSON": (f".{STATE}", torch.tensor([123], dtype=torch.uint8), "quant_state"),
    "bytes that are no text": (f".{STATE}", torch.tensor([255], dtype=torch.uint8), "quant_state"),
    "a list": (f".{STATE}", packed([1]), "quant_state"),
    "brackets": (f".{STATE}", torch.full((60000,), 91, dtype=torch.uint8), "quant_state"),
    "long JSON": (f".{STATE}", torch.full((70000,), 32, dtype=torch.uint8), "quant_state"),
    "JSON as floats": (f".{STATE}", torch.zeros(9), STATE),
    "two types": (".quant_state.bitsandbytes__fp4", packed({}), "quant_state"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name: str) -> None:
    suffix, value, field = TENSORS[name]
    state = saved() | {f"{KEY}{suffix}": value}
    state = {k: v for k, v in state.items() if v is not None}
    with pytest.raises(ValueError, match=rf"^{KEY}: {field}: got .*, expected "):
        read_state_dict(state, KEY)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_absmax_that_is_not_finite(value: float) -> None:
    state = saved(nested=False)
    state[f"{KEY}.absmax"] = state[f"{KEY}.absmax"].clone()
    state[f"{KEY}.absmax"][-1] = value
    with pytest.raises(ValueError, match=rf"^{KEY}: absmax: got NaN or Inf, expected finite"):
        read_state_dict(state, KEY)


INT8: dict[str, tuple[str, Any, str]] = {
    "SCB cut": ("SCB", torch.ones(N - 1), "SCB"),
    "SCB of NaN": ("SCB", torch.full((N,), math.nan), "SCB"),
    "a layout on meta": ("weight_format", torch.empty((), device="meta"), "weight_format"),
    "SCB of integers": ("SCB", torch.ones(N, dtype=torch.int32), "SCB"),
    "codes of one dimension": ("weight", torch.zeros(N * K, dtype=torch.int8), "shape"),
    "codes not signed": ("weight", torch.zeros(N, K, dtype=torch.uint8), "weight"),
    "codes transposed": ("weight", torch.zeros(K, N, dtype=torch.int8).t(), "weight"),
    "floats": ("weight", torch.zeros(N, K), "weight"),
    "another layout": ("weight_format", torch.tensor(2), "weight_format"),
    "another layout by name": ("weight_format", "col_turing", "weight_format"),
    "layouts": ("weight_format", torch.zeros(2), "weight_format"),
}


@pytest.mark.parametrize("name", INT8)
def test_int8_tensors(name: str) -> None:
    suffix, value, field = INT8[name]
    state = int8_saved() | {f"{KEY.removesuffix('weight')}{suffix}": value}
    with pytest.raises(ValueError, match=rf"^{KEY}: {field}: got .*, expected "):
        read_state_dict(state, KEY)


ZEROS = np.zeros(34 * 4, dtype=np.uint8)
GGUF: dict[str, tuple[tuple[Any, ...], str]] = {
    "type": ((ZEROS, (2, 64), "Q5_K"), "quant_type"),
    "number": ((ZEROS, (2, 64), 99), "quant_type"),
    "no type": ((ZEROS, (2, 64), None), "quant_type"),
    "rows of part of a block": ((ZEROS, (4, 33), "Q8_0"), "shape"),
    "bytes": ((ZEROS, (2, 96), "Q8_0"), "data"),
    "a huge shape": ((ZEROS, (HUGE, HUGE // 2), "Q8_0"), "data"),
    "signed": ((ZEROS.view(np.int8), (2, 64), "Q8_0"), "data"),
    "a list": ((list(ZEROS), (2, 64), "Q8_0"), "data"),
    "a tensor elsewhere": ((torch.zeros(136, device="meta").byte(), (2, 64), "Q8_0"), "data"),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf(name: str) -> None:
    arguments, field = GGUF[name]
    with pytest.raises(ValueError, match=rf"^{KEY}: {field}: got .*, expected "):
        read_gguf(*arguments, name=KEY)


QUANTIZE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "type": (torch.ones(2, 2), {"quant_type": "int4"}, "quant_type"),
    "integers": (torch.ones(2, 2).int(), {}, "weight"),
    "fp64": (torch.ones(2, 2).double(), {}, "weight"),
    "one dimension": (torch.ones(4), {}, "shape"),
    "nothing": (torch.ones(0, 4), {}, "shape"),
    "block size": (torch.ones(2, 2), {"block_size": 65}, "block_size"),
    "int8 in blocks": (torch.ones(2, 2), {"quant_type": "int8", "block_size": 64}, "block_size"),
    "int8 nested": (torch.ones(2, 2), {"quant_type": "int8", "nested": True}, "nested"),
}


@pytest.mark.parametrize("name", QUANTIZE)
def test_quantize(name: str) -> None:
    weight, options, field = QUANTIZE[name]
    with pytest.raises(ValueError, match=rf"^{KEY}: {field}: got .*, expected "):
        quantize(weight, **({"quant_type": "nf4", "name": KEY} | options))


@pytest.mark.parametrize("source", [nn.Linear(2, 2), nn.ReLU(), torch.ones(2), None, "weight"])
def test_what_is_not_quantized(source: Any) -> None:
    with pytest.raises(ValueError, match=r"^q: source: got .*, expected a weight of bitsandbytes"):
        read_weight(source, "q")


def test_one_part_of_a_sharded_weight() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        state = saved(nested=False)
        for key in (KEY, f"{KEY}.absmax"):
            parts = state | {key: DTensor.from_local(state[key], mesh, [Replicate()])}
            with pytest.raises(ValueError, match=r"got one process's part .* value\.full_tensor"):
                read_state_dict(parts, KEY)
    finally:
        dist.destroy_process_group()


def test_keys() -> None:
    with pytest.raises(ValueError, match=r"^k\.weight: key: got no such key"):
        read_state_dict(saved(), "k.weight")
    with pytest.raises(ValueError, match=r"^q\.weight: key: got no quantization state"):
        read_state_dict({"q.weight": torch.ones(2, 2)}, "q.weight")


def test_huge_claims_cost_nothing() -> None:
    states = [saved(shape=[HUGE, HUGE - 1]), saved(nested_blocksize=HUGE), saved(blocksize=HUGE)]

    def refuse_all() -> None:
        for state in states:
            with pytest.raises(ValueError):
                read_state_dict(state | {f"{KEY}.nested_absmax": torch.zeros(2)}, KEY)
        with pytest.raises(ValueError):
            read_gguf(ZEROS, (HUGE, HUGE // 2), "Q6_K")

    outcome = attempt(refuse_all)
    assert outcome.error == "" and outcome.seconds < MAX_SECONDS
    assert outcome.extra_bytes < MAX_BYTES
