"""The composed path of the CUDA backend (csrc/ops/lora_linear_blas.cpp): it runs on any device."""

from __future__ import annotations

import pytest
import torch
from problems import NAMES, Problem, gradients, make_problem, rms
from test_lora_linear import DTYPES, UNIT, dtype_id
from torch import Tensor

from lora_ext._extension import _C

SIZES = [(1, 64, 32, 8), (37, 257, 136, 17), (64, 768, 768, 8)]
ALL = [True] * 6


def scale_of(
    problem: Problem, as_tensor: bool
) -> tuple[float, Tensor | None, float, Tensor | None]:
    """The arguments scaling, scaling_tensor, dropout_p and rng_state of the operators."""
    factor = torch.tensor(problem.scaling / 4, dtype=torch.float64) if as_tensor else None
    number = 4.0 if as_tensor else problem.scaling
    return number, factor, problem.dropout_p, problem.rng_state


def composed(problem: Problem, as_tensor: bool, keep_h: bool) -> dict[str, Tensor]:
    scale = scale_of(problem, as_tensor)
    y, h = _C.composed_fwd(*problem.operands, *scale, keep_h)
    grads = _C.composed_bwd(
        problem.dy, problem.x, h if keep_h else None, problem.weight, problem.lora_A,
        problem.lora_B, *scale, ALL,
    )  # fmt: skip
    dx, dweight, dbias, dA, dB, dlora_bias = grads
    return dict(zip(("y", *NAMES), (y, dx, dweight, dbias, dA, dB, dlora_bias), strict=True))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@torch.no_grad()
def test_values_and_gradients(
    size: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    dropout_p: float,
    as_tensor: bool,
) -> None:
    M, K, N, r = size
    problem = make_problem(
        (M,), K, N, r, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=dropout_p,
        lora_bias=True, scaling=1.7,
    )  # fmt: skip
    with torch.enable_grad():
        exact = problem.exact_operands()
        exact_y = problem.plain(*exact)
        wanted = [exact_y, *gradients(exact_y, exact, problem.dy.double())]
    got = composed(problem, as_tensor, keep_h=M > 1)
    for (name, result), want in zip(got.items(), wanted, strict=True):
        operand = problem.x if name == "y" else getattr(problem, name)
        assert result.dtype == operand.dtype, name
        # To its type are rounded: h or dh, its product with the scaling tensor, the low-rank part,
        # and the sum, each by at most a unit. Sums in float32 add a rounding of each term at most.
        terms = max(problem.x.numel(), problem.weight.numel(), problem.dy.numel())
        compute = UNIT[torch.float64 if result.dtype == torch.float64 else torch.float32]
        bound = 4 * UNIT[dtypes[0]] + compute * terms**0.5
        assert rms(result.double() - want) <= bound * rms(want), name


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_nothing_is_read_from_the_device(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """A meta tensor has no values: reading the scaling, or the state of dropout, would fail."""
    problem = make_problem(dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=0.1, lora_bias=True)
    on_meta = {name: getattr(problem, name).detach().to("meta") for name in (*NAMES, "dy", "mask")}
    on_meta |= {"rng_state": problem.rng_state.to("meta")}  # type: ignore[union-attr]
    scale = (1.0, torch.tensor(2.0, device="meta"), 0.1, on_meta["rng_state"])
    y, h = _C.composed_fwd(*(on_meta[name] for name in NAMES), *scale, True)
    for kept_h in (h, None):
        grads = _C.composed_bwd(
            on_meta["dy"], on_meta["x"], kept_h, on_meta["weight"], on_meta["lora_A"],
            on_meta["lora_B"], *scale, ALL,
        )  # fmt: skip
        assert [t.shape for t in grads] == [on_meta[name].shape for name in NAMES]
    assert y.shape == on_meta["dy"].shape


@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_alone(wanted: int) -> None:
    problem = make_problem(dropout_p=0.1, lora_bias=True)
    scale = scale_of(problem, as_tensor=True)
    arguments = [
        t.detach() if isinstance(t, Tensor) else t
        for t in (problem.dy, problem.x, None, problem.weight, problem.lora_A, problem.lora_B)
    ]
    every = _C.composed_bwd(*arguments, *scale, ALL)
    alone = _C.composed_bwd(*arguments, *scale, [index == wanted for index in range(6)])
    assert torch.equal(alone[wanted], every[wanted])
    assert all(t.numel() == 0 for index, t in enumerate(alone) if index != wanted)
