"""`quantize`: codes and scales are bitsandbytes' on a CPU, to the bit, where a rounding decides."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from quant_problems import random_weight, same_bits
from quantized_libraries import library

from lora_ext.quant import quantize
from lora_ext.quant.encode import nested_scales

bnb = library("bitsandbytes")
F = bnb.functional


@pytest.fixture(autouse=True)
def eager(one_thread: None) -> Iterator[None]:
    """bitsandbytes compiles what it has no CPU kernel for, anew for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_values_between_two_codes(quant_type: str) -> None:
    """The middles, and their neighbours, times numbers of all sizes: what a reciprocal, a quotient
    or another rounding would tell apart. The last block is short."""
    table = F.get_4bit_type(quant_type, device="cpu").sort().values
    middles = (table[:-1] + table[1:]) / 2
    near = torch.cat([middles, middles.nextafter(table[:-1]), middles.nextafter(table[1:])])
    block = torch.cat([near, torch.tensor([1.0])])[:63]
    generator = torch.Generator().manual_seed(0)
    for i in range(100):
        tops = (
            10 ** (torch.rand(64, 1, generator=generator) * 8 - 4)
            if i
            else torch.full((64, 1), 1e-39)
        )
        rows = torch.cat([block.repeat(63, 1), block[-1:].repeat(63, 64 - len(block))], dim=1)
        flat = torch.cat([(rows * tops[:63]).view(-1), block * tops[63]])
        codes, state = F.quantize_4bit(flat.view(1, -1), quant_type=quant_type)
        ours = quantize(flat.view(1, -1), quant_type)
        assert torch.equal(ours.codes, codes.view(-1))
        assert same_bits(ours.scales, state.absmax)


def test_scales_between_two_codes() -> None:
    """Points of bitsandbytes' grid at which the nearest entry changes, and their neighbours."""
    points = (torch.arange(65535).double() + 0.5) * 2 / 65535 - 1
    for ulps in range(-3, 4):
        near = points.float().view(torch.int32).add(ulps).view(torch.float32)
        # Mirrored: the mean, which is taken off, is next to nothing. With 1 and -1 in each block.
        rows = torch.cat([near[:32512].view(256, 127), -near[:32512].view(256, 127)], dim=1)
        ends = torch.tensor([[1.0, -1.0]]).expand(256, 2)
        tops = torch.rand(256, 1, generator=torch.Generator().manual_seed(ulps)) + 0.5
        absmax = (torch.cat([rows, ends], dim=1) * tops).view(-1)
        offset = absmax.mean()
        codes, state = F.quantize_blockwise(absmax - offset, blocksize=256)
        ours = nested_scales(absmax)
        assert torch.equal(ours.codes, codes) and same_bits(ours.absmax, state.absmax)
        assert ours.offset == offset.item()


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_scales_that_are_all_the_same(value: float) -> None:
    weight = torch.full((4, 64), value)
    codes, state = F.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    ours = quantize(weight, "nf4", nested=True)
    assert torch.equal(ours.codes, codes.view(-1)) and torch.equal(ours.scales.codes, state.absmax)
    assert ours.dequantize().tolist() == weight.tolist()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_more_scales_than_one_nested_block(quant_type: str, nested: bool) -> None:
    draw = random.Random(0)
    weight = random_weight(draw, 301, 191, torch.bfloat16)
    codes, state = F.quantize_4bit(
        weight, blocksize=32, compress_statistics=nested, quant_type=quant_type
    )
    ours = quantize(weight, quant_type, 32, nested)
    assert torch.equal(ours.codes, codes.view(-1))
    row = ours.dequantize().view(1, -1)  # see is_read_wrong in test_quant_bitsandbytes.py
    state.shape = row.shape
    assert same_bits(row + 0, F.dequantize_4bit(codes, state) + 0)
    assert (len(state.absmax) > 7 * 256) and ours.along == "flat"


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_blocks_that_cross_rows(quant_type: str) -> None:
    """Where bitsandbytes errs with AVX512: values are within half a step of the matrix."""
    for K, block_size in ((96, 64), (80, 64), (64, 128), (48, 32)):
        weight = random_weight(random.Random(K), 32, K, torch.float32)
        found = quantize(weight, quant_type, block_size)
        steps = found.codebook.sort().values.diff().max()
        tops = found.scales.repeat_interleave(block_size)[: weight.numel()].view_as(weight)
        assert ((found.dequantize() - weight).abs() <= tops * steps * 0.5001).all()


def test_nibbles_in_order() -> None:
    """By hand: the first value is the high nibble; an odd one is padded by the code of zero."""
    found = quantize(torch.tensor([[1.0, -1.0, 0.0]]), "nf4")
    assert found.codes.tolist() == [0xF0, 0x77] and found.scales.tolist() == [1.0]
    assert found.dequantize().tolist() == [[1.0, -1.0, 0.0]]


def test_int8_between_two_codes() -> None:
    """k + 1/2 127ths of a row's maximum, and their neighbours."""
    halves = ((torch.arange(127) + 0.5).double() / 127).float()
    row = torch.cat([halves, halves.nextafter(halves - 1), halves.nextafter(halves + 1)])
    row = torch.cat([row, torch.ones(1)])
    weight = row * 10 ** (torch.rand(300, 1, generator=torch.Generator().manual_seed(0)) * 8 - 4)
    codes, absmax, _ = F.int8_vectorwise_quant(weight)
    ours = quantize(weight, "int8")
    assert torch.equal(ours.codes, codes.view(-1)) and same_bits(ours.scales, absmax)
