"""BD-LoRA: block-diagonal matrices, as PEFT has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from problems import UNIT
from torch import Tensor, nn

import lora_ext
from lora_ext import BdLoraConfig, LoraConfig, LoraModel, get_lora_model

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = {"target_modules_bd_a": ["0"], "target_modules_bd_b": ["2"], "nblocks": 2}
LISTS: dict[str, dict[str, Any]] = {
    "A and B": BOTH,
    "four of B, and a plain layer": {
        "target_modules_bd_b": ["2"],
        "nblocks": 4,
        "match_strict": False,
    },
    "one block": BOTH | {"nblocks": 1},
}
FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False}


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8)).to(dtype)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of the adapter's parts."""
    x = x.detach().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_files_and_results_are_pefts(lists: dict[str, Any], tmp_path: Path) -> None:
    bdlora = peft.BdLoraConfig(**lists)
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**FIELDS, use_bdlora=bdlora))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LoraModel.from_pretrained(net(), tmp_path / "theirs", is_trainable=True)
    x = torch.randn(7, 12, dtype=torch.float64)
    want = results(theirs, x)
    for got, exact in zip(results(ours, x), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    assert torch.equal(again(x), theirs(x))


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_merging(lists: dict[str, Any]) -> None:
    model = get_lora_model(net(), LoraConfig(**FIELDS, use_bdlora=lists))
    x = torch.randn(7, 12, dtype=torch.float64)
    y, before = model(x), [p.clone() for p in model.get_base_model().parameters()]
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    after = list(model.get_base_model().parameters())
    assert all(map(torch.equal, before, after))
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_float64_in_a_batch_and_compiled(dtype: torch.dtype) -> None:
    """y errs by no more than the roundings of two layers, of sums of up to 24 + r terms each."""
    model = get_lora_model(net(dtype), LoraConfig(**FIELDS, use_bdlora=BOTH))
    exact = get_lora_model(net(), LoraConfig(**FIELDS, use_bdlora=BOTH))
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    x = torch.randn(6, 12).to(dtype)
    got, want = model(x).double(), exact(x.double())
    bound = 2 * 28 * UNIT[dtype] * want.abs().max()
    assert (got - want).abs().max() <= bound
    assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))
    mixed = model(x, adapter_names=["default", "__base__"] * 3)
    with model.disable_adapter():
        assert torch.equal(mixed[1::2], model(x)[1::2])
    assert (mixed[::2].double() - want[::2]).abs().max() <= bound


def test_only_blocks_are_parameters() -> None:
    model = get_lora_model(net(), LoraConfig(**FIELDS, use_bdlora=BOTH))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert list(shapes.values()) == [(4, 6), (20, 4), (4, 20), (8, 2)]
    assert "block-diagonal" in str(lora_ext.explain(model))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both lists": (BOTH | {"target_modules_bd_b": ["0"]}, "Found overlapping modules"),
    "both patterns": (BOTH | {"target_modules_bd_a": [""]}, "matches both A and B"),
    "neither": ({"target_modules_bd_a": ["0"]}, "'2' matches neither A nor B"),
    "no divisor": (BOTH | {"nblocks": 3}, "nblocks: got 3, expected a divisor of in_features=12"),
    "no number": (BOTH | {"nblocks": "2"}, "nblocks: got '2', expected an integer"),
    "other fields": (BOTH | {"blocks": 2}, "blocks"),
}


@pytest.mark.parametrize(("lists", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(lists: dict[str, Any], message: str) -> None:
    base = net()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises((ValueError, TypeError), match=message):
        get_lora_model(base, LoraConfig(**FIELDS, use_bdlora=lists))
    assert [name for name, _ in base.named_modules()] == names


@pytest.mark.parametrize(
    "fields",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "orthogonal"}],
    ids=str,
)
def test_what_it_does_not_go_with(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"use_bdlora|block-diagonal"):
        get_lora_model(net(), LoraConfig(**FIELDS | fields, use_bdlora=BdLoraConfig(**BOTH)))


def test_layers_that_have_none_are_refused() -> None:
    base = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="only linear layers have block-diagonal"):
        get_lora_model(base, LoraConfig(**FIELDS, use_bdlora=BOTH))


def test_it_does_not_combine() -> None:
    model = get_lora_model(net(), LoraConfig(**FIELDS, use_bdlora=BOTH))
    with pytest.raises(ValueError, match="block-diagonal matrices"):
        model.add_weighted_adapter(["default"], [1.0], "half")
