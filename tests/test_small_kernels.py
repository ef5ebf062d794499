"""The small CUDA kernels that are called by themselves, emulated on the host: the state of dropout,
its mask, merging."""

from __future__ import annotations

import pytest
import torch
from emulated import TYPES
from emulated_small import SmallKernels
from problems import UNIT

import lora_ext


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> SmallKernels:
    return SmallKernels.build(tmp_path_factory.mktemp("kernels"))


def test_state_of_dropout(kernels: SmallKernels) -> None:
    for seed, offset in [(7, 12), (-3, 1 << 40), (2**63 - 1, 0)]:
        assert kernels.fill_rng_state(seed, offset).tolist() == [seed, offset]
        assert kernels.fill_rng_state(seed, offset, 8).tolist() == [seed, offset + 8]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (37, 129), (3, 300), (2, 128)])
def test_mask_is_the_cpus(kernels: SmallKernels, size: tuple[int, int], dropout_p: float) -> None:
    state = torch.tensor([123456789012345, 44])
    rows, columns = size
    whole = lora_ext.dropout_mask(state, 50 + rows, columns, dropout_p)
    for first_row in (0, 1, 50):
        keep = kernels.dropout_mask(state, first_row, rows, columns, dropout_p)
        assert torch.equal(keep.bool(), whole[first_row : first_row + rows])
        assert keep.max() <= 1


SIZES = [(1, 1, 1), (37, 72, 8), (200, 257, 17), (64, 136, 64)]  # N, K, r
DTYPES = [*TYPES, (torch.float32, torch.float32)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_merge_rounds_once(
    kernels: SmallKernels, size: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    (N, K, r), (base, adapter) = size, dtypes
    generator = torch.Generator().manual_seed(N)
    rows = torch.randn(N, K + 3, generator=generator).to(base)
    lora_A = torch.randn(r, K, generator=generator).to(adapter)
    lora_B = torch.randn(N, r, generator=generator).to(adapter)
    for weight in (rows[:, :K].contiguous(), rows[:, :K]):
        before = weight.clone()
        merged, finite = kernels.merge(weight, lora_A, lora_B, 0.5)
        exact = weight.double() + 0.5 * lora_B.double() @ lora_A.double()
        terms = weight.double().abs() + 0.5 * lora_B.double().abs() @ lora_A.double().abs()
        # Half a unit in the last place of the result, and the float sum of r + 1 terms
        limit = 2 * UNIT[base] * exact.abs() + (r + 2) * 2 * UNIT[torch.float32] * terms
        if base == torch.float16:
            limit += 2.0**-25  # below its normal numbers
        assert finite and ((merged.double() - exact).abs() <= limit).all()
        looked, finite = kernels.merge(weight, lora_A, lora_B, 0.5, write=False)
        assert finite and torch.equal(looked, before)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("part", ["weight", "lora_A", "lora_B"])
def test_merge_says_what_is_not_finite(kernels: SmallKernels, part: str, value: float) -> None:
    sizes = {"weight": (37, 72), "lora_A": (8, 72), "lora_B": (37, 8)}
    tensors = {name: torch.ones(size, dtype=torch.bfloat16) for name, size in sizes.items()}
    tensors[part][-1, -1] = value
    for write in (False, True):
        assert not kernels.merge(**tensors, scaling=1.0, write=write)[1]


@pytest.mark.parametrize(("update", "fits"), [(1e3, True), (1e4, False)])
def test_merge_says_what_overflows(kernels: SmallKernels, update: float, fits: bool) -> None:
    weight, lora_A = torch.full((2, 3), 6e4).half(), torch.ones(1, 3).half()
    lora_B = torch.full((2, 1), update).half()
    assert kernels.merge(weight, lora_A, lora_B, 1.0)[1] == fits
