"""dora_linear against its formula: with the dropped elements apart, and by a dense product."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from problems import UNIT, kept_for_backward, make_problem, rms
from torch import Tensor
from torch.nn.functional import linear

import lora_ext
from lora_ext import reference
from lora_ext._extension import _C
from lora_ext.functional import dora_linear

NAMES = ("x", "bias", "lora_A", "lora_B", "scale")  # what has a gradient; the weight is frozen


@dataclass
class Problem:
    operands: dict[str, Tensor]  # in the order of dora_linear's arguments
    dropout_p: float
    rng_state: Tensor
    mask: Tensor
    dy: Tensor

    def fused(self, operands: dict[str, Tensor]) -> Tensor:
        return dora_linear(
            **operands, scaling=2.0, dropout_p=self.dropout_p, rng_state=self.rng_state
        )

    def plain(self, operands: dict[str, Tensor]) -> Tensor:
        """PEFT's steps, each rounded to the dtype of its operands."""
        x, weight, bias, A, B, scale = operands.values()
        d = reference.dropout(x, self.dropout_p, self.mask)
        low_rank = 2.0 * (d.to(A.dtype) @ A.t() @ B.t())
        base = (scale - 1).to(x.dtype) * linear(d, weight)
        return linear(x, weight, bias) + base + low_rank.to(x.dtype)

    def results(self, exact: bool, fused: bool) -> dict[str, Tensor]:
        """y and the gradients, by name."""
        operands = {
            name: (t.double() if exact else t).detach().requires_grad_(name in NAMES)
            for name, t in self.operands.items()
        }
        y = self.fused(operands) if fused else self.plain(operands)
        grads = torch.autograd.grad(y, [operands[name] for name in NAMES], self.dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(NAMES, grads, strict=True))}


def problem(
    M: int,
    K: int,
    N: int,
    dropout_p: float,
    dtype: torch.dtype = torch.float64,
    adapter_dtype: torch.dtype | None = None,
) -> Problem:
    p = make_problem((M,), K, N, 4, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    assert p.rng_state is not None and p.mask is not None and p.bias is not None
    compute = torch.promote_types(dtype, torch.float32)
    scale = torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=compute) + 0.5
    operands = {"x": p.x, "weight": p.weight, "bias": p.bias, "lora_A": p.lora_A,
                "lora_B": p.lora_B, "scale": scale}  # fmt: skip
    operands = {name: t.detach() for name, t in operands.items()}
    return Problem(operands, dropout_p, p.rng_state, p.mask, p.dy)


def skips(M: int, dropout_p: float, dtype: torch.dtype = torch.float64) -> bool:
    return bool(_C.explain_dora_linear_cpu(M, dtype, dropout_p)[0])


# Beyond a block of 128 columns and a panel of outputs, below them, and beyond a chunk of rows.
SIZES = [(64, 300, 150), (200, 128, 64), (70, 5, 3), (64, 1, 1), (1100, 130, 70), (9, 300, 150)]


@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_values_and_gradients(
    size: tuple[int, int, int], dropout_p: float, by_columns: bool
) -> None:
    p = problem(*size, dropout_p)
    assert skips(size[0], dropout_p) == (size[0] >= 64 and dropout_p <= 0.5)
    expected = p.results(exact=True, fused=False)
    if by_columns:
        p.operands["weight"] = p.operands["weight"].t().contiguous().t()
    for name, actual in p.results(exact=False, fused=True).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_without_dropout(size: tuple[int, int, int]) -> None:
    p = problem(*size, 0.1)
    p.dropout_p, p.mask = 0.0, torch.ones_like(p.mask)
    expected = p.results(exact=True, fused=False)
    for name, actual in p.results(exact=False, fused=True).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-11, atol=1e-11, msg=name)


def test_values_and_gradients_of_strided_operands() -> None:
    p = problem(128, 140, 70, 0.2)
    expected = p.results(exact=False, fused=True)
    p.operands["x"] = p.operands["x"].t().contiguous().t()
    p.operands["weight"] = p.operands["weight"].repeat(1, 2)[:, :140]
    p.dy = p.dy.t().contiguous().t()
    for name, actual in p.results(exact=False, fused=True).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-12, atol=1e-12, msg=name)
    p.operands["weight"] = p.operands["weight"].repeat_interleave(2, 1)[:, ::2]
    assert 1 not in p.operands["weight"].stride()
    for name, actual in p.results(exact=False, fused=True).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dropout_p", [0.1, 0.9], ids=["dropped apart", "dense"])
def test_values_and_gradients_in_float32(dropout_p: float) -> None:
    p = problem(300, 257, 136, dropout_p, torch.float32)
    exact = p.results(exact=True, fused=False)
    for name, actual in p.results(exact=False, fused=True).items():
        # Sums of at most 300 terms, whose roundings have random signs.
        assert rms(actual - exact[name]) <= UNIT[torch.float32] * 300**0.5 * rms(exact[name]), name


DTYPES = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
          (torch.float16, torch.float16), (torch.float16, torch.float32)]  # fmt: skip


@pytest.mark.parametrize("dropout_p", [0.05, 0.1, 0.25])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("size", [(300, 257, 136), (128, 768, 512)], ids=str)
def test_error_against_plain_pytorch(
    size: tuple[int, int, int], dtype: torch.dtype, adapter_dtype: torch.dtype, dropout_p: float
) -> None:
    p = problem(*size, dropout_p, dtype, adapter_dtype)
    assert skips(size[0], dropout_p, dtype)
    exact = p.results(exact=True, fused=False)
    ours, plain = (p.results(exact=False, fused=fused) for fused in (True, False))
    for name in exact:
        error, plain_error = (rms(r[name].double() - exact[name]) for r in (ours, plain))
        assert error <= plain_error, name


@pytest.mark.parametrize("dropout_p", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
def test_error_where_most_is_dropped(
    dtype: torch.dtype, adapter_dtype: torch.dtype, dropout_p: float
) -> None:
    """Of y: what is kept is large there, and must not come from a difference of rounded numbers."""
    p = problem(300, 257, 136, dropout_p, dtype, adapter_dtype)
    exact = p.results(exact=True, fused=False)["y"]
    ours, plain = (p.results(exact=False, fused=fused)["y"] for fused in (True, False))
    assert rms(ours.double() - exact) <= rms(plain.double() - exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_results_every_time(dtype: torch.dtype) -> None:
    p = problem(1100, 300, 150, 0.1, dtype)
    first, again = (p.results(exact=False, fused=True) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], again[name]), name


def test_gradients_in_float64() -> None:
    p = problem(64, 3, 2, 0.3)
    assert skips(64, 0.3)

    def call(*tensors: Tensor) -> Tensor:
        return p.fused(dict(zip(p.operands, tensors, strict=True)))

    for trained in (set(NAMES), {*NAMES, "weight"}, {"scale", "lora_B"}, {"x", "scale"}):
        operands = [t.requires_grad_(name in trained) for name, t in p.operands.items()]
        assert torch.autograd.gradcheck(call, operands)
        assert torch.autograd.gradgradcheck(call, operands)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_every_choice_of_gradients(with_bias: bool) -> None:
    p = problem(70, 140, 70, 0.2)
    if not with_bias:
        p.operands["bias"] = None  # type: ignore[assignment]
    names = [name for name in NAMES if with_bias or name != "bias"]
    for chosen in itertools.product([False, True], repeat=len(names)):
        trained = [name for name, wanted in zip(names, chosen, strict=True) if wanted]
        operands = {
            name: None if t is None else t.detach().requires_grad_(name in trained)
            for name, t in p.operands.items()
        }
        y, expected = p.fused(operands), p.plain(operands)
        assert y.requires_grad == bool(trained)
        torch.testing.assert_close(y, expected)
        if trained:
            wanted = [operands[name] for name in trained]
            for ours, right in zip(
                torch.autograd.grad(y, wanted, p.dy), torch.autograd.grad(expected, wanted, p.dy),
                strict=True,
            ):  # fmt: skip
                torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("dropout_p", [0.1, 0.9], ids=["dropped apart", "dense"])
@pytest.mark.parametrize(
    ("trained", "kept"),
    [(NAMES, [(80, 30), (80, 20)]), (("lora_A", "lora_B"), [(80, 30)]), (("x",), [])],
    ids=["all", "adapter", "x"],
)
def test_only_what_backward_needs(
    trained: tuple[str, ...], kept: list[tuple[int, ...]], dropout_p: float
) -> None:
    p = problem(80, 30, 20, dropout_p)
    operands = {n: t.detach().requires_grad_(n in trained) for n, t in p.operands.items()}
    saved = kept_for_backward(lambda: p.fused(operands))
    assert [tuple(t.shape) for t in saved if t.shape[0] == 80] == kept


@pytest.mark.parametrize("size", [(0, 4, 3), (80, 0, 3), (80, 4, 0)], ids=str)
def test_empty(size: tuple[int, int, int]) -> None:
    p = problem(*size, 0.1)
    expected = p.results(exact=False, fused=False)
    for name, actual in p.results(exact=False, fused=True).items():
        torch.testing.assert_close(actual, expected[name], msg=name)


def test_leading_dimensions_and_inference() -> None:
    p = problem(72, 30, 20, 0.1)
    y = p.fused(p.operands)
    p.operands["x"] = p.operands["x"].view(3, 4, 6, 30)
    with torch.inference_mode():
        assert torch.equal(p.fused(p.operands), y.view(3, 4, 6, 20))


def test_explain_says_which_product_it_is() -> None:
    def reason(dropout_p: float, tokens: int = 2048, **options: bool) -> str:
        layer = lora_ext.nn.Linear(24, 20, 4, lora_dropout=dropout_p, use_dora=True, **options)
        if not options:
            lora_ext.mark_only_lora_as_trainable(layer)
        layer.add_adapter("second", r=2, lora_dropout=dropout_p)
        (row,) = lora_ext.explain(layer, tokens)
        return row.reason

    assert "one with the dropped elements alone" in reason(0.1)
    assert "one more pass" in reason(0.0)
    assert "forward and backward: so many elements are dropped" in reason(0.6)
    assert "forward and backward: few rows" in reason(0.1, tokens=8)
    assert "forward and backward: the weight requires grad" in reason(0.1, bias=False)


@pytest.mark.parametrize("dora_runs", ["first", "second"])
def test_explain_tells_what_runs_before_dora(dora_runs: str) -> None:
    layer = lora_ext.nn.Linear(24, 20, 4, lora_dropout=0.1, use_dora=True)
    layer.add_adapter("second", r=2, lora_dropout=0.1)
    lora_ext.mark_only_lora_as_trainable(layer)
    layer.set_adapter(["default", "second"] if dora_runs == "first" else ["second", "default"])
    reason = lora_ext.explain(layer)[0].reason
    wanted = "forward and backward: another adapter runs before it"
    assert (wanted in reason) == (dora_runs == "second")
    assert ("one with the dropped elements alone" in reason) == (dora_runs == "first")


def test_explain_tells_of_dora_in_other_layers() -> None:
    def reason(layer: lora_ext.nn.LoraLayer) -> str:
        return lora_ext.explain(layer)[0].reason

    options = {"lora_alpha": 2, "use_dora": True}
    one_more_pass = "; DoRA scales y, and dy, in one more pass"
    assert reason(lora_ext.nn.Embedding(9, 4, 2, **options)).endswith(one_more_pass)
    layer = lora_ext.nn.Conv2d(4, 4, 3, 2, lora_dropout=0.1, **options)
    assert reason(layer).endswith(
        "; DoRA with dropout needs a second base product, forward and backward"
    )
    assert reason(layer.eval()).endswith(one_more_pass)
    assert "DoRA" not in reason(lora_ext.nn.Conv2d(4, 4, 3, 2))
