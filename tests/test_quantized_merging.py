"""Merging adapters into quantized weights, dense or as codes again, and out of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantized_problems import (
    BASES,
    OPTIONS,
    dequantised,
    each_base,
    inputs,
    matrix_of,
    plain_linear,
    randomise,
)
from torch import nn

import lora_ext.nn as lora
from lora_ext import quant

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_base
def test_merging_dequantised(base: str, options: dict[str, Any]) -> None:
    module = BASES[base]()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    layer: Any = randomise(lora.Linear.from_linear(module, r=3, **options)).eval()  # type: ignore
    x = inputs()
    y, state = layer(x), {name: t.clone() for name, t in layer.state_dict().items()}
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=0, atol=2e-6)
    merged = layer.get_base_layer()
    assert type(merged) is nn.Linear and torch.equal(merged(x), layer(x))
    twin = dequantised(layer).eval()
    twin.merge()
    assert torch.equal(merged.weight, twin.weight)
    saved = layer.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(saved[n], state[n]) for n in saved)
    layer.unmerge()
    assert torch.equal(layer(x), y) and layer.get_base_layer() is module
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


@pytest.mark.parametrize("requantize", [False, True])
def test_a_lora_bias_needs_one_of_the_base(requantize: bool) -> None:
    linear = plain_linear()
    linear.bias = None
    base = quant.Linear.from_linear(linear)
    layer: Any = lora.Linear.from_linear(base, r=3, lora_bias=True)  # type: ignore[type-var]
    y = layer(inputs())
    expected = r"merge: lora_bias cannot be merged into a base without bias; construct the base"
    with pytest.raises(ValueError, match=expected):
        layer.merge(requantize=requantize)
    assert not layer.merged and torch.equal(layer(inputs()), y)


@pytest.mark.parametrize("base", ["nf4", "nf4 nested", "fp4", "int8"])
def test_merging_into_codes(base: str) -> None:
    module: Any = BASES[base]()
    layer: Any = randomise(lora.Linear.from_linear(module, r=3, lora_bias=True)).eval()
    x = inputs()
    y = layer(x)
    layer.merge()
    dense = layer.get_base_layer()
    layer.unmerge()
    layer.merge(requantize=True)
    merged = layer.get_base_layer()
    assert type(merged) is quant.Linear and torch.equal(merged(x), layer(x))
    old, new = quant.read_weight(module), quant.read_weight(merged)
    expected = quant.Linear.from_linear(
        dense,
        module.quant_type,
        **({} if base == "int8" else {"block_size": old.block_size, "nested": "nested" in base}),
    )
    assert torch.equal(new.dequantize(), expected.quantized_weight.dequantize())
    assert torch.equal(merged.bias, dense.bias) and not torch.equal(merged.bias, module.bias)
    layer.unmerge()
    assert torch.equal(layer(x), y)


def test_merging_is_refused() -> None:
    foreign: Any = lora.Linear.from_linear(BASES["foreign"](), r=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"requantize: got True .* Foreign .*expected False"):
        foreign.merge(requantize=True)
    assert not foreign.merged
    layer: Any = lora.Linear.from_linear(BASES["nf4"](), r=3)  # type: ignore[arg-type]
    layer.lora_B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge()
    assert not layer.merged
    layer.lora_B.data.zero_()
    layer.merge()
    with pytest.raises(RuntimeError, match=r"are merged .*call unmerge\(\)"):
        layer.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("requantize", [False, True])
def test_merging_what_overflows(requantize: bool) -> None:
    """fp16 base: what fp32 holds and it does not is refused, as the plain layer does."""
    module = quant.Linear.from_linear(plain_linear().half(), "nf4")
    layer: Any = randomise(lora.Linear.from_linear(module, r=3))  # type: ignore[type-var]
    x = inputs(torch.float16)
    y, state = layer(x), copy.deepcopy(layer.state_dict())
    layer.lora_B.data.fill_(3e38 if requantize else 1e6)
    layer.lora_A.data.fill_(1)
    with pytest.raises(ValueError, match=r"NaN or Inf .*overflow of float.*nothing "):
        layer.merge(requantize=requantize)
    assert not layer.merged and layer.get_base_layer() is module
    layer.load_state_dict(state)
    assert torch.equal(layer(x), y)


def test_deltas() -> None:
    layer: Any = randomise(lora.Linear.from_linear(BASES["nf4"](), r=3))  # type: ignore[arg-type]
    expected = layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    sliced: Any = lora.MergedLinear.from_linear(BASES["int8"](), [True, False, True], r=2)  # type: ignore
    randomise(sliced).eval()
    x = inputs()
    torch.testing.assert_close(
        sliced(x) - sliced.base_layer(x), x @ sliced.get_delta_weight("default").t()
    )
    y = sliced(x)
    sliced.merge()
    torch.testing.assert_close(sliced(x), y, rtol=0, atol=2e-6)
    sliced.unmerge()


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merging_adapters_of_any_dtype(dtype: torch.dtype, requantize: bool) -> None:
    base = quant.Linear.from_linear(plain_linear(), "nf4", compute_dtype=torch.bfloat16)
    base.compute_dtype = torch.bfloat16 if dtype is torch.bfloat16 else None
    layer: Any = lora.Linear.from_linear(base, r=3, autocast_adapter_dtype=False, lora_bias=True)
    layer = randomise(layer.double() if dtype is torch.float64 else layer)
    assert layer.lora_A.dtype is dtype
    x = inputs(torch.float64 if dtype is torch.float64 else torch.float32)
    y, parts = layer(x), {n: id(p) for n, p in layer.named_parameters()}
    dense = torch.float64 if dtype is torch.float64 else torch.float32  # what it was cast to
    expected = matrix_of(base, dense) + layer.get_delta_weight("default").to(dense)
    layer.merge(requantize=requantize)
    if not requantize:
        torch.testing.assert_close(layer.get_base_layer().weight.data, expected)
        atol = 1e-6 if dtype is torch.float64 else 0.02
        torch.testing.assert_close(layer(x), y, rtol=0, atol=atol)
    assert parts == {n: id(p) for n, p in layer.named_parameters()}
    layer.unmerge()
    assert torch.equal(layer(x), y)


def test_calls_that_a_merged_layer_cannot_make() -> None:
    layer: Any = lora.Linear.from_linear(BASES["nf4"](), r=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"QuantizedLinear: input: got .*expected a tensor"):
        layer([1.0])
    layer.merge()
    layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"the base has hooks; call unmerge\(\) first"):
        layer(inputs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["before", "wrapped", "merged", "there and back"])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_merging_what_was_cast(base: str, when: str, dtype: torch.dtype) -> None:
    module: Any = BASES[base]()
    if when == "before":
        module.to(dtype)
    layer: Any = randomise(lora.Linear.from_linear(module, r=3, lora_bias=True))
    if when == "merged":
        layer.merge()
    elif when == "there and back":
        layer.to(dtype)
        dtype = torch.float32
    layer.to(dtype)
    x = inputs(dtype)
    if when == "merged":
        assert layer.get_base_layer()(x).dtype is dtype
        layer.unmerge()
    y = layer(x)
    layer.merge()
    dense = layer.get_base_layer()
    assert all(parameter.dtype is dtype for parameter in dense.parameters())
    # Values of some units, in sums of 90 products: what the merged weight's rounding makes of them.
    atol = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.06, torch.float16: 0.01}
    torch.testing.assert_close(dense(x), y, rtol=0, atol=atol[dtype])
    assert dense(x).dtype is dtype
    layer.unmerge()
    layer.add_adapter("other", r=2, autocast_adapter_dtype=False)
    assert layer.lora_A_other.dtype is dtype
