"""lora_ext.nn.MergedLinear: adapters on some slices of the output."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext
from lora_ext.nn import MergedLinear, merged_linear

IN, OUT, RANK = 18, 24, 3
SLICES: dict[str, dict[str, Any]] = {
    "q and v": {"enable_lora": [True, False, True]},
    "all": {"enable_lora": [True, True, True]},
    "last of two": {"enable_lora": [False, True]},
    "unequal": {"enable_lora": [True, False, True, True], "slice_sizes": [12, 4, 3, 5]},
    "an empty one": {"enable_lora": [True, False, True], "slice_sizes": [20, 4, 0]},
    "transposed": {"enable_lora": [True, False, True], "fan_in_fan_out": True},
    "no bias": {"enable_lora": [False, True, True], "bias": False},
}
each_slicing = pytest.mark.parametrize("options", SLICES.values(), ids=SLICES.keys())


@pytest.fixture(params=["one call", "a call per slice"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of computing; which of them is the faster one depends on the rank."""
    few = {"one call": 10**9, "a call per slice": -1}[request.param]
    monkeypatch.setattr(merged_linear, "_FEW_ZEROS", few)


def layer_of(dtype: torch.dtype = torch.float64, **options: Any) -> MergedLinear:
    torch.manual_seed(0)
    options = {"enable_lora": [True, False, True], "r": RANK, "lora_alpha": 6, **options}
    return MergedLinear(IN, OUT, init_lora_weights=False, dtype=dtype, **options)


def rows(*sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*sizes, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def delta(layer: MergedLinear, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The update of the weight as [OUT, IN], from its definition."""
    update, r = torch.zeros(OUT, IN, dtype=A.dtype), B.shape[1]
    j = start = used = 0
    for size, enabled in zip(layer.slice_sizes, layer.enable_lora, strict=True):
        if enabled:
            block = B[used : used + size] @ A[j * r : (j + 1) * r]
            update[start : start + size] = scaling * block
            j, used = j + 1, used + size
        start += size
    return update


def expected(layer: MergedLinear, x: Tensor) -> Tensor:
    assert layer.lora_A is not None and layer.lora_B is not None
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    update = delta(layer, layer.lora_A, layer.lora_B, 6 / RANK)
    return nn.functional.linear(x, weight + update, layer.bias)


@each_slicing
@pytest.mark.parametrize("sizes", [(), (5,), (2, 5), (2, 3, 4), (1, 2, 3, 4), (0, 3)], ids=str)
def test_forward_is_the_block_formula(
    way: None, options: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    layer, x = layer_of(**options), rows(*sizes)
    y = layer(x)
    assert y.shape == (*sizes, OUT)
    torch.testing.assert_close(y, expected(layer, x), rtol=1e-12, atol=1e-12)


@each_slicing
def test_gradients_are_those_of_the_block_formula(way: None, options: dict[str, Any]) -> None:
    layer, x = layer_of(**options), rows(2, 5).requires_grad_()
    operands = [x, *layer.parameters()]
    y = layer(x)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, operands, dy)
    theirs = torch.autograd.grad(expected(layer, x), operands, dy)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_gradcheck(way: None) -> None:
    enable, sizes = [True, False, True], [2, 1, 1]
    options: dict[str, Any] = {"init_lora_weights": False, "dtype": torch.float64}
    layer = MergedLinear(3, 4, 1, enable_lora=enable, slice_sizes=sizes, **options)

    def call(x: Tensor, *parameters: Tensor) -> Any:
        given = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(layer, given, (x,))

    operands = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True), *layer.parameters())
    assert torch.autograd.gradcheck(call, operands)
    assert torch.autograd.gradgradcheck(call, operands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merged_weight_is_the_block_formula(dtype: torch.dtype) -> None:
    layer = layer_of(dtype, **SLICES["unequal"])
    exact = copy.deepcopy(layer).double()
    assert exact.lora_A is not None and exact.lora_B is not None
    update = delta(layer, exact.lora_A, exact.lora_B, 6 / RANK)
    base = layer.weight.detach().clone()
    layer.merge()
    # Every row of W + delta is below 1/4 + 2 * 3 / sqrt(18 * 3) < 2 (bounds of the Kaiming
    # uniforms): at most half a unit in the last place of a number below 2, beside the RANK + 1
    # roundings of float32.
    error = (layer.weight.double() - exact.weight - update).abs().max()
    half_a_unit = torch.finfo(dtype).eps / 2
    assert error <= half_a_unit + (RANK + 1) * torch.finfo(torch.float32).eps
    off = update.abs().sum(1) == 0
    assert off.sum() == 4 and torch.equal(layer.weight[off], base[off])


@each_slicing
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_disabled_slices_are_the_base_exactly(
    way: None, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    layer, x = layer_of(dtype, **options), rows(7, dtype=dtype)
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    whole, y = nn.functional.linear(x, weight, layer.bias), layer(x)
    start = 0
    for size, enabled in zip(layer.slice_sizes, layer.enable_lora, strict=True):
        part = slice(start, start := start + size)
        bias = None if layer.bias is None else layer.bias[part]
        alone = nn.functional.linear(x, weight[part], bias)  # BLAS may sum in another order
        base = whole[:, part] if merged_linear._FEW_ZEROS > 0 else alone
        assert torch.equal(y[:, part], base) != (enabled and size > 0)


def test_disabled_rows_of_the_update_are_zero(way: None) -> None:
    layer = layer_of()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    y = layer(rows(7))
    assert y[:, 8:16].count_nonzero() == 0 and y[:, :8].all() and y[:, 16:].all()


def test_dropout_drops_in_training_only() -> None:
    layer, x = layer_of(lora_dropout=0.5), rows(5)
    torch.manual_seed(4)
    state = lora_ext.draw_rng_state(x)
    mask = lora_ext.dropout_mask(state, 5, IN, 0.5)
    torch.manual_seed(4)
    y = layer(x)
    dropped = x * mask * 2
    assert layer.lora_A is not None and layer.lora_B is not None
    update = dropped @ delta(layer, layer.lora_A, layer.lora_B, 2.0).t()
    truth = nn.functional.linear(x, layer.weight, layer.bias) + update
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.eval()(x), expected(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 1.0], ids=["stacked", "apart"])
def test_several_adapters_add_up(way: None, dropout: float) -> None:
    layer, x = layer_of(**SLICES["unequal"]), rows(5)
    layer.add_adapter("other", r=5, lora_alpha=2, lora_dropout=dropout, init_lora_weights=False)
    layer.set_adapter(["default", "other"])
    update = torch.zeros(OUT, IN, dtype=x.dtype)
    for name in ("default", "other"):
        A, B = layer.adapter_parameters(name).values()
        update += delta(layer, A, B, layer.get_scale(name)) * (name == "default" or dropout < 1)
    truth = nn.functional.linear(x, layer.weight + update, layer.bias)
    torch.testing.assert_close(layer(x), truth, rtol=1e-12, atol=1e-12)
    y = layer.eval()(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)


@each_slicing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_hundred_merges_leave_every_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    layer, x = layer_of(dtype, **options), rows(4, dtype=dtype)
    base, state = layer.weight.detach().clone(), layer.state_dict().keys()
    for _ in range(100):
        layer.reset_lora_parameters()
        layer.merge()
        assert not torch.equal(layer.weight, base)
        assert torch.equal(layer.state_dict()["weight"], base)
        layer(x)
        layer.unmerge()
        assert torch.equal(layer.weight, base)
    assert layer.state_dict().keys() == state


def test_a_nan_in_the_last_slice_leaves_all() -> None:
    layer = layer_of()
    base = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B[-1, -1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merge()
    assert torch.equal(layer.weight, base) and not layer.merged


def test_positional_arguments_are_loralibs() -> None:
    layer = MergedLinear(IN, OUT, RANK, 6, 0.25, [True, False, True], True, True)
    assert (layer.r, layer.lora_alpha, layer.lora_dropout, layer.scaling) == (RANK, 6, 0.25, 2)
    assert layer.weight.shape == (IN, OUT) and layer.merge_weights
    assert layer.lora_A is not None and layer.lora_A.shape == (2 * RANK, IN)
    assert layer.lora_B is not None and layer.lora_B.shape == (2 * OUT // 3, RANK)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    assert layer.eval().merged and not layer.train().merged


def test_rank_zero_is_torch_nn_linear() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT)
    torch.manual_seed(0)
    layer, x = MergedLinear(IN, OUT), rows(3, dtype=torch.float32)
    assert torch.equal(layer(x), plain(x)) and layer.r == 0


def test_state_dict_round_trip() -> None:
    layer = layer_of(**SLICES["unequal"])
    other = layer_of(**SLICES["unequal"])
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.merge()
    layer.merge()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(rows(3)), layer(rows(3)))
    other.unmerge()
    layer.unmerge()
    assert torch.equal(other(rows(3)), layer(rows(3)))
    assert torch.equal(copy.deepcopy(layer)(rows(3)), layer(rows(3)))


def test_from_linear_shares_the_parameters_and_gives_the_base_back() -> None:
    linear = nn.Linear(IN, OUT, dtype=torch.float64).eval()
    options: dict[str, Any] = {"slice_sizes": [12, 4, 8], "init_lora_weights": False}
    layer = MergedLinear.from_linear(linear, [True, False, True], RANK, 6, **options)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    torch.testing.assert_close(layer(rows(3)), expected(layer, rows(3)), rtol=1e-12, atol=1e-12)
    base = layer.get_base_layer()
    assert type(base) is nn.Linear and torch.equal(base(rows(3)), linear(rows(3)))
    assert MergedLinear.from_linear(linear, [False], 0).r == 0


def test_from_conv1d_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    conv1d = transformers.pytorch_utils.Conv1D(OUT, IN).double()
    layer = MergedLinear.from_conv1d(conv1d, [True, False, True], RANK, 6, init_lora_weights=False)
    torch.testing.assert_close(layer(rows(3)), expected(layer, rows(3)), rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.get_base_layer()(rows(3)), conv1d(rows(3)))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing enabled": ({"enable_lora": [False, False]}, "at least one True"),
    "loralib's default": ({"enable_lora": [False]}, "at least one True"),
    "no slices": ({"enable_lora": []}, "got no slices"),
    "indivisible": ({"enable_lora": [True] * 5}, "24 out_features do not divide into 5"),
    "sizes too few": ({"slice_sizes": [12, 12]}, "got 2 sizes, expected 3"),
    "sizes too large": ({"slice_sizes": [12, 12, 12]}, "sum is out_features, 24"),
    "negative size": ({"slice_sizes": [12, 14, -2]}, "sum is out_features, 24"),
    "rank": ({"r": -1}, "r: got -1"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(**options)


def test_lora_bias_is_refused_and_changes_nothing() -> None:
    layer = layer_of()
    with pytest.raises(ValueError, match="lora_bias"):
        layer.add_adapter("other", lora_bias=True)
    assert list(layer.adapters) == ["default"] and len(list(layer.parameters())) == 4


def test_compiles_into_one_graph(way: None) -> None:
    layer, x = layer_of(torch.float32, **SLICES["unequal"]), rows(4, dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_subclass_with_a_forward_of_its_own_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    base, x = Doubled(4, 6), torch.randn(3, 4)
    layer = MergedLinear.from_linear(base, [True, False], r=2, init_lora_weights=False)
    update = layer.scaling * (x @ layer.lora_A.t() @ layer.lora_B.t())
    want = base(x) + torch.cat([update, torch.zeros(3, 3)], 1)
    torch.testing.assert_close(layer(x), want)
