"""torchao's weights in plain layouts: its own values, to the bit; other layouts are refused."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import pytest
import torch
from quant_problems import FLOATS, random_weight, row_ranges, same_bits
from quantized_libraries import library
from torch import Tensor, nn

from lora_ext.quant import QuantizedWeight, read_weight

ao = library("torchao.quantization")
workflows = library("torchao.quantization.quantize_.workflows")
nf4 = library("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOATS}
CASES = 24


def check_rows(found: QuantizedWeight, draw: random.Random) -> None:
    whole = found.dequantize()
    for begin, end in row_ranges(draw, found.shape[0]):
        assert same_bits(found.dequantize_rows(begin, end), whole[begin:end])


@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.values())
def test_nf4(dtype: torch.dtype) -> None:
    """Blocks that cross rows, too. Scales are formed in the weight's dtype, as its values are."""
    for i in range(CASES):
        draw = random.Random(f"nf4{i}{dtype}")
        block_size, group = draw.choice([2, 16, 32, 64]), draw.choice([1, 2, 8])
        N, K = block_size * group * draw.randint(1, 2), draw.choice([6, 33, 64, 96])
        weight = random_weight(draw, N, K, dtype) + torch.tensor(0.01, dtype=dtype)
        tensor = nf4.NF4Tensor.from_tensor(weight, block_size, group)
        found = read_weight(tensor)
        assert same_bits(found.dequantize(), tensor.get_original_weight())
        for other in FLOATS:
            assert same_bits(found.dequantize(other), tensor.to(other))
        assert found.codes.data_ptr() == tensor.quantized_data.data_ptr()
        check_rows(found, draw)


@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.values())
def test_int8(dtype: torch.dtype) -> None:
    """One scale for a row, a group or the tensor; with zero points and without."""
    for i in range(CASES):
        draw = random.Random(f"int8{i}{dtype}")
        N, K = draw.randint(1, 20), 8 * draw.randint(1, 12)
        granularity = draw.choice([ao.PerRow(), ao.PerTensor(), ao.PerGroup(8)])
        mapping = (ao.MappingType.SYMMETRIC, ao.MappingType.ASYMMETRIC)[i % 2]
        weight = random_weight(draw, N, K, dtype) + torch.tensor(0.01, dtype=dtype)
        tensor = workflows.Int8Tensor.from_hp(weight, granularity, mapping_type=mapping)
        found = read_weight(tensor)
        assert (found.zero_point is not None) == (i % 2 == 1)
        assert same_bits(found.dequantize(), tensor.dequantize())
        for other in FLOATS:
            assert same_bits(found.dequantize(other), tensor.dequantize(other))
        assert found.codes.data_ptr() == tensor.qdata.data_ptr()
        check_rows(found, draw)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=NAMES.values())
def test_int8_with_scales_of_any_dtype(scale_dtype: torch.dtype) -> None:
    weight = random_weight(random.Random(0), 6, 40, torch.bfloat16)
    made = workflows.Int8Tensor.from_hp(weight, ao.PerRow())
    for dtype in FLOATS:
        tensor = workflows.Int8Tensor(made.qdata, made.scale.to(scale_dtype), [1, 40], dtype)
        for other in FLOATS:
            assert same_bits(read_weight(tensor).dequantize(other), tensor.dequantize(other))


def int4(draw: random.Random, N: int, K: int, group: int, dtype: torch.dtype) -> Any:
    """An Int4Tensor by hand: torchao makes them with mslk, on a GPU."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    codes = torch.randint(-8, 8, (N, K), generator=generator, dtype=torch.int8)
    packed = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    scale = torch.rand(K // group, N, generator=generator).to(dtype)
    zero_point = torch.randn(K // group, N, generator=generator).to(dtype)
    tensor = workflows.Int4Tensor(packed, scale, zero_point, [1, group], torch.Size((N, K)))
    return tensor, codes


@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.values())
def test_int4(dtype: torch.dtype) -> None:
    """torchao multiplies by these weights, but does not dequantize them: code * scale + zero_point,
    whose product is exact in fp32 for 16-bit scales, is formed here in fp64."""
    for i in range(CASES):
        draw = random.Random(f"int4{i}{dtype}")
        group = draw.choice([2, 16, 32])
        N, K = draw.randint(1, 20), group * draw.randint(1, 6)
        tensor, codes = int4(draw, N, K, group, dtype)
        scale, zero_point = (
            t.t().repeat_interleave(group, dim=1).double()
            for t in (tensor.scale, tensor.zero_point)
        )
        expected = ((codes * scale).float().double() + zero_point).float()
        found = read_weight(tensor)
        for other in FLOATS:
            assert same_bits(found.dequantize(other), expected.to(other))
        assert found.dtype is dtype and found.codes.data_ptr() == tensor.qdata.data_ptr()
        check_rows(found, draw)


def test_a_module() -> None:
    layer = nn.Linear(64, 8, bias=False)
    ao.quantize_(layer, ao.Int8WeightOnlyConfig())
    assert same_bits(read_weight(layer).dequantize(), layer.weight.dequantize())


def opaque() -> ModuleType:
    return library("torchao.prototype.quantization.int4.int4_opaque_tensor")


SHAPE = torch.Size((8, 16))
WORDS, HALF = torch.zeros(8, 2, dtype=torch.int32), torch.ones(1, 8, dtype=torch.bfloat16)
BYTES = torch.zeros(8, 8, dtype=torch.int8)
OTHER_LAYOUTS = {
    "Int4OpaqueTensor": lambda: opaque().Int4OpaqueTensor(BYTES, HALF, [1, 16], SHAPE),
    "Int4PreshuffledTensor": lambda: workflows.Int4PreshuffledTensor(BYTES, HALF, [1, 16], SHAPE),
    "Int4PlainInt32Tensor": lambda: workflows.Int4PlainInt32Tensor(
        WORDS, HALF, HALF, [1, 16], SHAPE
    ),
    "Int4TilePackedTo4dTensor": lambda: workflows.Int4TilePackedTo4dTensor(
        WORDS.view(1, 1, 8, 2), HALF, [1, 16], SHAPE
    ),
    "IntxUnpackedToInt8Tensor": lambda: workflows.IntxUnpackedToInt8Tensor(
        torch.zeros(8, 16, dtype=torch.int8), torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.int8),
        torch.int4, (1, 16), torch.float32, None,
    ),
    "Float8Tensor": lambda: workflows.Float8Tensor.from_hp(torch.ones(8, 16)),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_LAYOUTS)
def test_other_layouts_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"q: class: got torchao's {kind}, expected an (Int|NF)"):
        read_weight(OTHER_LAYOUTS[kind](), "q")


def changed(tensor: Any, **fields: Any) -> Any:
    for field, value in fields.items():
        setattr(tensor, field, value)
    return tensor


def int8_tensor() -> Any:
    return workflows.Int8Tensor.from_hp(torch.randn(8, 16), ao.PerRow())


def int4_tensor() -> Any:
    return int4(random.Random(0), 8, 16, 4, torch.bfloat16)[0]


def nf4_tensor(*shape: int) -> Any:
    return nf4.NF4Tensor.from_tensor(torch.randn(*(shape or (8, 64))), 16, 2)


ROW: Tensor = torch.ones(8)
MALFORMED = {
    "int8 act_pre_scale": (int8_tensor, {"act_pre_scale": ROW}, "act_pre_scale"),
    "int8 block_size": (int8_tensor, {"block_size": [2, 16]}, "block_size"),
    "int8 block_size of three": (int8_tensor, {"block_size": [1, 1, 16]}, "block_size"),
    "int8 scale": (int8_tensor, {"scale": ROW[:7]}, "scale"),
    "int8 scale of integers": (int8_tensor, {"scale": ROW.int()}, "scale"),
    "int8 zero_point": (int8_tensor, {"zero_point": ROW}, "zero_point"),
    "int8 qdata": (int8_tensor, {"qdata": BYTES[:3]}, "qdata"),
    "int4 act_pre_scale": (int4_tensor, {"act_pre_scale": ROW}, "act_pre_scale"),
    "int4 scale": (int4_tensor, {"scale": HALF}, "scale"),
    "int4 scale transposed": (int4_tensor, {"scale": torch.ones(8, 4)}, "scale"),
    "int4 block_size": (int4_tensor, {"block_size": [1, 3]}, "block_size"),
    "int4 qdata": (int4_tensor, {"qdata": BYTES[:, :7]}, "qdata"),
    "nf4 of one dimension": (lambda: nf4_tensor(128), {}, "shape"),
    "nf4 transposed": (lambda: nf4_tensor().t(), {}, "strides"),
    "nf4 block_size": (nf4_tensor, {"block_size": 17}, "block_size"),
    "nf4 block_size 1": (nf4_tensor, {"block_size": 1}, "block_size"),
    "nf4 block_size 0": (nf4_tensor, {"block_size": 0}, "block_size"),
    "nf4 scaler_block_size": (nf4_tensor, {"scaler_block_size": 5}, "scaler_block_size"),
    "nf4 data": (nf4_tensor, {"quantized_data": torch.zeros(9).byte()}, "quantized_data"),
    "nf4 factor": (nf4_tensor, {"quantization_factor": ROW}, "quantization_factor"),
    "nf4 mean": (nf4_tensor, {"scaler_mean": torch.tensor(1.0).half()}, "scaler_mean"),
    "nf4 table": (nf4_tensor, {"nf4": ROW}, "nf4"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str) -> None:
    make, fields, field = MALFORMED[name]
    with pytest.raises(ValueError, match=rf"^q: {field}: got .*, expected "):
        read_weight(changed(make(), **fields), "q")
