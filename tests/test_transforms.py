"""Forward-mode AD, torch.func's transforms and vectorised derivatives of every operator and layer:
what plain PyTorch makes of the formula."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from devices import same_bits
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import lora_ext
from lora_ext import reference
from lora_ext.functional import (
    column_scale,
    dora_linear,
    draw_rng_state,
    dropout,
    dropout_mask,
    lora_embedding,
    lora_update,
    weight_norm,
)

M, K, N, R, P = 3, 5, 4, 2, 0.4
STATE = draw_rng_state(torch.empty(0))
MASK = dropout_mask(STATE, M, K, P)
INDEX = torch.tensor([1, 0, 1])
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


X, W, BIAS, A, B, S = random(M, K), random(N, K), random(N), random(R, K), random(N, R), random(N)


class Operator(NamedTuple):
    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    operands: tuple[Tensor, ...]


def fused_linear(p: float) -> Callable[..., Tensor]:
    return lambda x, W, bias, A, B, lora_bias: lora_ext.lora_linear(
        x, W, bias, A, B, lora_bias, scaling=0.5, dropout_p=p, rng_state=STATE
    )


def plain_linear(p: float) -> Callable[..., Tensor]:
    return lambda x, W, bias, A, B, lora_bias: reference.lora_linear(
        x, W, bias, A, B, lora_bias, scaling=0.5, dropout_p=p, mask=MASK if p else None
    )


def plain_dora(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    d = reference.dropout(x, P, MASK)
    return x @ W.T + (scale - 1) * (d @ W.T) + 0.5 * d @ A.T @ B.T + bias


OPERATORS = {
    "lora_linear": Operator(fused_linear(0.0), plain_linear(0.0), (X, W, BIAS, A, B, S)),
    "lora_linear, dropout": Operator(fused_linear(P), plain_linear(P), (X, W, BIAS, A, B, S)),
    "lora_linear, scaling tensor": Operator(
        lambda x, scaling: lora_ext.lora_linear(x, W, None, A, B, scaling=scaling.detach()),
        lambda x, scaling: x @ W.T + scaling.detach() * (x @ A.T @ B.T),
        (X, torch.tensor(0.5, dtype=torch.float64)),
    ),
    "lora_linear_multi": Operator(
        lambda x, W, bias, A, B, V: torch.cat(
            lora_ext.lora_linear_multi(
                x, [W, V, W], [bias, None, None], [A, None, A], [B, None, B], scalings=0.5,
                dropout_p=[P, 0.0, 0.0], rng_states=[STATE, None, None],
            ), -1,
        ),
        lambda x, W, bias, A, B, V: torch.cat(
            [plain_linear(P)(x, W, bias, A, B, None), x @ V.T,
             plain_linear(0.0)(x, W, None, A, B, None)], -1,
        ),
        (X, W, BIAS, A, B, random(3, K)),
    ),
    "lora_mlp": Operator(
        lambda x, W, A, B, V: lora_ext.lora_mlp(
            x, [W, W, V], None, [A, None, None], [B, None, None], scalings=0.5,
            dropout_p=[P, 0.0, 0.0], rng_states=[STATE, None, None], activation="gelu_tanh",
        ),
        lambda x, W, A, B, V: (
            torch.nn.functional.gelu(plain_linear(P)(x, W, None, A, B, None), approximate="tanh")
            * (x @ W.T)
        ) @ V.T,
        (X, W, A, B, random(3, len(W))),
    ),
    "dora_linear": Operator(
        lambda x, W, bias, A, B, g: dora_linear(
            x, W, bias, A, B, g, scaling=0.5, dropout_p=P, rng_state=STATE
        ),
        plain_dora,
        (X, W, BIAS, A, B, S),
    ),
    "lora_embedding": Operator(
        lambda W, A, B: lora_embedding(INDEX, W, A, B, scaling=0.5),
        lambda W, A, B: reference.lora_embedding(INDEX, W, A, B, scaling=0.5),
        (W, random(R, N), random(K, R)),
    ),
    "lora_update": Operator(
        lambda x, A, B, b: lora_update(x, A, B, b, 0.5, P, STATE),
        lambda x, A, B, b: 0.5 * (reference.dropout(x, P, MASK) @ A.T @ B.T + b),
        (X, A, B, S),
    ),
    "column_scale": Operator(
        column_scale, lambda z, s, b: z * s + b, (random(M, N), S, BIAS)
    ),
    "dropout": Operator(
        lambda x: dropout(x, STATE, P), lambda x: reference.dropout(x, P, MASK), (X,)
    ),
}  # fmt: skip
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def same(got: object, expected: object) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@every_operator
def test_forward_mode_is_plain_pytorchs(operator: Operator) -> None:
    fused, plain, operands = operator
    for i, t in enumerate(operands):

        def one(f: Callable[..., Tensor], value: Tensor, i: int = i) -> Tensor:
            return f(*operands[:i], value, *operands[i + 1 :])

        tangent = torch.ones_like(t)
        expected = jvp(lambda v: one(plain, v), (t,), (tangent,))
        same(jvp(lambda v: one(fused, v), (t,), (tangent,)), expected)
        for grad_mode in (True, False):
            with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
                y = one(fused, forward_ad.make_dual(t, tangent))
                got = forward_ad.unpack_dual(y).tangent
                same(torch.zeros_like(y) if got is None else got, expected[1])
        jacobian = jacrev(lambda v: one(plain, v))(t)
        same(jacfwd(lambda v: one(fused, v))(t), jacobian)
        same(jacrev(lambda v: one(fused, v))(t), jacobian)


def test_linearize() -> None:
    fused, plain, (x, *rest) = OPERATORS["lora_linear, dropout"]
    _, product = linearize(lambda v: fused(v, *rest), x)
    same(product(x), jvp(lambda v: plain(v, *rest), (x,), (x,))[1])


@every_operator
def test_every_mode_and_its_batches_by_numbers(operator: Operator) -> None:
    """Reverse, forward, forward over reverse, and each vectorised."""
    if operator is OPERATORS["lora_linear, scaling tensor"]:
        pytest.skip("its scaling has no gradient")
    leaves = [t.clone().requires_grad_() for t in operator.operands]
    assert torch.autograd.gradcheck(
        operator.fused, leaves, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True, fast_mode=True,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(
        operator.fused, leaves, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


@every_operator
def test_hessian_and_vjp(operator: Operator) -> None:
    fused, plain, operands = operator
    which = tuple(range(len(operands)))

    def loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: f(*given).square().sum()

    same(hessian(loss(fused), which)(*operands), hessian(loss(plain), which)(*operands))
    (y, pull), (expected, plain_pull) = vjp(fused, *operands), vjp(plain, *operands)
    same(y, expected)
    same(pull(torch.ones_like(y)), plain_pull(torch.ones_like(y)))


@every_operator
def test_vmap_over_each_operand_and_all(operator: Operator) -> None:
    fused, plain, operands = operator
    for batched in [(i,) for i in range(len(operands))] + [tuple(range(len(operands)))]:
        given = [
            torch.stack([t, 2 * t, -t], -1) if i in batched else t for i, t in enumerate(operands)
        ]
        dims = tuple(-1 if i in batched else None for i in range(len(operands)))
        same(vmap(fused, dims)(*given), vmap(plain, dims)(*given))
        gradient = [grad(lambda *a, f=f: f(*a).square().sum(), batched) for f in (fused, plain)]
        same(*(vmap(g, dims)(*given) for g in gradient))


@pytest.mark.parametrize("dora", [False, True], ids=["lora_linear", "dora_linear"])
def test_randomness_of_vmap_is_respected(dora: bool) -> None:
    def f(x: Tensor) -> Tensor:
        if dora:
            g = torch.ones(1, dtype=x.dtype)
            return dora_linear(
                x, x.new_zeros(1, 64), None, x.new_ones(1, 64), x.new_ones(1, 1), g,
                dropout_p=0.5, rng_state=draw_rng_state(x),
            )  # fmt: skip
        return lora_ext.lora_linear(
            x, x.new_zeros(1, 64), None, x.new_ones(1, 64), x.new_ones(1, 1), dropout_p=0.5
        )

    x = torch.ones(8, 64, dtype=torch.float64) * 2 ** torch.arange(64, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(f)(x)
    assert len(vmap(f, randomness="same")(x).unique()) == 1
    assert len(vmap(f, randomness="different")(x).unique()) == 8
    nested = vmap(vmap(f, randomness="different"), randomness="different")(x.expand(3, 8, 64))
    assert len(nested.unique()) == 24
    torch.manual_seed(0)
    assert not torch.equal(*(vmap(f, randomness="different")(x) for _ in range(2)))


def test_gradients_of_torch_func_draw_the_masks_of_plain_calls() -> None:
    layer = lora_ext.nn.Linear(K, N, r=R, lora_dropout=0.5, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    torch.manual_seed(0)
    expected = torch.autograd.grad(layer(X).sum(), layer.lora_A)[0]
    torch.manual_seed(0)
    got = grad(lambda a: functional_call(layer, {"lora_A": a}, (X,)).sum())(layer.lora_A.detach())
    same(got, expected)


def layer_of(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer in float64 with an adapter that is not zero, and its input."""
    options = {"r": 2, "lora_alpha": 4, "dtype": torch.float64}
    image = random(2, 4, 5, 5)
    layers: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "Linear": (lambda: lora_ext.nn.Linear(K, N, **options), X),
        "Linear, DoRA": (lambda: lora_ext.nn.Linear(K, N, use_dora=True, **options), X),
        "Embedding": (lambda: lora_ext.nn.Embedding(N, K, **options), INDEX),
        "Embedding, DoRA": (lambda: lora_ext.nn.Embedding(N, K, use_dora=True, **options), INDEX),
        "Conv1d": (lambda: lora_ext.nn.Conv1d(4, 6, 3, **options), image[:, :, 0].clone()),
        "Conv2d": (lambda: lora_ext.nn.Conv2d(4, 6, 3, **options), image),
        "Conv2d, DoRA": (lambda: lora_ext.nn.Conv2d(4, 6, 3, use_dora=True, **options), image),
        "Conv3d": (
            lambda: lora_ext.nn.Conv3d(4, 6, 3, **options), torch.stack([image] * 3, 2)
        ),
        "MergedLinear": (
            lambda: lora_ext.nn.MergedLinear(K, 6, enable_lora=[True, False, True], **options), X
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    make, x = layers[kind]
    layer = make()
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, 1.0, 0.5)
    return layer, x


LAYERS = ("Linear", "Linear, DoRA", "Embedding", "Embedding, DoRA", "Conv1d", "Conv2d")
LAYERS += ("Conv2d, DoRA", "Conv3d", "MergedLinear")


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_forward_mode_is_the_transpose_of_backward(kind: str, trained: bool) -> None:
    """<u, J v> = <J^T u, v>, for the input and every parameter at once; the norms of DoRA are
    constants in both."""
    layer, x = layer_of(kind)
    layer.requires_grad_(trained)
    given = {name: p.detach() for name, p in layer.named_parameters()}
    if x.is_floating_point():
        given["input"] = x

    def f(given: dict[str, Tensor]) -> Tensor:
        rest = {name: t for name, t in given.items() if name != "input"}
        return functional_call(layer, rest, (given.get("input", x),))

    v = {
        name: torch.cos(torch.arange(t.numel(), dtype=t.dtype)).view_as(t)
        for name, t in given.items()
    }
    y, tangent = jvp(f, (given,), (v,))
    u = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    gradients = torch.autograd.grad(f(leaves), list(leaves.values()), u)
    expected = sum((g * v[name]).sum() for name, g in zip(leaves, gradients, strict=True))
    same((u * tangent).sum(), expected)
    if x.is_floating_point():
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v["input"]))).tangent
        assert dual is not None
        zeros = {name: torch.zeros_like(t) for name, t in v.items()} | {"input": v["input"]}
        same(dual, jvp(f, (given,), (zeros,))[1])


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_each_sample(kind: str) -> None:
    layer, x = layer_of(kind)
    parameters = {name: p.detach() for name, p in layer.named_parameters() if "lora_" in name}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(layer, parameters, (sample[None],)).square().sum()

    with warnings.catch_warnings():  # a norm of DoRA has no rule of its own: once for each sample
        warnings.filterwarnings("ignore", "There is a performance drop.*weight_norm")
        each = vmap(grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        expected = torch.autograd.grad(loss(leaves, sample), list(leaves.values()))
        same([each[name][i] for name in leaves], list(expected))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_batch_of_adapters(kind: str) -> None:
    """As of several runs in one: an input and a base that are shared, and adapters that are not."""
    layer, x = layer_of(kind)
    batch = {
        name: torch.stack([p.detach(), p.detach().flip(0), 2 * p.detach()])
        for name, p in layer.named_parameters()
        if "lora_" in name
    }

    def y(adapter: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, adapter, (x,))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop.*weight_norm")
        together = vmap(y)(batch)
    same(together, torch.stack([y({n: t[i] for n, t in batch.items()}) for i in range(3)]))


@pytest.mark.parametrize("kind", LAYERS)
def test_functional_call_of_a_merged_layer(kind: str) -> None:
    """Its parameters are the merged ones; with the base's, which a state_dict holds, the adapters
    would be lost: refused."""
    layer, x = layer_of(kind)
    before = layer(x)
    layer.merge()
    given = {name: p.detach() for name, p in layer.named_parameters()}
    same(functional_call(layer, given, (x,)), before)
    state = layer.state_dict()

    def total(state: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, state, (x,)).sum()

    for call in (total, grad(total), lambda state: jvp(total, (state,), (state,))):
        with pytest.raises(RuntimeError, match="merged, but its weight is the base's"):
            call(state)
    layer.unmerge()
    same(functional_call(layer, state, (x,)), before)


def dropping(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer whose adapter drops out half of a batch of three equal inputs."""
    layer, x = layer_of(kind)
    for name in layer.adapters:
        layer.adapters[name] = dataclasses.replace(layer.adapters[name], lora_dropout=0.5)
    return layer.train(), torch.stack([x] * 3)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "Embedding" not in kind])
def test_layers_obey_the_randomness_of_vmap(kind: str) -> None:
    layer, x = dropping(kind)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)
    alike = vmap(layer, randomness="same")(x)
    assert same_bits(alike[0], alike[1]) and same_bits(alike[0], alike[2])
    different = vmap(layer, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    assert not torch.equal(different[1], different[2])


def test_autocast_is_obeyed_inside_transforms() -> None:
    layer = lora_ext.nn.Linear(64, 32, r=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y, tangent = jvp(layer, (x,), (x,))
        expected = layer(x)
        batched = vmap(layer)(x)
    assert y.dtype == tangent.dtype == batched.dtype == torch.bfloat16
    for got in (y, batched):
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-5)


def test_what_has_no_derivative_refuses_a_tangent() -> None:
    """A norm is a constant for autograd; pure operators and merge_ are not to be transformed."""
    dual_weight = (W.clone(), torch.ones_like(W))
    calls: dict[str, Callable[[Tensor], object]] = {
        "weight_norm": lambda w: weight_norm(w, A, B),
        "lora_linear_fwd": lambda w: torch.ops.lora_ext.lora_linear_fwd(X, w, None, A, B),
        "merge_": lambda w: torch.ops.lora_ext.merge_(w, A, B),
    }
    for name, call in calls.items():
        with (
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match=f"forward AD.*{name}"),
        ):
            call(forward_ad.make_dual(*dual_weight))
        with pytest.raises((RuntimeError, NotImplementedError)):
            jvp(lambda w, call=call: call(w.clone()), *((t,) for t in dual_weight))
