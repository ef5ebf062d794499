"""torch.compile: one graph, no breaks, the same numbers as eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lora_ext


def make_net(dropout_p: float, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).to(dtype)
    lora_ext.replace_linear(net, "all-linear", r=8, lora_alpha=16, lora_dropout=dropout_p)
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.lora_B, std=0.1)
    return net


def gradients(net: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    net.zero_grad()
    x.grad = None
    y = function(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_one_graph_over_many_sizes(dropout_p: float, backend: str, how: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    net = make_net(dropout_p)
    compiled = torch.compile(
        net, fullgraph=True, backend=backend, dynamic=True if how == "dynamic=True" else None
    )
    for M in (5, 12, 33, 64, 130, 257):
        x = torch.randn(M, 64, requires_grad=True)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
        for got, want in zip(gradients(net, compiled, x), gradients(net, net, x), strict=True):
            if backend == "aot_eager":  # the same kernels: also the same dropout, bit for bit
                assert torch.equal(got, want)
            else:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_automatic_dynamic_shapes_recompile_once() -> None:
    torch._dynamo.reset()
    net = make_net(0.1)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for M in (8, 16, 24, 40, 72):
        compiled(torch.randn(M, 64))
    assert counter.frame_count <= 2  # a static one, then one for every size


def test_scaling_tensor_changes_without_recompiling() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    layer = make_net(0.0)[0]
    scaling = torch.tensor(1.0)

    @torch.compile(fullgraph=True, backend=counter)
    def call(x: Tensor) -> Tensor:
        return lora_ext.lora_linear(
            x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, scaling=scaling
        )

    x = torch.randn(4, 64)
    for value in (1.0, 0.5, -3.0):
        scaling.fill_(value)
        eager = lora_ext.lora_linear(
            x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, scaling=value
        )
        assert torch.equal(call(x), eager)
    assert counter.frame_count == 1


def test_compiled_autograd() -> None:
    torch._dynamo.reset()
    net = make_net(0.25)
    x = torch.randn(9, 64, requires_grad=True)
    eager = gradients(net, net, x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        for got, want in zip(gradients(net, net, x), eager, strict=True):
            assert torch.equal(got, want)


def test_export() -> None:
    net = make_net(0.0).eval()
    x = torch.randn(6, 64)
    program = torch.export.export(
        net, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=512)},)
    )
    assert torch.equal(program.module()(x), net(x))
    assert program.module()(torch.randn(9, 64)).shape == (9, 32)
