"""column_scale, dropout and weight_norm against their formulas."""

from __future__ import annotations

import pytest
import torch
from problems import make_problem, rms
from torch import Tensor

import lora_ext
from lora_ext.functional import column_scale, dropout, weight_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (2, 3, 31), (130, 33), (257, 64), (0, 4), (4, 0), (7,)]


def operands(shape: tuple[int, ...], dtype: torch.dtype, factor_dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    z, scale, bias = (torch.randn(size) for size in (shape, shape[-1:], shape[-1:]))
    return [t.requires_grad_() for t in (z.to(dtype), scale.to(factor_dtype), bias.to(dtype))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_column_scale(shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool) -> None:
    compute = torch.promote_types(dtype, torch.float32)
    inputs = operands(shape, dtype, compute)[: 3 if with_bias else 2]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = exact[0] * exact[1] + (exact[2] if with_bias else 0)
    y = column_scale(*inputs)
    assert y.dtype == dtype and y.shape == truth.shape
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), truth, rtol=eps, atol=4 * torch.finfo(compute).eps)
    dy = torch.randn(shape).to(dtype)
    actual = torch.autograd.grad(y, inputs, dy)
    expected = torch.autograd.grad(truth, exact, dy.double())
    assert [g.dtype for g in actual] == [t.dtype for t in inputs]
    assert torch.equal(actual[0], (dy.to(compute) * inputs[1]).to(dtype))
    # Sums of n products in the compute type: error below n eps times the sum of their sizes.
    sizes = [(dy.double() * exact[0]).abs(), dy.double().abs()]
    for gradient, right, size in zip(actual[1:], expected[1:], sizes, strict=False):
        terms = size.numel() // max(size.shape[-1], 1)
        bound = size.reshape(terms, size.shape[-1]).sum(0) * terms * torch.finfo(compute).eps
        error = (gradient.double() - right).abs()
        assert (error <= bound + torch.finfo(gradient.dtype).eps * right.abs()).all()


def test_column_scale_of_strided_and_expanded_operands() -> None:
    z = torch.randn(9, 40)[:, 3:36].requires_grad_()
    scale = torch.randn(66)[::2].requires_grad_()
    y = column_scale(z, scale)
    torch.testing.assert_close(y, z * scale)
    dz, dscale = torch.autograd.grad(y.sum(), [z, scale])  # dy is one number, expanded
    torch.testing.assert_close(dz, scale.detach().expand(9, 33))
    torch.testing.assert_close(dscale, z.detach().sum(0))
    by_column = torch.randn(33, 9).t()
    torch.testing.assert_close(column_scale(by_column, scale), by_column * scale)


def test_column_scale_gradients_in_float64() -> None:
    inputs = operands((5, 3), torch.float64, torch.float64)
    assert torch.autograd.gradcheck(column_scale, inputs)
    assert torch.autograd.gradgradcheck(column_scale, inputs)


def test_column_scale_keeps_z_only_to_train_the_scale() -> None:
    z, scale, _ = operands((5, 3), torch.float32, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        column_scale(z, scale.detach())
        assert [tuple(t.shape) for t in saved] == [(3,)]
        column_scale(z, scale)
        assert [tuple(t.shape) for t in saved[1:]] == [(5, 3), (3,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 200), (2, 3, 128), (4, 1), (0, 8), (9,)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
def test_dropout_is_its_mask(shape: tuple[int, ...], dtype: torch.dtype, dropout_p: float) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    state = lora_ext.draw_rng_state(x)
    mask = lora_ext.dropout_mask(state, x.numel() // shape[-1], shape[-1], dropout_p)
    compute = torch.promote_types(dtype, torch.float32)
    survivor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    expected = (x.to(compute) * survivor).to(dtype) * mask.view(shape)
    y = dropout(x, state, dropout_p)
    assert torch.equal(y, expected)
    dy = torch.randn(shape).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, (dy.to(compute) * survivor).to(dtype) * mask.view(shape))


def test_dropout_gradients_in_float64() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    state = lora_ext.draw_rng_state(x)
    assert torch.autograd.gradcheck(lambda x: dropout(x, state, 0.4), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, state, 0.4), x)


PAIRS = [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[2:]]


@pytest.mark.parametrize(("dtype", "adapter_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("sizes", [(40, 72, 8), (1, 5, 1), (67, 1500, 3), (200, 33, 16)], ids=str)
def test_weight_norm(
    dtype: torch.dtype, adapter_dtype: torch.dtype, transposed: bool, sizes: tuple[int, int, int]
) -> None:
    N, K, r = sizes
    p = make_problem((1,), K, N, r, dtype=dtype, adapter_dtype=adapter_dtype)
    weight = p.weight.t().contiguous().t() if transposed else p.weight
    norm = weight_norm(weight, p.lora_A, p.lora_B, p.scaling)
    assert norm.dtype == torch.promote_types(dtype, torch.float32) and not norm.requires_grad
    exact = p.weight.double() + p.scaling * p.lora_B.double() @ p.lora_A.double()
    truth = torch.linalg.vector_norm(exact, dim=1)
    # Half the relative error of a sum of squares of at most 64 + K/64 terms in sequence, and that
    # of the r products behind each of them; measured errors are far smaller.
    terms = 64 + max(N, K) / 48 + r
    assert ((norm - truth).abs() <= terms * torch.finfo(norm.dtype).eps * truth).all()


def test_weight_norm_where_the_update_all_but_cancels_the_weight() -> None:
    p = make_problem((1,), 64, 32, 8)
    # W is -s B A up to a thousandth: the expansion |W|^2 + 2s<W, BA> + s^2|BA|^2 would keep no
    # digit of its square, 1e-6 of each term.
    noise = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)) * 1e-3
    weight = noise - p.scaling * (p.lora_B @ p.lora_A).detach()
    exact = weight.double() + p.scaling * p.lora_B.double() @ p.lora_A.double()
    truth = torch.linalg.vector_norm(exact, dim=1)
    plain = torch.linalg.vector_norm(weight + p.scaling * p.lora_B @ p.lora_A, dim=1)
    error = weight_norm(weight, p.lora_A, p.lora_B, p.scaling) - truth
    assert rms(error) <= 2 * rms(plain - truth) and rms(error) < 1e-3 * rms(truth)


def test_weight_norm_of_nothing() -> None:
    for N, K in [(0, 4), (3, 0)]:
        norm = weight_norm(torch.zeros(N, K), torch.zeros(2, K), torch.zeros(N, 2))
        assert torch.equal(norm, torch.zeros(N))
