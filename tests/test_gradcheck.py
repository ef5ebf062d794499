"""Numerical derivatives in float64, with the dropout mask held fixed."""

from __future__ import annotations

import itertools

import pytest
import torch
from devices import each_device
from problems import NAMES, Problem, make_problem
from torch import Tensor

SUBSETS = [subset for size in range(1, 7) for subset in itertools.combinations(NAMES, size)]
assert len(SUBSETS) == 63


def with_grads(problem: Problem, wanted: tuple[str, ...]) -> tuple[list[Tensor | None], list[int]]:
    """Operands of which only `wanted` require grad, and the positions of those."""
    operands = [
        None if t is None else t.detach().requires_grad_(name in wanted)
        for name, t in zip(NAMES, problem.operands, strict=True)
    ]
    return operands, [i for i, t in enumerate(operands) if t is not None and t.requires_grad]


def check(problem: Problem, wanted: tuple[str, ...], twice: bool = False) -> None:
    operands, positions = with_grads(problem, wanted)

    def function(*leaves: Tensor) -> Tensor:
        full = list(operands)
        for position, value in zip(positions, leaves, strict=True):
            full[position] = value
        return problem.fused(*full)

    leaves = [operands[i] for i in positions]
    assert torch.autograd.gradcheck(function, leaves)
    if twice:
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@each_device
def test_every_subset_of_gradients(device: str, wanted: tuple[str, ...], dropout_p: float) -> None:
    problem = make_problem(
        (3,), 5, 4, 2, dtype=torch.float64, lora_bias=True, dropout_p=dropout_p, device=device
    )
    check(problem, wanted)
    operands, positions = with_grads(problem, wanted)
    y = problem.fused(*operands)
    y.backward(problem.dy)
    for i, tensor in enumerate(operands):
        assert (tensor.grad is not None) == (i in positions)


@pytest.mark.parametrize("rows", [(), (1,), (2, 3)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("lora_bias", [True, False], ids=["lora-bias", "no-lora-bias"])
def test_shapes(rows: tuple[int, ...], dropout_p: float, bias: bool, lora_bias: bool) -> None:
    problem = make_problem(
        rows, 6, 5, 3, dtype=torch.float64, bias=bias, lora_bias=lora_bias, dropout_p=dropout_p
    )
    check(problem, NAMES)


TWICE = [
    ("x",),
    ("lora_A",),
    ("lora_B",),
    ("weight",),
    ("x", "lora_A"),
    ("x", "lora_B", "lora_A"),
    NAMES,
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("wanted", TWICE, ids="+".join)
@each_device
def test_second_derivatives(device: str, wanted: tuple[str, ...], dropout_p: float) -> None:
    problem = make_problem(
        (3,), 5, 4, 2, dtype=torch.float64, lora_bias=True, dropout_p=dropout_p, device=device
    )
    check(problem, wanted, twice=True)


@pytest.mark.parametrize("asked", [("x", "lora_B"), ("lora_B",)], ids="+".join)
def test_second_derivative_without_x_is_refused(asked: tuple[str, ...]) -> None:
    problem = make_problem((3,), 5, 4, 2, dtype=torch.float64)
    operands, _ = with_grads(problem, ("x", "lora_B"))
    with pytest.raises(RuntimeError, match=r"lora_linear: double backward: x was not kept"):
        torch.autograd.grad(
            problem.fused(*operands).sum(),
            [operands[NAMES.index(name)] for name in asked],
            create_graph=True,
        )


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_several_layers_deep(depth: int, dropout_p: float) -> None:
    problems = [
        make_problem((2,), 4, 4, 2, dtype=torch.float64, dropout_p=dropout_p, seed=seed)
        for seed in range(depth)
    ]
    x = problems[0].x

    def net(x: Tensor, *adapters: Tensor) -> Tensor:
        for i, p in enumerate(problems):
            x = torch.tanh(p.fused(x, p.weight, p.bias, *adapters[2 * i : 2 * i + 2], None))
        return x

    adapters = [t for p in problems for t in (p.lora_A, p.lora_B)]
    assert torch.autograd.gradcheck(net, [x, *adapters])
