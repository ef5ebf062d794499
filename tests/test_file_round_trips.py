"""A model with adapters, saved and loaded into a fresh base, is the same bit for bit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_zoo import drawn, tokens, zoo
from safetensors.torch import load_file
from test_families import TARGETS as FAMILY_TARGETS
from test_families import VARIANTS
from test_peft_parity import CASES
from tiny_models import BUILDERS
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model

# More are tried with, say, LORA_EXT_ROUND_TRIPS=2000.
COUNT = int(os.environ.get("LORA_EXT_ROUND_TRIPS", "40"))
FILE = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapted(base: nn.Module, fields: dict[str, Any]) -> LoraModel | None:
    """With adapters and all else that trains changed; None if the fields do not go together."""
    try:
        model = get_lora_model(base, LoraConfig(**fields)).eval()
    except (TypeError, ValueError, NotImplementedError):
        return None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(0.1 * noise.to(parameter.dtype))
    return model


def output(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        y = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return y if isinstance(y, Tensor) else y[1] if y[1].dim() else y[0]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [key for key, tensor in one.items() if not torch.equal(tensor, other[key])]
    assert not different


def check_round_trip(model: LoraModel, base: nn.Module, inputs: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    loaded = LoraModel.from_pretrained(base, folder)
    same(loaded.state_dict(), model.state_dict())
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    mine, theirs = model.peft_config["default"].to_file(), loaded.peft_config["default"].to_file()
    for field in ("rank_pattern", "alpha_pattern"):
        assert list(mine[field] or ()) == list(theirs[field] or ())
    for note in ("auto_mapping", "peft_version", "base_model_name_or_path"):  # that saving adds
        assert theirs.pop(note) is not None or note == "base_model_name_or_path"
        del mine[note]
    # Of the model's own: what is loaded to be run is frozen.
    assert theirs.pop("inference_mode") is True and mine.pop("inference_mode") is False
    assert mine == theirs
    loaded.save_pretrained(folder / "again")
    same(load_file(folder / "again" / FILE), load_file(folder / FILE))


@pytest.mark.parametrize("seed", range(COUNT))
def test_drawn_configs(seed: int, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if seed % 5 == 4 else torch.float32
    model = adapted(zoo(dtype), drawn(seed))
    if model is None:
        pytest.skip("fields that do not go together")
    check_round_trip(model, zoo(dtype), tokens(), tmp_path)


def test_most_drawn_configs_go_together() -> None:
    assert sum(adapted(zoo(), drawn(seed)) is not None for seed in range(20)) >= 8


@pytest.mark.parametrize("case", CASES)
def test_parity_cases(case: str, tmp_path: Path) -> None:
    build, fields = CASES[case]

    def base() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return build()

    (net, x), (fresh, _) = base(), base()
    model = adapted(net, {"r": 4} | fields)
    assert model is not None
    check_round_trip(model, fresh.eval(), x, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", BUILDERS)
def test_families(family: str, variant: str, tmp_path: Path) -> None:
    fields = {"r": 4, "target_modules": FAMILY_TARGETS.get(family)} | VARIANTS[variant]
    fields["bias"] = "all" if variant == "default" else "none"
    if family == "resnet" and variant == "all-linear":
        fields["target_modules"] = r".*convolution|classifier\.1"
    base, inputs = BUILDERS[family]()
    model = adapted(base, fields)
    assert model is not None
    check_round_trip(model, BUILDERS[family]()[0], inputs, tmp_path)


@pytest.mark.parametrize("seed", range(0, COUNT, 3))
def test_by_way_of_peft(seed: int, tmp_path: Path) -> None:
    """Ours, read and written by PEFT, is ours again. It cannot be where PEFT's own file loses the
    order of a pattern, or where PEFT has no such layer."""
    fields = drawn(seed)
    for pattern in ("rank_pattern", "alpha_pattern"):
        fields[pattern] = dict(list(fields.get(pattern, {}).items())[:1])
    model = adapted(zoo(), fields)
    if model is None:
        pytest.skip("fields that do not go together")
    model.save_pretrained(tmp_path / "ours")
    try:
        theirs = peft.PeftModel.from_pretrained(zoo(), tmp_path / "ours")
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"PEFT: {error}"[:200])
    theirs.save_pretrained(tmp_path / "theirs")
    again = LoraModel.from_pretrained(zoo(), tmp_path / "theirs")
    same(again.state_dict(), model.state_dict())
    assert torch.equal(output(again, tokens()), output(model, tokens()))
