"""init_lora_weights="mica": minor singular vectors that stay, against PEFT and linear algebra."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model, mark_only_lora_as_trainable
from lora_ext.nn import Conv2d, Linear

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "tall": lambda: nn.Linear(6, 9),
    "wide": lambda: nn.Linear(9, 6),
    "Conv1D": lambda: transformers.pytorch_utils.Conv1D(9, 6),
    "embedding": lambda: nn.Embedding(11, 6),
}
X = {"tall": torch.randn(3, 6), "wide": torch.randn(3, 9), "Conv1D": torch.randn(3, 6)}
each_layer = pytest.mark.parametrize("name", LAYERS)


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = LAYERS[name]()

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def x_of(name: str) -> Tensor:
    return torch.arange(11) if name == "embedding" else X[name]


def config(**fields: Any) -> dict[str, Any]:
    return {"r": 2, "target_modules": ["layer"], "init_lora_weights": "mica"} | fields


def layer_of(model: LoraModel) -> Any:
    return model.get_submodule("base_model.model.layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@each_layer
def test_minor_singular_vectors(name: str, dtype: torch.dtype) -> None:
    net = Net(name).to(dtype)
    plain = net.layer.weight.detach()
    layer = layer_of(get_lora_model(net, LoraConfig(**config(init_lora_weights="MiCA"))))
    weight = plain if name in ("tall", "wide") else plain.t()
    singular = torch.linalg.svdvals(weight.double())[-2:]
    B = layer.lora_B.double()
    # float32's and, of what is stored, the parameter's rounding; singular values are about 1.
    allowed = 1e-5 if layer.lora_B.dtype is torch.float32 else 1e-12
    torch.testing.assert_close(B.t() @ B, torch.eye(2).double(), rtol=0, atol=allowed)
    torch.testing.assert_close(
        (weight.double().t() @ B).norm(dim=0), singular, rtol=0, atol=allowed
    )
    assert not layer.lora_A.any() and torch.equal(layer.weight, plain)
    assert layer.lora_A.requires_grad and not layer.lora_B.requires_grad


@each_layer
def test_as_peft_and_files_go_both_ways(name: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Net(name), peft.LoraConfig(**config()))
    ours = get_lora_model(Net(name), LoraConfig(**config()))
    for key, value in peft.get_peft_model_state_dict(theirs).items():
        own = ours.state_dict()
        parts = [t for n, t in own.items() if n.endswith("lora_B")]
        if "B" in key.rpartition("lora_")[2]:
            torch.testing.assert_close(parts[0].abs(), value.abs(), rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    with torch.no_grad():
        layer_of(ours).lora_A.normal_()
    ours.save_pretrained(tmp_path)
    x = x_of(name)
    back = peft.PeftModel.from_pretrained(Net(name), tmp_path)
    torch.testing.assert_close(back(x), ours(x))
    assert sum(p.requires_grad for p in back.parameters()) == 0
    again = LoraModel.from_pretrained(Net(name), tmp_path, is_trainable=True)
    assert torch.equal(again(x), ours(x))
    names = {n.rpartition(".")[2] for n, p in again.named_parameters() if p.requires_grad}
    assert names == {"lora_A"}


def test_loading_computes_no_singular_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_lora_model(Net("tall"), LoraConfig(**config())).save_pretrained(tmp_path)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("an SVD")

    monkeypatch.setattr(torch.linalg, "svd", refused)
    loaded = LoraModel.from_pretrained(Net("tall"), tmp_path)
    assert layer_of(loaded).adapters["default"].init_lora_weights == "mica"


def test_no_call_makes_lora_B_train() -> None:
    model = get_lora_model(Net("tall"), LoraConfig(**config()))
    model.add_adapter("two", LoraConfig(**config(init_lora_weights=True)))

    def trains() -> list[str]:
        return sorted(n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad)

    assert trains() == ["lora_A"]
    model.set_adapter("two")
    assert trains() == ["lora_A_two", "lora_B_two"]
    model.set_adapter(["default", "two"])
    assert trains() == ["lora_A", "lora_A_two", "lora_B_two"]
    model.set_requires_grad(["default", "two"], True)
    assert trains() == ["lora_A", "lora_A_two", "lora_B_two"]
    mark_only_lora_as_trainable(model)
    assert trains() == ["lora_A", "lora_A_two", "lora_B_two"]
    model.rename_adapter("default", "first")
    model.set_adapter("first")
    assert trains() == ["lora_A_first"]
    before = copy.deepcopy(layer_of(model).lora_B_first)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x_of("tall")).square().sum().backward()
    optimizer.step()
    assert layer_of(model).lora_A_first.any() and torch.equal(layer_of(model).lora_B_first, before)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "rank": (
        lambda: get_lora_model(Net("tall"), LoraConfig(**config(r=7))),
        "MiCA requires `r` <= min",
    ),
    "rank of an embedding": (
        lambda: get_lora_model(Net("embedding"), LoraConfig(**config(r=7))),
        "MiCA requires `r` <= min",
    ),
    "DoRA": (lambda: LoraConfig(**config(use_dora=True)), "use_dora: got True, expected False"),
    "DoRA of a layer": (
        lambda: Linear(4, 4, r=2, use_dora=True, init_lora_weights="mica"),
        "unsupported variant combination",
    ),
    "lora_bias": (lambda: LoraConfig(**config(lora_bias=True)), "lora_bias: got True"),
    "convolution": (
        lambda: Conv2d(4, 4, 1, r=2, init_lora_weights="mica"),
        "MiCA is for linear layers and embeddings",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused(what: str) -> None:
    make, text = WRONG[what]
    with pytest.raises(ValueError, match=text):
        make()


def test_beside_what_is_merged_it_is_refused() -> None:
    model = get_lora_model(Net("tall"), LoraConfig(**config()))
    model.merge_adapter()
    with pytest.raises(ValueError, match="reads the base weight, which holds merged adapters"):
        model.add_adapter("two", LoraConfig(**config()))
    assert list(model.peft_config) == ["default"]
