"""What `convert_to_lora` does not take of our own layers, and who says so before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converted_layers import Net, adapted
from torch import nn

import lora_ext
from lora_ext import LoraConfig, convert_to_lora, get_lora_model


def shaped(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


def with_nan(model: Any) -> Any:
    model.get_base_model().first.lora_B.data[0] = float("nan")
    return model


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "convolution": (
        lambda: get_lora_model(shaped(a=nn.Conv2d(3, 4, 3)), LoraConfig(target_modules=["a"])),
        TypeError,
        r"lora_ext\.nn\.conv\.Conv2d",
    ),
    "embedding": (
        lambda: get_lora_model(shaped(a=nn.Embedding(5, 4)), LoraConfig(target_modules=["a"])),
        TypeError,
        "Embedding",
    ),
    "aLoRA": (
        lambda: get_lora_model(
            Net(),
            LoraConfig(
                target_modules=["first"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"
            ),
        ),
        TypeError,
        r"nn\.linear\.Linear",
    ),
    "rows": (
        lambda: get_lora_model(
            shaped(a=nn.Linear(4, 4), e=nn.Embedding(5, 4)),
            LoraConfig(target_modules=["a"], trainable_token_indices={"e": [1]}),
        ),
        TypeError,
        "TrainableTokensLayer",
    ),
    "bias": (lambda: adapted(bias="lora_only"), ValueError, "bias: got 'lora_only'"),
    "lora_bias": (lambda: adapted(lora_bias=True), ValueError, "lora_bias: got True"),
    "rank": (adapted, ValueError, "rank: got 9, expected at most 8.*'turned'"),
    "nothing": (Net, TypeError, "Could not detect any layer"),
    "NaN": (lambda: with_nan(adapted()), ValueError, "has NaN or Inf"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_linear_update_is_refused(case: str, tmp_path: Path) -> None:
    make, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        lora_ext.save_as_lora(tmp_path / "new", make(), 9 if case == "rank" else 2)
    assert not (tmp_path / "new").exists()


def test_who_can_be_converted_says_so() -> None:
    model = adapted()
    assert model.supports_lora_conversion() and model.base_model.supports_lora_conversion("default")
    assert model.get_base_model().first.supports_lora_conversion()
    make, _, _ = REFUSED["rows"]
    assert not make().supports_lora_conversion()
    with pytest.raises(ValueError, match="adapter_name: got 'other'"):
        convert_to_lora(model, 2, "other")
