"""Tensor parallelism: layers divided between two processes compute what one does, and move no more
than a frozen layer and M r numbers."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import assert_passed, names_of_checks, run_checks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

import lora_ext.nn as lora
from lora_ext.distributed import ColwiseLora, RowwiseLora, Traffic

K, N, R = 12, 8, 3


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))


def layer_with(
    *, dtype: torch.dtype = torch.float32, adapters: int = 1, p: float = 0.0, **options: Any
) -> lora.Linear:
    """With adapters that are not zero."""
    torch.manual_seed(1)
    trains_weight = options.pop("trains_weight", False)
    base = nn.Linear(K, N, bias=options.pop("bias", True), dtype=dtype)
    layer = lora.Linear.from_linear(base, r=R, lora_alpha=6, lora_dropout=p, **options)
    names = ["default", *(f"more{i}" for i in range(1, adapters))]
    for name in names[1:]:
        layer.add_adapter(name, r=R + 1, lora_alpha=2, lora_dropout=p, **options)
    layer.set_adapter(names)
    for name in names:
        for parameter in layer.adapter_parameters(name).values():
            nn.init.normal_(parameter, std=0.5)
    layer.weight.requires_grad_(trains_weight)
    return layer


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            if isinstance(grad, DTensor):
                assert isinstance(parameter, DTensor)
                assert grad.placements == parameter.placements, (name, grad.placements)
                grad = grad.full_tensor()
            found[name] = grad
    return found


def run_style(layer: nn.Module, style: type[ParallelStyle], x: Tensor, dy: Tensor) -> Any:
    """(y, dx, gradients, bytes) of a step in tensor parallel, all of them whole."""
    layer = parallelize_module(copy.deepcopy(layer), mesh(), style(**LAYOUTS[style]))
    x = x.clone().requires_grad_()
    with Traffic() as traffic:
        y = layer(x)
        y.backward(dy)
    return y, x.grad, gradients(layer), traffic


# So that plain whole tensors go in and come out. The bytes that this takes are those of any layer.
LAYOUTS: dict[Any, dict[str, Any]] = {
    ColwiseLora: {"output_layouts": Replicate()},
    RowwiseLora: {"input_layouts": Replicate()},
    ColwiseParallel: {"output_layouts": Replicate()},
    RowwiseParallel: {"input_layouts": Replicate()},
}
STYLES: tuple[type[ParallelStyle], ...] = (ColwiseLora, RowwiseLora)
BASES = {ColwiseLora: ColwiseParallel, RowwiseLora: RowwiseParallel}


def assert_like_one_process(layer: nn.Module, style: Any, rows: int, tolerance: float) -> None:
    dtype = next(layer.parameters()).dtype
    x, dy = torch.randn(2, rows // 2, K, dtype=dtype), torch.randn(2, rows // 2, N, dtype=dtype)
    want = copy.deepcopy(layer)
    x0 = x.clone().requires_grad_()
    y0 = want(x0)
    y0.backward(dy)
    y, dx, grads, _ = run_style(layer, style, x, dy)
    wanted = gradients(want)
    assert grads.keys() == wanted.keys() and len(grads) >= 2
    pairs = {"y": (y, y0), "dx": (dx, x0.grad)} | {n: (grads[n], wanted[n]) for n in grads}
    for name, (got, one) in pairs.items():
        error = ((got - one).norm() / one.norm()).item()
        assert error <= tolerance, (style.__name__, rows, name, error)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without a bias": {"bias": False},
    "lora_bias": {"lora_bias": True},
    "a trained weight": {"trains_weight": True},
    "three adapters": {"adapters": 3},
    "three adapters with lora_bias": {"adapters": 3, "lora_bias": True},
}


def check_gradients_are_those_of_one_process() -> None:
    """With more tokens than features, and with fewer: what is summed is another thing."""
    for style, rows, options in itertools.product(STYLES, (4, 64), OPTIONS.values()):
        assert_like_one_process(layer_with(**options), style, rows, 1e-6)
        assert_like_one_process(layer_with(dtype=torch.float64, **options), style, rows, 1e-14)


def check_uneven_parts() -> None:
    for style, rows in itertools.product(STYLES, (4, 64)):
        torch.manual_seed(1)
        layer = lora.Linear.from_linear(nn.Linear(K + 1, N + 1), r=R)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(rows, K + 1, requires_grad=True)
        want = layer(x)
        want.sum().backward()
        wanted, dx = gradients(layer), x.grad
        divided = parallelize_module(copy.deepcopy(layer), mesh(), style(**LAYOUTS[style]))
        x1 = x.detach().clone().requires_grad_()
        y = divided(x1)
        y.sum().backward()
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x1.grad, dx, rtol=1e-5, atol=1e-5)
        for name, grad in gradients(divided).items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-5)


def check_float32_adapters_beside_bfloat16() -> None:
    """As near to float64 as one process is, within what rounding partial sums to bf16 adds."""
    for style, rows in itertools.product(STYLES, (4, 64)):
        layer = layer_with(dtype=torch.bfloat16, bias=False)
        assert layer.lora_A is not None and layer.lora_A.dtype == torch.float32
        x, dy = torch.randn(rows, K).bfloat16(), torch.randn(rows, N).bfloat16()
        exact = copy.deepcopy(layer).double()
        x0 = x.double().requires_grad_()
        y0 = exact(x0)
        y0.backward(dy.double())
        y, dx, grads, _ = run_style(layer, style, x, dy)
        pairs = [(y, y0), (dx, x0.grad)]
        pairs += [(grads[name], one) for name, one in gradients(exact).items()]
        for got, one in pairs:
            error = ((got.double() - one).norm() / one.norm()).item()
            assert error < 3 * 2**-8, (style, rows, error)  # three roundings to bf16


def check_bytes_are_a_frozen_layers_and_M_r() -> None:
    for style, rows, adapters in itertools.product(STYLES, (4, 64), (1, 3)):
        layer = layer_with(adapters=adapters, lora_bias=False)
        x, dy = torch.randn(rows, K), torch.randn(rows, N)
        _, _, _, ours = run_style(layer, style, x, dy)
        frozen = nn.Linear(K, N).requires_grad_(False)
        _, _, _, base = run_style(frozen, BASES[style], x, dy)
        rank = R + (adapters - 1) * (R + 1)
        extra = ours.total - base.total
        assert 0 < extra <= rows * rank * 4, (style, rows, adapters, extra)
        features = K if style is ColwiseLora else N
        assert extra == min(rows, features) * rank * 4
        forward = {"all_reduce": 1} if style is RowwiseLora else {"all_gather": 1}
        with torch.no_grad(), Traffic() as traffic:
            parallelize_module(layer, mesh(), style(**LAYOUTS[style]))(x)
        after = {k: v for k, v in traffic.calls.items() if k in forward}
        assert after == forward, traffic.calls  # one for base and adapter together


def check_sequence_parallel_layouts() -> None:
    """x divided along tokens goes in, y comes out so: gathered and scattered instead of summed."""
    rank = dist.get_rank()
    for style in STYLES:
        layer = layer_with(lora_bias=True)
        x, dy = torch.randn(2, 6, K), torch.randn(2, 6, N)
        layouts = {"input_layouts": Shard(1), "output_layouts": Shard(1)}
        divided = parallelize_module(copy.deepcopy(layer), mesh(), style(**layouts))
        x0, x1 = x.clone().requires_grad_(), x.chunk(2, 1)[rank].clone().requires_grad_()
        y0, y1 = layer(x0), divided(x1)
        y0.backward(dy)
        y1.backward(dy.chunk(2, 1)[rank])
        torch.testing.assert_close(y1, y0.chunk(2, 1)[rank], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x1.grad, x0.grad.chunk(2, 1)[rank], rtol=1e-5, atol=1e-5)
        found = gradients(divided)
        for name, grad in gradients(layer).items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(divided(x1), y1)


def check_dropout() -> None:
    """Column-wise the mask is that of one process; row-wise each process has its own, of the same
    probability, and the gradients fit it; checkpointing makes the same again."""
    x, dy = torch.randn(64, K), torch.randn(64, N)
    for rows in (4, 64):
        layer, twin = layer_with(p=0.5), layer_with(p=0.5)
        x0 = x[:rows].clone().requires_grad_()
        torch.manual_seed(3)
        y0 = layer(x0)
        y0.backward(dy[:rows])
        torch.manual_seed(3)
        y, dx, grads, _ = run_style(twin, ColwiseLora, x[:rows], dy[:rows])
        torch.testing.assert_close(y, y0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx, x0.grad, rtol=1e-5, atol=1e-5)
        for name, grad in gradients(layer).items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-5)
    layer = layer_with(p=0.25, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(R, K) + torch.eye(R, K).roll(K // 2, 1))
        layer.lora_B.copy_(torch.eye(N, R))
    layer = parallelize_module(layer, mesh(), RowwiseLora(**LAYOUTS[RowwiseLora]))
    y = layer(torch.ones(20_000, K))[:, :R] / layer.scaling * 0.75  # kept elements of both parts
    counts = torch.stack([(y.round() == n).float().mean() for n in range(3)])
    expected = torch.tensor([0.0625, 0.375, 0.5625])  # independent: neither alike nor opposite
    assert (counts - expected).abs().max() < 0.01, counts


def check_dropout_under_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    x, dy = torch.randn(64, K), torch.randn(64, N)
    for style, rows in itertools.product(STYLES, (4, 64)):
        found = []
        for again in (False, True):
            layer = layer_with(p=0.5)
            layer = parallelize_module(layer, mesh(), style(**LAYOUTS[style]))
            layer(x[:rows])
            torch.manual_seed(3)
            x0 = x[:rows].clone().requires_grad_()
            y = checkpoint(layer, x0, use_reentrant=False) if again else layer(x0)
            y.backward(dy[:rows])
            found.append([y, x0.grad, *gradients(layer).values()])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def check_other_seeds_in_a_group_are_refused() -> None:
    layer = parallelize_module(layer_with(p=0.5), mesh(), ColwiseLora())
    torch.manual_seed(mesh().get_local_rank())
    with pytest.raises(ValueError, match=r"different dropout states.*seed them alike"):
        layer(torch.randn(4, K))


def check_dora() -> None:
    for p in (0.0, 0.5):
        layer, twin = (layer_with(use_dora=True, p=p) for _ in range(2))
        x, dy = torch.randn(4, K), torch.randn(4, N)
        x0 = x.clone().requires_grad_()
        torch.manual_seed(3)
        y0 = layer(x0)
        y0.backward(dy)
        torch.manual_seed(3)
        y, dx, grads, _ = run_style(twin, ColwiseLora, x, dy)
        torch.testing.assert_close(y, y0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx, x0.grad, rtol=1e-5, atol=1e-5)
        assert "lora_magnitude_vector" in grads
        for name, grad in gradients(layer).items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="scale whole rows of the weight"):
        parallelize_module(layer_with(use_dora=True), mesh(), RowwiseLora())


def check_a_base_divided_before() -> None:
    """Adapters are placed beside a base that torch's own styles divided, with the values of one
    process, and are trained in the same way."""
    for style, rows in itertools.product(STYLES, (4, 64)):
        base = nn.Linear(K, N).requires_grad_(False)
        torch.manual_seed(5)
        want = lora.Linear.from_linear(copy.deepcopy(base), r=R, init_lora_weights=False)
        divided = parallelize_module(base, mesh(), BASES[style](**LAYOUTS[style]))
        torch.manual_seed(5)
        layer = lora.Linear.from_linear(divided, r=R, init_lora_weights=False)
        x, dy = torch.randn(rows, K), torch.randn(rows, N)
        x0, x1 = x.clone().requires_grad_(), x.clone().requires_grad_()
        want(x0).backward(dy)
        layer(x1).backward(dy)
        assert (x1.grad - x0.grad).norm() <= 1e-6 * x0.grad.norm()
        found = gradients(layer)
        for name, grad in gradients(want).items():
            assert (found[name] - grad).norm() <= 1e-6 * grad.norm(), name
            value = getattr(layer, name).full_tensor()
            assert torch.equal(value, getattr(want, name)), name
        layer.add_adapter("second", r=2)
        layer.set_adapter(["default", "second"])
        layer.rename_adapter("second", "other")
        layer(x1).backward(dy)
        layer.delete_adapter("other")
        for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
            with pytest.raises(ValueError, match=r"reads the whole weight.*add the adapter first"):
                layer.add_adapter("more", r=2, **options)
        assert list(layer.adapters) == ["default"]


def check_what_is_not_placed_is_refused() -> None:
    x = torch.randn(4, K)
    for style in (ColwiseParallel, RowwiseParallel):
        layer = parallelize_module(layer_with(), mesh(), style(**LAYOUTS[style]))
        with pytest.raises(ValueError, match=r"lora_[AB].*torch's styles do not know adapters"):
            layer(x)
    layer = layer_with()
    weight = distribute_tensor(layer.weight.detach(), mesh(), [Shard(0)])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(TypeError, match="x: got a plain tensor, expected a DTensor"):
        layer(x)
    with pytest.raises(ValueError, match=r"bias: got a plain tensor"):
        layer(distribute_tensor(x, mesh(), [Replicate()]))
    layer = parallelize_module(layer_with(), mesh(), ColwiseLora())
    layer.weight = nn.Parameter(layer.weight.redistribute(placements=[Replicate()]).detach())
    with pytest.raises(ValueError, match=r"expected \[Shard\(0\)\] or \[Shard\(1\)\]"):
        layer(x)
    for other in (lora.Embedding(8, 4, r=2), lora.MergedLinear(8, 4, r=2, enable_lora=[True])):
        with pytest.raises(TypeError, match=r"expected a lora_ext\.nn\.Linear"):
            parallelize_module(other, mesh(), ColwiseLora())
    table = parallelize_module(nn.Embedding(8, 4), mesh(), ColwiseParallel())
    with pytest.raises(ValueError, match=r"only lora_ext\.nn\.Linear has adapters"):
        lora.Embedding.from_embedding(table, r=2)

    class Own(nn.Linear):
        pass

    own = parallelize_module(Own(K, N), mesh(), ColwiseParallel())
    with pytest.raises(ValueError, match=r"Own, has to be called itself.*DTensor"):
        lora.Linear.from_linear(own, r=2)
    merged = layer_with()
    merged.merge()
    with pytest.raises(ValueError, match="it is merged"):
        parallelize_module(merged, mesh(), RowwiseLora())


def check_merging() -> None:
    """Merged parts are bit for bit those of what one process merges, and come out again."""
    for style, options in itertools.product(STYLES, ({}, {"lora_bias": True})):
        want = layer_with(adapters=2, **options)
        layer = parallelize_module(copy.deepcopy(want), mesh(), style(**LAYOUTS[style]))
        x = torch.randn(5, K)
        before, base = layer(x), layer.weight
        want.merge()
        layer.merge()
        assert torch.equal(layer.weight.full_tensor(), want.weight)
        assert torch.equal(layer.bias.full_tensor(), want.bias)
        torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
        layer.unmerge()
        assert layer.weight is base and torch.equal(layer(x), before)
        with torch.no_grad():
            layer.lora_B.fill_(torch.inf)
        with pytest.raises(ValueError, match="NaN or Inf"):
            layer.merge()
        assert not layer.merged and layer.weight is base


@pytest.mark.parametrize("check", names_of_checks(globals()))
def test_in_two_processes(check: str) -> None:
    assert_passed(__file__, check)


if __name__ == "__main__":
    run_checks(globals())
