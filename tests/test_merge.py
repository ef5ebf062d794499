"""merge() and unmerge(): one rounding, exact return, nothing half-done."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from devices import each_device
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lora_ext import reference
from lora_ext.nn import Linear

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]
# [out_features, in_features, r], around the kernels' panels of 48 rows and chunks of 1024 columns.
SIZES = [(1, 1, 1), (7, 5, 3), (1, 40, 2), (40, 1, 2), (49, 1027, 5), (97, 33, 17)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "lora_bias": {"lora_bias": True},
    "adapter in base dtype": {"autocast_adapter_dtype": False},
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def layer_of(
    dtype: torch.dtype = torch.float32, size: tuple[int, int, int] = (7, 5, 3), **options: Any
) -> Linear:
    torch.manual_seed(0)
    out_features, in_features, r = size
    layer = Linear(in_features, out_features, r, 1.7 * r, dtype=dtype, **options)
    new_adapter(layer)
    return layer


def new_adapter(layer: Linear) -> None:
    for name in ("lora_A", "lora_B", "lora_bias"):
        if getattr(layer, name) is not None:
            nn.init.normal_(getattr(layer, name), std=0.5)


def snapshot(layer: Linear) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}


def same_bytes(layer: Linear, before: dict[str, Tensor]) -> bool:
    pairs = [(now, before[name]) for name, now in snapshot(layer).items()]
    return all(torch.equal(now.view(torch.uint8), then.view(torch.uint8)) for now, then in pairs)


def stored(layer: Linear) -> Tensor:
    """The weight as [out_features, in_features]."""
    return (layer.weight.t() if layer.fan_in_fan_out else layer.weight).detach()


def exact_sums(layer: Linear) -> tuple[Tensor, Tensor]:
    """weight + scaling B A in float64, and the same sum of absolute values."""
    assert layer.lora_A is not None and layer.lora_B is not None
    parts = [part.detach().double() for part in (stored(layer), layer.lora_A, layer.lora_B)]
    exact = reference.merged_weight(*parts, layer.scaling)
    return exact, reference.merged_weight(*[part.abs() for part in parts], layer.scaling)


def assert_rounded_once(merged: Tensor, exact: Tensor, terms: Tensor, operations: int) -> None:
    """Every operation in float32 (float64) errs by half an ulp of `terms` at most; then there is
    one rounding to the dtype."""
    compute = torch.float64 if merged.dtype == torch.float64 else torch.float32
    error = operations * torch.finfo(compute).eps * terms
    info = torch.finfo(merged.dtype)
    rounding = info.eps / 2 * (exact.abs() + error) + info.smallest_normal * info.eps
    assert ((merged.double() - exact).abs() <= error + rounding).all()


@each_option
@each_size
@each_dtype
@each_device
def test_weight_is_rounded_once(
    device: str, dtype: torch.dtype, size: tuple[int, int, int], options: dict[str, Any]
) -> None:
    layer = layer_of(dtype, size, device=device, **options)
    exact, terms = exact_sums(layer)
    layer.merge()
    merged = stored(layer)
    assert_rounded_once(merged, exact, terms, layer.r + 2)
    if dtype in HALVES and merged.numel() > 1000:
        # Only sums within float32's error of the middle between two neighbours may differ.
        assert (merged == exact.to(dtype)).double().mean() > 0.99


@each_dtype
@each_device
def test_bias_is_rounded_once(device: str, dtype: torch.dtype) -> None:
    layer = layer_of(dtype, (1000, 3, 2), lora_bias=True, device=device)
    assert layer.lora_bias is not None
    bias, added = layer.bias.detach().double(), layer.lora_bias.detach().double() * layer.scaling
    exact, terms = bias + added, bias.abs() + added.abs()
    layer.merge()
    assert_rounded_once(layer.bias.detach(), exact, terms, 2)


@each_option
@each_dtype
@each_device
def test_merged_forward_is_the_unmerged_one(
    device: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    layer, exact = (layer_of(dtype, (33, 41, 4), device=device, **options) for _ in range(2))
    x = torch.randn(16, 41).to(device, dtype)
    truth = exact.double()(x.double())
    unmerged = layer(x)
    layer.merge()
    # A weight that is rounded once cannot do better than this rounding, even in exact arithmetic.
    exact.merge()
    rounded = exact.to(dtype).double()(x.double()).to(dtype)
    yardstick = max((y.double() - truth).abs().max() for y in (unmerged, rounded))
    rounding = 41 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert (layer(x).double() - truth).abs().max() <= 2 * yardstick + rounding * truth.abs().max()


@each_option
@each_dtype
@each_device
def test_a_thousand_adapters_come_and_go(
    device: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    layer = layer_of(dtype, (13, 11, 2), device=device, **options)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    for _ in range(1000):
        new_adapter(layer)
        layer.merge()
        assert not torch.equal(layer.weight, weight)
        layer.unmerge()
        assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)


def test_merging_does_not_write_into_the_base() -> None:
    layer = layer_of()
    weight, values, version = layer.weight, layer.weight.detach().clone(), layer.weight._version
    for _ in range(2):
        layer.merge()
        assert layer.weight is not weight and layer.weight.requires_grad and layer.weight.is_leaf
        assert torch.equal(weight, values) and weight._version == version
        layer.unmerge()
        assert layer.weight is weight and torch.equal(weight, values)


def test_what_trains_while_merged_trains_after_it() -> None:
    layer = layer_of()
    layer.add_adapter("other", r=2)
    layer.merge()
    layer.weight.requires_grad_(False)
    layer.merge(adapter_names=["other"])
    assert not layer.weight.requires_grad
    layer.unmerge()
    assert not layer.weight.requires_grad


def assert_refused(layer: Linear) -> None:
    before = snapshot(layer)
    with pytest.raises(ValueError, match="would hold NaN or Inf"):
        layer.merge()
    assert same_bytes(layer, before) and not layer.merged


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "lora_bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "fan_in_fan_out"])
@each_dtype
@each_device
def test_not_finite_is_refused(
    device: str, dtype: torch.dtype, transposed: bool, name: str, value: float
) -> None:
    layer = layer_of(dtype, (49, 33, 3), fan_in_fan_out=transposed, lora_bias=True, device=device)
    getattr(layer, name).data.flatten()[-1] = value  # the last one, in the tail of every loop
    assert_refused(layer)


@pytest.mark.parametrize("name", ["weight", "bias"])
@each_dtype
@each_device
def test_overflow_of_the_dtype_is_refused(device: str, dtype: torch.dtype, name: str) -> None:
    layer = layer_of(dtype, (49, 33, 3), lora_bias=True, device=device)
    largest = torch.finfo(dtype).max
    # The update itself is finite: scaling * r * A * B is 5.1 % of the largest number.
    adapter = {"lora_A": 0.1 * largest**0.5, "lora_B": largest**0.5 / 10, "lora_bias": largest / 17}
    for part, value in adapter.items():
        nn.init.constant_(getattr(layer, part), value)
    getattr(layer, name).data.flatten()[-1] = largest
    assert_refused(layer)


def test_state_dict_of_a_merged_layer_is_the_base() -> None:
    layer, before = layer_of(lora_bias=True), snapshot(layer_of(lora_bias=True))
    layer.merge()
    state = layer.state_dict()
    assert set(state) == set(before)
    assert all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("part", ["adapter", "everything"])
def test_loading_into_a_merged_layer_merges_what_was_loaded(part: str) -> None:
    layer, other = layer_of(lora_bias=True), layer_of(lora_bias=True)
    old = snapshot(layer)
    new = {k: torch.randn_like(v) for k, v in old.items() if part == "everything" or "lora" in k}
    layer.merge()
    layer.load_state_dict(new, strict=False)
    other.load_state_dict(old | new)
    other.merge()
    assert layer.merged and same_bytes(layer, snapshot(other))
    layer.unmerge()
    assert same_bytes(layer, old | new)


def test_loading_what_cannot_be_merged_unmerges_and_says_so() -> None:
    layer, base = layer_of(), snapshot(layer_of())
    layer.merge()
    with pytest.raises(RuntimeError, match=r"now unmerged.*NaN"):
        layer.load_state_dict(base | {"lora_A": torch.full((3, 5), float("nan"))})
    assert not layer.merged and torch.equal(layer.weight, base["weight"])


def test_training_the_adapter_while_merged_does_not_hurt_unmerge() -> None:
    layer = layer_of(lora_bias=True)
    base = {"weight": layer.weight.detach().clone(), "bias": layer.bias.detach().clone()}
    layer.merge()
    new_adapter(layer)
    layer.unmerge()
    assert same_bytes(layer, snapshot(layer) | base)


def test_backward_through_a_forward_before_the_merge_is_that_of_the_base() -> None:
    layer, x = layer_of(), torch.randn(4, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    y = layer(x).sum()
    layer.merge()
    (dx,) = torch.autograd.grad(y, x)
    assert torch.equal(dx, expected)


def operands(N: int, K: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, K), torch.randn(N, 3)


def test_only_the_weight_is_written() -> None:
    A, B = operands(50, 33)
    whole = torch.randn(60, 40)
    before = whole.clone()
    torch.ops.lora_ext.merge_(whole[5:55, 4:37], A.t().contiguous().t(), B, 0.5)
    delta = whole - before
    torch.testing.assert_close(delta[5:55, 4:37], 0.5 * B @ A)
    delta[5:55, 4:37] = 0
    assert not delta.any()


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_no_temporary_of_the_size_of_the_weight(transposed: bool) -> None:
    A, B = operands(4096, 2048)
    weight = torch.randn(2048, 4096).t() if transposed else torch.randn(4096, 2048)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees what this thread allocates
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            torch.ops.lora_ext.merge_(weight, A, B, 1.0)
    finally:
        torch.set_num_threads(threads)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    assert 0 < allocated < weight.nbytes / 8  # 0: the profiler would have seen nothing


def test_the_base_of_an_unloaded_layer_is_freed() -> None:
    layer = layer_of()
    base = weakref.ref(layer.weight)
    layer.merge()
    plain = layer.get_base_layer()
    del layer
    gc.collect()
    assert base() is None and plain.weight is not None
