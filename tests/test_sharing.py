"""What several adapters cannot have each for itself, and modules that are saved whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError
from lora_ext.nn import Linear


class Net(nn.Module):
    """With modules of all kinds that can be saved whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 4)
        self.list = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])
        self.dict = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
        self.sequence = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.numbers = nn.ParameterList([nn.Parameter(torch.ones(4))])

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.first(x)) + self.numbers[0]
        y = self.sequence[1](self.sequence(y)) if self.head else y
        y = self.dict["one"](y) if "one" in self.dict else y
        for name, module in self.dict.items():
            y = module(y) + len(name)
        assert len(self.list) == 2 and [*self.list][-1] is self.list[-1]
        return torch.cat([head(y) for head in self.list], -1)


X = torch.linspace(-1, 1, 12).view(3, 4)


def config_of(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["first"], "init_lora_weights": False} | fields)


def model_of(**fields: Any) -> LoraModel:
    return get_lora_model(Net(), config_of(**fields))


# Biases of the base


def biases_of(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters() if n.endswith("bias")}


@pytest.mark.parametrize("second", ["all", "lora_only"])
@pytest.mark.parametrize("first", ["all", "lora_only"])
def test_one_adapter_has_the_biases_of_the_base(first: str, second: str, tmp_path: Path) -> None:
    other = model_of(bias=second)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    other.save_pretrained(tmp_path)
    model = model_of(bias=first)
    y, before = model(X), biases_of(model)
    for add in (
        lambda: model.add_adapter("other", config_of(bias=second)),
        lambda: model.load_adapter(tmp_path, "other"),
    ):
        with pytest.raises(ValueError, match=f"bias: got '{second}' beside 'default'"):
            add()
        now = biases_of(model)
        assert list(now) == list(before) and all(torch.equal(now[n], before[n]) for n in now)
        assert list(model.peft_config) == ["default"] and torch.equal(model(X), y)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_base_are_not_loaded_into_a_merged_model(bias: str, tmp_path: Path) -> None:
    """Merging keeps the base's parameters, which unmerging puts back: the file's would be lost, or
    end beside a weight that they do not belong to."""
    model_of(bias=bias).save_pretrained(tmp_path)
    model = model_of(lora_bias=True)
    model.merge_adapter()
    y, before = model(X), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"merged adapters; call unmerge_adapter\(\) first"):
        model.load_adapter(tmp_path, "other")
    now = model.state_dict()
    assert list(now) == list(before) and all(torch.equal(now[n], before[n]) for n in now)
    assert list(model.peft_config) == ["default"] and torch.equal(model(X), y)
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default", "other"]


def test_adapters_without_biases_may_be_beside_it() -> None:
    model = model_of(bias="none")
    model.add_adapter("biased", config_of(bias="all"))
    model.add_adapter("none", config_of())
    assert list(model.peft_config) == ["default", "biased", "none"]
    with pytest.raises(ValueError, match="'biased' has biases of the base"):
        model.add_weighted_adapter(["default", "biased"], [1, 1], "new", "cat")
    model.delete_adapter("biased")
    model.add_adapter("again", config_of(bias="lora_only"))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_the_biases_that_train_are_pefts(bias: str) -> None:
    fields = {"r": 2, "target_modules": ["attention", "first"], "bias": bias}
    ours = get_lora_model(Net(), LoraConfig(**fields)).get_base_model()
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(**fields)).base_model.model

    def trained(net: nn.Module) -> set[str]:
        names = (
            name.replace("base_layer.", "") for name, p in net.named_parameters() if p.requires_grad
        )
        return {name for name in names if name.endswith("bias")}

    assert trained(ours) == trained(theirs)
    assert bool(trained(ours)) == (bias != "none")


def test_a_merged_bias_trains_as_the_config_says() -> None:
    model = model_of(bias="lora_only", lora_bias=True)
    layer: Any = model.get_base_model().first
    bias = layer.bias
    model.merge_adapter()
    assert layer.bias is not bias
    model.set_adapter("default", inference_mode=True)
    assert layer.bias is bias and not bias.requires_grad
    model.merge_adapter()
    model.set_adapter("default")
    assert bias.requires_grad


# Modules that are saved whole


@pytest.mark.parametrize("name", ["head", "list", "dict", "sequence", "numbers", "attention"])
def test_containers_can_be_saved_whole(name: str, tmp_path: Path) -> None:
    model = model_of(modules_to_save=[name])
    with torch.no_grad():
        trained = [p for n, p in model.named_parameters() if "modules_to_save" in n]
        assert trained and all(parameter.requires_grad for parameter in trained)
        for parameter in trained:
            parameter.add_(0.25)
    y = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), Net()(X))
    model.save_pretrained(tmp_path)
    assert torch.equal(LoraModel.from_pretrained(Net(), tmp_path)(X), y)
    assert torch.equal(copy.deepcopy(model)(X), y)
    torch.testing.assert_close(model.merge_and_unload()(X), y)


NAMES = [
    "keys",
    "items",
    "values",
    "pop",
    "update",
    "clear",
    "type",
    "training",
    "forward",
    "train",
]
NAMES += ["weight", "lora_A", "A", "_modules", "adapters", "modules_to_save"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_modules_have_as_attributes(name: str, tmp_path: Path) -> None:
    model = get_lora_model(Net(), config_of(modules_to_save=["head"]), name)
    with torch.no_grad():
        model.get_base_model().head.modules_to_save[name].weight.fill_(0.5)
    y = model.eval().train()(X)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    assert torch.equal(LoraModel.from_pretrained(Net(), folder, name)(X), y)
    model.rename_adapter(name, "other")
    assert torch.equal(model(X), y) and list(model.get_base_model().head.modules_to_save) == [
        "other"
    ]
    model.rename_adapter("other", name)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(X), y)
    assert torch.equal(copy.deepcopy(model)(X), y)
    model.load_state_dict(model.state_dict())
    assert torch.equal(model.to(torch.float64).to(torch.float32)(X), y)
    model.delete_adapter(name)
    assert torch.equal(model(X), Net()(X))


@pytest.mark.parametrize("name", ["first", "sequence"])
def test_modules_with_adapters_cannot_be_saved_whole(name: str) -> None:
    model = model_of(target_modules=["first", "sequence.0"])
    y = model(X)
    with pytest.raises(TypeError, match=f"modules_to_save: '{name}' has adapters"):
        model.add_adapter("other", config_of(target_modules=["head"], modules_to_save=[name]))
    assert list(model.peft_config) == ["default"] and torch.equal(model(X), y)


# Merging where the base, or the moment, is unusual


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "in inference mode"])
def test_bases_that_are_inference_tensors(inside: bool) -> None:
    with torch.inference_mode():
        net = Net()
    plain = net.first(X)
    model = get_lora_model(net, config_of(target_modules=["first", "attention", "list.0"]))
    layer: Any = net.first
    values = layer.weight.clone()
    with torch.inference_mode(inside):
        y = layer(X)
        model.merge_adapter()
        torch.testing.assert_close(layer(X), y)
        model.unmerge_adapter()
        assert torch.equal(layer.weight, values) and torch.equal(layer(X), y)
        model.add_adapter("other", config_of(init_lora_weights="olora"))
        model.set_adapter("other")
        torch.testing.assert_close(layer(X), plain)
        model.set_adapter("default")
        model.merge_adapter()
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    model.unmerge_adapter()
    assert all(p.requires_grad for p in layer.parts("default").values())


def test_merging_while_the_adapters_are_disabled() -> None:
    model, plain = model_of(), Net()(X)
    y = model(X)
    model.disable_adapters()
    with pytest.raises(ValueError, match="the adapters are disabled"):
        model.merge_adapter()
    assert torch.equal(model(X), plain)
    model.enable_adapters()
    assert torch.equal(model(X), y)
    with model.disable_adapter():
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X), y)


def test_a_layer_that_follows_its_mode_can_be_disabled() -> None:
    layer = Linear(4, 4, r=2, init_lora_weights=False, merge_weights=True)
    plain, y = layer.get_base_layer()(X), layer(X)
    layer.eval()
    assert layer.merged
    layer.enable_adapters(False)
    assert not layer.merged and torch.equal(layer(X), plain)
    layer.train().eval()
    assert torch.equal(layer(X), plain)
    layer.enable_adapters(True)
    assert layer.merged
    torch.testing.assert_close(layer(X), y)
    layer.train()
    assert torch.equal(layer(X), y)


class TwoNames(nn.Module):
    """A module that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.first = self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.other(self.first(x)))
        return y


@pytest.mark.parametrize("names", [["first"], ["other"], ["first", "other"]], ids=str)
def test_a_module_with_two_names_is_saved_by_those_that_the_config_means(
    names: list[str], tmp_path: Path
) -> None:
    net = TwoNames()
    config = config_of(target_modules=["head"], modules_to_save=names)
    model = get_lora_model(copy.deepcopy(net), config)
    with torch.no_grad():
        model.get_base_model().other.modules_to_save["default"].weight.mul_(2.0)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key.split(".")[2] for key in keys} == {"head", *names}
    again = LoraModel.from_pretrained(copy.deepcopy(net), tmp_path)
    assert torch.equal(again(X), model(X))


def test_two_names_of_one_module_with_other_values_are_refused(tmp_path: Path) -> None:
    config = config_of(target_modules=["head"], modules_to_save=["first", "other"])
    get_lora_model(TwoNames(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.other.weight"] += 1.0  # as PEFT may train them
    save_file(tensors, file)
    net = TwoNames()
    with pytest.raises(AdapterFileError, match=r"other\.weight.*differs from .*first\.weight"):
        LoraModel.from_pretrained(net, tmp_path)
    assert type(net.first) is nn.Linear and net.other is net.first


def test_modules_inside_those_that_another_adapter_saves_are_not_named(tmp_path: Path) -> None:
    model = model_of(modules_to_save=["dict"])
    model.add_adapter("two", config_of(modules_to_save=["one", "head"]))  # but for dict.one
    model.add_adapter("three", config_of(modules_to_save=["0"]))
    assert model.peft_config["two"].modules_to_save == ["head"]
    assert model.peft_config["three"].modules_to_save == ["0"]
    model.save_pretrained(tmp_path)
    for name in ("two", "three"):
        model.set_adapter(name)
        again = LoraModel.from_pretrained(Net(), tmp_path / name)
        assert torch.equal(again(X), model(X))
