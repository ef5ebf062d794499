"""bitsandbytes' weights: values, codes and scales are its own, to the bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from quant_problems import FLOATS, random_weight, row_ranges, same_bits
from quantized_libraries import library
from torch import Tensor

from lora_ext.quant import NestedScales, QuantizedWeight, quantize, read_state_dict, read_weight
from lora_ext.quant.bitsandbytes import BLOCK_SIZES

bnb = library("bitsandbytes")
F = bnb.functional

CASES = 12  # of each parametrisation
STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float64)
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOATS}


@pytest.fixture(autouse=True)
def eager(one_thread: None) -> Iterator[None]:
    """bitsandbytes compiles what it has no CPU kernel for, anew for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def dequantized(codes: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """By bitsandbytes, as one row, of which it takes the right scales; see `is_read_wrong`."""
    row = copy.copy(state)
    row.shape, row.dtype = torch.Size((1, state.shape.numel())), dtype
    return F.dequantize_4bit(codes, row).reshape(state.shape)


def is_read_wrong(shape: tuple[int, int], block_size: int) -> bool:
    """bitsandbytes 0.50.2 takes the scales of other blocks with AVX512, where blocks cross rows of
    a multiple of 16 values."""
    return shape[1] % 16 == 0 and shape[1] % block_size != 0


def problems(seed: str) -> Iterator[tuple[random.Random, tuple[int, int], int]]:
    """Shapes, every third of an odd number of values, and block sizes, every fourth 64."""
    draw = random.Random(seed)
    for i in range(CASES):
        N, K = draw.randint(1, 24), draw.choice([draw.randint(1, 150), 16 * draw.randint(1, 9)])
        if i % 3 == 0:
            N, K = N | 1, K | 1
        yield draw, (N, K), 64 if i % 4 == 0 else draw.choice(BLOCK_SIZES)


def check(found: QuantizedWeight, codes: Tensor, state: Any, draw: random.Random) -> None:
    """The matrix in all dtypes, and rows of it, beside bitsandbytes'."""
    assert found.shape == tuple(state.shape) and found.dtype is state.dtype
    assert found.codes.data_ptr() == codes.data_ptr()
    for dtype in FLOATS:
        whole = found.dequantize(dtype)
        # Of zeros without their signs: FP4's code 8 is minus zero in some of its kernels alone.
        assert same_bits(whole + 0, dequantized(codes, state, dtype) + 0)
        for begin, end in row_ranges(draw, found.shape[0]):
            assert same_bits(found.dequantize_rows(begin, end, dtype), whole[begin:end])
    assert same_bits(found.dequantize(), found.dequantize(state.dtype))
    if not is_read_wrong(found.shape, found.block_size):
        assert torch.equal(found.dequantize(), F.dequantize_4bit(codes, state))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.values())
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit(quant_type: str, dtype: torch.dtype, nested: bool) -> None:
    """Live weights and `quantize`, with each dtype of storage that the bytes fit."""
    storages = set()
    for draw, (N, K), block_size in problems(f"{quant_type}{dtype}{nested}"):
        weight = random_weight(draw, N, K, dtype)
        fit = [s for s in STORAGES if -(-N * K // 2) % s.itemsize == 0]
        storages.add(storage := draw.choice(fit))
        options = dict(blocksize=block_size, compress_statistics=nested, quant_type=quant_type)
        live = bnb.nn.Params4bit(weight, quant_storage=storage, **options).to("cpu")
        state = live.quant_state
        check(read_weight(live), live.data, state, draw)

        ours = quantize(weight, quant_type, block_size, nested)
        assert torch.equal(ours.codes, live.data.view(torch.uint8).reshape(-1))
        assert same_bits(ours.codebook, state.code)
        if not nested:
            assert same_bits(ours.scales, state.absmax)
            continue
        assert isinstance(ours.scales, NestedScales)
        assert torch.equal(ours.scales.codes, state.absmax)
        assert same_bits(ours.scales.codebook, state.state2.code)
        assert same_bits(ours.scales.absmax, state.state2.absmax)
        assert ours.scales.offset == state.offset.item()
        assert ours.scales.block_size == state.state2.blocksize
    assert len(storages) > 2


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.values())
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_state_dict(quant_type: str, dtype: torch.dtype, nested: bool) -> None:
    """What a Linear4bit saves, and the layer itself."""
    for draw, (N, K), block_size in problems(f"saved{quant_type}{dtype}{nested}"):
        layer = bnb.nn.Linear4bit(1, 1, bias=False)
        weight = random_weight(draw, N, K, dtype)
        options = dict(blocksize=block_size, compress_statistics=nested, quant_type=quant_type)
        layer.weight = bnb.nn.Params4bit(weight, module=layer, **options)
        layer = layer.to("cpu")
        state = layer.state_dict(prefix="model.q.")
        check(read_state_dict(state, "model.q.weight"), layer.weight.data, layer.quant_state, draw)
        check(read_weight(layer), layer.weight.data, layer.quant_state, draw)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_each_storage(storage: torch.dtype, nested: bool) -> None:
    """Live and saved; FSDP asks for the dtype of the rest of the model."""
    weight = random_weight(random.Random(0), 8, 100, torch.bfloat16)
    layer = bnb.nn.Linear4bit(100, 8, quant_type="nf4", quant_storage=storage)
    options = dict(quant_storage=storage, compress_statistics=nested, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, module=layer, **options)
    layer = layer.to("cpu")
    assert layer.weight.dtype is storage
    for found in (read_weight(layer), read_state_dict(layer.state_dict(), "weight")):
        check(found, layer.weight.data, layer.quant_state, random.Random(1))


def test_embeddings() -> None:
    four = bnb.nn.Embedding4bit(6, 40, quant_type="nf4").to("cpu")
    expected = dequantized(four.weight.data, four.weight.quant_state, torch.float32)
    assert same_bits(read_weight(four).dequantize(), expected)
    eight = bnb.nn.Embedding8bit(6, 40).to("cpu")
    expected = F.int8_vectorwise_dequant(eight.weight.CB, eight.weight.SCB)
    assert same_bits(read_weight(eight).dequantize(), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.values())
def test_int8(dtype: torch.dtype) -> None:
    for i in range(24):
        draw = random.Random(f"{i}{dtype}")
        N, K = draw.randint(1, 24), draw.randint(1, 150)
        weight = random_weight(draw, N, K, dtype)
        codes, absmax, _ = F.int8_vectorwise_quant(weight)
        ours = quantize(weight, "int8")
        assert torch.equal(ours.codes.view(N, K), codes) and same_bits(ours.scales, absmax)

        live = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False).to("cpu")
        found = read_weight(live)
        whole = F.int8_vectorwise_dequant(live.CB, live.SCB)
        assert found.codes.data_ptr() == live.data.data_ptr() and found.along == "row"
        assert same_bits(found.dequantize(), whole)
        assert same_bits(found.dequantize(torch.bfloat16), whole.bfloat16())
        for begin, end in row_ranges(draw, N):
            assert same_bits(found.dequantize_rows(begin, end), whole[begin:end])


def test_int8_layers() -> None:
    """Before and after the forward that moves SCB, and as saved."""
    layer = bnb.nn.Linear8bitLt(33, 7, bias=False, has_fp16_weights=False).to("cpu")
    expected = F.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    assert same_bits(read_weight(layer).dequantize(), expected)
    layer(torch.randn(2, 33, dtype=torch.float16))
    assert layer.weight.SCB is None
    assert same_bits(read_weight(layer).dequantize(), expected)
    state = layer.state_dict(prefix="q.")
    assert same_bits(read_state_dict(state, "q.weight").dequantize(), expected)
    del state["q.weight_format"]
    assert same_bits(read_state_dict(state, "q.weight").dequantize(), expected)


def linear_4bit(nested: bool) -> Any:
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=nested)
    return layer.to(torch.bfloat16).to("cpu")


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_the_layout_for_cpus_is_refused(nested: bool) -> None:
    """Live, and in what bitsandbytes saves after it: scales transposed, or of another dtype."""
    layer = linear_4bit(nested)
    weight = layer.weight
    weight.data, weight.quant_state = F._convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    with pytest.raises(ValueError, match=r"q: quant_state\.packing_format_for_cpu: got True.*load"):
        read_weight(layer, "q")
    field = "nested_dtype" if nested else "absmax"
    with pytest.raises(ValueError, match=rf"q\.weight: {field}: .* repacked"):
        read_state_dict(layer.state_dict(prefix="q."), "q.weight")


def test_the_state_of_the_module() -> None:
    """Sharding makes the parameter anew, without its state; the layer has it, too."""
    layer = linear_4bit(True)
    expected = read_weight(layer).dequantize()
    layer.weight.quant_state = None
    assert same_bits(read_weight(layer).dequantize(), expected)


def test_not_quantized_yet() -> None:
    with pytest.raises(ValueError, match="w: quant_state: got None, expected one: move the layer"):
        read_weight(bnb.nn.Linear4bit(4, 4), "w")
    with pytest.raises(ValueError, match=r"w: weight: got a float32 .* move the layer"):
        read_weight(bnb.nn.Linear8bitLt(4, 4, has_fp16_weights=False), "w")


@pytest.mark.parametrize("field", ["absmax", "shape", "blocksize", "code", "dtype", "quant_type"])
def test_live_state_that_was_changed(field: str) -> None:
    layer = linear_4bit(False)
    wrong = {"absmax": torch.ones(3), "shape": (64, 127), "blocksize": 48}
    wrong |= {"code": torch.zeros(16), "dtype": torch.int8, "quant_type": "af4"}
    setattr(layer.weight.quant_state, field, wrong[field])
    said = {"shape": "weight", "code": "quant_map"}.get(field, field)
    with pytest.raises(ValueError, match=rf"^q: {said}: got .*, expected "):
        read_weight(layer, "q")
