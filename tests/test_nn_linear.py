"""lora_ext.nn.Linear: its constructor, its forward and backward, and its life as an nn.Module."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext
from lora_ext import reference
from lora_ext.nn import Linear

IN, OUT, RANK = 24, 20, 4
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]


def layer_of(dtype: torch.dtype = torch.float32, **options: Any) -> Linear:
    """A layer whose adapter is not zero."""
    torch.manual_seed(0)
    layer = Linear(IN, OUT, RANK, 8, init_lora_weights=False, dtype=dtype, **options)
    if layer.lora_bias is not None:
        nn.init.normal_(layer.lora_bias)
    return layer


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(layer: Linear, x: Tensor, mask: Tensor | None = None) -> Tensor:
    assert layer.lora_A is not None and layer.lora_B is not None
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    adapter = (layer.lora_A, layer.lora_B, layer.lora_bias)
    dropout = {"dropout_p": layer.lora_dropout, "mask": mask} if mask is not None else {}
    return reference.lora_linear(x, weight, layer.bias, *adapter, scaling=layer.scaling, **dropout)


def assert_as_exact(actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice the error of plain PyTorch in the same dtype, and one rounding."""
    assert actual.dtype == plain.dtype
    yardstick = (plain.double() - truth).abs().max()
    rounding = torch.finfo(plain.dtype).eps * truth.abs().max()
    assert (actual.double() - truth).abs().max() <= 2 * yardstick + rounding


def test_rank_zero_is_torch_nn_linear() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT)
    torch.manual_seed(0)
    layer = Linear(IN, OUT)
    assert layer.r == 0 and not [name for name in layer.state_dict() if "lora" in name]
    assert torch.equal(layer(rows()), plain(rows()))


@pytest.mark.parametrize(
    ("use_rslora", "scaling"), [(False, 8 / 4), (True, 8 / 2)], ids=["alpha/r", "rslora"]
)
def test_scaling(use_rslora: bool, scaling: float) -> None:
    assert Linear(IN, OUT, 4, 8, use_rslora=use_rslora).scaling == scaling


def test_positional_order_is_loralibs() -> None:
    layer = Linear(IN, OUT, 4, 8, 0.25, True)
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert (layer.r, layer.lora_alpha, layer.lora_dropout, layer.fan_in_fan_out) == (4, 8, 0.25, 1)
    assert layer.weight.shape == (IN, OUT)


def test_fan_in_fan_out_stores_the_transpose() -> None:
    layer, transposed = layer_of(), layer_of(fan_in_fan_out=True)
    assert torch.equal(transposed.weight, layer.weight.t())
    truth = expected(layer.double(), rows().double())
    assert_as_exact(transposed(rows()), expected(transposed, rows()), truth)


@pytest.mark.parametrize("init", [True, "gaussian", False], ids=str)
def test_initial_adapter(init: bool | str) -> None:
    torch.manual_seed(0)
    layer = Linear(256, 128, 8, lora_bias=True, init_lora_weights=init)
    assert layer.lora_A is not None and layer.lora_B is not None and layer.lora_bias is not None
    assert (layer.lora_B.count_nonzero() == 0) == (init is not False)
    assert layer.lora_bias.count_nonzero() == 0
    # 2048 samples: the sample deviation is within 5 % of the true one with 3 sigma to spare.
    deviation = 1 / 8 if init == "gaussian" else 1 / math.sqrt(3 * 256)
    assert layer.lora_A.std().item() == pytest.approx(deviation, rel=0.05)
    if init != "gaussian":
        assert layer.lora_A.abs().max() <= 1 / math.sqrt(256)  # uniform: bounded


def test_reset_starts_the_adapter_again() -> None:
    layer = Linear(IN, OUT, RANK)
    assert layer.lora_A is not None and layer.lora_B is not None
    nn.init.constant_(layer.lora_A, 7.0)
    nn.init.constant_(layer.lora_B, 7.0)
    layer.reset_lora_parameters()
    assert torch.equal(layer(rows()), nn.functional.linear(rows(), layer.weight, layer.bias))


@pytest.mark.parametrize("keep_fp32", [True, False], ids=["autocast", "same"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapter_dtype(dtype: torch.dtype, keep_fp32: bool) -> None:
    layer = layer_of(dtype, lora_bias=True, autocast_adapter_dtype=keep_fp32)
    adapter = torch.float32 if keep_fp32 and dtype in HALVES else dtype
    kinds = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert kinds == {
        name: adapter if name.startswith("lora_") else dtype
        for name in ("weight", "bias", "lora_A", "lora_B", "lora_bias")
    }


def test_meta_device_takes_no_memory_and_can_be_filled() -> None:
    layer = layer_of(lora_bias=True, device="meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    filled = layer.to_empty(device="cpu")
    filled.load_state_dict(layer_of(lora_bias=True).state_dict())
    assert torch.equal(filled(rows()), layer_of(lora_bias=True)(rows()))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "lora_bias": {"lora_bias": True},
    "lora_bias only": {"bias": False, "lora_bias": True},
    "rslora": {"use_rslora": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "adapter in base dtype": {"autocast_adapter_dtype": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_forward_is_the_reference(dtype: torch.dtype, options: dict[str, Any]) -> None:
    layer, x = layer_of(dtype, **options), rows(dtype)
    truth = expected(copy.deepcopy(layer).double(), x.double())
    assert_as_exact(layer(x), expected(layer, x), truth)


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_training_drops_what_the_rng_says_and_eval_nothing(probability: float) -> None:
    layer, x = layer_of(lora_dropout=probability), rows()
    double = copy.deepcopy(layer).double()
    torch.manual_seed(3)
    state = lora_ext.draw_rng_state(x)
    mask = lora_ext.dropout_mask(state, x.shape[0] * x.shape[1], IN, probability)
    torch.manual_seed(3)
    assert_as_exact(layer(x), expected(layer, x, mask), expected(double, x.double(), mask))
    assert torch.equal(layer.eval()(x), layer_of()(x))
    assert not torch.equal(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=["plain", "rslora", "lora_bias"]
)
def test_three_layer_net_agrees_with_peft(options: dict[str, bool]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    first, second, third = nn.Linear(IN, 32), nn.Linear(32, 28), nn.Linear(28, OUT)
    net, names = nn.Sequential(first, nn.GELU(), second, nn.GELU(), third), ["0", "2", "4"]
    ours = copy.deepcopy(net)
    lora_ext.replace_linear(ours, names, RANK, 8, init_lora_weights=False, **options)
    config = peft.LoraConfig(target_modules=names, r=RANK, lora_alpha=8, **options)
    theirs = peft.get_peft_model(net, config).base_model.model
    pairs: list[tuple[Tensor, Tensor]] = []
    for name in names:
        layer, other = ours.get_submodule(name), theirs.get_submodule(name)
        pairs += [(layer.lora_A, other.lora_A["default"].weight)]
        pairs += [(layer.lora_B, other.lora_B["default"].weight)]
        if layer.lora_bias is not None:
            pairs += [(nn.init.normal_(layer.lora_bias), other.lora_B["default"].bias)]
    for mine, other in pairs:
        other.data.copy_(mine.data)
    our_x, their_x = rows().requires_grad_(), rows().requires_grad_()
    y, their_y = ours(our_x), theirs(their_x)
    torch.testing.assert_close(y, their_y, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    their_y.backward(dy)
    for mine, other in [(our_x, their_x), *pairs]:
        assert mine.grad is not None and other.grad is not None and other.grad.norm() > 0
        assert (mine.grad - other.grad).norm() <= 1e-4 * other.grad.norm()


def test_from_linear_shares_the_parameters_and_keeps_the_state() -> None:
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    layer = Linear.from_linear(linear, RANK, 16, 0.5, use_rslora=True, lora_bias=True)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert (layer.in_features, layer.out_features, layer.training) == (IN, OUT, False)
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert (layer.r, layer.lora_alpha, layer.lora_dropout) == (RANK, 16, 0.5)
    assert layer.scaling == 8 and layer.lora_bias is not None
    without_bias = Linear.from_linear(nn.Linear(IN, OUT, bias=False))
    assert without_bias.training and without_bias.bias is None


def test_repr_names_what_differs_from_the_default() -> None:
    short = "in_features=24, out_features=20, bias=True, r=4, lora_alpha=8"
    assert layer_of().extra_repr() == short
    layer = layer_of(bias=False, lora_dropout=0.5, use_rslora=True, fan_in_fan_out=True)
    layer.merge()
    assert layer.extra_repr() == (
        "in_features=24, out_features=20, bias=False, r=4, lora_alpha=8, lora_dropout=0.5, "
        "use_rslora=True, fan_in_fan_out=True, merged=True"
    )


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_is_independent(way: str, merged: bool) -> None:
    layer = layer_of(lora_bias=True, lora_dropout=0.5).eval()
    base = layer.weight.detach().clone()
    if merged:
        layer.merge()
    before = layer(rows())
    other = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(rows()), before) and other.merged == merged
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(layer(rows()), before)
    if merged:
        other.unmerge()
        assert torch.equal(other.weight, base)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_conversion_takes_everything_along(dtype: torch.dtype, merged: bool) -> None:
    layer = layer_of(lora_bias=True)
    base = layer.weight.detach().clone()
    if merged:
        layer.merge()
    assert layer.to(dtype) is layer
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    assert layer(rows(dtype)).dtype == dtype
    if merged:
        layer.unmerge()
    assert torch.equal(layer.weight, base.to(dtype))


def test_module_methods_return_the_layer() -> None:
    layer = layer_of()
    for call in (layer.train, layer.eval, layer.half, layer.bfloat16, layer.float, layer.double):
        assert call() is layer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_state_dict_keys_are_loralibs_and_load(options: dict[str, Any]) -> None:
    layer = layer_of(**options)
    optional = [name for name in ("bias", "lora_bias") if getattr(layer, name) is not None]
    assert set(layer.state_dict()) == {"weight", "lora_A", "lora_B", *optional}
    other = Linear(IN, OUT, RANK, 8, **options)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(rows()), layer(rows()))


def test_functional_call_uses_the_given_adapter() -> None:
    layer = layer_of()
    assert layer.lora_B is not None
    new = torch.randn_like(layer.lora_B).requires_grad_()
    y = torch.func.functional_call(layer, {"lora_B": new}, (rows(),))
    (gradient,) = torch.autograd.grad(y.sum(), new)
    layer.lora_B.data.copy_(new.data)
    y = layer(rows())
    assert torch.equal(torch.func.functional_call(layer, {}, (rows(),)), y)
    (direct,) = torch.autograd.grad(y.sum(), layer.lora_B)
    assert torch.equal(gradient, direct)
