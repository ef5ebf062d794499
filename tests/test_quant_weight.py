"""QuantizedWeight: fields that do not fit each other, rows, blocks, bytes. Without any library."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from measured import MAX_BYTES, attempt
from quant_problems import same_bits

from lora_ext.quant import NestedScales, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
KEY, N, K = "layers.0.q.weight", 6, 50
BLOCKS = 5  # of 64 values

CODES = torch.zeros(150, dtype=torch.uint8)
NESTED = NestedScales(CODES[:BLOCKS], torch.zeros(256), torch.zeros(1), 256, 0.0)
DESCRIPTIONS: dict[str, tuple[str, Any]] = {
    "shape": ("shape", (N, K + 2)),
    "shape of text": ("shape", "NK"),
    "packing": ("packing", "low_last"),
    "packing in whole units": ("packing", "halves_16"),
    "signed codes": ("codes", CODES.view(torch.int8)),
    "codes cut": ("codes", CODES[1:]),
    "no codebook": ("codebook", None),
    "codebook": ("codebook", torch.zeros(256)),
    "codebook in fp64": ("codebook", torch.zeros(16).double()),
    "block size": ("block_size", 0),
    "block size of a fraction": ("block_size", 64.0),
    "block size beyond 64 bits": ("block_size", 1 << 70),
    "no scales": ("scales", None),
    "scales": ("scales", torch.zeros(BLOCKS + 1)),
    "scales in fp64": ("scales", torch.zeros(BLOCKS).double()),
    "scales elsewhere": ("scales", torch.zeros(BLOCKS, device="meta")),
    "shift": ("shift", torch.zeros(1)),
    "zero points": ("zero_point", torch.zeros(BLOCKS)),
    "factor": ("factor", math.inf),
    "factor that is an int": ("factor", 1),
    "dtype": ("dtype", torch.float64),
    "rounding": ("rounding", torch.int8),
    "nested codes": ("scales", dataclasses.replace(NESTED, codes=CODES)),
    "nested codebook": ("scales", dataclasses.replace(NESTED, codebook=torch.zeros(16))),
    "nested absmax": ("scales", dataclasses.replace(NESTED, absmax=torch.zeros(2))),
    "nested block size": ("scales", dataclasses.replace(NESTED, block_size=-1)),
    "nested offset": ("scales", dataclasses.replace(NESTED, offset=math.nan)),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions(name: str) -> None:
    field, value = DESCRIPTIONS[name]
    whole = quantize(torch.randn(N, K), "nf4", name=KEY)
    said = {"packing in whole units": "shape", "shape": "codes"}.get(name, field)
    with pytest.raises(ValueError, match=rf"^{KEY}: {said}[.\w]*: got .*, expected "):
        dataclasses.replace(whole, **{field: value})


def test_a_codebook_beside_signed_codes() -> None:
    with pytest.raises(ValueError, match=r"weight: codebook: .* expected None"):
        dataclasses.replace(quantize(torch.ones(2, 2), "int8"), codebook=torch.zeros(256))


@pytest.mark.parametrize("rows", [(-1, 2), (3, 2), (0, N + 1), (0.0, 2), (True, 2)])
def test_rows(rows: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{KEY}: rows: got .*, expected 0 <= begin"):
        quantize(torch.ones(N, K), "nf4", name=KEY).dequantize_rows(*rows)


def test_no_rows_and_other_dtypes() -> None:
    found = quantize(torch.ones(N, K), "nf4", name=KEY)
    assert found.dequantize_rows(2, 2).shape == (0, K)
    with pytest.raises(ValueError, match=f"^{KEY}: dtype: got torch.float64, expected "):
        found.dequantize(torch.float64)


def test_rows_cost_rows() -> None:
    """16 rows of a matrix that would be 1 GiB in fp32, in codes of 128 MiB."""
    codes = torch.zeros(1 << 27, dtype=torch.uint8)
    scales = torch.ones(1 << 22)
    whole = dataclasses.replace(
        quantize(torch.ones(N, K), "nf4"), shape=(1 << 14, 1 << 14), codes=codes, scales=scales
    )

    outcome = attempt(lambda: whole.dequantize_rows(5, 21))
    assert outcome.error == "" and outcome.extra_bytes < MAX_BYTES


@pytest.mark.parametrize(("K", "along"), [(64, "row"), (128, "K"), (96, "flat"), (32, "flat")])
def test_blocks_along(K: int, along: str) -> None:
    assert quantize(torch.ones(4, K), "nf4").along == along


def test_it_cannot_be_changed() -> None:
    found = quantize(torch.ones(N, K), "nf4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.block_size = 32  # type: ignore[misc]


@pytest.mark.parametrize("nested", [False, True])
def test_panels_and_bytes(nested: bool) -> None:
    """A matrix of several panels is its rows; bytes are those of the tensors that it holds."""
    weight = torch.randn(1100, 1027, dtype=torch.float32).bfloat16()
    found = quantize(weight, "nf4", nested=nested)
    rows = [found.dequantize_rows(i, i + 100) for i in range(0, 1100, 100)]
    assert same_bits(found.dequantize(), torch.cat(rows))
    blocks = -(-weight.numel() // 64)
    scales = blocks + 4 * 256 + 4 * -(-blocks // 256) if nested else 4 * blocks
    assert found.nbytes == weight.numel() // 2 + 4 * 16 + scales
    assert repr(found).startswith("QuantizedWeight(weight: [1100, 1027], high_first, 4 bits, ")
