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
    operands = (x, weight, layer.bias, layer.lora_A, layer.lora_B, layer.lora_bias)
    scale, probability = layer.scaling, layer.lora_dropout
    return reference.lora_linear(*operands, scaling=scale, dropout_p=probability, mask=mask)


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


def test_scaling_is_alpha_over_r_or_its_root() -> None:
    assert Linear(IN, OUT, 4, 8).scaling == 8 / 4
    assert Linear(IN, OUT, 4, 8, use_rslora=True).scaling == 8 / 2


def test_positional_order_is_loralibs() -> None:
    layer = Linear(IN, OUT, 4, 8, 0.25, True)
    assert (layer.in_features, layer.out_features, layer.r, layer.lora_alpha) == (IN, OUT, 4, 8)
    assert layer.lora_dropout == 0.25 and layer.fan_in_fan_out and layer.weight.shape == (IN, OUT)


def test_fan_in_fan_out_stores_the_transpose() -> None:
    assert torch.equal(layer_of(fan_in_fan_out=True).weight, layer_of().weight.t())


@pytest.mark.parametrize("again", [False, True], ids=["constructed", "reset"])
@pytest.mark.parametrize("init", [True, "gaussian", False], ids=str)
def test_initial_adapter(init: bool | str, again: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(256, 128, 8, lora_bias=True, init_lora_weights=init)
    assert layer.lora_A is not None and layer.lora_B is not None and layer.lora_bias is not None
    if again:
        for parameter in layer.parameters():
            nn.init.constant_(parameter, 7.0)
        layer.reset_lora_parameters()
    assert (layer.lora_B.count_nonzero() == 0) == (init is not False)
    assert (layer.lora_bias.count_nonzero() == 0) == (init is not False)
    # 2048 samples: the sample deviation is within 5 % of the true one with 3 sigma to spare.
    deviation = 1 / 8 if init == "gaussian" else 1 / math.sqrt(3 * 256)
    assert layer.lora_A.std().item() == pytest.approx(deviation, rel=0.05)
    if init != "gaussian":
        assert layer.lora_A.abs().max() <= 1 / math.sqrt(256)  # uniform: bounded


@pytest.mark.parametrize("keep_fp32", [True, False], ids=["autocast", "same"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapter_dtype(dtype: torch.dtype, keep_fp32: bool) -> None:
    layer = layer_of(dtype, lora_bias=True, autocast_adapter_dtype=keep_fp32)
    adapter = torch.float32 if keep_fp32 and dtype in HALVES else dtype
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == (adapter if name.startswith("lora_") else dtype)


def test_meta_device_can_be_filled() -> None:
    layer, other = layer_of(lora_bias=True, device="meta"), layer_of(lora_bias=True)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    layer.to_empty(device="cpu").load_state_dict(other.state_dict())
    assert torch.equal(layer(rows()), other(rows()))


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
    torch.manual_seed(3)
    state = lora_ext.draw_rng_state(x)
    mask = lora_ext.dropout_mask(state, x.shape[0] * x.shape[1], IN, probability)
    torch.manual_seed(3)
    truth = expected(copy.deepcopy(layer).double(), x.double(), mask)
    assert_as_exact(layer(x), expected(layer, x, mask), truth)
    assert layer.eval() is layer and torch.equal(layer(x), layer_of()(x))
    assert layer.train() is layer and not torch.equal(layer(x), layer_of()(x))


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
        layer, peft_layer = ours.get_submodule(name), theirs.get_submodule(name)
        A, B = peft_layer.lora_A["default"], peft_layer.lora_B["default"]
        pairs += [(layer.lora_A, A.weight), (layer.lora_B, B.weight)]
        if layer.lora_bias is not None:
            pairs += [(nn.init.normal_(layer.lora_bias), B.bias)]
    for mine, other in pairs:
        other.data.copy_(mine.data)
    our_x, their_x = rows().requires_grad_(), rows().requires_grad_()
    y, their_y = ours(our_x), theirs(their_x)
    torch.testing.assert_close(y, their_y, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    torch.autograd.backward([y, their_y], [dy, dy])
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
    assert (layer.r, layer.lora_dropout, layer.scaling) == (RANK, 0.5, 8)
    assert layer.lora_bias is not None
    assert Linear.from_linear(nn.Linear(IN, OUT, bias=False)).bias is None


def test_repr_names_what_differs_from_the_default() -> None:
    short = "in_features=24, out_features=20, bias=True, r=4, lora_alpha=8"
    assert layer_of().extra_repr() == short
    layer = layer_of(lora_dropout=0.5, use_rslora=True, fan_in_fan_out=True)
    layer.merge()
    flags = ", lora_dropout=0.5, use_rslora=True, fan_in_fan_out=True, merged=True"
    assert layer.extra_repr() == short + flags


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
@pytest.mark.parametrize("method", ["double", "bfloat16", "half"])
def test_conversion_takes_everything_along(method: str, merged: bool) -> None:
    layer, dtype = layer_of(lora_bias=True), getattr(torch, method)
    base = layer.weight.detach().clone()
    if merged:
        layer.merge()
    assert getattr(layer, method)() is layer and layer.to(dtype) is layer
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    assert layer(rows(dtype)).dtype == dtype
    if merged:
        layer.unmerge()
    assert torch.equal(layer.weight, base.to(dtype))


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
    called = torch.func.functional_call(layer, {"lora_B": new}, (rows(),))
    assert not torch.equal(called, layer(rows()))
    layer.lora_B.data.copy_(new.data)
    direct = layer(rows())
    assert torch.equal(called, direct)
    (gradient,) = torch.autograd.grad(called.sum(), new)
    assert torch.equal(gradient, torch.autograd.grad(direct.sum(), layer.lora_B)[0])
