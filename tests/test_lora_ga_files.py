"""LoRA-GA's saved adapters and conversions, and what cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from calibration_models import (
    Net,
    loss,
    points,
    same_state,
    state_of,
    training,
)
from test_lora_ga import NET, QUIET, check_alike, configs, own_config, seeded
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoraGAConfig, preprocess_loraga
from lora_ext.cli import main


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Any, Any, Path]:
    base = Net()
    start, config = copy.deepcopy(base), own_config(NET)
    preprocess_loraga(start, config, training(start, points()))
    own = lora_ext.get_peft_model(start, config)
    own.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    own.save_pretrained(tmp_path / "trained")
    return base, own, tmp_path


def test_saved_adapters_load_onto_the_weights_that_they_belong_to(trained: Any) -> None:
    _, own, place = trained
    x = points()[0]
    changed = copy.deepcopy(own).unload()  # W - s B A, with the adapter taken off
    with pytest.warns(UserWarning, match="weights that LoRA-GA changed"):
        back = lora_ext.PeftModel.from_pretrained(copy.deepcopy(changed), place / "trained")
    torch.testing.assert_close(back(x), own(x))
    for_peft = peft.PeftModel.from_pretrained(copy.deepcopy(changed), place / "trained")
    torch.testing.assert_close(for_peft(x), own(x))
    assert back.peft_config["default"].lora_ga_config == LoraGAConfig()
    for_peft.save_pretrained(place / "theirs")
    with pytest.warns(UserWarning, match="weights that LoRA-GA changed"):
        again = lora_ext.PeftModel.from_pretrained(changed, place / "theirs")
    torch.testing.assert_close(again(x), own(x))


def test_conversion_to_plain_lora(trained: Any) -> None:
    base, own, place = trained
    x = points()[0]
    own.save_pretrained(place / "plain", path_initial_model_for_weight_conversion=place / "initial")
    arguments = ["convert", place / "trained", place / "by_command", "--initial", place / "initial"]
    assert main([str(one) for one in arguments]) == 0
    for folder in ("plain", "by_command"):
        for library in (lora_ext, peft):
            back = library.PeftModel.from_pretrained(copy.deepcopy(base), place / folder)
            torch.testing.assert_close(back(x), own(x), rtol=1e-4, atol=1e-5)
            assert back.peft_config["default"].init_lora_weights is True


def test_without_a_gradient_it_starts_plainly_as_in_peft() -> None:
    base, x = Net(), points()[0]
    a, b = configs(NET)
    for_peft = seeded(peft.get_peft_model, copy.deepcopy(base), a)
    with pytest.warns(UserWarning, match="no layer has a gradient.*preprocess_loraga"):
        own = seeded(lora_ext.get_peft_model, copy.deepcopy(base), b)
    check_alike(for_peft, own)
    assert torch.equal(own(x), base(x))
    net, nameless = Net(), LoraConfig(init_lora_weights="lora_ga", **NET)
    preprocess_loraga(net, b, training(net, points()))
    before = state_of(net)
    with pytest.raises(ValueError, match="lora_ga_config must be provided"):
        lora_ext.get_peft_model(net, nameless)
    assert same_state(before, state_of(net))
    conv = lora_ext.nn.Conv2d(4, 4, 1, r=2, init_lora_weights="lora_ga")
    assert conv.lora_B is not None and not conv.lora_B.any()
    with pytest.raises(ValueError, match="it is for linear layers"):
        lora_ext.nn.MultiheadAttention(4, 2, r=2, init_lora_weights="lora_ga")


def quantized() -> nn.Module:
    net = Net()
    lora_ext.quant.quantize_(net, "nf4")
    return net


def step_of(call: Any) -> dict[str, Any]:
    return {"dataloader": points(), "forward_fn": call}


NAN = [torch.full((4, 16), float("nan"))]
WRONG: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "no config": (Net, {"lora_ga_config": None}, step_of(loss), "If you want to use LoRA-GA"),
    "nothing to run": (Net, {}, {}, "got none of them"),
    "empty": (Net, {}, {"dataloader": []}, "dataloader is empty"),
    "NaN": (Net, {}, {"dataloader": NAN, "forward_fn": loss}, "holds NaN"),
    "unused": (Net, {"target_modules": ["first", "unused"]}, step_of(loss), r"never reached \['un"),
    "no gradient": (Net, {}, step_of(lambda m, x: 0 * loss(m, x)), "is zero"),
    "quantized": (quantized, {}, step_of(loss), "does not support quantized"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_leaves_the_model_as_it_was(what: str) -> None:
    make, fields, arguments, text = WRONG[what]
    model = make().eval()
    before = state_of(model)
    ga = {"lora_ga_config": LoraGAConfig(), "init_lora_weights": "lora_ga"}
    with pytest.raises(ValueError, match=text):
        preprocess_loraga(model, LoraConfig(**NET | ga | fields), **QUIET | arguments)
    assert same_state(before, state_of(model))
    with pytest.raises(TypeError, match=r"forward_fn: got .*expected a loss"):
        preprocess_loraga(Net(), own_config(NET), dataloader=points(), **QUIET)


def test_ranks_beyond_the_vectors_are_refused_and_nothing_changed() -> None:
    net, config = Net(), own_config(NET | {"r": 7})
    preprocess_loraga(net, config, training(net, points()))
    before = state_of(net)
    with pytest.raises(ValueError, match="expected at most 6: it takes 2 r singular vectors"):
        lora_ext.get_peft_model(net, config)
    assert same_state(before, state_of(net))


@pytest.mark.parametrize(
    "wrong",
    [{"direction": "AB"}, {"scale": 1}, {"stable_gamma": 0}, {"stable_gamma": True}],
    ids=str,
)
def test_configs_are_checked(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"lora_ga_config: {name}: got"):
        LoraConfig(lora_ga_config=wrong)
    with pytest.raises(ValueError, match=rf"lora_ga_{name}: got"):
        lora_ext.nn.Linear.from_linear(nn.Linear(4, 4), r=1, **{f"lora_ga_{name}": wrong[name]})
