"""lora_ext.loralib beside loralib itself: names, values, gradients, modes, files."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext.loralib as lora

loralib = pytest.importorskip("loralib")

F64 = {"dtype": torch.float64}
X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0), **F64)
TOKENS = torch.tensor([[0, 3, 3], [8, 1, 2]])
IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1), **F64)
# Of each case: the layer from a module that is loralib or ours, and its input.
CASES: dict[str, tuple[Callable[[Any], Any], Tensor]] = {
    "Linear": (lambda m: m.Linear(6, 7, 3, 2, **F64), X),
    "Linear r=0": (lambda m: m.Linear(6, 7, **F64), X),
    "Linear no bias": (lambda m: m.Linear(6, 7, r=2, bias=False, **F64), X),
    "Linear fan_in_fan_out": (lambda m: m.Linear(6, 7, r=2, fan_in_fan_out=True, **F64), X),
    "Linear dropout of 1": (lambda m: m.Linear(6, 7, r=2, lora_dropout=1.0, **F64), X),
    "Linear not merging": (lambda m: m.Linear(6, 7, r=2, merge_weights=False, **F64), X),
    "Embedding": (lambda m: m.Embedding(9, 5, 2, 3, **F64), TOKENS),
    "Embedding r=0": (lambda m: m.Embedding(9, 5, **F64), TOKENS),
    "Embedding options": (
        lambda m: m.Embedding(9, 5, r=2, padding_idx=3, scale_grad_by_freq=True, **F64),
        TOKENS,
    ),
    "MergedLinear": (
        lambda m: m.MergedLinear(6, 9, 2, 3, 0.0, [True, False, True], **F64),
        X,
    ),
    "MergedLinear fan_in_fan_out": (
        lambda m: m.MergedLinear(6, 8, r=2, enable_lora=[True] * 2, fan_in_fan_out=True, **F64),
        X,
    ),
    "MergedLinear one slice": (lambda m: m.MergedLinear(6, 9, r=2, enable_lora=[True], **F64), X),
    "MergedLinear r=0": (lambda m: m.MergedLinear(6, 9, **F64), X),
    "Conv2d": (lambda m: m.Conv2d(4, 6, 3, r=2, lora_alpha=3, **F64), IMAGES),
    "Conv2d r=0": (lambda m: m.Conv2d(4, 6, 3, **F64), IMAGES),
    "Conv2d groups": (
        lambda m: m.Conv2d(4, 6, 3, 2, groups=2, stride=2, padding=1, bias=False, **F64),
        IMAGES,
    ),
    "Conv2d reflect": (
        lambda m: m.Conv2d(4, 6, 3, r=2, padding=2, dilation=2, padding_mode="reflect", **F64),
        IMAGES,
    ),
    "ConvLoRA": (lambda m: m.ConvLoRA(nn.Conv2d, 4, 6, 2, r=3, **F64), IMAGES),
    "Conv1d of one": (lambda m: m.Conv1d(4, 6, 1, r=2, **F64), IMAGES[..., 0]),
    "Conv3d of one": (lambda m: m.Conv3d(4, 6, 1, r=2, **F64), IMAGES[..., None]),
}
each_case = pytest.mark.parametrize("case", CASES)


def pair(case: str, trained: bool = True) -> tuple[Any, Any, Tensor]:
    """loralib's layer, ours, made from the same seed, and their input."""
    make, x = CASES[case]
    layers = []
    for module in (loralib, lora):
        torch.manual_seed(5)
        layer = make(module)
        if trained:
            for name, parameter in layer.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter)
        layers.append(layer)
    return layers[0], layers[1], x


def weight_of(layer: Any) -> Tensor:
    return getattr(layer, "conv", layer).weight


@each_case
def test_the_same_seed_makes_the_same_layer(case: str) -> None:
    theirs, ours, _ = pair(case, trained=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, own), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert own.requires_grad == other.requires_grad, name
        assert own.stride() == other.stride() and torch.equal(own, other), name
    plain = (int, float, bool, list)
    told = {k: v for k, v in vars(theirs).items() if isinstance(v, plain) and k[0] != "_"}
    assert {name: getattr(ours, name) for name in told} == told
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert isinstance(ours, lora.LoRALayer) and callable(ours.lora_dropout)
    if hasattr(theirs, "lora_ind"):
        assert torch.equal(ours.lora_ind, theirs.lora_ind)
        assert torch.equal(ours.merge_AB(), theirs.merge_AB())


@each_case
def test_results_and_gradients(case: str) -> None:
    theirs, ours, x = pair(case)
    results = []
    for layer in (theirs, ours):
        own = x.clone().requires_grad_(x.is_floating_point())
        y = layer(own)
        (y * torch.linspace(-1, 1, y.numel(), **F64).view_as(y)).sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        results.append({"y": y, "dx": own.grad, **gradients})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert (expected is None) == (results[1][name] is None), name
        torch.testing.assert_close(results[1][name], expected, rtol=1e-10, atol=1e-10)


@each_case
def test_eval_merges_into_the_state_dict_and_train_gives_every_bit_back(case: str) -> None:
    theirs, ours, x = pair(case)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for cycle in range(3):
        theirs.eval()
        assert ours.eval() is ours
        assert ours.merged == theirs.merged and ours.training is False, cycle
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for name, expected in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
        theirs.train()
        assert ours.train() is ours and ours.merged == theirs.merged
        assert all(torch.equal(ours.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("case", [case for case in CASES if "dropout" not in case])
def test_files_of_one_load_into_the_other(case: str) -> None:
    for merge in (False, True):
        theirs, ours, x = pair(case)
        theirs.train(not merge)
        ours.train(not merge)
        fresh_theirs, fresh_ours, _ = pair(case, trained=False)
        fresh_theirs.train(not merge)
        fresh_ours.train(not merge)
        fresh_theirs.load_state_dict(ours.state_dict())
        fresh_ours.load_state_dict(theirs.state_dict())
        expected = theirs(x)
        torch.testing.assert_close(fresh_theirs(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(fresh_ours(x), expected, rtol=1e-10, atol=1e-10)
        fresh_ours.train()
        torch.testing.assert_close(fresh_ours(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["Linear", "Embedding", "MergedLinear", "ConvLoRA", "Conv2d"])
def test_constructors_have_the_same_arguments(name: str) -> None:
    def arguments(module: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        return [(parameter.name, parameter.default) for parameter in parameters]

    assert arguments(lora) == arguments(loralib)


def test_all_names_are_there() -> None:
    values = vars(loralib).items()
    theirs = [n for n, v in values if getattr(v, "__module__", "").startswith("loralib.")]
    assert "LoRALayer" in theirs and not [name for name in theirs if not hasattr(lora, name)]
    assert lora.name == loralib.name
    for function in ("mark_only_lora_as_trainable", "lora_state_dict"):
        own = inspect.signature(getattr(lora.utils, function)).parameters
        other = inspect.signature(getattr(loralib.utils, function)).parameters
        assert [(p.name, p.default) for p in own.values()] == [
            (p.name, p.default) for p in other.values()
        ]


class Net(nn.Module):
    """Layers of every kind, and a plain one, for the rules that go by names."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.words = module.Embedding(9, 8, r=2)
        self.qkv = module.MergedLinear(8, 12, r=2, enable_lora=[True, False, True])
        self.project = module.Linear(12, 8, r=2, lora_dropout=0.1)
        self.plain = module.Linear(8, 8)
        self.convolve = module.Conv2d(1, 2, 3, r=2)
        self.bias_table = nn.Embedding(3, 2)
        self.head = nn.Linear(4, 5)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_marking_and_saving_go_by_the_same_names(bias: str) -> None:
    theirs, ours = Net(loralib), Net(lora)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    lora.mark_only_lora_as_trainable(ours, bias)
    trains = [
        {name for name, p in net.named_parameters() if p.requires_grad} for net in (theirs, ours)
    ]
    assert trains[0] == trains[1]
    expected = loralib.lora_state_dict(theirs, bias)
    assert lora.lora_state_dict(ours, bias).keys() == expected.keys()
    ours.load_state_dict(expected, strict=False)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in expected.items())


@pytest.mark.parametrize("lora_alpha", [math.nan, math.inf, -math.inf, 10**400])
def test_a_scale_that_is_not_finite_is_refused(lora_alpha: float) -> None:
    with pytest.raises(ValueError, match=r"Linear: lora_alpha: got .*expected a finite number"):
        lora.Linear(3, 4, r=2, lora_alpha=lora_alpha)
