"""The operator dequantize beside QuantizedWeight.dequantize, to the bit."""

from __future__ import annotations

import pytest
import torch
from quant_matrices import ANY_SIZE, MATRICES, values
from quant_problems import same_bits

from lora_ext.quant.operator import operands_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dequantize = torch.ops.lora_ext.dequantize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_values_are_the_descriptions(name: str, dtype: torch.dtype) -> None:
    """By the CPU's kernels, and by ATen's operators, as on devices without kernels."""
    sizes = [(1, 1), (37, 293), (300, 264)] if name in ANY_SIZE else [(16, 16), (96, 264)]
    for N, K in sizes:
        weight = MATRICES[name](N, K)
        operands = operands_of(weight)
        assert same_bits_or_double(dequantize(*operands, dtype), values(weight, dtype))
        composed = torch.ops.lora_ext.dequantize.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd),
            *operands, dtype,
        )  # fmt: skip
        assert same_bits_or_double(composed, values(weight, dtype))


def same_bits_or_double(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype is torch.float64:  # float's values, widened
        return other.dtype is torch.float64 and same_bits(one.float(), other.float())
    return same_bits(one, other)


def test_what_does_not_fit_is_refused() -> None:
    tensors, layout, numbers = operands_of(MATRICES["nf4"](8, 8))
    with pytest.raises(TypeError, match="dequantize: dtype: got int64, expected float64"):
        dequantize(tensors, layout, numbers, torch.int64)
    with pytest.raises(ValueError, match="dequantize: weight: got no tensors"):
        dequantize([], layout, numbers, torch.float32)
    with pytest.raises(ValueError, match="dequantize: weight: scales: got none among 2 tensors"):
        dequantize(tensors[:2], layout, numbers, torch.float32)
