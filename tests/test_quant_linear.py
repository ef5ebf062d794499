"""lora_linear_quantized against lora_linear of the dequantized matrix and against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from platform import machine
from typing import Any

import pytest
import torch
from devices import dots_slowly, multiplies_fp16
from problems import NAMES, UNIT, Problem, exact_results, make_problem, results, rms
from quant_matrices import ANY_SIZE, MATRICES, quantized, random_matrix, values
from test_lora_linear import DTYPES, LAYOUTS, cpu_bounds, dtype_id, leaf
from torch import Tensor

from lora_ext.quant import QuantizedWeight
from lora_ext.quant.operator import lora_linear_quantized

pytestmark = pytest.mark.usefixtures("one_thread")
N, K = 24, 160  # blocks of 64 cross rows; 15 units of 256
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def call(p: Problem, weight: QuantizedWeight, *operands: Tensor | None) -> Tensor:
    """The problem's, with the matrix that its weight is the values of."""
    x, _, *others = operands or p.operands
    return lora_linear_quantized(
        x, weight, *others, scaling=p.scaling, dropout_p=p.dropout_p, rng_state=p.rng_state
    )


def problem_on(
    weight: QuantizedWeight, rows: tuple[int, ...], r: int = 8, **options: Any
) -> Problem:
    N, K = weight.shape
    p = make_problem(rows, K, N, r, **options)
    p.weight = values(weight, p.x.dtype).requires_grad_()
    return p


def results_of(p: Problem, weight: QuantizedWeight) -> dict[str, Tensor]:
    """y and the gradients; not that of the weight."""
    operands = list(p.operands)
    operands[NAMES.index("weight")] = None
    found = results(call(p, weight), operands, p.dy)
    assert "weight" not in found
    return found


def assert_as_exact(p: Problem, weight: QuantizedWeight) -> None:
    wanted = exact_results(p)
    found = results_of(p, weight)
    for name, bound in cpu_bounds(p, wanted).items():
        if name == "weight":
            continue
        assert found[name].shape == wanted[name].shape
        assert found[name].dtype == (p.x if name == "y" else getattr(p, name)).dtype
        error = rms(found[name].double() - wanted[name])
        assert error <= bound, f"{name}: error {error:.3g}, at most {bound:.3g} allowed"


def read_by_products(weight: QuantizedWeight, dtype: torch.dtype) -> list[Tensor]:
    """The matrix as forward and dx multiply it: by rows of the identity, a few and all at once."""
    N, K = weight.shape
    A, B = torch.zeros(1, K, dtype=dtype), torch.zeros(N, 1, dtype=dtype)
    eye = torch.eye(K, dtype=dtype)
    few = torch.cat([lora_linear_quantized(x, weight, None, A, B) for x in eye.split(16)])
    x = torch.zeros(N, K, dtype=dtype, requires_grad=True)
    lora_linear_quantized(x, weight, None, A, B).backward(torch.eye(N, dtype=dtype))
    assert x.grad is not None
    return [few.t(), lora_linear_quantized(eye, weight, None, A, B).t(), x.grad]


def check_values_of_all() -> None:
    """Every matrix, in every dtype, value by value: sums of one value and zeros are exact."""
    whole = [(N, K), (5, 256)]  # the second in whole blocks: its codes are read in whole vectors
    cases = [(name, shape, dtype) for name in MATRICES for shape in whole for dtype in FLOATS]
    odd = [(1, 1), (3, 5), (37, 51), (2, 1090)]
    cases += [(name, shape, torch.float32) for name in ANY_SIZE for shape in odd]
    for name, shape, dtype in cases:
        weight = MATRICES[name](*shape)
        for i, found in enumerate(read_by_products(weight, dtype)):
            assert torch.equal(found, values(weight, dtype)), (name, shape, dtype, i)


def check_bits_of_widened_products() -> None:
    """Blocks and their order are those of the dense matrix."""
    names = {"nf4": torch.bfloat16, "int8": torch.float16}
    for name, dtype in names.items():
        if multiplies_fp16() and dtype is torch.float16:
            continue  # by ATen's product, of parts that may be cut elsewhere
        weight = MATRICES[name](300, 530)
        p = problem_on(weight, (270,), dtype=dtype, dropout_p=0.1)
        dense = results(p.fused(), list(p.operands), p.dy)
        for result, found in results_of(p, weight).items():
            assert torch.equal(found, dense[result]), (name, result)


CAPABILITIES = ["default", "avx2", "avx512", "avx512_bf16", "amx_bf16"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_values_to_the_bit(capability: str) -> None:
    """By each instruction set's kernels, which a process chooses once, and by the widened product
    wherever that runs."""
    here = torch.backends.cpu.get_cpu_capability()
    if CAPABILITIES.index(capability) > {"AVX2": 1, "AVX512": 3}.get(here, 0):
        pytest.skip(f"this CPU has {here}")
    program = "import test_quant_linear as t; t.check_values_of_all()"
    if machine() in ("x86_64", "AMD64") and (capability != "avx512_bf16" or dots_slowly()):
        program += "; t.check_bits_of_widened_products()"
    environment = os.environ | {"LORA_EXT_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scales_that_are_not_finite(dtype: torch.dtype, block_size: int) -> None:
    """Infinities and NaN stay in their block."""
    weight = random_matrix(20, 64, "high_first", block_size)
    scales = weight.scales
    assert isinstance(scales, Tensor)
    scales[3], scales[9], scales[21] = float("inf"), float("nan"), -float("inf")
    wanted = values(weight, dtype)
    assert 0 < wanted.isfinite().logical_not().sum() <= 3 * block_size
    A, B = torch.zeros(1, 64, dtype=dtype), torch.zeros(20, 1, dtype=dtype)
    for M in (4, 40):
        x = torch.ones(M, 64, dtype=dtype)
        y = lora_linear_quantized(x, weight, None, A, B)
        sums = (x.double() @ wanted.double().t()).to(dtype)
        assert torch.equal(y.isnan(), sums.isnan()) and torch.equal(y.isinf(), sums.isinf())


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("M", [0, 1, 3, 16, 17, 300])
def test_rows(M: int, dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float) -> None:
    for name, K in (("nf4-nested", 211), ("int8", 211), ("nf4-nested", 256), ("int8", 320)):
        weight = MATRICES[name](77, K)
        options = {"dtype": dtypes[0], "adapter_dtype": dtypes[1], "dropout_p": dropout_p}
        assert_as_exact(problem_on(weight, (M,), **options, lora_bias=M != 3, bias=M != 16), weight)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name: str, dtype: torch.dtype) -> None:
    weight = MATRICES[name](N, K)
    for M in (5, 40):
        assert_as_exact(problem_on(weight, (M,), dtype=dtype, dropout_p=0.1), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "shape"), [("nf4", (1100, 2100)), ("int8", (2060, 1153))])
def test_wide(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Several parts in both directions, of several chunks."""
    weight = ANY_SIZE[name](*shape)
    assert_as_exact(problem_on(weight, (19,), 16, dtype=dtype), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, dtype: torch.dtype) -> None:
    weight = MATRICES["nf4"](40, 72)
    for M in (7, 37):
        p = problem_on(weight, (M,), dtype=dtype, dropout_p=0.1)
        p.x, p.dy = leaf(LAYOUTS[layout](p.x.detach())), LAYOUTS[layout](p.dy)
        assert_as_exact(p, weight)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_the_adapter_is_as_beside_a_dense_matrix(
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    """The same code: the adapter's and the biases' gradients are the same to the bit."""
    weight = MATRICES["nf4"](40, 72)
    for M in (5, 40):
        options = {"dtype": dtypes[0], "adapter_dtype": dtypes[1], "dropout_p": 0.1}
        p = problem_on(weight, (M,), lora_bias=True, **options)
        dense = results(p.fused(), list(p.operands), p.dy)
        for result, found in results_of(p, weight).items():
            if result not in ("y", "x"):
                assert torch.equal(found, dense[result]), (M, result)


@pytest.mark.parametrize("rows", [(), (2, 3), (2, 1, 30)], ids=str)
def test_leading_dimensions(rows: tuple[int, ...]) -> None:
    weight = MATRICES["int8"](40, 72)
    assert_as_exact(problem_on(weight, rows, dropout_p=0.3), weight)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("M", [9, 64])
def test_through_several_layers(M: int, dtype: torch.dtype) -> None:
    """LoRA's part of dx is invisible in one layer's dA and dB: stack three, with B ≠ 0. Errors
    against float64 are those of the dense layers, but for sums in another order."""
    weights = [quantized("nf4", nested=i == 1)(72, 72) for i in range(3)]
    problems = [
        problem_on(weight, (M,), dtype=dtype, dropout_p=0.1, seed=i)
        for i, weight in enumerate(weights)
    ]

    def run(how: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        leaves = [leaf(problems[0].x.to(to))]
        y = leaves[0]
        for p, weight in zip(problems, weights, strict=True):
            operands = [None if t is None else leaf(t.to(to)) for t in p.operands[2:]]
            leaves += [t for t in operands if t is not None]
            y = torch.tanh(how(p, weight, y, p.weight.detach().to(to), *operands))
        return [y, *torch.autograd.grad(y, leaves, problems[0].dy.to(to))]

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    floor = 3 * (2 * UNIT[dtype] + UNIT[compute] * 72**0.5)
    exact = run(lambda p, _, *operands: p.plain(*operands), torch.float64)
    dense = run(lambda p, _, *operands: p.fused(*operands), dtype)
    for got, other, want in zip(run(call, dtype), dense, exact, strict=True):
        assert rms(got.double() - want) <= rms(other.double() - want) + floor * rms(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_and_threads(dtype: torch.dtype) -> None:
    """The same bits in every run; with another number of threads within the bound."""
    weight = MATRICES["nf4"](520, 640)
    for M in (5, 40, 600):
        p = problem_on(weight, (M,), dtype=dtype, dropout_p=0.1)
        first = results_of(p, weight)
        for _ in range(5):
            again = results_of(p, weight)
            assert all(torch.equal(again[name], first[name]) for name in first)
        before = torch.get_num_threads()
        try:
            for threads in (2, 3, 16):
                torch.set_num_threads(threads)
                assert_as_exact(p, weight)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_uninitialised_memory_is_never_read(dtype: torch.dtype) -> None:
    """Deterministic mode fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for M in (6, 50):
            weight = MATRICES["nf4"](70, 130)
            assert_as_exact(problem_on(weight, (M,), dtype=dtype, dropout_p=0.1), weight)
    finally:
        torch.use_deterministic_algorithms(False)
