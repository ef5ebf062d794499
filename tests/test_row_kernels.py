"""The CUDA kernels of weight_norm, column_scale and lora_embedding, emulated on the host, against
their formulas in float64; and that of quantized matrices."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from emulated_dequantize import check_dequantize
from emulated_rows import Problem, RowKernels, check_column_scale, check_embedding, check_norms
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32)]
# Rows, columns, rank, and columns that lie between the rows: a tile has 32 x 256 and 32 ranks.
SIZES = [
    (1, 1, 1, 0),
    (37, 264, 8, 1),
    (33, 520, 40, 24),
    (70, 257, 33, 0),  # no row but the first is aligned
    (5, 256, 64, 3),
    (5, 40, 0, 0),
    (33, 528, 5, 8),  # rows 16 bytes apart, and none at a multiple of 16
]
SEEDS = itertools.cycle(range(4))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> RowKernels:
    return RowKernels.load(RowKernels.compile(tmp_path_factory.mktemp("kernels")))


@pytest.fixture(autouse=True)
def reset(kernels: RowKernels) -> None:
    kernels.gpu(90)
    kernels.schedule("eager", 0)


@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("capability", [75, 86], ids=["without mma", "mma"])
def test_weight_norm(
    kernels: RowKernels, capability: int, dtypes: Any, size: Any, by_column: bool
) -> None:
    kernels.gpu(capability)
    kernels.schedule("random", next(SEEDS))
    check_norms(kernels, Problem(*size, *dtypes), by_column)


@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
def test_norms_of_an_update_that_all_but_cancels_the_weight(
    kernels: RowKernels, by_column: bool
) -> None:
    p = Problem(33, 264, 8, 0, FP32, FP32)
    p.weight.copy_(-0.5 * p.lora_B @ p.lora_A).add_(1e-3 * torch.randn(33, 264))
    check_norms(kernels, p, by_column)


@pytest.mark.parametrize("adapter", [BF16, FP32], ids=str)
@pytest.mark.parametrize("capability", [75, 86], ids=["without mma", "mma"])
def test_norms_beyond_the_matrix_nothing_counts(
    kernels: RowKernels, capability: int, adapter: torch.dtype
) -> None:
    """Infinite factors meet zeros there. Of a float that is two of 16 bits NaN may come instead."""
    kernels.gpu(capability)
    wanted = [torch.inf] if capability == 75 or adapter == BF16 else [torch.inf, torch.nan]
    for by_column in (True, False):
        p = Problem(33, 264, 8, 0, BF16, adapter)
        (p.lora_A if by_column else p.lora_B.t())[3, 7] = torch.inf
        norms = kernels.weight_norm(p.weight, p.lora_A, p.lora_B, 0.5, by_column)
        assert str(norms[7].item()) in map(str, wanted)
        assert norms.isfinite().sum() == len(norms) - 1


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("rows", [1, 63, 200])
@pytest.mark.parametrize("columns", [(1, 0), (264, 0), (257, 0), (40, 8), (40, 3)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_column_scale(
    kernels: RowKernels, dtype: torch.dtype, columns: tuple[int, int], rows: int, processors: int
) -> None:
    kernels.gpu(86, processors)
    kernels.schedule("random", next(SEEDS))
    check_column_scale(kernels, Problem(rows, columns[0], 1, columns[1], dtype, dtype))


@pytest.mark.parametrize("processors", [1, 132])
def test_column_scale_of_many_rows(kernels: RowKernels, processors: int) -> None:
    """More than a block has, and more parts than groups of threads that add them."""
    kernels.gpu(86, processors)
    check_column_scale(kernels, Problem(1200, 24, 1, 0, BF16, BF16))


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_gradients_of_column_scale_that_are_wanted(
    kernels: RowKernels, mask: tuple[bool, bool, bool]
) -> None:
    p = Problem(130, 264, 1, 0, BF16, BF16)
    whole = kernels.column_scale_backward(p.dy, p.z, p.scale, (True, True, True))
    z = p.z if mask[1] else None
    for name, got in kernels.column_scale_backward(p.dy, z, p.scale, mask).items():
        assert torch.equal(got, whole[name]), name


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_lora_embedding(kernels: RowKernels, dtypes: Any, size: Any) -> None:
    kernels.schedule("random", next(SEEDS))
    check_embedding(kernels, Problem(*size, *dtypes))


@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_that_is_none(kernels: RowKernels, token: int) -> None:
    p = Problem(5, 264, 8, 0, BF16, BF16)
    tokens = torch.tensor([0, 4, token])
    with pytest.raises(RuntimeError, match="lora_embedding: indices: index out of range"):
        kernels.lora_embedding(tokens, p.weight, p.of_tokens, p.of_dimensions, 0.5)


@pytest.mark.parametrize("seed", range(1, 4))
def test_sums_are_in_a_fixed_order(kernels: RowKernels, seed: int) -> None:
    """Whatever the order that blocks and warps run in."""
    p = Problem(300, 520, 40, 0, BF16, FP32)

    def results() -> list[Tensor]:
        gradients = kernels.column_scale_backward(p.dy, p.z, p.scale, (True, True, True))
        norms = [kernels.weight_norm(p.weight, p.lora_A, p.lora_B, 0.5, by) for by in (0, 1)]
        return [*norms, *gradients.values()]

    want = results()
    kernels.schedule("random", seed)
    for got, one in zip(results(), want, strict=True):
        assert torch.equal(got, one)


def test_rows_beyond_two_to_the_31_elements(kernels: RowKernels) -> None:
    """Two rows, so far apart; what lies between is not touched, so it takes no memory."""
    M, N, r = 2, 264, 3
    far = 2**31 + 8
    p = Problem(M, N, r, 0, BF16, BF16)
    laid = torch.empty(far + N, dtype=BF16).as_strided((M, N), (far, 1))
    laid.copy_(p.weight)
    p.weight = p.z = p.dy = laid
    kernels.guarded = False
    try:
        check_norms(kernels, p, False)
        check_norms(kernels, p, True)
        check_column_scale(kernels, p)
        check_embedding(kernels, p)
    finally:
        kernels.guarded = True


LIMITS = {  # rows of 8 columns: tiles that fit into the first dimension of a grid alone; too many
    "column_scale": ("bf16", {"M": 64 << 17, "N": 8}, {"M": 64 << 31, "N": 8}),
    "lora_embedding": ("bf16", {"M": 32 << 17, "D": 8}, {"M": 32 << 31, "D": 8}),
    "weight_norm": ("bf16", {"N": 32 << 17, "K": 8}, {"N": 32 << 31, "K": 8}),
}


@pytest.mark.parametrize("function", LIMITS)
def test_more_blocks_than_the_other_dimensions_of_a_grid_have(
    kernels: RowKernels, function: str
) -> None:
    types, many, too_many = LIMITS[function]
    kernels.limits_only(True)
    try:
        kernels.launch(function, types, **many)
        with pytest.raises(RuntimeError, match="a matrix has more tiles than a grid"):
            kernels.launch(function, types, **too_many)
    finally:
        kernels.limits_only(False)


@pytest.mark.parametrize("seed", range(2))
def test_dequantized_matrices_are_those_of_the_cpu(kernels: RowKernels, seed: int) -> None:
    kernels.schedule("random", seed)
    check_dequantize(kernels)
