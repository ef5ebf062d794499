"""GGUF's blocks: gguf's own values, to the bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quant_problems import random_weight, row_ranges, same_bits
from quantized_libraries import library

from lora_ext.quant import read_gguf, read_weight

gguf = library("gguf")
quants, Type = gguf.quants, gguf.GGMLQuantizationType

pytestmark = pytest.mark.usefixtures("one_thread")
TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
CASES = 60
# Of each block, fp16 numbers that random bytes would make NaN.
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}


def random_bytes(draw: random.Random, N: int, K: int, quant_type: str) -> np.ndarray:
    """[N, bytes of a row]: any codes, scales that are numbers, zeros and denormal ones too."""
    rng = np.random.default_rng(draw.getrandbits(32))
    values, nbytes = gguf.GGML_QUANT_SIZES[Type[quant_type]]
    blocks = rng.integers(0, 256, (N * K // values, nbytes), dtype=np.uint8)
    for at in HALVES[quant_type]:
        scales = (rng.standard_normal(len(blocks)) * 10.0 ** rng.integers(-7, 2)).astype(np.float16)
        scales[rng.random(len(blocks)) < 0.1] = 0
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(N, -1)


@pytest.mark.parametrize("quant_type", TYPES)
def test_values(quant_type: str) -> None:
    block = gguf.GGML_QUANT_SIZES[Type[quant_type]][0]
    for i in range(CASES):
        draw = random.Random(f"{quant_type}{i}")
        N, K = draw.randint(1, 7), block * draw.randint(1, 256 // block + 1)
        data = random_bytes(draw, N, K, quant_type)
        whole = torch.from_numpy(quants.dequantize(data, Type[quant_type]))
        kind: Any = draw.choice([quant_type, Type[quant_type], int(Type[quant_type])])
        found = read_gguf(draw.choice([data, torch.from_numpy(data)]), (N, K), kind)
        assert torch.equal(found.dequantize(), whole)
        # gguf subtracts the minimum, which is added here: a sum of zeros has another sign.
        assert quant_type == "Q4_K" or same_bits(found.dequantize(), whole)
        assert torch.equal(found.dequantize(torch.bfloat16), whole.bfloat16())
        for begin, end in row_ranges(draw, N):
            assert torch.equal(found.dequantize_rows(begin, end), whole[begin:end])


@pytest.mark.parametrize("quant_type", ["Q8_0", "Q4_0", "Q4_1"])
def test_what_gguf_quantized(quant_type: str) -> None:
    weight = random_weight(random.Random(1), 9, 96, torch.float32)
    data = quants.quantize(weight.numpy(), Type[quant_type])
    found = read_gguf(data, tuple(np.array([9, 96], np.uint64)), quant_type)
    assert same_bits(
        found.dequantize(), torch.from_numpy(quants.dequantize(data, Type[quant_type]))
    )
    assert (found.dequantize() - weight).abs().max() < 0.3


def test_a_file(tmp_path: Path) -> None:
    """A reader's tensor: a memory map that cannot be written, and sizes the other way round."""
    data = random_bytes(random.Random(2), 4, 512, "Q6_K")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=Type.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(path).tensors
    found = read_weight(tensor)
    assert found.shape == (4, 512) and found.name == "blk.0.attn_q.weight"
    assert torch.equal(found.dequantize(), torch.from_numpy(quants.dequantize(data, Type.Q6_K)))
