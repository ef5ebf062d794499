"""key_mapping: what is none is refused as the argument, and no tensor of a file is lost by it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoraModel
from lora_ext.errors import AdapterFileError

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": ([1], TypeError, "key_mapping"),
    "a number for a key": ({1: "x"}, TypeError, "key_mapping"),
    "a number": ({"a": 1}, TypeError, "key_mapping"),
    "no expression": ({"(": "x"}, ValueError, "key_mapping: got '\\('"),
    "no replacement": ({"(a)": r"\2"}, ValueError, "key_mapping: got .*invalid group"),
    "two of one key": ({r"^[01]\.": "0."}, AdapterFileError, r"0\..* of .*0\..* and .*1\."),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_one_is_refused(case: str, tmp_path: Path) -> None:
    """Where it is given, wherever that is."""
    mapping, error, match = WRONG[case]
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = LoraModel(copy.deepcopy(base), LoraConfig(r=2, target_modules=["0", "1"]))
    model.save_pretrained(tmp_path)
    small = LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    calls = (
        lambda: LoraModel.from_pretrained(copy.deepcopy(base), tmp_path, key_mapping=mapping),
        lambda: small.load_adapter(tmp_path, "x", key_mapping=mapping),
        lambda: lora_ext.hotswap_adapter(model, tmp_path, "default", key_mapping=mapping),
        lambda: lora_ext.load_peft_weights(tmp_path, key_mapping=mapping),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for call in calls:
        with pytest.raises(error, match=match):
            call()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
