"""Several adapters in one layer: names, scales, which of them run, merging."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext
from lora_ext.errors import AlreadyMergedError, NotMergedError
from lora_ext.nn import Linear

IN, OUT = 12, 10
SETTINGS = {
    "default": {"r": 4, "lora_alpha": 8},
    "french": {"r": 2, "lora_alpha": 3, "use_rslora": True},
    "biased": {"r": 3, "lora_alpha": 6, "lora_bias": True},
}


def layer_of(dtype: torch.dtype = torch.float64) -> Linear:
    """Three adapters, none of them zero."""
    torch.manual_seed(0)
    layer = Linear(IN, OUT, dtype=dtype)
    for name, settings in SETTINGS.items():
        layer.add_adapter(name, init_lora_weights=False, **settings)
        for parameter in layer.adapter_parameters(name).values():
            nn.init.normal_(parameter, std=0.3)
    return layer


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def update(layer: Linear, name: str, x: Tensor) -> Tensor:
    parts = {key.split("_")[1]: value for key, value in layer.adapter_parameters(name).items()}
    product = x @ parts["A"].t() @ parts["B"].t()
    return layer.get_scale(name) * (product + parts.get("bias", torch.zeros(OUT, dtype=x.dtype)))


def base(layer: Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight, layer.bias)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_first_adapter_is_active_and_trains_and_later_ones_are_not() -> None:
    layer = layer_of()
    assert layer.active_adapters == ("default",) and list(layer.adapters) == list(SETTINGS)
    trains = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trains == {"weight", "bias", "lora_A", "lora_B"}
    close(layer(rows()), base(layer, rows()) + update(layer, "default", rows()))


@pytest.mark.parametrize(
    "names", [["french"], ["biased", "default"], ["default", "french", "biased"]], ids="+".join
)
def test_active_adapters_add_up_with_gradients(names: list[str]) -> None:
    layer, x = layer_of(), rows().requires_grad_()
    layer.set_adapter(names)
    expected = base(layer, x) + sum(update(layer, name, x) for name in names)
    close(layer(x), expected)
    wanted = [x, *(p for name in names for p in layer.adapter_parameters(name).values())]
    dy = torch.randn_like(expected)
    pairs = [torch.autograd.grad(y, wanted, dy) for y in (layer(x), expected)]
    for actual, truth in zip(*pairs, strict=True):
        close(actual, truth)
    trains = {name for name, p in layer.named_parameters() if p.requires_grad}
    chosen = {key for name in names for key in layer.adapter_parameters(name)}
    assert trains == chosen | {"weight", "bias"}
    layer.set_adapter(names, inference_mode=True)
    assert not any(
        p.requires_grad for name in SETTINGS for p in layer.adapter_parameters(name).values()
    )


def test_half_precision_base_with_several_adapters() -> None:
    layer = layer_of(torch.bfloat16)
    layer.set_adapter(SETTINGS)
    exact, x = copy.deepcopy(layer).double(), rows(torch.bfloat16)
    truth = exact(x.double())
    assert (layer(x).double() - truth).abs().max() <= 2**-8 * truth.abs().max()  # one rounding


def test_adapters_of_different_dropout_each_drop_their_share() -> None:
    layer = Linear(IN, OUT, dtype=torch.float64)
    layer.add_adapter("always", r=2, lora_dropout=0.0, init_lora_weights=False)
    layer.add_adapter("never", r=2, lora_dropout=1.0, init_lora_weights=False)
    layer.set_adapter(["always", "never"])
    close(layer(rows()), base(layer, rows()) + update(layer, "always", rows()))
    both = update(layer, "always", rows()) + update(layer, "never", rows())
    close(layer.eval()(rows()), base(layer, rows()) + both)


def test_parameters_of_an_adapter_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="adapter_name: got 'nope', expected one of"):
        layer_of().adapter_parameters("nope")


def test_scales() -> None:
    layer, x = layer_of(), rows()
    unit = update(layer, "default", x)
    for scale in (2.0, -0.5):
        layer.set_scale("default", scale)
        close(layer(x), base(layer, x) + scale * unit)
    layer.set_scale("default", 0.0)
    assert torch.equal(layer(x), base(layer, x))
    layer.set_scale("default", 1.0)
    layer.scale_layer(3.0)
    assert layer.get_scale() == 6.0 and layer.scaling == 6.0
    layer.unscale_layer(1.5)
    assert layer.get_scale() == 4.0
    layer.unscale_layer()
    assert layer.get_scale() == 2.0


def test_disabled_is_the_base_exactly() -> None:
    layer, x = layer_of(torch.float32), rows(torch.float32)
    on = layer(x)
    layer.enable_adapters(False)
    assert layer.disable_adapters and torch.equal(layer(x), base(layer, x))
    layer.enable_adapters(True)
    assert torch.equal(layer(x), on)
    layer.merge()
    before = layer.weight.clone()
    layer.enable_adapters(False)
    assert not layer.merged and not torch.equal(layer.weight, before)


def test_rename_and_delete() -> None:
    layer, x = layer_of(), rows()
    layer.set_adapter(["default", "french"])
    y = layer(x)
    layer.rename_adapter("default", "german")
    layer.rename_adapter("french", "default")
    assert list(layer.adapters) == ["german", "default", "biased"]
    assert layer.active_adapters == ("german", "default") and torch.equal(layer(x), y)
    assert layer.lora_A_german.shape == (4, IN) and layer.lora_A.shape == (2, IN)
    layer.delete_adapter("german")
    close(layer(x), base(layer, x) + update(layer, "default", x))
    with pytest.warns(UserWarning, match="Setting active adapter to biased"):
        layer.delete_adapter("default")
    close(layer(x), base(layer, x) + update(layer, "biased", x))
    assert layer.lora_A is None and set(layer.state_dict()) == {
        "weight", "bias", "lora_A_biased", "lora_B_biased", "lora_bias_biased"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merging_several_and_more_later(dtype: torch.dtype) -> None:
    layer = layer_of(dtype)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    layer.set_adapter(["default", "french"])
    layer.merge()
    first = layer.weight.clone()
    with pytest.raises(AlreadyMergedError):
        layer.merge(adapter_names=["french"])
    layer.merge(adapter_names=["biased"])
    assert layer.merged_adapters == ("default", "french", "biased")
    exact = weight.double() + sum(
        layer.adapters[n].scaling * p[1].double() @ p[0].double()
        for n in SETTINGS
        for p in [list(layer.adapter_parameters(n).values())]
    )
    # one rounding, whatever the number of merges
    assert (layer.weight.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    assert not torch.equal(layer.bias, bias)
    assert torch.equal(layer.state_dict()["weight"], weight)
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)
    with pytest.raises(NotMergedError):
        layer.unmerge()
    layer.merge()
    assert torch.equal(layer.weight, first)


def test_a_refused_merge_leaves_what_was_merged() -> None:
    layer = layer_of(torch.float32)
    layer.merge()
    merged = layer.weight.clone()
    with torch.no_grad():
        layer.lora_B_french[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(adapter_names=["french"])
    assert torch.equal(layer.weight, merged) and layer.merged_adapters == ("default",)


def test_set_adapter_unmerges() -> None:
    layer = layer_of()
    weight = layer.weight.clone()
    layer.merge()
    layer.set_adapter("french")
    assert not layer.merged and torch.equal(layer.weight, weight)


def test_merge_weights_follows_train_and_eval() -> None:
    layer = Linear(IN, OUT, 4, 8, 0.0, False, True, init_lora_weights=False)
    weight, y = layer.weight.clone(), layer(rows(torch.float32))
    assert layer.eval() is layer and layer.merged
    torch.testing.assert_close(layer(rows(torch.float32)), y)
    assert layer.eval().merged and layer.train() is layer and not layer.merged
    assert torch.equal(layer.weight, weight)
    assert not Linear(IN, OUT, merge_weights=True).eval().merged


def test_copies_and_files_keep_all_adapters() -> None:
    layer = layer_of()
    layer.set_adapter(["default", "biased"])
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(rows()), layer(rows()))
    again = layer_of()
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    again.load_state_dict(layer.state_dict())
    again.set_adapter(["default", "biased"])
    assert torch.equal(again(rows()), layer(rows()))


def test_base_layer_comes_back() -> None:
    layer, x = layer_of(), rows()
    plain = layer.get_base_layer()
    assert type(plain) is nn.Linear and set(plain.state_dict()) == {"weight", "bias"}
    assert plain.weight is layer.weight and torch.equal(plain(x), base(layer, x))
    layer.merge()
    assert torch.equal(layer.get_base_layer()(x), layer(x))
    transposed = Linear(IN, OUT, 2, fan_in_fan_out=True, dtype=torch.float64)
    close(transposed.get_base_layer()(x), transposed(x))


WRONG: dict[str, tuple[Callable[[Linear], object], str]] = {
    "name taken": (lambda layer: layer.add_adapter("french"), "french"),
    "name with a dot": (lambda layer: layer.add_adapter("a.b"), "without dots"),
    "empty name": (lambda layer: layer.add_adapter(""), "non-empty"),
    "rank": (lambda layer: layer.add_adapter("new", r=0), "r: got 0"),
    "alpha": (lambda layer: layer.add_adapter("new", lora_alpha=float("nan")), "lora_alpha"),
    "unknown, set": (lambda layer: layer.set_adapter("new"), "adapter_name: got 'new'"),
    "unknown, merge": (lambda layer: layer.merge(adapter_names=["new"]), "adapter_name: got 'new'"),
    "unknown, delete": (lambda layer: layer.delete_adapter("new"), "adapter_name: got 'new'"),
    "rename onto": (lambda layer: layer.rename_adapter("french", "default"), "default"),
    "scale": (lambda layer: layer.set_scale("french", float("inf")), "finite"),
    "unscale by 0": (lambda layer: layer.unscale_layer(0), "scale: got 0"),
    "unscale by NaN": (lambda layer: layer.unscale_layer(float("nan")), "scale: got nan"),
    "unscale by inf": (lambda layer: layer.unscale_layer(float("inf")), "scale: got inf"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_and_changes_nothing(
    call: Callable[[Linear], object], message: str
) -> None:
    layer = layer_of()
    before, y = copy.deepcopy(layer.state_dict()), layer(rows())
    with pytest.raises(ValueError, match=message):
        call(layer)
    assert list(layer.adapters) == list(SETTINGS) and torch.equal(layer(rows()), y)
    after = layer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in after)


def test_a_merged_adapter_is_neither_deleted_nor_scaled() -> None:
    layer = layer_of()
    layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer.delete_adapter("default")
    with pytest.raises(ValueError, match="merged"):
        layer.set_scale("default", 2.0)


class _Gated(nn.Module):
    """A module with attributes of its own under names that a layer with adapters might use."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self._variant, self._alone, self._path = "swiglu", "alone", "path"

    def explain(self) -> str:
        return f"{self._variant} {self._alone} {self._path}"

    def forward(self, x: Tensor) -> Tensor:
        assert self.explain() == "swiglu alone path"
        return x @ self.w


def test_attributes_of_the_base_stay_its_own() -> None:
    model = nn.Sequential()
    model.m = _Gated()
    adapted = lora_ext.get_lora_model(model, lora_ext.LoraConfig(r=2, target_parameters=["m.w"]))
    adapted(torch.randn(2, 4))
    assert [row.path for row in lora_ext.explain(adapted)] == ["composed"]
    assert adapted.unload().m.explain() == "swiglu alone path"


def test_a_bias_of_lora_b_that_is_set_by_hand_runs() -> None:
    layer = lora_ext.nn.Linear(4, 3, r=2, lora_alpha=4)
    x = torch.randn(2, 4)
    before = layer(x)
    layer.lora_bias = nn.Parameter(torch.ones(3))
    torch.testing.assert_close(layer(x), before + 2.0)


def test_a_subclass_of_linear_may_change_what_runs() -> None:
    class Doubled(lora_ext.nn.Linear):
        def low_rank(self, prefix: str = "") -> list[Any]:
            return [one._replace(scaling=2 * one.scaling) for one in super().low_rank(prefix)]

    torch.manual_seed(0)
    layer, x = Doubled(4, 3, r=2, init_lora_weights=False), torch.randn(2, 4)
    plain = lora_ext.nn.Linear(4, 3, r=2, init_lora_weights=False)
    plain.load_state_dict(layer.state_dict())
    plain.set_scale("default", 2.0)
    torch.testing.assert_close(layer(x), plain(x))
