"""lora_linear against the reference in float64: values, gradients, layouts, shapes."""

from __future__ import annotations

import pytest
import torch
from devices import each_device
from problems import (
    UNIT,
    Problem,
    exact_results,
    expected_sizes,
    gradients,
    kernel_bound,
    make_problem,
    results,
    rms,
)
from torch import Tensor

import lora_ext

# M, K, N, r, and which biases there are
SIZES = [
    ((1, 64, 32, 8), "both biases"),
    ((3, 5, 7, 1), "lora_bias"),
    ((16, 768, 768, 8), "bias"),
    ((37, 257, 136, 17), "both biases"),
    ((49, 72, 1100, 64), "no bias"),
    ((200, 1100, 72, 16), "bias"),
    ((97, 130, 257, 5), "lora_bias"),
    ((2, 2049, 1025, 40), "no bias"),
    ((16, 2100, 2060, 64), "bias"),  # few rows, large adapter: BLAS also under dropout
    ((66, 130, 257, 129), "both biases"),  # large rank: BLAS, of 16 bits from 256 on
    ((70, 65, 72, 1024), "bias"),
]
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def dtype_id(pair: tuple[torch.dtype, torch.dtype]) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(pair))


def assert_as_exact(problem: Problem) -> None:
    """Each result is within a few roundings of float64."""
    operands = list(problem.operands)
    found = results(problem.fused(), operands, problem.dy)
    wanted = exact_results(problem)
    bounds = cuda_bounds if problem.x.is_cuda else cpu_bounds
    for name, bound in bounds(problem, wanted).items():
        assert found[name].shape == wanted[name].shape, name
        error = rms(found[name].double() - wanted[name])
        assert error <= bound, f"{name}: error {error:.3g}, at most {bound:.3g} allowed"


def cpu_bounds(problem: Problem, wanted: dict[str, Tensor]) -> dict[str, float]:
    """As seen from the largest magnitudes of a result: the low-rank part and the sum are each
    rounded once to its type; sums in float32 add at most sqrt(terms) roundings of their own, of
    terms no larger than the total's RMS."""
    terms = max(problem.x.numel(), problem.weight.numel(), problem.dy.numel())
    bounds = {}
    for name, want in wanted.items():
        dtype = (problem.x if name == "y" else getattr(problem, name)).dtype
        compute = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
        bounds[name] = (2 * UNIT[dtype] + compute * terms**0.5) * max(rms(want), 1e-30)
    return bounds


def cuda_bounds(problem: Problem, wanted: dict[str, Tensor]) -> dict[str, float]:
    """What the kernels may err, and twice the error of plain PyTorch on the same GPU: products by
    cuBLAS may also be summed in parts that are rounded to 16 bits."""
    operands = list(problem.operands)
    plain = results(problem.plain(), operands, problem.dy)
    sizes = expected_sizes(problem)
    bounds = {}
    for name, want in wanted.items():
        error = rms(plain[name].double() - want)
        # Nothing to compare where there are no elements; their mean is not a number.
        kernels = kernel_bound(problem, plain[name].dtype) * sizes[name] if want.numel() else 0.0
        bounds[name] = 2 * error + kernels
    return bounds


@each_device
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("size", "biases"),
    SIZES,
    ids=[f"{'x'.join(map(str, size))}-{biases}" for size, biases in SIZES],
)
def test_values_and_gradients(
    size: tuple[int, int, int, int],
    biases: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    dropout_p: float,
    device: str,
) -> None:
    M, K, N, r = size
    assert_as_exact(
        make_problem(
            (M,),
            K,
            N,
            r,
            dtype=dtypes[0],
            adapter_dtype=dtypes[1],
            dropout_p=dropout_p,
            lora_bias=biases in ("lora_bias", "both biases"),
            bias=biases in ("bias", "both biases"),
            device=device,
        )
    )


@pytest.mark.parametrize("dtypes", DTYPES[1:4], ids=dtype_id)
def test_large_ranks_in_blocks_of_rows(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Copies of x, dy, y and dx are of 2^20 elements at most for each thread: the last block of
    each is of less rows than the others. h is made again in backward, of dropout's blocks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        problem = make_problem(
            (1100,), 1000, 1010, 256, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=0.3
        )
        assert_as_exact(problem)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "rows", [(), (4,), (2, 3), (2, 1, 3), (2, 3, 1, 2)], ids=lambda rows: f"{len(rows) + 1}d"
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_device
def test_leading_dimensions(
    device: str, dtype: torch.dtype, rows: tuple[int, ...], dropout_p: float
) -> None:
    assert_as_exact(make_problem(rows, dtype=dtype, dropout_p=dropout_p, device=device))


@pytest.mark.parametrize(
    ("rows", "K", "N", "r"),
    [((0,), 8, 8, 2), ((2, 0, 3), 8, 8, 2), ((30,), 0, 8, 2), ((30,), 8, 0, 2), ((30,), 8, 8, 0)],
    ids=["no-rows", "no-rows-4d", "no-inputs", "no-outputs", "rank-0"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@each_device
def test_empty(
    device: str, rows: tuple[int, ...], K: int, N: int, r: int, dtype: torch.dtype, dropout_p: float
) -> None:
    assert_as_exact(make_problem(rows, K, N, r, dtype=dtype, dropout_p=dropout_p, device=device))


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "row-strided": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "column-strided": lambda x: torch.stack([x, x], 2)[:, :, 0],
    "misaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
    "rows-reversed-twice": lambda x: x.flip(0).contiguous().flip(0),
}


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", ["x", "weight", "lora_A", "lora_B", "dy"])
@each_device
def test_strides(device: str, operand: str, layout: str, dtype: torch.dtype) -> None:
    problem = make_problem((37,), 72, 40, 8, dtype=dtype, dropout_p=0.1, device=device)
    plain_y = problem.fused()
    plain_grads = gradients(plain_y, list(problem.operands), problem.dy)
    relaid = LAYOUTS[layout](getattr(problem, operand).detach())
    assert torch.equal(relaid, getattr(problem, operand))
    setattr(problem, operand, relaid if operand == "dy" else leaf(relaid))
    y = problem.fused()
    bound = 2 * UNIT[dtype] + UNIT[torch.float32] * 72**0.5  # sums may be in another order
    assert rms(y - plain_y) <= bound * rms(plain_y)
    for got, want in zip(
        gradients(y, list(problem.operands), problem.dy), plain_grads, strict=True
    ):
        assert rms(got - want) <= bound * rms(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_device
def test_expanded_input_and_gradient(device: str, dtype: torch.dtype) -> None:
    problem = make_problem((1,), dtype=dtype, dropout_p=0.1, device=device)
    problem.x = problem.x.detach().expand(6, -1)
    problem.mask = lora_ext.dropout_mask(problem.rng_state, 6, 72, 0.1)
    problem.dy = torch.ones((), dtype=dtype, device=device).expand(6, 40)
    problem.x.requires_grad_()
    assert_as_exact(problem)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_device
def test_dx_through_several_layers(device: str, dtype: torch.dtype, dropout_p: float) -> None:
    """LoRA's part of dx is invisible in one layer's dA and dB: stack three, with B ≠ 0."""
    problems = [
        make_problem((64,), 72, 72, 8, dtype=dtype, dropout_p=dropout_p, seed=s, device=device)
        for s in range(3)
    ]

    def run(how: str, to: torch.dtype) -> list[Tensor]:
        """y and all gradients, by plain PyTorch or fused."""
        y = leaf(problems[0].x.to(to))
        leaves = [y]
        for p in problems:
            operands = [None if t is None else leaf(t.to(to)) for t in p.operands[1:]]
            leaves += [t for t in operands if t is not None]
            y = torch.tanh(getattr(p, how)(y, *operands))
        return [y, *torch.autograd.grad(y, leaves, problems[0].dy.to(to))]

    # Each layer rounds twice and sums in an order of its own.
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    floor = 3 * (2 * UNIT[dtype] + UNIT[compute] * 72**0.5)
    exact = run("plain", torch.float64)
    for got, plain, want in zip(run("fused", dtype), run("plain", dtype), exact, strict=True):
        allowed = 2 * rms(plain.double() - want) + floor * rms(want)
        assert rms(got.double() - want) <= allowed


@pytest.mark.parametrize("scaling", [0.0, -1.5, 1], ids=str)
def test_scaling_number_and_tensor_agree(scaling: float) -> None:
    p = make_problem((9,), dropout_p=0.1)
    as_number, as_tensor = (
        lora_ext.lora_linear(*p.operands, scaling=s, dropout_p=0.1, rng_state=p.rng_state)
        for s in (scaling, torch.tensor(float(scaling), dtype=torch.float64))
    )
    assert torch.equal(as_number, as_tensor)
    for got, want in zip(
        gradients(as_tensor, list(p.operands), p.dy),
        gradients(as_number, list(p.operands), p.dy),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_scaling_zero_is_exactly_the_base() -> None:
    p = make_problem((9,), dtype=torch.bfloat16)
    y = lora_ext.lora_linear(*p.operands, scaling=0.0)
    assert torch.equal(y, torch.nn.functional.linear(p.x, p.weight, p.bias))


@each_device
def test_inference_mode_and_no_grad(device: str) -> None:
    p = make_problem((9,), device=device)
    with torch.no_grad():
        y = p.fused()
    assert not y.requires_grad and torch.equal(y, p.fused())
    with torch.inference_mode():
        assert torch.equal(p.fused(), y)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES[1:4], ids=dtype_id)
@each_device
def test_fifty_reruns_are_bitwise_equal(
    device: str, dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float
) -> None:
    p = make_problem(
        (200,), 304, 200, 16, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=dropout_p,
        device=device,
    )  # fmt: skip
    first = [p.fused(), *gradients(p.fused(), list(p.operands), p.dy)]
    for _ in range(50):
        again = [p.fused(), *gradients(p.fused(), list(p.operands), p.dy)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("size", [(50, 130, 70, 5), (50, 136, 72, 40)], ids=str)
@each_device
def test_uninitialised_memory_is_never_read(
    device: str, size: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Deterministic mode fills fresh memory with NaN. Of cuBLAS it would want another workspace."""
    M, K, N, r = size
    p = make_problem(
        (M,), K, N, r, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=0.1, device=device
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert_as_exact(p)
    finally:
        torch.use_deterministic_algorithms(False)
