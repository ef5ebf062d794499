"""`ignore_mismatched_sizes`: what has another shape is left out by name, as in PEFT; all else of a
file is loaded, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_ext
from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError, NotBuiltError

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def net(hidden: int = 8, labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "first": nn.Linear(6, 6),
        "second": nn.Linear(6, hidden),
        "head": nn.Linear(4, labels),
    }
    return nn.ModuleDict(layers)


def config(**fields: Any) -> LoraConfig:
    names = ["first", "second"]
    return LoraConfig(r=2, target_modules=names, modules_to_save=["head"], **fields)


def filled(model: Any) -> Any:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of a model with a narrower layer and another number of labels."""
    filled(get_lora_model(net(), config())).save_pretrained(tmp_path)
    return tmp_path


OTHERS = [f"{PREFIX}second.lora_B.weight", f"{PREFIX}head.weight", f"{PREFIX}head.bias"]


def values(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    found = lora_ext.get_peft_model_state_dict(model, adapter_name=adapter)
    return {key: tensor.clone() for key, tensor in found.items()}


def check_left_out(model: Any, file: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """What has the file's shape has its values, all else what it had."""
    now = values(model)
    assert now.keys() == file.keys()
    for key, tensor in now.items():
        assert torch.equal(tensor, before[key] if key in OTHERS else file[key]), key


def fresh() -> Any:
    """What a new adapter of the larger model has: lora_B zero, the head its original."""
    return get_lora_model(net(12, 5), config())


def test_from_pretrained_leaves_other_shapes_out(folder: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"got shape \[8, 2\], expected \[12, 2\]"):
        LoraModel.from_pretrained(net(12, 5), folder)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True") as caught:
        model = LoraModel.from_pretrained(net(12, 5), folder, ignore_mismatched_sizes=True)
    (text,) = {str(one.message) for one in caught}
    assert text.startswith("LoraModel.load_adapter: size mismatch for ")
    assert all(f"'{key}': got [" in text for key in OTHERS)
    assert text.count("size mismatch") == len(OTHERS)
    check_left_out(model, load_file(folder / WEIGHTS), values(fresh()))


def test_it_loads_what_peft_loads(folder: Path) -> None:
    """PEFT warns of the same keys, with the adapter's name in them, and fills the same."""
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True") as theirs:
        model = peft.PeftModel.from_pretrained(net(12, 5), folder, ignore_mismatched_sizes=True)
    said = " ".join(str(one.message) for one in theirs)
    named = [
        f"{PREFIX}second.lora_B.default.weight",
        f"{PREFIX}head.modules_to_save.default.weight",
    ]
    assert all(f"- {key}: found shape" in said for key in named) and said.count("found shape") == 3
    found = peft.get_peft_model_state_dict(model)
    with pytest.warns(UserWarning):
        ours = LoraModel.from_pretrained(net(12, 5), folder, ignore_mismatched_sizes=True)
    for key, tensor in values(ours).items():
        assert torch.equal(found[key], tensor), key
    with pytest.warns(UserWarning):
        expected = model.load_adapter(folder, "default", ignore_mismatched_sizes=True)
        got = ours.load_adapter(folder, "default", ignore_mismatched_sizes=True)
    plain = [key.replace(".default", "") for key in expected.missing_keys]
    assert got.missing_keys == plain == OTHERS[:1] and not got.unexpected_keys


def test_an_adapter_that_is_there_keeps_what_does_not_fit(folder: Path) -> None:
    model = filled(fresh())
    before, file = values(model), load_file(folder / WEIGHTS)
    with pytest.warns(UserWarning, match="size mismatch"):
        model.load_adapter(folder, "default", ignore_mismatched_sizes=True)
    check_left_out(model, file, before)
    model = filled(fresh())
    with pytest.warns(UserWarning, match="size mismatch for .*second.lora_B"):
        result = lora_ext.set_peft_model_state_dict(model, file, ignore_mismatched_sizes=True)
    check_left_out(model, file, before)
    assert set(result.missing_keys) == set(OTHERS) and not result.unexpected_keys


def test_another_rank_leaves_the_layers_as_a_new_adapters(folder: Path) -> None:
    """A config of another rank than the values': every A and B is left out, and the update none."""
    with pytest.warns(UserWarning, match="size mismatch"):
        model = LoraModel.from_pretrained(
            net(), folder, config=_of_rank(3), ignore_mismatched_sizes=True
        )
    base = net()
    assert torch.equal(model.get_base_model()["second"](X), base["second"](X))


def _of_rank(r: int) -> LoraConfig:
    return LoraConfig(r=r, target_modules=["first", "second"], modules_to_save=["head"])


def test_mica_has_its_first_values_where_the_file_does_not_fit(tmp_path: Path) -> None:
    options = {"init_lora_weights": "mica", "target_modules": ["first", "second"]}
    filled(get_lora_model(net(), LoraConfig(r=2, **options))).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="size mismatch"):
        model = LoraModel.from_pretrained(net(12), tmp_path, ignore_mismatched_sizes=True)
    new = values(get_lora_model(net(12), LoraConfig(r=2, **options)))
    key = f"{PREFIX}second.lora_B.weight"
    assert new[key].abs().max() > 0 and torch.equal(values(model)[key], new[key])


def test_biases_and_grouped_convolutions(tmp_path: Path) -> None:
    def convolution(out: int, groups: int) -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Conv2d(4, out, 3, groups=groups)
        return nn.ModuleDict({"conv": layer, "norm": nn.LayerNorm(out)})

    made = LoraConfig(r=2, target_modules=["conv"], bias="all")
    filled(get_lora_model(convolution(8, 1), made)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="size mismatch") as caught:
        model = LoraModel.from_pretrained(
            convolution(12, 2), tmp_path, ignore_mismatched_sizes=True
        )
    said = " ".join(str(one.message) for one in caught)
    own = convolution(12, 2)
    for key in ("conv.base_layer.bias", "norm.bias"):
        assert f"{PREFIX}{key}" in said
    assert torch.equal(model.get_base_model()["conv"].bias, own["conv"].bias)
    layer = model.get_base_model()["conv"]
    image = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(layer(image), own["conv"](image))  # lora_B is a new one's


def test_a_grouped_convolutions_lora_A_is_its_own_where_the_files_is_left_out(
    tmp_path: Path,
) -> None:
    """Not of PEFT's shape, without groups, in which it could not be merged."""
    made = LoraConfig(r=2, target_modules=["0"])
    wide = nn.Sequential(nn.Conv2d(4, 8, 5, groups=2))
    filled(get_lora_model(wide, made)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="size mismatch for .*lora_A"):
        model = LoraModel.from_pretrained(
            nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), tmp_path, ignore_mismatched_sizes=True
        )
    layer = model.get_base_model()[0]
    assert layer.lora_A.shape == (2, 2, 3, 3) and not layer.adapters["default"].ungrouped_lora_A
    model.merge_adapter()


UNFIT: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "missing": lambda tensors: tensors.pop(f"{PREFIX}first.lora_A.weight"),
    "unknown": lambda tensors: tensors.update({f"{PREFIX}third.lora_A.weight": torch.ones(2, 2)}),
    "NaN": lambda tensors: tensors[f"{PREFIX}first.lora_A.weight"].fill_(float("nan")),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_all_else_stays_all_or_nothing(folder: Path, kind: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    UNFIT[kind](tensors)
    save_file(tensors, folder / WEIGHTS)
    model = filled(fresh())
    before = values(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdapterFileError, match=kind):
            model.load_adapter(folder, "default", ignore_mismatched_sizes=True)
        with pytest.raises(AdapterFileError, match=kind):
            model.load_adapter(folder, "new", ignore_mismatched_sizes=True)
    now = values(model)
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(now[key], tensor) for key, tensor in before.items())


def test_a_warning_that_is_an_error_changes_nothing(folder: Path) -> None:
    model = filled(fresh())
    before = values(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="size mismatch"):
            model.load_adapter(folder, "default", ignore_mismatched_sizes=True)
        file = load_file(folder / WEIGHTS)
        with pytest.raises(UserWarning, match="size mismatch"):
            lora_ext.set_peft_model_state_dict(model, file, ignore_mismatched_sizes=True)
    now = values(model)
    assert all(torch.equal(now[key], tensor) for key, tensor in before.items())


def test_what_loads_into_no_model_refuses_it_by_name(folder: Path) -> None:
    model = get_lora_model(net(), config())
    with pytest.raises(NotBuiltError, match="ignore_mismatched_sizes"):
        lora_ext.hotswap_adapter(model, folder, "default", ignore_mismatched_sizes=True)
    with pytest.raises(TypeError, match="ignore_mismatched_sizes"):
        LoraModel.from_pretrained(net(), folder, ignore_mismatched_sizes="yes")
