"""Convolutions with adapters: the formula, PEFT, merging, several adapters, errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_ext
from lora_ext.nn import Conv1d, Conv2d, Conv3d
from lora_ext.nn.kinds import layer_for

KINDS: dict[str, Any] = {"1d": Conv1d, "2d": Conv2d, "3d": Conv3d}
PLAIN: dict[str, Any] = {"1d": nn.Conv1d, "2d": nn.Conv2d, "3d": nn.Conv3d}
CONVOLVE: dict[str, Any] = {"1d": F.conv1d, "2d": F.conv2d, "3d": F.conv3d}
HALVES = [torch.bfloat16, torch.float16]
IN, OUT, RANK = 4, 6, 2

# (kind, kernel_size, options of nn.ConvNd)
GRID: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "1d kernel 1": ("1d", 1, {}),
    "1d kernel 3": ("1d", 3, {"padding": 1}),
    "1d stride, dilation": ("1d", 3, {"stride": 2, "dilation": 2, "padding": 3}),
    "1d same": ("1d", 4, {"padding": "same"}),
    "1d circular": ("1d", 3, {"padding": 1, "padding_mode": "circular"}),
    "1d groups": ("1d", 3, {"groups": 2, "padding": 1}),
    "2d kernel 1": ("2d", 1, {"bias": False}),
    "2d kernel 3": ("2d", 3, {"padding": 1}),
    "2d patches": ("2d", 4, {"stride": 4}),
    "2d not square": ("2d", (3, 2), {"stride": (2, 1), "padding": (0, 1)}),
    "2d dilation": ("2d", 3, {"dilation": (1, 2), "padding": 2}),
    "2d same, dilation": ("2d", (2, 3), {"dilation": 2, "padding": "same"}),
    "2d valid": ("2d", 3, {"padding": "valid"}),
    "2d zeros": ("2d", 3, {"padding": 2, "padding_mode": "zeros"}),
    "2d reflect": ("2d", 3, {"padding": 1, "padding_mode": "reflect"}),
    "2d replicate": ("2d", 3, {"padding": (1, 2), "padding_mode": "replicate", "stride": 2}),
    "2d circular, same": ("2d", (3, 2), {"padding": "same", "padding_mode": "circular"}),
    "2d groups": ("2d", (1, 3), {"groups": 2, "padding": 1, "stride": 2}),
    "3d kernel 1": ("3d", 1, {}),
    "3d kernel 2": ("3d", 2, {"padding": 1}),
    "3d groups, dilation": ("3d", (2, 1, 3), {"groups": 2, "dilation": (1, 2, 1)}),
    "3d replicate": ("3d", 3, {"padding": 1, "padding_mode": "replicate", "stride": (1, 2, 1)}),
}
each_case = pytest.mark.parametrize("case", GRID.values(), ids=GRID.keys())


def layer_of(case: tuple[str, Any, dict[str, Any]], **options: Any) -> Any:
    """A layer whose update is about as large as its base."""
    kind, kernel, base_options = case
    torch.manual_seed(0)
    layer = KINDS[kind](IN, OUT, kernel, RANK, 3, **base_options, **options)
    randomise(layer)
    return layer


def randomise(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        with torch.no_grad():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1.0)


def images(layer: Any, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = (8, 7, 6)[: len(layer.kernel_size)]
    return torch.randn(batch, layer.in_channels, *sizes, generator=generator).to(dtype)


def delta(layer: Any, name: str = "default") -> Tensor:
    """scaling * B A as a kernel of the base's shape, group by group, from PEFT's definition."""
    A, B = (layer.adapter_parameters(name)[k] for k in adapter_keys(name))
    products = [
        torch.einsum("or,ri...->oi...", b.flatten(1), a)
        for a, b in zip(A.chunk(layer.groups), B.chunk(layer.groups), strict=True)
    ]
    return layer.get_scale(name) * torch.cat(products)


def adapter_keys(name: str) -> tuple[str, str]:
    return ("lora_A", "lora_B") if name == "default" else (f"lora_A_{name}", f"lora_B_{name}")


def formula(layer: Any, x: Tensor, *names: str) -> Tensor:
    """The base with W + the sum of scaling * B A, by PyTorch's own layer."""
    kernel = layer.weight + sum(delta(layer, name) for name in names or ("default",))
    base = layer.get_base_layer()
    parameters = (
        {"weight": kernel} if layer.bias is None else {"weight": kernel, "bias": layer.bias}
    )
    return torch.func.functional_call(base, parameters, (x,))


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@each_case
def test_forward_and_gradients_are_the_formulas(case: tuple[str, Any, dict[str, Any]]) -> None:
    layer = layer_of(case, dtype=torch.float64)
    x = images(layer).requires_grad_()
    y, expected = layer(x), formula(layer, x)
    assert expected.shape == y.shape and relative(y, expected) <= 1e-13
    assert relative(y, layer.get_base_layer()(x)) > 0.1  # the update is there
    dy, wanted = torch.randn_like(y), [x, *layer.parameters()]
    pairs = [torch.autograd.grad(out, wanted, dy) for out in (y, expected)]
    assert all(relative(*pair) <= 1e-13 for pair in zip(*pairs, strict=True))


@each_case
def test_gradcheck(case: tuple[str, Any, dict[str, Any]]) -> None:
    layer = layer_of(case, dtype=torch.float64, lora_bias=True)
    names = [name for name, _ in layer.named_parameters()]
    x = images(layer, batch=1)[..., :5].contiguous().requires_grad_()

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *layer.parameters()), fast_mode=True)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_merged_is_unmerged_and_back(
    case: tuple[str, Any, dict[str, Any]], dtype: torch.dtype
) -> None:
    layer = layer_of(case, dtype=dtype)
    base, x = layer.weight.clone(), images(layer, dtype)
    exact_layer = copy.deepcopy(layer).double()
    truth = formula(exact_layer, x.double())
    unmerged = layer(x)
    layer.merge()
    exact = exact_layer.weight + delta(exact_layer)
    # float32's error of a sum of RANK + 1 terms, then one rounding
    error = (RANK + 2) * torch.finfo(torch.float32).eps * (1 + exact.abs())
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((layer.weight.double() - exact).abs() <= error + rounding).all()
    # Rounding W to `dtype` is what plain PyTorch does too: that error is the yardstick.
    plain = torch.func.functional_call(layer.get_base_layer(), {"weight": exact.to(dtype)}, (x,))
    yardstick = max((y.double() - truth).abs().max() for y in (plain, unmerged))
    floor = torch.finfo(dtype).eps * truth.abs().max()
    assert (layer(x).double() - truth).abs().max() <= 2 * yardstick + floor
    layer.unmerge()
    assert torch.equal(layer.weight, base) and torch.equal(layer(x), unmerged)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", ["1d groups", "2d kernel 3", "3d replicate"])
def test_a_hundred_cycles_leave_every_bit(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(GRID[name], dtype=dtype, lora_bias=True)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    for _ in range(100):
        for parameter in layer.adapter_parameters("default").values():
            nn.init.normal_(parameter)
        layer.merge()
        assert not torch.equal(layer.weight, weight) and not torch.equal(layer.bias, bias)
        layer.unmerge()
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)


@pytest.mark.parametrize("name", ["2d kernel 3", "2d groups"])
def test_channels_last(name: str) -> None:
    layer = layer_of(GRID[name], dtype=torch.float64)
    x = images(layer)
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), expected)
    base = layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.weight, base)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("keep_fp32", [True, False], ids=["fp32 adapter", "same dtype"])
def test_half_precision_base(dtype: torch.dtype, keep_fp32: bool) -> None:
    layer = layer_of(GRID["2d kernel 3"], dtype=dtype, autocast_adapter_dtype=keep_fp32)
    assert layer.lora_A.dtype == (torch.float32 if keep_fp32 else dtype)
    x = images(layer, dtype).requires_grad_()
    exact = copy.deepcopy(layer).double()
    exact_x = x.detach().double().requires_grad_()
    truth = formula(exact, exact_x)
    y = layer(x)
    # The base's result and the sum are rounded, each by eps / 2 of terms as large as the sum.
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype and relative(y.double(), truth) <= 2 * eps
    dy = torch.randn_like(y)
    y.backward(dy)
    truth.backward(dy.double())
    # A product of operands that were rounded a few times: h, dh, x, dy, W.
    for mine, other in [(x, exact_x), *zip(layer.parameters(), exact.parameters(), strict=True)]:
        assert mine.grad.dtype == mine.dtype
        assert relative(mine.grad.double(), other.grad) <= 4 * eps


def test_autocast() -> None:
    layer, truth = (layer_of(GRID["2d kernel 3"], dtype=torch.float32) for _ in range(2))
    x = images(layer, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = formula(truth.double(), x.double())
    assert relative(y.double(), expected) <= 4 * torch.finfo(torch.bfloat16).eps
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32 and layer.lora_A.grad.norm() > 0


@pytest.mark.parametrize("name", ["1d groups", "2d kernel 3", "3d groups, dilation"])
def test_several_adapters_add_up_and_merge(name: str) -> None:
    layer = layer_of(GRID[name], dtype=torch.float64)
    layer.add_adapter("wide", r=4, lora_alpha=2, use_rslora=True, lora_bias=True)
    layer.add_adapter("third", r=2, lora_alpha=5)
    randomise(layer)
    names = ["third", "default", "wide"]
    layer.set_adapter(names)
    x = images(layer).requires_grad_()
    bias = layer.get_scale("wide") * layer.lora_bias_wide
    expected = formula(layer, x, *names) + bias.view(-1, *(1,) * len(layer.kernel_size))
    y = layer(x)
    assert relative(y, expected) <= 1e-13
    wanted, dy = [x, *layer.parameters()], torch.randn_like(y)
    pairs = [torch.autograd.grad(out, wanted, dy) for out in (y, expected)]
    assert all(relative(*pair) <= 1e-13 for pair in zip(*pairs, strict=True))
    base = layer.weight.clone()
    layer.merge()
    assert relative(layer(x), expected) <= 1e-13
    layer.unmerge()
    assert torch.equal(layer.weight, base)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_dropout_drops_elements_of_x_before_A() -> None:
    layer = layer_of(GRID["2d reflect"], dtype=torch.float64, lora_dropout=0.25)
    x = images(layer)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.25)
    base, zero = layer.get_base_layer(), torch.zeros_like(layer.bias)
    update = torch.func.functional_call(base, {"weight": delta(layer), "bias": zero}, (dropped,))
    torch.manual_seed(3)
    assert relative(layer(x), base(x) + update) <= 1e-13
    assert relative(layer.eval()(x), formula(layer, x)) <= 1e-13


def test_two_dropout_probabilities() -> None:
    layer = layer_of(GRID["2d kernel 3"], dtype=torch.float64)
    layer.add_adapter("never", r=2, lora_dropout=1.0, init_lora_weights=False)
    layer.set_adapter(["default", "never"])
    x = images(layer)
    assert relative(layer(x), formula(layer, x)) <= 1e-13
    assert relative(layer.eval()(x), formula(layer, x, "default", "never")) <= 1e-13


def test_unbatched_input() -> None:
    for name in ("1d kernel 3", "2d groups", "3d kernel 2"):
        layer = layer_of(GRID[name], dtype=torch.float64)
        x = images(layer, batch=1)
        assert relative(layer(x[0]), layer(x)[0]) <= 1e-14


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "rank_pattern": {"rank_pattern": {"0": 4}, "alpha_pattern": {"2": 1}},
}
# PEFT is wrong for dilation, padding modes, groups: there the formula above is the oracle.
PEFT_NETS: dict[str, list[tuple[int, int, Any, dict[str, Any]]]] = {
    "1d": [(4, 6, 3, {"padding": 1}), (6, 5, 2, {"stride": 2}), (5, 3, 1, {})],
    "2d": [(4, 6, 3, {"padding": 1}), (6, 5, (3, 2), {"stride": (2, 1)}), (5, 3, 1, {})],
    "3d": [(4, 6, 3, {"padding": 1}), (6, 5, 2, {"stride": 2}), (5, 3, 2, {"padding": 1})],
}


@pytest.mark.parametrize("config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS.keys())
@pytest.mark.parametrize("kind", PEFT_NETS)
def test_three_layer_net_agrees_with_peft(kind: str, config: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    convs = [PLAIN[kind](i, o, k, **options) for i, o, k, options in PEFT_NETS[kind]]
    net = nn.Sequential(convs[0], nn.GELU(), convs[1], nn.GELU(), convs[2])
    ours, names = copy.deepcopy(net), ["0", "2", "4"]
    ranks, alphas = config.get("rank_pattern", {}), config.get("alpha_pattern", {})
    for name in names:
        module: Any = KINDS[kind].from_conv(
            ours.get_submodule(name),
            ranks.get(name, RANK),
            alphas.get(name, 3),
            **{key: value for key, value in config.items() if "pattern" not in key},
        )
        randomise(module)
        setattr(ours, name, module)
    settings = peft.LoraConfig(target_modules=names, r=RANK, lora_alpha=3, **config)
    theirs = peft.get_peft_model(net, settings).base_model.model
    pairs: list[tuple[Tensor, Tensor]] = []
    for name in names:
        mine, other = ours.get_submodule(name), theirs.get_submodule(name)
        for key, parameter in mine.peft_parameters("default").items():
            part, attribute = key.split(".")
            pairs += [(parameter, getattr(other.get_submodule(f"{part}.default"), attribute))]
        other.base_layer.weight.data.copy_(mine.weight.data)
        other.base_layer.bias.data.copy_(mine.bias.data)
    for mine, other in pairs:
        assert mine.shape == other.shape
        other.data.copy_(mine.data)
    our_x = torch.randn(2, 4, *(9, 8, 7)[: int(kind[0])]).requires_grad_()
    their_x = our_x.detach().clone().requires_grad_()
    y, their_y = ours(our_x), theirs(their_x)
    torch.testing.assert_close(y, their_y, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    torch.autograd.backward([y, their_y], [dy, dy])
    for mine, other in [(our_x, their_x), *pairs]:
        assert other.grad.norm() > 0 and relative(mine.grad, other.grad) <= 1e-4
    if kind != "3d":  # PEFT's merge of a Conv3d fails
        for name in names:
            mine, other = ours.get_submodule(name), theirs.get_submodule(name)
            mine.merge()
            other.merge()
            torch.testing.assert_close(mine.weight, other.base_layer.weight, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mine.bias, other.base_layer.bias, rtol=1e-5, atol=1e-5)


def test_rank_zero_is_torchs_layer() -> None:
    for kind, ours in KINDS.items():
        torch.manual_seed(0)
        layer = ours(IN, OUT, 3, stride=2)
        torch.manual_seed(0)
        plain = PLAIN[kind](IN, OUT, 3, stride=2)
        assert layer.r == 0 and set(layer.state_dict()) == {"weight", "bias"}
        assert torch.equal(layer(images(layer).float()), plain(images(layer).float()))


def test_positional_arguments_are_loralibs() -> None:
    layer = Conv2d(IN, OUT, 3, 2, 8, 0.25, True, stride=2)
    assert (layer.r, layer.lora_alpha, layer.lora_dropout, layer.merge_weights) == (
        2,
        8,
        0.25,
        True,
    )
    assert layer.scaling == 4 and layer.stride == (2, 2) and layer.weight.shape == (OUT, IN, 3, 3)
    layer.eval()
    assert layer.merged and layer.train() is layer and not layer.merged


def test_initial_adapter_is_pefts() -> None:
    layer = Conv2d(64, 128, 3, 8)
    assert layer.lora_B.count_nonzero() == 0 and layer.lora_A.shape == (8, 64, 3, 3)
    bound = 1 / math.sqrt(64 * 9)  # uniform in it; 4608 samples: within 5 % at 3 sigma
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_from_conv_shares_and_keeps() -> None:
    plain = nn.Conv2d(4, 4, 3, padding="same", groups=2, dtype=torch.bfloat16).eval()
    plain.weight.requires_grad_(False)
    layer = layer_for("conv", plain)
    assert type(layer) is Conv2d and layer.weight is plain.weight and not layer.training
    layer.add_adapter("default", r=2, init_lora_weights=False)
    assert layer.lora_A.dtype == torch.float32 and layer.padding == "same"
    base = layer.get_base_layer()
    assert type(base) is nn.Conv2d and set(base.state_dict()) == {"weight", "bias"}
    x = torch.randn(1, 4, 5, 5, dtype=torch.bfloat16)
    assert torch.equal(base(x), plain(x)) and not torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_state_dict_round_trip(merged: bool) -> None:
    layer = layer_of(GRID["2d groups"], lora_bias=True)
    x, base = images(layer, torch.float32), layer.weight.clone()
    y = layer(x)
    if merged:
        layer.merge()
    state = layer.state_dict()
    assert set(state) == {"weight", "bias", "lora_A", "lora_B", "lora_bias"}
    assert torch.equal(state["weight"], base)
    other = copy.deepcopy(layer)
    randomise(other)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), y)
    keys = {"lora_A.weight", "lora_B.weight", "lora_B.bias"}
    assert set(layer.peft_parameters("default")) == keys
    shapes = layer.peft_shapes(layer.adapters["default"])
    assert shapes == {k: tuple(v.shape) for k, v in layer.peft_parameters("default").items()}


def test_explain() -> None:
    layer = layer_of(GRID["2d kernel 3"])
    assert lora_ext.explain(nn.Sequential(layer))[0].path == "aten convolution"
    layer.merge()
    assert lora_ext.explain(nn.Sequential(layer))[0].path == "torch.nn.functional.conv2d"


def test_repr() -> None:
    text = "4, 6, kernel_size=(3, 3), stride=(1, 1), r=2, lora_alpha=8"
    assert Conv2d(4, 6, 3, 2, 8).extra_repr() == text


def test_errors_change_nothing() -> None:
    layer = Conv2d(4, 6, 3, groups=2)
    with pytest.raises(ValueError, match=r"Conv2d: r: got 3 with groups 2, expected a multiple"):
        layer.add_adapter("odd", r=3)
    assert not layer.adapters and set(layer.state_dict()) == {"weight", "bias"}
    with pytest.raises(ValueError, match="r: got -1"):
        Conv1d(4, 6, 3, -1)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\S*Conv1d"):
        Conv1d.from_conv(nn.Conv2d(4, 6, 3))

    class Standardised(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight - weight.mean(), bias)

    with pytest.raises(TypeError, match="keeps its _conv_forward"):
        Conv2d.from_conv(Standardised(4, 6, 3))
    with pytest.raises(TypeError, match="ConvTranspose2d"):
        layer_for("up", nn.ConvTranspose2d(4, 6, 3))
    biased = Conv2d(4, 6, 3, 2, bias=False, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias cannot be merged"):
        biased.merge()


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_bias"])
def test_nan_is_not_merged_and_every_bit_stays(part: str) -> None:
    layer = layer_of(GRID["2d groups"], lora_bias=True)
    with torch.no_grad():
        getattr(layer, part).view(-1)[-1] = math.nan  # of the last group
    before = {name: value.clone() for name, value in layer.named_parameters()}
    with pytest.raises(ValueError, match="NaN"):
        layer.merge()
    assert not layer.merged
    for name, value in layer.named_parameters():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), name
