"""Mistakes of a first day: each is told, in words that name what to change."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoraModel
from lora_ext.errors import AdapterFileError


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))


def adapted(**fields: object) -> LoraModel:
    return lora_ext.get_lora_model(two_layers(), LoraConfig(r=2, target_modules=["0"], **fields))


@pytest.mark.parametrize("call", ["replace_linear", "get_lora_model"])
def test_a_name_among_others_that_is_no_modules_is_told(call: str) -> None:
    names = ["0", "valu"]
    with pytest.warns(UserWarning, match=r"target_modules: \['valu'\] match no module") as caught:
        if call == "replace_linear":
            assert lora_ext.replace_linear(two_layers(), names, r=2) == ["0"]
        else:
            lora_ext.get_lora_model(two_layers(), LoraConfig(r=2, target_modules=names))
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["0", "2"]},
        {"target_modules": ["0", "2"], "exclude_modules": ["2"]},
        {"target_modules": ["0", "2"], "modules_to_save": ["2"]},
        {"target_modules": r"0|nothing"},
    ],
    ids=["all", "excluded", "saved", "expression"],
)
def test_names_that_modules_have_are_no_reason_to_warn(fields: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lora_ext.get_lora_model(two_layers(), LoraConfig(r=2, **fields))
        model.add_adapter("second", LoraConfig(r=2, **fields))


def test_a_layer_that_cannot_take_the_rank_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=4))
    with pytest.raises(ValueError, match=r"layer '1': Conv2d: r: got 2 with groups 4"):
        lora_ext.get_lora_model(model, LoraConfig(r=2, target_modules=["0", "1"]))
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("names", ["all_linear", "all linear", ["all-linear"]], ids=str)
def test_misspelt_all_linear_is_recognised(names: str | list[str]) -> None:
    expected = 'matches no module; did you mean the string "all-linear"'
    with pytest.raises(ValueError, match=expected):
        lora_ext.get_lora_model(two_layers(), LoraConfig(target_modules=names))
    with pytest.raises(ValueError, match=expected):
        lora_ext.replace_linear(two_layers(), names)


def test_merging_a_second_time_for_good_says_where_the_adapters_went() -> None:
    model = adapted()
    model.merge_and_unload()
    with pytest.raises(ValueError, match=r"without adapter layers \(merge_and_unload"):
        model.merge_and_unload()


def test_merging_without_an_active_adapter_says_so() -> None:
    model = adapted()
    model.set_adapter([])
    with pytest.raises(ValueError, match=r"merge: no adapter is active.*set_adapter"):
        model.merge_adapter()


def test_a_file_given_for_its_folder_is_told(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with pytest.raises(AdapterFileError, match=r"is a file, expected the folder of an adapter"):
        LoraModel.from_pretrained(two_layers(), file)


def test_train_warns_of_merged_adapters() -> None:
    model = adapted(modules_to_save=["2"])
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"Linear.train: adapters \['default'\] are merged"):
        model.train()
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.merge_adapter()
        model.train()
        model.eval()
