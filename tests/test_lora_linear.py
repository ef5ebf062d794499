"""lora_linear against the reference in float64: values, gradients, layouts, shapes."""

from __future__ import annotations

import pytest
import torch
from problems import NAMES, Problem, gradients, make_problem, rms
from torch import Tensor

import lora_ext

# Half an ulp at 1.0. Accumulation is in float32 for the 16-bit types.
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-9,
    torch.float16: 2.0**-12,
}
SIZES = [
    (1, 64, 32, 8),
    (3, 5, 7, 1),
    (16, 768, 768, 8),
    (37, 257, 136, 17),
    (49, 72, 1100, 64),
    (200, 1100, 72, 16),
    (97, 130, 257, 5),
    (2, 2049, 1025, 40),
    (16, 2100, 2060, 64),  # few rows, large adapter: BLAS also under dropout
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
    """Each result is within a few roundings of float64, as seen from its largest magnitudes."""
    y = problem.fused()
    grads = gradients(y, list(problem.operands), problem.dy)
    exact = problem.exact_operands()
    exact_y = problem.plain(*exact)
    exact_grads = gradients(exact_y, exact, problem.dy.double())
    names = [name for name, t in zip(NAMES, problem.operands, strict=True) if t is not None]
    for name, got, want in zip(["y", *names], [y, *grads], [exact_y, *exact_grads], strict=True):
        assert got.shape == want.shape, name
        if want.numel() == 0:
            continue
        # The low-rank part and the sum are each rounded once to the result's type; sums in float32
        # add at most sqrt(terms) roundings of their own, of terms no larger than the total's RMS.
        terms = max(problem.x.numel(), problem.weight.numel(), problem.dy.numel())
        compute = UNIT[torch.float64 if got.dtype == torch.float64 else torch.float32]
        bound = 2 * UNIT[got.dtype] + compute * terms**0.5
        assert rms(got.double() - want) <= bound * max(rms(want), 1e-30), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_values_and_gradients(
    size: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float
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
            lora_bias=M % 2 == 1,
            bias=M % 3 != 0,
        )
    )


@pytest.mark.parametrize(
    "rows", [(), (4,), (2, 3), (2, 1, 3), (2, 3, 1, 2)], ids=lambda rows: f"{len(rows) + 1}d"
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_leading_dimensions(rows: tuple[int, ...], dropout_p: float) -> None:
    assert_as_exact(make_problem(rows, dropout_p=dropout_p))


@pytest.mark.parametrize(
    ("rows", "K", "N", "r"),
    [((0,), 8, 8, 2), ((2, 0, 3), 8, 8, 2), ((30,), 0, 8, 2), ((30,), 8, 0, 2), ((30,), 8, 8, 0)],
    ids=["no-rows", "no-rows-4d", "no-inputs", "no-outputs", "rank-0"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty(
    rows: tuple[int, ...], K: int, N: int, r: int, dtype: torch.dtype, dropout_p: float
) -> None:
    assert_as_exact(make_problem(rows, K, N, r, dtype=dtype, dropout_p=dropout_p))


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
def test_strides(operand: str, layout: str, dtype: torch.dtype) -> None:
    problem = make_problem((37,), 72, 40, 8, dtype=dtype, dropout_p=0.1)
    plain_y = problem.fused()
    plain_grads = gradients(plain_y, list(problem.operands), problem.dy)
    relaid = LAYOUTS[layout](getattr(problem, operand).detach())
    assert torch.equal(relaid, getattr(problem, operand))
    setattr(problem, operand, relaid if operand == "dy" else leaf(relaid))
    y = problem.fused()
    assert rms(y - plain_y) <= 2 * UNIT[dtype] * rms(plain_y)
    for got, want in zip(
        gradients(y, list(problem.operands), problem.dy), plain_grads, strict=True
    ):
        assert rms(got - want) <= 2 * UNIT[dtype] * rms(want)


def test_expanded_input_and_gradient() -> None:
    problem = make_problem((1,), dropout_p=0.1)
    problem.x = problem.x.detach().expand(6, -1)
    problem.mask = lora_ext.dropout_mask(problem.rng_state, 6, 72, 0.1)
    problem.dy = torch.ones(()).expand(6, 40)
    problem.x.requires_grad_()
    assert_as_exact(problem)


def test_dx_through_several_layers() -> None:
    """LoRA's part of dx is invisible in one layer's dA and dB: stack three, with B ≠ 0."""
    problems = [make_problem((5,), 24, 24, 4, dtype=torch.float64, seed=s) for s in range(3)]

    def net(x: Tensor, fused: bool) -> Tensor:
        for p in problems:
            x = torch.tanh((p.fused if fused else p.plain)(x, *p.operands[1:]))
        return x

    leaves = [problems[0].x] + [t for p in problems for t in p.operands[1:] if t is not None]
    fused = torch.autograd.grad(net(problems[0].x, True).sum(), leaves)
    plain = torch.autograd.grad(net(problems[0].x, False).sum(), leaves)
    for got, want in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


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


def test_inference_mode_and_no_grad() -> None:
    p = make_problem((9,))
    with torch.no_grad():
        y = p.fused()
    assert not y.requires_grad and torch.equal(y, p.fused())
    with torch.inference_mode():
        assert torch.equal(p.fused(), y)


def test_fifty_reruns_are_bitwise_equal() -> None:
    p = make_problem((200,), 300, 200, 16, dtype=torch.bfloat16, dropout_p=0.1)
    first = [p.fused(), *gradients(p.fused(), list(p.operands), p.dy)]
    for _ in range(50):
        again = [p.fused(), *gradients(p.fused(), list(p.operands), p.dy)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_uninitialised_memory_is_never_read() -> None:
    """Deterministic mode fills fresh memory with NaN."""
    p = make_problem((50,), 130, 70, 5, dropout_p=0.1)
    torch.use_deterministic_algorithms(True)
    try:
        assert_as_exact(p)
    finally:
        torch.use_deterministic_algorithms(False)
