"""Linear layers over quantized bases: values, gradients, what backward keeps, what stays as it is.
The bases are made without any library; tests/quantized has those of bitsandbytes and torchao."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from problems import kept_for_backward
from quantized_problems import (
    BASES,
    OPTIONS,
    Foreign,
    K,
    N,
    assert_as_exact,
    dequantised,
    each_base,
    inputs,
    matrix_of,
    plain_linear,
    randomise,
    results,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_ext
import lora_ext.nn as lora
from lora_ext import functional, quant
from lora_ext.nn.quantized import QuantizedLinear, lora_linear
from lora_ext.quant import call
from lora_ext.quant.kinds import DEQUANTIZERS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_base
def test_it_is_the_layer_over_the_dequantised_base(
    base: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    layer = randomise(lora.Linear.from_linear(BASES[base](), r=3, **options))  # type: ignore
    twin = dequantised(layer, dtype)
    found = [results(one, inputs(dtype)) for one in (layer, twin)]
    exact = results(twin.double(), inputs(dtype).double())
    for mine, theirs, wanted in zip(*found, exact, strict=True):
        if base == "foreign" or "use_dora" in options:  # by the dequantised matrix
            assert torch.equal(mine, theirs)
        assert_as_exact(mine, theirs, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_base
def test_values_beside_float64(base: str, dtype: torch.dtype) -> None:
    """Off by no more than twice what plain PyTorch is in this dtype, and some roundings."""
    layer = randomise(lora.Linear.from_linear(BASES[base](), r=3))  # type: ignore[arg-type]
    x = inputs(dtype)
    W, b = matrix_of(layer.base_layer, dtype), layer.base_layer.bias.detach()
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    exact = x.double() @ W.double().t() + b.to(dtype).double()
    exact = exact + layer.scaling * x.double() @ A.double().t() @ B.double().t()
    plain = lora_ext.reference.lora_linear(
        x, W, b.to(dtype), A.to(dtype), B.to(dtype), scaling=layer.scaling
    )
    error, bound = ((y.double() - exact).abs().max().item() for y in (layer(x), plain))
    assert error <= 2 * bound + torch.finfo(dtype).eps * exact.abs().max().item()


@each_base
def test_several_adapters_and_plans(base: str) -> None:
    layer: Any = lora.Linear.from_linear(BASES[base](), r=3)  # type: ignore[arg-type]
    layer.add_adapter("other", r=2, lora_dropout=0.0, use_rslora=True)
    layer.add_adapter("dora", r=2, use_dora=True)
    randomise(layer).eval()
    x = torch.randn(5, K)
    rows = ["default", "other", "__base__", "dora", "other"]
    for active in (["default", "other"], ["default", "dora"], ["other"]):
        layer.set_adapter(active)
        twin, exact = dequantised(layer), dequantised(layer).double()
        assert_as_exact(layer(x), twin(x), exact(x.double()))
        with lora_ext.batch(rows):
            assert torch.equal(layer(x), twin(x))
    layer.enable_adapters(False)
    twin.enable_adapters(False)
    assert torch.equal(layer(x), twin(x))


def test_backward_keeps_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And neither the matrix nor a view of it, whatever the adapter is."""
    made: list[weakref.ref[Tensor]] = []

    def values(*arguments: Any) -> Tensor:
        found = original(*arguments)
        made.append(weakref.ref(found))
        return found

    original = call.values
    monkeypatch.setattr(call, "values", values)
    for options in OPTIONS.values():
        layer = lora.Linear.from_linear(BASES["nf4"](), r=3, **options)  # type: ignore[arg-type]
        x = inputs()
        kept = kept_for_backward(lambda: layer(x))  # noqa: B023
        assert all(tensor.numel() < N * K for tensor in kept)
        by_codes = "use_dora" not in options  # which never make the matrix
        assert bool(made) is not by_codes
        del made[:], kept
        y = layer(x)
        assert not any(one() is not None for one in made)
        y.sum().backward()
        assert x.grad is not None and (by_codes or len(made) > 1) and not (by_codes and made)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_within_checkpoints(use_reentrant: bool) -> None:
    layer = randomise(lora.Linear.from_linear(BASES["nf4"](), r=3, lora_dropout=0.2))  # type: ignore
    x = inputs()

    def run() -> Tensor:
        return checkpoint(layer, x, use_reentrant=use_reentrant)  # type: ignore[no-any-return]

    torch.manual_seed(1)
    layer(x).sum().backward()
    expected = x.grad, layer.lora_A.grad
    x.grad = layer.lora_A.grad = None
    torch.manual_seed(1)
    y = run()
    y.sum().backward()
    assert expected[0] is not None and torch.equal(expected[0], x.grad)
    assert torch.equal(expected[1], layer.lora_A.grad)
    if not use_reentrant:  # x is kept, by the checkpoint alone
        assert [t.data_ptr() for t in kept_for_backward(run) if t.numel() >= x.numel()] in (
            [],
            [x.data_ptr()],
        )


def test_gradients_of_gradients_and_transforms() -> None:
    base = quant.Linear.from_linear(plain_linear(0, (4, 6)), "nf4")
    layer = randomise(lora.Linear.from_linear(base, r=2)).double()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)
    y = layer(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    found = torch.func.grad(lambda x: layer(x).square().sum())(x.detach())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_autocast(options: dict[str, Any]) -> None:
    layer = randomise(lora.Linear.from_linear(BASES["nf4"](), r=3, **options))  # type: ignore
    twin = dequantised(layer, torch.bfloat16)
    x = inputs().detach().repeat(1, 3, 1).requires_grad_()  # few rows are summed by the codes
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = results(layer, x), results(lambda x: twin(x.bfloat16()), x)
    assert mine[0].dtype is torch.bfloat16
    assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=False))


def test_the_compute_dtype_of_the_base() -> None:
    base = quant.Linear.from_linear(plain_linear(), "nf4", compute_dtype=torch.bfloat16)
    layer = randomise(lora.Linear.from_linear(base, r=3))
    x = inputs()
    expected = dequantised(layer, torch.bfloat16)(x.bfloat16())
    assert torch.equal(layer(x), expected.float()) and layer(x).dtype is torch.float32
    assert layer.lora_A.dtype is torch.float32
    narrow = lora.Linear.from_linear(base, r=3, autocast_adapter_dtype=False)
    assert narrow.lora_A is not None and narrow.lora_A.dtype is torch.bfloat16
    assert narrow(x).dtype is torch.float32


@each_base
def test_training_leaves_the_base_as_it_is(base: str) -> None:
    module = BASES[base]()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = nn.Sequential(module)
    assert lora_ext.replace_linear(model, ["0"], r=3, lora_dropout=0.1) == ["0"]
    lora_ext.mark_only_lora_as_trainable(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = []
    for _ in range(5):
        y = model(inputs())
        loss.append(y.square().mean())
        loss[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss[-1] < loss[0]
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    layer: Any = model[0]
    assert layer.get_base_layer() is module and layer.base_layer is module


@each_base
def test_copies_pickles_and_state_dicts(base: str) -> None:
    layer: Any = randomise(lora.Linear.from_linear(BASES[base](), r=3))  # type: ignore[arg-type]
    x = inputs()
    y = layer(x)
    copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    other: Any = lora.Linear.from_linear(
        quant.Linear.from_linear(plain_linear(1), "nf4", block_size=32, nested=True)
        if base == "nf4 nested"
        else type(layer.base_layer).from_linear(plain_linear(1), **_kind(layer.base_layer))
        if base != "foreign"
        else Foreign(torch.zeros(N, K), torch.zeros(N)),
        r=3,
    )
    other.load_state_dict(layer.state_dict())
    layer.base_layer.bias.data += 1
    layer.lora_B.data += 1
    for twin in (copied, pickled, other):
        assert torch.equal(twin(x), y) and type(twin) is QuantizedLinear


def _kind(base: Any) -> dict[str, Any]:
    size = {} if base.quant_type == "int8" else {"block_size": base.quantized_weight.block_size}
    return {"quant_type": base.quant_type, **size}


def test_nothing_is_kept_alive() -> None:
    layer = lora.Linear.from_linear(BASES["nf4"](), r=3)  # type: ignore[arg-type]
    layer(inputs()).sum().backward()
    gone = weakref.ref(layer), weakref.ref(layer.base_layer)
    del layer
    gc.collect()
    assert gone[0]() is None and gone[1]() is None


def test_hooks_on_the_base_are_called() -> None:
    layer: Any = randomise(lora.Linear.from_linear(BASES["nf4"](), r=3))  # type: ignore[arg-type]
    x, calls = inputs(), []
    y = layer(x)
    handle = layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(layer(x), y)
    assert calls == [1] and "the base has hooks" in lora_ext.explain(layer)[0].reason
    with pytest.raises(ValueError, match="the base has hooks, so it is called"):
        layer.merge()
    handle.remove()
    assert torch.equal(layer(x), y)


def test_explain_says_how() -> None:
    layer: Any = lora.Linear.from_linear(BASES["nf4"](), r=3)  # type: ignore[arg-type]
    for what in ("nothing", "dora", "plan", "off"):
        if what == "dora":
            layer.add_adapter("dora", r=2, use_dora=True)
            layer.set_adapter("dora")
        layer.enable_adapters(what != "off")
        with lora_ext.batch([layer.active_adapters[0]] * 3 if what == "plan" else []):
            assert "dequantised for each call" in lora_ext.explain(layer)[0].reason
    layer.enable_adapters(True)
    layer.merge()
    assert lora_ext.explain(layer)[0].reason == (
        "merged: the adapter is in the weight, dequantised"
    )


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"init_lora_weights: got 'pissa'.*loftq"):
        lora.Linear.from_linear(BASES["nf4"](), r=3, init_lora_weights="pissa")  # type: ignore
    layer = lora.Linear.from_linear(BASES["nf4"](), r=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="keeps its forward"):
        lora.Linear.from_linear(layer, r=3)
    with pytest.raises(TypeError, match="register_dequantizer: kind: got 3"):
        quant.register_dequantizer(3, Foreign.dequantize)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="register_dequantizer: function: got 3"):
        quant.register_dequantizer(Foreign, 3)  # type: ignore[arg-type]
    for kind in (nn.Linear, quant.Linear):
        with pytest.raises(TypeError, match="got Linear, which all such layers of this process"):
            quant.register_dequantizer(kind, lambda layer: layer.weight)
    monkeypatch.setitem(DEQUANTIZERS, Foreign, lambda layer: layer.codes)
    with pytest.raises(ValueError, match=r"'0': .*registered for Foreign.*floating point"):
        lora_ext.get_lora_model(
            nn.Sequential(BASES["foreign"]()), lora_ext.LoraConfig(target_modules=["0"])
        )
    monkeypatch.setitem(DEQUANTIZERS, Foreign, lambda layer: layer.dequantize().t())
    foreign: Any = BASES["foreign"]()
    foreign.in_features, foreign.out_features = K, N
    with pytest.raises(ValueError, match=rf"'0': .*registered for Foreign.*shape \[{N}, {K}\]"):
        lora_ext.get_lora_model(nn.Sequential(foreign), lora_ext.LoraConfig(target_modules=["0"]))


def test_mica_and_dora_read_the_dequantised_weight() -> None:
    layer: Any = lora.Linear.from_linear(BASES["nf4"](), r=3, init_lora_weights="mica")  # type: ignore
    U = torch.linalg.svd(matrix_of(layer.base_layer))[0]
    torch.testing.assert_close(layer.lora_B.data.abs(), U[:, -3:].abs(), rtol=0, atol=1e-4)
    layer.add_adapter("dora", r=3, use_dora=True)
    norms = matrix_of(layer.base_layer).norm(dim=1)
    torch.testing.assert_close(layer.parts("dora")["lora_magnitude_vector"].data, norms)


def test_the_function() -> None:
    matrix = quant.quantize(plain_linear().weight, "nf4")
    x, A, B = inputs(), torch.randn(2, K, requires_grad=True), torch.randn(N, 2)
    y = lora_linear(x, matrix, None, functional.LowRank(A, B, scaling=0.5))
    W = matrix.dequantize()
    expected = lora_ext.lora_linear(x, W, None, A, B, scaling=0.5)
    exact = lora_ext.lora_linear(
        *(t.double() for t in (x, W)), None, A.double(), B.double(), scaling=0.5
    )
    found = [(r, *torch.autograd.grad(r.sum(), [x, A])) for r in (y, expected, exact)]
    for results_of_each in zip(*found, strict=True):
        assert_as_exact(*results_of_each)


@each_base
def test_what_changed_in_place_is_noticed_in_backward(base: str) -> None:
    module: Any = BASES[base]()
    layer: Any = lora.Linear.from_linear(module, r=3)
    codes = module.codes if base == "foreign" else module.weight
    for changed in (None, codes, layer.lora_A):
        x = inputs() * 1
        y = layer(x)
        with torch.no_grad():
            (x if changed is None else changed).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_layer_may_be_gone_before_backward() -> None:
    layer: Any = lora.Linear.from_linear(BASES["foreign"](), r=3)  # type: ignore[arg-type]
    x = inputs()
    y = layer(x)
    del layer
    gc.collect()
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_adapters_that_are_narrower_than_what_is_computed_in(
    options: dict[str, Any], compute_dtype: torch.dtype
) -> None:
    """As model.half() leaves them where the base has its own dtype to compute in."""
    base = quant.Linear.from_linear(plain_linear(), "nf4", compute_dtype=compute_dtype)
    half: Any = randomise(lora.Linear.from_linear(base, r=3, **options)).half()
    wide = copy.deepcopy(half)
    for parameter in wide.adapter_parameters("default").values():
        parameter.data = parameter.data.float()
    x = inputs(torch.float16)
    mine, theirs = results(half, x), results(wide, x)
    assert mine[0].dtype is torch.float16 and mine[2].dtype is torch.float16
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(mine, theirs, strict=True))
    for layer in (half, wide):
        layer.add_adapter("other", r=2, lora_alpha=4)
        layer.lora_A_other.data = half.lora_A_other.data.half().to(layer.lora_A.dtype)
        layer.lora_B_other.data = torch.ones_like(layer.lora_B_other, dtype=layer.lora_B.dtype)
        layer.set_adapter(["default", "other"])
    assert half.lora_A_other.dtype is torch.float16
    mine, theirs = results(half, x), results(wide, x)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(mine, theirs, strict=True))


def test_narrower_adapters_of_slices_and_plans() -> None:
    base = quant.Linear.from_linear(plain_linear(), "int8", compute_dtype=torch.bfloat16)
    sliced = lora.MergedLinear.from_linear(base, r=3, enable_lora=[True, False])
    layers: list[Any] = [sliced, lora.Linear.from_linear(base, r=3)]
    for layer in map(randomise, layers):
        x = inputs(torch.float16)
        found = []
        for dtype in (torch.float16, torch.float32):
            for parameter in layer.adapter_parameters("default").values():
                parameter.data = parameter.data.half().to(dtype)
            with lora_ext.batch(adapters=["default", None]):
                found.append([layer(x), *torch.autograd.grad(layer(x).sum(), x)])
            found[-1] += results(layer, x)[:2]
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_several_adapters_of_an_x_in_float64() -> None:
    """Scalings that float32 does not hold."""
    layer: Any = lora_ext.nn.Linear.from_linear(quant.Linear.from_linear(nn.Linear(K, N), "nf4"), 0)
    for name, r in ("a", 3), ("b", 6):
        layer.add_adapter(name, r=r, lora_alpha=8, init_lora_weights=False)
    layer.set_adapter(["a", "b"])
    x = torch.randn(5, K, dtype=torch.float64)
    base = layer.base_layer
    expected = nn.functional.linear(x, base.quantized_weight.dequantize(torch.float32).double())
    expected = expected + base.bias.double()
    for name, r in ("a", 3), ("b", 6):
        A, B = (part.detach().double() for part in layer.parts(name).values())
        expected = expected + 8 / r * nn.functional.linear(nn.functional.linear(x, A), B)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
