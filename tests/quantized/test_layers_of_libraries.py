"""Layers over the linear layers of bitsandbytes and torchao."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torchao.quantization as ao
from bitsandbytes.nn.modules import Params4bit
from quant_problems import same_bits
from quantized_problems import (
    OPTIONS,
    assert_as_exact,
    dequantised,
    inputs,
    matrix_of,
    plain_linear,
    randomise,
    results,
)
from torch import Tensor, nn
from torchao.quantization.quantize_ import workflows
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

import lora_ext
import lora_ext.nn as lora
from lora_ext import quant
from lora_ext.bench.cli import main as bench

N, K = 64, 128  # which bitsandbytes' kernels for CPUs take
X = inputs(width=K)


def linear_4bit(quant_type: str = "nf4", **options: Any) -> nn.Module:
    layer = bnb.nn.Linear4bit(K, N, quant_type=quant_type, **options)
    layer.weight = Params4bit(
        plain_linear(0, (N, K)).weight.detach(),
        compress_statistics=options.get("compress_statistics", True),
        quant_type=quant_type,
        quant_storage=options.get("quant_storage", torch.uint8),
        module=layer,
    )
    return layer.to("cpu")


def linear_8bit() -> nn.Module:
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    weight = plain_linear(0, (N, K)).weight.detach()
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def torchao_linear(convert: Callable[[nn.Linear], None]) -> nn.Module:
    layer = plain_linear(0, (N, K))
    convert(layer)
    return layer


def nf4_tensor(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), 64, 64), requires_grad=False)


def int4_tensor(layer: nn.Linear) -> None:
    """By hand: torchao makes them on a GPU."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 127, (N, K // 2), generator=generator, dtype=torch.int8)
    scale, zero = torch.rand(2, K // 32, N, generator=generator) * 0.1
    weight = workflows.Int4Tensor(codes, scale, zero, [1, 32], torch.Size((N, K)))
    layer.weight = nn.Parameter(weight, requires_grad=False)


BITSANDBYTES: dict[str, Callable[[], nn.Module]] = {
    "nf4": linear_4bit,
    "fp4, plain scales": lambda: linear_4bit("fp4", compress_statistics=False),
    "nf4 in bf16": lambda: linear_4bit(quant_storage=torch.bfloat16),
    "int8": linear_8bit,
}
BASES = BITSANDBYTES | {
    "torchao nf4": lambda: torchao_linear(nf4_tensor),
    "torchao int4": lambda: torchao_linear(int4_tensor),
    "torchao int8": lambda: torchao_linear(lambda m: ao.quantize_(m, ao.Int8WeightOnlyConfig())),
}
each_base = pytest.mark.parametrize("base", BASES)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what it saves, as bytes where they are packed."""
    found = {}
    for name, tensor in module.state_dict().items():
        inner = getattr(tensor, "__tensor_flatten__", lambda: ((), None))()[0]
        for part in inner:
            found[f"{name}.{part}"] = getattr(tensor, part).clone()
        if not inner:
            found[name] = tensor.clone()
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    def as_bytes(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(-1).view(torch.uint8)

    return one.keys() == other.keys() and all(
        torch.equal(as_bytes(one[name]), as_bytes(other[name])) for name in one
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_base
def test_it_is_the_layer_over_the_dequantised_base(base: str, options: dict[str, Any]) -> None:
    module = BASES[base]()
    before = tensors(module)
    layer = randomise(lora.Linear.from_linear(module, r=3, **options))  # type: ignore[arg-type]
    found = [results(one, X) for one in (layer, dequantised(layer))]
    exact = results(dequantised(layer).double(), X.detach().double().requires_grad_())
    for each in zip(*found, exact, strict=True):
        assert_as_exact(*each)
    layer.eval()(X.detach())
    assert same(before, tensors(module))


@each_base
def test_the_base_computes_the_same(base: str) -> None:
    """As far as its own kernels go: bitsandbytes' int8 rounds x."""
    if base == "torchao int4":
        pytest.skip("torchao multiplies with it on a GPU only")
    module = BASES[base]()
    layer = lora.Linear.from_linear(module, r=3)  # type: ignore[arg-type]
    atol = 0.05 if base == "int8" else 1e-5
    torch.testing.assert_close(layer(X), module.train()(X), rtol=0, atol=atol)


@pytest.mark.parametrize("requantize", [False, True])
@each_base
def test_merging(base: str, requantize: bool) -> None:
    module = BASES[base]()
    before = tensors(module)
    layer: Any = randomise(lora.Linear.from_linear(module, r=3, lora_bias=True))  # type: ignore
    y = layer(X)
    if requantize and base not in BITSANDBYTES:
        with pytest.raises(ValueError, match="requantize: got True"):
            layer.merge(requantize=True)
        return
    layer.merge(requantize=requantize)
    merged = layer.get_base_layer()
    found = layer(X)
    if requantize:
        assert type(merged) is type(module) and merged is not module
        atol = 0.05 if base == "int8" else 1e-5
        torch.testing.assert_close(merged.train()(X), found, rtol=0, atol=atol)
        expected = matrix_of(module) + layer.get_delta_weight("default")
        step = 0.02 if base == "int8" else 0.2  # of codes, beside a block's largest value
        assert (matrix_of(merged) - expected).abs().max() < step * expected.abs().max()
    else:
        assert type(merged) is nn.Linear and torch.equal(merged(X), found)
        torch.testing.assert_close(found, y, rtol=0, atol=1e-5)
    layer.unmerge()
    assert torch.equal(layer(X), y) and layer.get_base_layer() is module
    assert same(before, tensors(module))


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("base", BITSANDBYTES)
def test_pickles(base: str, requantize: bool) -> None:
    """pickle makes bitsandbytes' parameters plain ones, with their attributes."""
    module = BASES[base]()
    loaded = pickle.loads(pickle.dumps(module))
    assert type(loaded.weight) is nn.Parameter
    layer: Any = randomise(lora.Linear.from_linear(module, r=3))  # type: ignore[type-var]
    twin: Any = lora.Linear.from_linear(loaded, r=3)
    for name, part in layer.parts("default").items():
        twin.parts("default")[name].data.copy_(part)
    y = layer(X)
    assert torch.equal(twin(X), y)
    for one in (layer, twin):
        one.merge(requantize=requantize)
    merged = layer(X)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(X), merged) and torch.equal(again(X), merged)
    assert type(twin.get_base_layer()) is type(layer.get_base_layer())
    again.unmerge()
    assert torch.equal(again(X), y)


@pytest.mark.parametrize("convert", [nf4_tensor, int4_tensor])
def test_what_was_loaded_is_read(convert: Callable[[nn.Linear], None]) -> None:
    """torchao's copy_ is not counted for the tensors inside, and scales are formed of them."""
    layer: Any = lora.Linear.from_linear(torchao_linear(convert), r=3)  # type: ignore[type-var]
    other = plain_linear(7, (N, K))
    convert(other)
    layer(X)
    layer.base_layer.load_state_dict(other.state_dict())
    expected = nn.functional.linear(X, matrix_of(other), other.bias)
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)


def test_codes_that_were_cast_are_refused() -> None:
    layer: Any = lora.Linear.from_linear(linear_4bit(quant_storage=torch.bfloat16), r=3)  # type: ignore
    layer.half()
    with pytest.raises(ValueError, match=r"quant_storage torch.bfloat16: got .*cast them"):
        layer(X.half())


def test_a_layer_that_was_called_before() -> None:
    """LLM.int8()'s first forward moves its scales; a second read finds them."""
    module: Any = linear_8bit()
    first = matrix_of(module)
    layer = lora.Linear.from_linear(module, r=3)
    y = layer(X)
    module(X.detach())
    assert module.weight.SCB is None
    assert same_bits(matrix_of(module), first) and torch.equal(layer(X), y)
    assert torch.equal(lora.Linear.from_linear(module, r=3)(X), y)


def test_a_repacked_weight_is_refused() -> None:
    module: Any = linear_4bit()
    layer: Any = lora.Linear.from_linear(module, r=3)
    layer(X)
    if not module.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks on a CPU with AVX512_BF16 only")
    module.eval()(X.detach().bfloat16())
    with pytest.raises(ValueError, match=r"packing_format_for_cpu.*load the model again"):
        layer(X)
    model = nn.Sequential(nn.Linear(4, 4), module)
    with pytest.raises(ValueError, match=r"'1': .*packing_format_for_cpu"):
        lora_ext.replace_linear(model, ["0", "1"], r=2)
    assert type(model[0]) is nn.Linear and model[1] is module


def opaque() -> nn.Module:
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    words = torch.zeros(8, 2, dtype=torch.int32)
    layer = nn.Linear(16, 8)
    weight = Int4OpaqueTensor(words, torch.ones(1, 8, 2).bfloat16(), [1, 16], torch.Size((8, 16)))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


UNREAD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "not quantized yet": (lambda: bnb.nn.Linear4bit(16, 8), "move the layer to its device"),
    "fp16 weights": (lambda: bnb.nn.Linear8bitLt(16, 8), "has_fp16_weights=False"),
    "opaque": (opaque, "Int4WeightOnlyConfig"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_cannot_be_read_is_refused(name: str) -> None:
    make, cure = UNREAD[name]
    model = nn.Sequential(nn.Linear(16, 16), make())
    before = list(model)
    for adapt in (
        lambda: lora_ext.get_lora_model(model, lora_ext.LoraConfig(target_modules=["0", "1"])),
        lambda: lora_ext.replace_linear(model, ["0", "1"]),
    ):
        with pytest.raises(ValueError, match=f"target_modules: '1': .*{cure}"):
            adapt()
        assert all(now is then for now, then in zip(model, before, strict=True))


def test_state_dicts_are_bitsandbytes() -> None:
    """Of `lora_ext.quant.Linear`: what either saves the other reads."""
    plain = plain_linear(0, (N, K))
    for nested in (False, True):
        theirs: Any = linear_4bit(compress_statistics=nested)
        theirs.bias.data.copy_(plain.bias.data)
        mine = quant.Linear.from_linear(plain, "nf4", nested=nested)
        saved, other = mine.state_dict(), theirs.state_dict()
        assert saved.keys() == other.keys()
        for name in saved.keys() - {"weight.quant_state.bitsandbytes__nf4"}:
            assert same_bits(saved[name], other[name]), name
        mine.load_state_dict(other)
        assert same_bits(matrix_of(mine), matrix_of(theirs))
        stats = {k.removeprefix("weight."): v for k, v in saved.items() if k.startswith("weight.")}
        read = Params4bit.from_prequantized(saved["weight"], stats, device="cpu")
        assert same_bits(quant.read_weight(read).dequantize(), matrix_of(theirs))
    eight, theirs = quant.Linear.from_linear(plain, "int8"), linear_8bit()
    assert eight.state_dict().keys() == theirs.state_dict().keys()
    eight.load_state_dict(theirs.state_dict())
    assert same_bits(matrix_of(eight), matrix_of(theirs))


def test_peft_takes_part_in_the_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    given = ["--shapes=128x64", "--tokens=40", "--ranks=4", "--dtypes=fp32", "--dropouts=0"]
    given += ["--budget=0.05", f"--json={file}"]
    assert bench(["--quantized=nf4", *given]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["status"] for row in rows if row["rival"] == "peft_bnb"] == ["ok", "ok"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [False, True], ids=["layer", "base"])
@pytest.mark.parametrize("base", [name for name in BASES if name != "nf4 in bf16"])
def test_merging_what_was_cast(base: str, first: bool, dtype: torch.dtype) -> None:
    if first and dtype is torch.float64:
        pytest.skip("libraries' weights are in no float64")
    module = BASES[base]()
    if first and "torchao" in base:
        module = module.to(dtype)
    before = matrix_of(module)
    layer: Any = randomise(lora.Linear.from_linear(module, r=3)).to(dtype)
    assert torch.equal(matrix_of(layer.base_layer), before)
    x = inputs(dtype, K)
    y = layer(x)
    layer.merge()
    dense = layer.get_base_layer()
    assert [parameter.dtype for parameter in dense.parameters()] == [dtype] * 2
    expected = before.double() + layer.get_delta_weight("default").double()
    assert torch.equal(dense.weight, expected.float().to(dtype)) or torch.allclose(
        dense.weight.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7
    )
    assert dense(x).dtype is dtype and y.dtype is dtype


@pytest.mark.parametrize("base", ["torchao nf4", "torchao int8"])
def test_a_base_that_was_cast_before_tells_what_to(base: str) -> None:
    module = BASES[base]().to(torch.bfloat16)
    layer: Any = randomise(lora.Linear.from_linear(module, r=3))
    layer.merge()
    dense = layer.get_base_layer()
    assert dense.weight.dtype is torch.bfloat16 and dense(X.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("dora", [False, True], ids=["operator", "dequantised"])
@pytest.mark.parametrize("base", BASES)
def test_what_is_copied_into_a_weight_is_noticed_in_backward(base: str, dora: bool) -> None:
    """torchao's tensors count that for themselves, not for what is in them."""
    module: Any = BASES[base]()
    layer = lora.Linear.from_linear(module, r=3, use_dora=dora)
    other = pickle.loads(pickle.dumps(module.weight))
    for changed in (False, True):
        y = layer(X)
        if changed:
            with torch.no_grad():
                module.weight.copy_(other)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        y = layer(X)
        y.sum().backward(retain_graph=True)
        y.sum().backward()


SCALES: dict[str, Callable[[Any], None]] = {
    "offset in place": lambda state: state.offset.mul_(2),
    "offset": lambda state: setattr(state, "offset", state.offset * 2),
    "absmax of absmax": lambda state: setattr(state.state2, "absmax", state.state2.absmax * 2),
}


@pytest.mark.parametrize("change", SCALES.values(), ids=SCALES.keys())
def test_scales_that_another_hand_changed_are_read_anew(change: Callable[[Any], None]) -> None:
    base = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, compress_statistics=True)
    layer: Any = lora_ext.nn.Linear.from_linear(base.to("cpu"), r=2)
    x = torch.randn(3, 128)
    layer(x)
    change(base.weight.quant_state)
    expected = nn.functional.linear(x, quant.read_weight(base).dequantize(torch.float32), base.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_rows_maxima_that_are_in_the_state() -> None:
    base = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False).to("cpu")
    layer: Any = lora_ext.nn.Linear.from_linear(base, r=2)
    base.state.SCB, base.weight.SCB = base.weight.SCB, None
    x = torch.randn(3, 128)
    layer(x)
    base.state.SCB = base.state.SCB * 2
    expected = nn.functional.linear(
        x, quant.read_weight(base).dequantize(torch.float32), base.bias.float()
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_pickle_that_is_copied_runs() -> None:
    """bitsandbytes' weight is a Parameter without its state then; its layer has the state."""
    net = nn.Sequential(bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32)).to("cpu")
    model: Any = lora_ext.get_lora_model(net, lora_ext.LoraConfig(target_modules=["0"]))
    x = torch.randn(3, 128)
    again = copy.deepcopy(pickle.loads(pickle.dumps(model)))
    assert torch.equal(again(x), model(x))
