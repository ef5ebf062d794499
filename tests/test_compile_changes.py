"""torch.compile of every kind of layer: one graph that is right, and what may change under it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext.nn as lora
from lora_ext import LoraConfig, draw_rng_state, get_lora_model, lora_embedding, lora_linear
from lora_ext.functional import dora_linear, weight_norm

X, TOKENS, SEQUENCE = torch.randn(5, 8), torch.tensor([[1, 2], [3, 1]]), torch.randn(3, 2, 8)
IMAGE = torch.randn(2, 4, 5, 5)
Make = tuple[Callable[..., Any], tuple[Tensor, ...]]


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.w)


def linear(base: Callable[[int, int], nn.Linear] = nn.Linear, **own: Any) -> Callable[..., Any]:
    return lambda **o: lora.Linear.from_linear(base(8, 6), **own, **o)


def attention(enable_lora: str | None) -> Callable[..., Any]:
    return lambda **o: lora.MultiheadAttention.from_multihead_attention(
        nn.MultiheadAttention(8, 2), enable_lora=enable_lora, **o
    )


def merged_linear(**o: Any) -> Any:
    return lora.MergedLinear.from_linear(nn.Linear(8, 6), enable_lora=[True, False, True], **o)


KINDS: dict[str, Make] = {
    "Linear": (linear(), (X,)),
    "Linear, kept": (linear(Doubled), (X,)),
    "Linear, DoRA": (linear(use_dora=True), (X,)),
    "Embedding": (lambda **o: lora.Embedding.from_embedding(nn.Embedding(9, 6), **o), (TOKENS,)),
    "Embedding, DoRA": (
        lambda **o: lora.Embedding.from_embedding(nn.Embedding(9, 6), use_dora=True, **o),
        (TOKENS,),
    ),
    "Conv1d": (lambda **o: lora.Conv1d.from_conv(nn.Conv1d(4, 6, 3), **o), (IMAGE[:, :, 0],)),
    "Conv2d": (lambda **o: lora.Conv2d.from_conv(nn.Conv2d(4, 6, 3), **o), (IMAGE,)),
    "Conv2d, DoRA": (
        lambda **o: lora.Conv2d.from_conv(nn.Conv2d(4, 6, 3), use_dora=True, **o),
        (IMAGE,),
    ),
    "Conv3d": (
        lambda **o: lora.Conv3d.from_conv(nn.Conv3d(4, 6, 3), **o),
        (torch.stack([IMAGE] * 3, 2),),
    ),
    "MergedLinear": (merged_linear, (X,)),
    "MultiheadAttention": (attention(None), (SEQUENCE,) * 3),
    "MultiheadAttention, q and v": (attention("qv"), (SEQUENCE,) * 3),
    "AnyLayer": (
        lambda **o: lora.AnyLayer.from_module(nn.Bilinear(8, 8, 4), ["weight"], **o),
        (X, X),
    ),
    "ParamLayer": (lambda **o: lora.ParamLayer.from_module(Stack(), ["w"], **o), (X[:, :5],)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
DROPPING = [kind for kind in KINDS if not kind.startswith(("Embedding", "AnyLayer", "Param"))]


def made(kind: str, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, args = KINDS[kind]
    layer = make(r=2, init_lora_weights=False, **options)
    if any(p.dim() == 1 and "magnitude" in n for n, p in layer.named_parameters()):
        with torch.no_grad():  # else DoRA is its base
            layer.lora_magnitude_vector.mul_(1.5)
    return layer.double(), tuple(x.double() if x.is_floating_point() else x for x in args)


def first(y: Any) -> Tensor:
    result: Tensor = y[0] if isinstance(y, tuple) else y
    return result


class Graphs:
    """What is compiled without breaks, and how many graphs that took so far."""

    def __init__(self, module: Callable[..., Any]) -> None:
        torch._dynamo.reset()
        self.count = 0
        self.compiled = torch.compile(module, fullgraph=True, backend=self.backend)

    def backend(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        backend: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        return backend

    @contextlib.contextmanager
    def none(self) -> Iterator[None]:
        before = self.count
        yield
        assert self.count == before


def outcome(layer: nn.Module, call: Callable[..., Any], args: tuple[Tensor, ...]) -> list[Tensor]:
    """The result, and the gradients of the input and of the parameters."""
    torch.manual_seed(3)
    args = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in args)
    leaves = [x for x in args if x.requires_grad]
    leaves += [p for p in layer.parameters() if p.requires_grad]
    y = first(call(*args))
    grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    return [y.detach(), *(grad for grad in grads if grad is not None)]


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@each_kind
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_every_kind_is_one_graph(kind: str, merged: bool) -> None:
    layer, args = made(kind)
    if merged and layer.merged_parameters():
        layer.merge()
    graphs = Graphs(layer)
    same(outcome(layer, graphs.compiled, args), outcome(layer, layer, args))
    assert graphs.count == 1


@pytest.mark.parametrize("kind", DROPPING)
def test_several_adapters_with_dropout(kind: str) -> None:
    """The masks are those of eager calls, also where several are drawn."""
    layer, args = made(kind, lora_dropout=0.5)
    layer.add_adapter("other", r=3, lora_dropout=0.25, init_lora_weights=False)
    layer.set_adapter(["default", "other"])
    graphs = Graphs(layer)
    same(outcome(layer, graphs.compiled, args), outcome(layer, layer, args))
    assert graphs.count == 1


def test_layers_that_read_the_same_input_drop_out_different_elements() -> None:
    layer, (x,) = made("Linear", lora_dropout=0.5)

    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x), layer(x)

    compiled = torch.compile(twice, fullgraph=True, backend="inductor")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.manual_seed(0)
            got = compiled(x)
            torch.manual_seed(0)
            torch.testing.assert_close(got, twice(x))
        assert not torch.equal(*got)


@each_kind
def test_scales_are_two_graphs(kind: str) -> None:
    """One for the first, and one for any."""
    layer, args = made(kind)
    graphs = Graphs(layer)
    for i in range(12):
        layer.set_scale("default", 0.3 + 0.1 * i)  # 1.0 is one of them
        same(outcome(layer, graphs.compiled, args), outcome(layer, layer, args))
    assert graphs.count == 2


def test_scalings_of_functions_are_two_graphs() -> None:
    W, A, B, x = (torch.randn(s) for s in ((6, 8), (2, 8), (6, 2), (3, 8)))
    state, g = draw_rng_state(x), torch.rand(6)

    def products(scaling: float) -> list[Tensor]:
        options: dict[str, Any] = {"scaling": scaling, "dropout_p": 0.5, "rng_state": state}
        return [
            lora_linear(x, W, None, A, B, **options),
            dora_linear(x, W, None, A, B, g, **options),
            lora_embedding(TOKENS, W.t(), A, B, scaling=scaling),
            weight_norm(W, A, B, scaling),
        ]

    graphs = Graphs(products)
    for i in range(6):
        torch.testing.assert_close(graphs.compiled(0.3 + 0.1 * i), products(0.3 + 0.1 * i))
    assert graphs.count == 2


@each_kind
def test_switches_compile_once_each(kind: str) -> None:
    layer, args = made(kind)
    layer.add_adapter("other", r=2, init_lora_weights=False, use_dora="DoRA" in kind)
    graphs = Graphs(layer)
    switches: list[Callable[[], object]] = [
        lambda: layer.set_adapter("other"),
        lambda: layer.set_adapter("default"),
        layer.eval,
        layer.train,
        lambda: layer.enable_adapters(False),
        lambda: layer.enable_adapters(True),
    ]
    if layer.merged_parameters():
        switches += [layer.merge, layer.unmerge]
    for switch in switches:
        switch()
        graphs.compiled(*args)
    with graphs.none():
        for _ in range(10):
            for switch in switches:
                switch()
                torch.testing.assert_close(first(graphs.compiled(*args)), first(layer(*args)))


def test_values_change_without_compiling_again() -> None:
    layer, (x,) = made("Linear")
    graphs = Graphs(layer)
    state = layer.state_dict()
    before = graphs.compiled(x).detach()
    with graphs.none():
        layer.load_state_dict({name: 2 * value for name, value in state.items()})
        torch.testing.assert_close(graphs.compiled(x), layer(x))
        assert not torch.allclose(layer(x), before)


def test_a_model_with_adapters() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    config = LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
    model = get_lora_model(net, config)
    model.add_adapter("other", config)
    graphs = Graphs(model)

    def changes(i: int) -> Iterator[None]:
        model.set_adapter("other")
        yield
        model.set_adapter("default")
        yield
        model.set_scale("default", 0.5 + 0.1 * i)
        yield
        model.eval()
        yield
        model.train()
        yield
        with model.disable_adapter():
            yield

    for _ in range(2):
        for _ in changes(0):
            graphs.compiled(X)
    for _ in changes(1):
        graphs.compiled(X)
    with graphs.none():
        for i in range(10):
            for _ in changes(i):
                torch.testing.assert_close(graphs.compiled(X), model(X))
