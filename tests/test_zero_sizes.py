"""Sizes of zero, each alone and with others, for every operator: forward, backward and second
derivatives are plain PyTorch's, whatever requires grad and with one thread or two."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import lora_ext
from lora_ext import reference
from lora_ext.functional import (
    column_scale,
    dora_linear,
    draw_rng_state,
    dropout,
    dropout_mask,
    weight_norm,
)

Function = Callable[..., Tensor]
SIZES = list(itertools.product((0, 64), (0, 6), (0, 5), (0, 3)))  # M, N, K, r: two parts of rows
ids = [
    " ".join(f"{name}{size}" for name, size in zip("MNKr", sizes, strict=True)) for sizes in SIZES
]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def check(
    fused: Function,
    plain: Function,
    operands: dict[str, Tensor],
    constant: str = "",
    twice: bool = True,
) -> None:
    """Every subset of the operands that may require grad."""
    names = [name for name in operands if name not in constant.split()]
    for count in range(len(names) + 1):
        for wanted in itertools.combinations(names, count):
            given = {n: t.detach().requires_grad_(n in wanted) for n, t in operands.items()}
            leaves = [given[name] for name in wanted]
            results = [_derivatives(f(**given), leaves, twice) for f in (fused, plain)]
            for got, expected in zip(*results, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def _derivatives(y: Tensor, leaves: list[Tensor], twice: bool) -> list[Tensor]:
    """y, its gradients, and the gradients of those, made twice: fused and differentiable."""
    if not leaves:
        return [y]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    if len(leaves) < 3 or not twice:  # with fewer, not all that second derivatives read is kept
        return [y.detach(), *first]
    again = torch.autograd.grad(y, leaves, dy, create_graph=True)
    second = torch.autograd.grad(
        sum(g.square().sum() for g in again), leaves, allow_unused=True, materialize_grads=True
    )
    return [y.detach(), *first, *(g.detach() for g in again), *second]


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("sizes", SIZES, ids=ids)
@pytest.mark.usefixtures("threads")
def test_lora_linear(sizes: tuple[int, int, int, int], dropout_p: float) -> None:
    M, N, K, r = sizes
    operands = tensors(x=(M, K), weight=(N, K), lora_A=(r, K), lora_B=(N, r))
    bias = torch.ones(N, dtype=torch.float64)
    state = draw_rng_state(bias)
    mask = dropout_mask(state, M, K, dropout_p) if dropout_p else None

    def fused(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return lora_ext.lora_linear(
            x, weight, bias, lora_A, lora_B, scaling=0.5, dropout_p=dropout_p, rng_state=state
        )

    def plain(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return reference.lora_linear(
            x, weight, bias, lora_A, lora_B, scaling=0.5, dropout_p=dropout_p, mask=mask
        )

    check(fused, plain, operands)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("sizes", SIZES, ids=ids)
@pytest.mark.usefixtures("threads")
def test_dora_linear(sizes: tuple[int, int, int, int], dropout_p: float) -> None:
    M, N, K, r = sizes
    operands = tensors(x=(M, K), weight=(N, K), lora_A=(r, K), lora_B=(N, r), scale=(N,))
    state = draw_rng_state(operands["x"])
    mask = dropout_mask(state, M, K, dropout_p)

    def fused(**given: Tensor) -> Tensor:
        x, W, A, B, g = given.values()
        return dora_linear(x, W, None, A, B, g, dropout_p=dropout_p, rng_state=state)

    def plain(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor) -> Tensor:
        d = reference.dropout(x, dropout_p, mask)
        return x @ weight.T + (scale - 1) * (d @ weight.T) + d @ lora_A.T @ lora_B.T

    check(fused, plain, operands, "weight")
    check(fused, plain, operands, "lora_A lora_B scale")


@pytest.mark.parametrize("sizes", SIZES, ids=[i.replace("N", "D").replace("K", "V") for i in ids])
@pytest.mark.usefixtures("threads")
def test_lora_embedding(sizes: tuple[int, int, int, int]) -> None:
    M, D, V, r = sizes
    if V == 0:
        M = 0
    operands = tensors(weight=(V, D), lora_A=(r, V), lora_B=(D, r))
    index = torch.arange(M) % max(V, 1)

    def fused(**given: Tensor) -> Tensor:
        return lora_ext.lora_embedding(index, *given.values(), scaling=0.5)

    def plain(**given: Tensor) -> Tensor:
        return reference.lora_embedding(index, *given.values(), scaling=0.5)

    # torch's own lookup has no second derivatives without tokens.
    check(fused, plain, operands, twice=M > 0)


@pytest.mark.parametrize("sizes", [(0, 0), (0, 6), (64, 0)], ids=["M0 N0", "M0 N6", "M64 N0"])
@pytest.mark.usefixtures("threads")
def test_elementwise(sizes: tuple[int, int]) -> None:
    z = tensors(z=sizes)["z"]
    state = draw_rng_state(z)
    check(lambda z: dropout(z, state, 0.5), lambda z: z * 0, {"z": z})
    operands = tensors(z=sizes, scale=sizes[1:], bias=sizes[1:])
    check(column_scale, lambda z, scale, bias: z * scale + bias, operands)


@pytest.mark.parametrize("sizes", SIZES[:8], ids=[i[3:] for i in ids[:8]])
@pytest.mark.usefixtures("threads")
def test_merging(sizes: tuple[int, int, int, int]) -> None:
    _, N, K, r = sizes
    W, A, B = tensors(weight=(N, K), lora_A=(r, K), lora_B=(N, r)).values()
    merged = W + 0.5 * B @ A
    torch.testing.assert_close(weight_norm(W, A, B, 0.5), torch.linalg.vector_norm(merged, dim=1))
    torch.ops.lora_ext.merge_(W, A, B, 0.5)
    torch.testing.assert_close(W, merged)
