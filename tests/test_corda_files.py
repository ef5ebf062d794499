"""CorDA's saved adapters and conversions, and what cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from calibration_models import (
    Net,
    points,
    running,
    same_state,
    state_of,
    twice,
)
from test_corda import NET, own_config
from torch import nn

import lora_ext
from lora_ext import CordaConfig, LoraConfig, preprocess_corda
from lora_ext.cli import main
from lora_ext.errors import AdapterFileError


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Any, Any, Path, dict[str, Any]]:
    """A base, a trained model, and its folders "initial" and "trained"; what a cache has."""
    base = Net()
    config = own_config(NET, cache_file=str(tmp_path / "cache.pt"))
    start = copy.deepcopy(base)
    preprocess_corda(start, config, running(start, points()))
    own = lora_ext.get_peft_model(start, config)
    own.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    own.save_pretrained(tmp_path / "trained")
    return base, own, tmp_path, {"cache_file": str(tmp_path / "cache.pt")}


def test_saved_adapters_load_where_the_base_starts_the_same(trained: Any) -> None:
    base, own, place, cache = trained
    x = points()[0]
    with pytest.raises(AdapterFileError, match="please run `preprocess_corda` first"):
        lora_ext.PeftModel.from_pretrained(copy.deepcopy(base), place / "trained")
    one, other = twice(base)
    preprocess_corda(one, own_config(NET, **cache))
    back = lora_ext.PeftModel.from_pretrained(one, place / "trained")
    torch.testing.assert_close(back(x), own(x))
    assert back.peft_config["default"].corda_config == CordaConfig(**cache)
    preprocess_corda(other, own_config(NET, **cache))
    for_peft = peft.PeftModel.from_pretrained(other, place / "trained")
    torch.testing.assert_close(for_peft(x), own(x))
    for_peft.save_pretrained(place / "theirs")
    third = copy.deepcopy(base)
    preprocess_corda(third, own_config(NET, **cache))
    again = lora_ext.PeftModel.from_pretrained(third, place / "theirs")
    torch.testing.assert_close(again(x), own(x))


def test_conversion_to_plain_lora(trained: Any) -> None:
    base, own, place, _ = trained
    x = points()[0]
    own.save_pretrained(place / "plain", path_initial_model_for_weight_conversion=place / "initial")
    arguments = ["convert", place / "trained", place / "by_command", "--initial", place / "initial"]
    assert main([str(one) for one in arguments]) == 0
    for folder in ("plain", "by_command"):
        for library in (lora_ext, peft):
            back = library.PeftModel.from_pretrained(copy.deepcopy(base), place / folder)
            torch.testing.assert_close(back(x), own(x), rtol=1e-4, atol=1e-5)
            assert back.peft_config["default"].r == 6
    # What was trained since is no initial state.
    with torch.no_grad():
        own.get_submodule("base_model.model.first").lora_A.add_(0.1)
    with pytest.raises(ValueError, match="expected columns of lora_B that are orthogonal"):
        own.save_pretrained(place / "x", path_initial_model_for_weight_conversion=place / "trained")


def quantized() -> nn.Module:
    net = Net()
    lora_ext.quant.quantize_(net, "nf4")
    return net


NAN = torch.full((4, 16), float("nan"))
WRONG: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "no config": (Net, {"corda_config": None, "init_lora_weights": True}, {}, "corda_config: got"),
    "nothing to run": (Net, {}, {}, "run_model must be specified"),
    "empty": (Net, {}, {"dataloader": []}, "dataloader is empty"),
    "NaN": (Net, {}, {"dataloader": [NAN]}, "Invalid value found in input"),
    "zeros": (Net, {}, {"dataloader": [torch.zeros(4, 16)]}, "largest element .* is 0"),
    "unused": (
        Net,
        {"target_modules": ["first", "unused"]},
        {"dataloader": points()},
        r"never reached \['unused'\]",
    ),
    "rank": (Net, {"rank_pattern": {"second": 13}}, {"dataloader": points()}, "at most 12"),
    "quantized": (quantized, {}, {"dataloader": points()}, "is quantized"),
    "nothing linear": (
        lambda: nn.Sequential(nn.Embedding(4, 4)),
        {"target_modules": ["0"]},
        {"dataloader": points()},
        "No supported layers",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_leaves_the_model_as_it_was(what: str) -> None:
    make, fields, arguments, text = WRONG[what]
    model = make()
    model.train()
    before = state_of(model)
    corda = {"corda_config": CordaConfig(), "init_lora_weights": "corda"}
    config = LoraConfig(**NET | corda | fields)
    with pytest.raises(ValueError, match=text):
        preprocess_corda(model, config, **{"show_progress_bar": False} | arguments)
    assert same_state(before, state_of(model))


def test_files_of_other_models_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "c.pt"
    config = own_config(NET, cache_file=str(place))
    place.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="cannot be read"):
        preprocess_corda(Net(), config)
    torch.save({"a": 1}, place)
    with pytest.raises(ValueError, match="expected a dict of tensors"):
        preprocess_corda(Net(), config)
    torch.save({"a": torch.ones(1)}, place)
    with pytest.raises(ValueError, match=r"has no 'first\.eigens\.S_WC'"):
        preprocess_corda(Net(), config)
    place.unlink()
    net = Net()
    preprocess_corda(net, config, running(net, points()))
    net = Net()
    preprocess_corda(net, config)
    other = own_config(NET | {"r": 4})
    before = state_of(net)
    with pytest.raises(ValueError, match="eigens: got U, S, V of shapes"):
        lora_ext.get_peft_model(net, other)
    assert same_state(before, state_of(net))


def test_without_preprocessing_and_on_other_layers() -> None:
    with pytest.raises(ValueError, match="please run `preprocess_corda` first"):
        lora_ext.get_peft_model(Net(), own_config(NET))
    with pytest.raises(ValueError, match="it is for linear layers"):
        lora_ext.nn.Conv2d(4, 4, 1, r=2, init_lora_weights="corda")
    own = lora_ext.nn.Embedding(5, 4, r=2, init_lora_weights="corda")  # plain, as in PEFT
    assert own.lora_A is not None and not own.lora_A.any()
    with pytest.raises(ValueError, match="should be 'ipm' or 'kpm'"):
        CordaConfig(corda_method="x")
